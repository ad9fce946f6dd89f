"""Executors: how bursts get to workers and results come back, in the engine's process or on Ray."""
