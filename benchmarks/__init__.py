"""Measurements, studies and demonstrations on top of the engine. Imported by people and the CLI only."""
