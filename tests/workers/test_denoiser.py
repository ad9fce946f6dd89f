"""What loading a model sets up in the process."""

from __future__ import annotations

import os
import subprocess
import sys

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
