"""OTLP metrics on their way from the wire to the series store.

bytes → `shape` (or `otlp`, the slow path) → `admit` → the store's batch → durable → answer; `service` drives it.
"""
