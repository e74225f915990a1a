"""What is asked of a server, as data (catalog), and how it is asked: one connection, bounded answers."""
