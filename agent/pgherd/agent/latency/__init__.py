"""How long statements take: percentiles with a stated uncertainty, from stock PostgreSQL, without logs or extensions.

`observation` → `window` → `estimate` → `publish` are pure; `sampler` asks the server ten times a second.
What it is, how it works and where it fails: docs/latency.md.
"""
