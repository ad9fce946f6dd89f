"""The canvases of a burst as tensors: their wire format, state, policies, staging, graphs and events."""
