"""The embedded tiny model: its tasks, training, evaluation and demo."""
