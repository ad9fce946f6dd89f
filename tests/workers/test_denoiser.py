"""What loading a model sets up in the process."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from remask.workers.models.denoiser import load_denoiser, multiplies

CODE = """
import os
import torch
from remask import LLM

def resident_mb():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) / 1000

environment = dict(os.environ)
llm = LLM("tiny", device="cpu")
assert dict(os.environ) == environment, "the host's environment is not ours to change"
weight = torch.randn(768, 192, dtype=torch.bfloat16)
def products(lens):
    for rows in lens:
        torch.nn.functional.linear(torch.ones(rows, 192, dtype=torch.bfloat16), weight)
products(range(500, 600))
before = resident_mb()
products(range(600, 1400))
print(resident_mb() - before)
"""


HAS_BFLOAT16 = multiplies(torch.bfloat16, torch.device("cpu"))


@pytest.mark.skipif(not HAS_BFLOAT16, reason="a CPU that cannot multiply bf16 has no such kernels")
def test_products_of_ever_new_shapes_take_no_more_memory() -> None:
    unset = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**unset, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(run.stdout) < 100, "560 where the caches are not bounded"


@pytest.mark.parametrize("supported", [False, True])
def test_a_dtype_that_the_cpu_cannot_multiply_is_computed_in_float32_unless_asked_for(
    golden_checkpoint: Path,
    supported: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: supported)
    caplog.set_level(logging.INFO)
    automatic = load_denoiser(golden_checkpoint, device="cpu").model
    assert automatic.embedding.dtype == (torch.bfloat16 if supported else torch.float32)
    assert ("this CPU cannot multiply torch.bfloat16" in caplog.text) == (not supported)
    asked = load_denoiser(golden_checkpoint, dtype="bfloat16", device="cpu").model
    assert asked.embedding.dtype == torch.bfloat16
    for ours, theirs in zip(automatic.parameters(), asked.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype)), "the same numbers"
