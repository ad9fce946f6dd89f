"""What loading a model sets up, and what a CPU needs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from remask import SamplingParams
from remask.scheduler.canvas import CanvasState, new_canvas
from remask.scheduler.messages import StepBatch
from remask.scheduler.params import resolve
from remask.workers.attention.varlen import VarlenLayout
from remask.workers.models.cpu import padded_len
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser
from remask.workers.models.transformer import Transformer
from remask.workers.rows.pack import PackedRows
from remask.workers.worker import Worker

POLICIES: list[dict[str, Any]] = [
    {"unmask": "threshold:0.5"},
    {"unmask": "capped_threshold:0.3", "remask": "wino:t2=0.95"},
    {"unmask": "schedule:6", "cfg_scale": 1.0},
    {"unmask": "capped_threshold:0.3", "remask": "oracle_loo:0.9"},
]


def run(model: TransformerDenoiser, num_canvases: int = 4) -> list[CanvasState]:
    """Canvases of different lengths and policies, to their ends."""
    canvases = []
    for i in range(num_canvases):
        params = resolve(SamplingParams(max_tokens=9 + 5 * i, block_length=8, **POLICIES[i % 4]))
        prompt = [5, 11, 7, 9][: 1 + i % 4]
        canvases.append(new_canvas("r", i, prompt, params, seed=i, sample=0, mask_id=0, stop_ids=[]))
    states: list[CanvasState | int] = [canvas.state for canvas in canvases]
    batch = StepBatch(burst_id=0, num_steps=100, specs=[c.spec for c in canvases], states=states)
    return Worker(model).run(batch).states


def test_padded_packs_write_what_others_write(golden_checkpoint: Path) -> None:
    model = load_denoiser(golden_checkpoint, dtype="float32", device="cpu")
    expected = run(model)
    model._padded_len = padded_len
    for found, own in zip(run(model), expected, strict=True):
        assert found.tokens == own.tokens
        assert found.commit_steps == own.commit_steps
        numbers = (torch.frombuffer(bytearray(s.confidences), dtype=torch.float32) for s in (found, own))
        torch.testing.assert_close(*numbers, rtol=1e-4, atol=1e-5)


def test_products_in_bfloat16_have_few_sizes(
    golden_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: set[int] = set()
    forward, logits = Transformer.forward, Transformer.logits

    def noted_forward(self: Transformer, rows: PackedRows, *others: Any) -> torch.Tensor:
        sizes.update((len(rows.ids_T), len(rows.candidates_H)))
        return forward(self, rows, *others)

    def noted_logits(self: Transformer, hidden_ND: torch.Tensor, *others: Any) -> torch.Tensor:
        sizes.add(len(hidden_ND))
        return logits(self, hidden_ND)

    monkeypatch.setattr(Transformer, "forward", noted_forward)
    monkeypatch.setattr(Transformer, "logits", noted_logits)
    model = load_denoiser(golden_checkpoint, dtype="bfloat16", device="cpu")
    assert all(state.finished for state in run(model, 8))
    assert len(sizes) > 3
    assert sizes == set(map(padded_len, sizes))
    assert len(set(map(padded_len, range(1, 1025)))) == 40


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


@pytest.mark.parametrize(("dtype", "batches"), [("float32", True), ("bfloat16", False)])
def test_tiles_keep_sequences_in_one_call_only_if_it_rounds_alike(
    golden_checkpoint: Path,
    dtype: str,
    batches: bool,
    sdpa_calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("remask.workers.models.denoiser.ignores_places", lambda weight: True)
    model = load_denoiser(golden_checkpoint, dtype=dtype, device="cpu")
    assert model.use_tiles()
    q = torch.zeros(6, 4, 48, dtype=model.model.embedding.dtype)
    layout = VarlenLayout((0, 3, 6), (0, 3, 6), ())
    model.attention.attend(q, q, q, layout)
    assert sdpa_calls == ([2] if batches else [1, 1])
