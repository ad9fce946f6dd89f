"""Attention over packed rows behind one varlen interface."""
