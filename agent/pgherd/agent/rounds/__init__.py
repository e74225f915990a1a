"""Rounds: what is known only inside each database, asked of one database at a time over a second connection."""
