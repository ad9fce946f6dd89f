"""Runs mixes of requests and writes their outputs: `python run_mixes.py PLAN OUTPUT`.

The script runs in a separate process. That process and the workers on Ray that it starts find the policies in
this file's directory.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch

from remask import LLM


def result_of(output: Any) -> dict[str, Any]:
    """All fields of a request's output."""
    samples = [[s.token_ids, s.nfe, s.confidences, s.finish_reason] for s in output.outputs]
    error = [output.error_type, output.error_status, output.error]
    return {"samples": samples, "error": error}


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Results by the name of a run: the outputs of the last run with that name, and for each of them the wall
    seconds and this process's CPU seconds."""
    results: dict[str, Any] = {}
    with LLM(plan["model"], device="cpu", dtype="float32", **plan["options"]) as llm:
        for name, places in plan["runs"]:
            asks = [plan["asks"][place] for place in places]
            start = time.perf_counter(), time.process_time()
            outputs = llm.generate([prompt for prompt, _ in asks], [params for _, params in asks])
            end = time.perf_counter(), time.process_time()
            found = results.setdefault(name, {"seconds": [], "cpu_seconds": [], "outputs": {}})
            found["seconds"].append(end[0] - start[0])
            found["cpu_seconds"].append(end[1] - start[1])
            found["outputs"] = dict(zip(places, map(result_of, outputs), strict=True))
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("remask").setLevel(logging.CRITICAL)
    plans = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([run(plan) for plan in plans]))
