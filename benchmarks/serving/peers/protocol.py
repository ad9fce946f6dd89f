"""The peer's side of the exchange: JSON lines on its standard input and output.

The peer first writes `{"ready": NAME}` when the model is loaded, or `{"error": TEXT}`. Each line of the input
is a list of requests. The peer answers a line with `{"answers": [...]}`, one answer for each request, or with
`{"error": TEXT}`. The peer exits at the end of the input. Output of libraries goes to standard error. An
adapter must not have the name of the package that it imports.

A request has `prompt` (ids), `text` (None where the prompt is made of ids), `max_tokens` and `block_length`
(tokens), `steps` (denoising steps, where the policy is a schedule, else None) and `seed`. An answer has
`text`, `num_tokens` (visible ones) and `nfe` (forwards, or None).
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Answers = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def serve(load: Callable[[str], tuple[str, Answers]]) -> None:
    """Runs an adapter: `load` gets the model's directory, which is its first argument, and gives the peer's
    name and what answers a batch."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")

    try:
        name, answer = load(sys.argv[1])
    except Exception as error:
        tell({"error": f"{type(error).__name__}: {error}"})
        return
    tell({"ready": name})
    for line in sys.stdin:
        try:
            tell({"answers": answer(json.loads(line))})
        except Exception as error:
            tell({"error": f"{type(error).__name__}: {error}"})
