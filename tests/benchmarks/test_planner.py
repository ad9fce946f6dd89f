"""The planner: its formulas against what steps need, and its plan against this machine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden_files import GOLDEN

from remask import InvalidRequest
from remask.benchmarks import planner
from remask.benchmarks.gpu import timing
from remask.benchmarks.planner import GPUS, Load, Machine, plan, report, step_flops, step_seconds
from remask.benchmarks.throughput import find_model
from remask.benchmarks.utilization import Work
from remask.scheduler.canvas import new_canvas
from remask.scheduler.messages import StepBatch
from remask.scheduler.params import resolve
from remask.workers.models.denoiser import TransformerDenoiser
from remask.workers.models.loading import read_config
from remask.workers.models.transformer import Transformer
from remask.workers.worker import Worker

LLADA = read_config(find_model("llada-8b")[0])[1]
LOAD = Load(prompt_len=100, canvas_len=64, block_len=32, tokens_per_forward=2.0)


def test_arithmetic_is_that_of_a_block_of_real_steps(golden_model: TransformerDenoiser) -> None:
    config = golden_model.config
    needed = timing.needed_flops(config, timing.canvases(config, 4, 40, 64), range(32))
    assert step_flops(config, 4, Load(40, 64, 32, 1.0)) == pytest.approx(needed, rel=1e-9)


@pytest.mark.parametrize(("reuse", "refresh"), [("both", None), ("both", 4), ("prefix", None)])
def test_arithmetic_with_reuse_is_that_of_real_steps(
    golden_model: TransformerDenoiser, reuse: Any, refresh: int | None
) -> None:
    load = Load(40, 64, 16, 1.0, reuse, refresh)
    fields = {"max_tokens": 64, "block_length": 16, "unmask": "schedule", "reuse": reuse, "refresh": refresh}
    own = new_canvas(
        "r", 0, [5] * 40, resolve(fields), seed=1, sample=0, mask_id=golden_model.mask_id, stop_ids=[]
    )
    with Work(golden_model.model) as work:
        Worker(golden_model).run(StepBatch(burst_id=0, num_steps=64, specs=[own.spec], states=[own.state]))
    assert sum(rows for rows, _ in work.packs) / 64 == pytest.approx(load.mean_rows)
    assert step_flops(golden_model.config, 1, load) == pytest.approx(work.flops / 64, rel=0.02)


def test_reuse_moves_the_crossover() -> None:
    exact, reused = (
        report("llada-8b", "h200", Load(128, 256, 32, 3.0, reuse), "bfloat16") for reuse in (None, "both")
    )
    assert exact["crossover"] is not None
    assert reused["exact_crossover"] == exact["crossover"]
    assert reused["crossover"] is None or reused["crossover"] > exact["crossover"]
    assert any("without reuse" in note for note in reused["notes"])


def test_weights_are_those_of_the_model_without_its_embedding_and_norms(
    golden_model: TransformerDenoiser,
) -> None:
    parameters = golden_model.model.named_parameters()
    read = sum(p.numel() for name, p in parameters if p.ndim == 2 and name != "embedding")
    assert planner.weight_bytes(golden_model.config, 2, 100) == 2 * read


def test_experts_that_no_row_is_sent_to_are_not_read() -> None:
    """3 of 16 experts a row: with one row 3 are read, with two 3 + 3 * 13 / 16 on average, with many all."""
    config = read_config(GOLDEN / "lladamoe-tiny")[1]
    model = Transformer(config)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1 and name != "embedding"}
    of_experts = sum(size for name, size in sizes.items() if name.endswith(("rts.gate_up", "rts.down")))
    rest = sum(sizes.values()) - of_experts
    for num_rows, share in ((1, 3 / 16), (2, (3 + 3 * 13 / 16) / 16), (10_000, 1.0)):
        found = planner.weight_bytes(config, 2, num_rows)
        assert found == pytest.approx(2 * (rest + share * of_experts)), num_rows


def test_a_step_is_bound_by_memory_up_to_the_knee_and_by_arithmetic_beyond() -> None:
    machine = Machine(1e14, 1e12, 1e-3)
    knee = planner.knee_rows(machine, LLADA, 2)
    one = Load(1, 1, 1, 1.0)
    floor = planner.weight_bytes(LLADA, 2, 1) / 1e12 + 1e-3
    for batch, expected in ((1, floor), (knee // 4, floor)):
        assert step_seconds(machine, LLADA, 2, batch, one) == pytest.approx(expected)
    beyond = step_seconds(machine, LLADA, 2, 4 * knee, one)
    assert beyond == pytest.approx(step_flops(LLADA, 4 * knee, one) / 1e14 + 1e-3)
    assert beyond > floor


def test_the_crossover_is_where_the_cached_engine_overtakes() -> None:
    found = plan(GPUS["h200"], LLADA, 2, LOAD)
    for point in found["points"]:
        ahead = point["autoregressive_tokens_per_second"] > point["tokens_per_second"]
        assert ahead == (found["crossover"] is not None and point["batch_size"] >= found["crossover"])
        to_win = plan(
            GPUS["h200"], LLADA, 2, Load(100, 64, 32, min(64.0, 1.01 * point["tokens_per_forward_to_win"]))
        )
        if point["tokens_per_forward_to_win"] < 63:
            (same,) = [p for p in to_win["points"] if p["batch_size"] == point["batch_size"]]
            assert same["tokens_per_second"] > same["autoregressive_tokens_per_second"]
    assert found["crossover"] is not None, "a cache wins on batched throughput"
    assert plan(GPUS["h200"], LLADA, 2, Load(1, 64, 64, 64.0))["crossover"] is None


def test_a_faster_gpu_is_faster() -> None:
    times = [
        step_seconds(GPUS[name], LLADA, 2, 1, LOAD) for name in ("l40s", "a100-80gb", "h100", "h200", "b200")
    ]
    assert times == sorted(times, reverse=True)


@pytest.mark.slow
def test_this_machine_is_planned_from_its_own_rates() -> None:
    found = report("tiny", "this", Load(64, 32, 32, 1.0), "float32", [4, 8])
    assert found["overhead_ms"] >= 0
    assert [c["batch_size"] for c in found["check"]] == [4, 8]
    for checked in found["check"]:
        assert 0.3 < checked["planned_over_real"] < 3, "a busy machine is off; the committed figures are not"


@pytest.mark.parametrize(
    ("arguments", "parameter"),
    [
        ({"gpu": "h20"}, "gpu"),
        ({"model": "/nonexistent"}, "model"),
        ({"load": Load(0, 64, 32, 1.0)}, "prompt_len"),
        ({"load": Load(1, 64, 0, 1.0)}, "block_len"),
        ({"load": Load(1, 64, 32, 65.0)}, "tokens_per_forward"),
        ({"load": Load(1, 10**6, 32, 1.0)}, "canvas_len"),
        ({"load": Load(1, 64, 32, 1.0, "dual")}, "reuse"),  # type: ignore[arg-type]
        ({"load": Load(1, 64, 32, 1.0, None, 4)}, "refresh"),
        ({"load": Load(1, 64, 32, 1.0, "both", 1)}, "refresh"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(arguments: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        report(**{"model": "llada-8b", "gpu": "h200", "load": LOAD, "dtype": "bfloat16"} | arguments)
    assert error.value.parameter == parameter
    with pytest.raises(InvalidRequest, match="mixed"):
        planner.load_of("mixt", 1, 1, 1, 1.0)


def test_the_command_prints_and_writes_a_plan(
    remask: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    run = remask("plan", "--workload", "mixed", "--output", tmp_path / "plan.json")
    assert run.returncode == 0, run.stderr
    assert "knee: " in run.stdout
    assert "autoregressive engine of this shape is faster from" in run.stdout
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["load"]["prompt_len"] == 72
    refused = remask("plan", "--check", "4")
    assert (refused.returncode, "check: needs --gpu this" in refused.stderr) == (2, True)
