"""Alert rules, their state over time and the notifications that follow. Given a query function; knows no store."""
