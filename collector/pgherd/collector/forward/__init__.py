"""What was stored, also sent on: to Prometheus' remote write and to OTLP receivers, through a queue on disk per destination.

Written before the commit that it is about, so that a crash repeats samples downstream and never loses them: receivers
tell a repeated sample by its time.
"""
