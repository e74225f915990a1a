"""A bounded queue on disk: what was appended is sent some time, or counted as dropped. The agent's spool, the collector's forwarding."""
