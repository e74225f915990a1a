"""Logical backups: take, verify, restore, retain. Short-lived children; works with the collector away."""
