"""The torch floor: models, attention, packed rows, head, strategies, the denoising step and its executors."""
