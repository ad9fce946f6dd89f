"""Batch files: many requests from a file, their results into another, through any interruption.

`source` reads the input, `lines` turns a line into a checked request, `check` does so for the whole file
before any work, `journal` is the output while it grows, `identity` says which run an output belongs to,
`parquet` is the one file that knows pyarrow, and `run` puts them together.
"""
