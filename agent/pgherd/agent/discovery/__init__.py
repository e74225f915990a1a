"""`pgherd-agent discover`: which PostgreSQL servers are on this host, and which of them the agent serves."""
