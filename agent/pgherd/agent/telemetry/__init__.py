"""From samples to acknowledged points: OTLP bytes, the spool on disk, the shipper."""
