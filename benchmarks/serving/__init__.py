"""Requests in time against the engine, autoregressive baselines and servers."""
