"""Load tests of the engine, autoregressive baselines and servers."""
