"""The names of the attention backends. Imports no torch: options are read before it is needed."""

from typing import Literal

AttentionName = Literal["auto", "sdpa", "torch", "flash2", "flash3", "flash4"]
