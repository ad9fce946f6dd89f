"""Golden outputs of the model families beside LLaDA: a file of cases, and how they are compared."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from step_cases import logits_of

from remask import LLM, SamplingParams
from remask.workers.models.denoiser import load_denoiser
from remask.workers.models.row_ops import RowOps

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


class Case(NamedTuple):
    """A case with a counterpart.

    Attributes:
        golden: as the file has it.
        fields: our parameters.
    """

    golden: dict[str, Any]
    fields: dict[str, Any]


def read(name: str) -> dict[str, Any]:
    """A file of cases."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def canvas_of(golden: dict[str, Any]) -> dict[str, Any]:
    """Canvas and block of a case; the references do not stop at an end of text."""
    own, length = golden["params"], golden["params"]["gen_length"]
    return {"max_tokens": length, "block_length": own.get("block_length", length), "ignore_eos": True}


def check_packed(checkpoint: Path, cases: list[Case], max_num_rows: int, **options: Any) -> None:
    """`check` of cases in another order, in an engine of their own, on a CPU unless said otherwise."""
    shuffled = random.Random(max_num_rows).sample(cases, len(cases))
    options = {"device": "cpu", **options}
    with LLM(checkpoint, dtype="float32", max_num_rows=max_num_rows, **options) as llm:
        check(llm, shuffled)


def check(llm: LLM, cases: list[Case]) -> None:
    """Asserts equal tokens and forwards, all cases in one call. Some prompts hold the mask id, which the
    intake refuses and the engine keeps."""
    intake, requests = llm.engine.intake, []
    mask_id = intake.config.mask_id
    for golden, fields in cases:
        prompt = [(mask_id + 1) % 2 if token == mask_id else token for token in golden["prompt"]]
        checked = intake.check(prompt, SamplingParams(**fields))
        requests.append(intake.request(checked._replace(ids=golden["prompt"])))
    outputs = {output.request_id: output for output in llm.engine.serve(requests)}
    for (golden, _), request in zip(cases, requests, strict=True):
        sample = outputs[request.request_id].outputs[0]
        needed = golden.get("nfe_needed", golden["nfe"])
        assert (sample.token_ids, sample.nfe) == (golden["output"], needed), (
            golden["policy"],
            golden["params"],
        )


def check_logits(checkpoint: Path, entries: list[dict[str, Any]], ops: RowOps | None = None) -> None:
    """Asserts that raw logits are those of the published forward; `ops`: other than the model's."""
    model = load_denoiser(checkpoint, dtype="float32", device="cpu")
    model.ops = ops or model.ops
    for entry in entries:
        found = logits_of(model, np.array(entry["input"]))
        assert (found - torch.tensor(entry["logits"])).abs().max() < 1e-4
