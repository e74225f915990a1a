"""What the server executes, from pg_stat_statements: totals per database and the statements that take most time."""
