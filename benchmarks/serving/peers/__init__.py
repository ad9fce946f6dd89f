"""Adapters for other engines, each run by the Python of an environment in which that engine is installed.

They import nothing of remask; `protocol` says what they exchange with it.
"""
