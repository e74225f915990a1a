"""The agent's side of a command: local policy, journal, execution in children, and the session that carries it."""
