"""Batch files: runs the requests of a file and writes their results; an interrupted run can be resumed.

`source` reads the input. `lines` parses a line into a checked request. `check` checks the whole file before
any request runs. `journal` writes the partial output. `identity` names the run that an output belongs to.
`parquet` is the only file that imports pyarrow. `run` combines them.
"""
