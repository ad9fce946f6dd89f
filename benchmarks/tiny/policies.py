"""The decoding policies that the tiny model is shown and evaluated under, with whole-canvas blocks."""

from __future__ import annotations

from remask import SamplingParams

POLICIES: dict[str, dict[str, str]] = {
    "one token a step": {"unmask": "schedule"},
    "random order": {"unmask": "schedule:score=random"},
    "5 equal steps": {"unmask": "schedule:steps=5"},
    "threshold 0.95": {"unmask": "threshold:0.95"},
    "threshold 0.9": {"unmask": "threshold:0.9"},
    "threshold 0.7": {"unmask": "threshold:0.7"},
    "factor 1.0": {"unmask": "factor:1.0"},
    "WINO 0.7/0.9": {"unmask": "capped_threshold:0.7", "remask": "wino:t2=0.9"},
}


COMPARED = ("one token a step", "threshold 0.9", "WINO 0.7/0.9")  # careful, bold, and bold with repairs
ROOM = 4  # tokens of the canvas behind the longest answer, for the end-of-text token


def params(policy: str, answer_len: int) -> SamplingParams:
    """Parameters for an answer of up to `answer_len` tokens and the end-of-text token behind it."""
    canvas = answer_len + ROOM
    return SamplingParams(max_tokens=canvas, block_length=canvas, seed=0, **POLICIES[policy])
