"""The series store: samples in DuckDB behind one writer, an inverted index in memory, short reads.

`SeriesStore` is the door; `Batch` goes in, `Window`s come out. Nothing here knows OTLP or PromQL.
"""
