"""Measurements that want a GPU: one script, `run.py`, that does all of them."""
