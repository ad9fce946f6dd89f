"""Flash-attention backends: the choice of a backend, and the calls of its kernel.

Without a GPU, a dense function with the same signature replaces a library's kernel. It takes only the
arguments that kernels take. `test_fixed_rows` runs whole models on it.
"""

from __future__ import annotations

import importlib
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from remask import InvalidRequest, SamplingParams
from remask.scheduler.canvas import new_canvas
from remask.scheduler.messages import StepBatch
from remask.scheduler.params import resolve
from remask.workers.attention import flash, select
from remask.workers.attention.flash import MODULES, FlashAttention
from remask.workers.attention.sdpa import SdpaAttention
from remask.workers.attention.select import BACKENDS, pick_attention
from remask.workers.attention.varlen import AttentionBackend, DeviceLayout, VarlenLayout
from remask.workers.kernels import elementwise, head, shadow_attention
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser
from remask.workers.startup.warm_up import warm_up
from remask.workers.worker import Worker

GPU = torch.device("cuda", 0)
BOUNDS = torch.tensor([0, 3, 3, 7], dtype=torch.int32)


def dense_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    """Attention of each query to the keys of its sequence; NaN for rows of no sequence."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert q.shape[1] == k.shape[1], "grouped heads are repeated first"
    assert int(cu_q.diff().max()) <= max_q
    assert int(cu_k.diff().max()) <= max_k
    own, theirs = (
        torch.bucketize(torch.arange(len(x)), cu[1:].long(), right=True) for x, cu in ((q, cu_q), (k, cu_k))
    )
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * q.shape[2] ** -0.5
    seen = (own.unsqueeze(1) == theirs) & (own < len(cu_q) - 1).unsqueeze(1)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, *(x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))


def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
    assert named.pop("causal") is False
    order = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dense_varlen(*_grouped(q, k, v), *(named.pop(name) for name in order), **named), torch.empty(0)


def varlen_attn(q: Tensor, k: Tensor, v: Tensor, *bounds: Any, enable_gqa: bool = False) -> Tensor:
    return dense_varlen(*(_grouped(q, k, v) if enable_gqa else (q, k, v)), *bounds)


def varlen_attn_without_groups(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    return dense_varlen(q, k, v, cu_q, cu_k, max_q, max_k)


LIBRARIES = {
    "flash": SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func),
    "torch": SimpleNamespace(varlen_attn=varlen_attn),
    "torch 2.11": SimpleNamespace(varlen_attn=varlen_attn_without_groups),
}


def backend(monkeypatch: pytest.MonkeyPatch, library: str, name: str) -> FlashAttention:
    monkeypatch.setattr(flash.importlib, "import_module", lambda _: LIBRARIES[library])
    try:
        return FlashAttention(name)
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("library", "name"), [("flash", "flash3"), ("torch", "torch"), ("torch 2.11", "torch")]
)
def test_a_kernel_gets_what_it_takes(monkeypatch: pytest.MonkeyPatch, library: str, name: str) -> None:
    attention = backend(monkeypatch, library, name)
    q, (k, v) = torch.randn(7, 4, 8), torch.randn(2, 7, 2, 8)
    layout = VarlenLayout((), (), (), DeviceLayout(BOUNDS, BOUNDS, 4, 4, None))
    expected = dense_varlen(*_grouped(q, k, v), BOUNDS, BOUNDS, 4, 4)
    torch.testing.assert_close(attention.attend(q, k, v, layout), expected)
    assert attention.name == name
    assert attention.reads_device


def test_a_library_without_the_function_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match="varlen"):
        backend(monkeypatch, "torch", "flash2")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with a GPU of some capability, and some libraries."""

    def has(capability: tuple[int, int], *installed: str) -> None:
        real = importlib.import_module

        def find(module: str) -> Any:
            if module in MODULES.values():
                name = next(name for name, path in MODULES.items() if path == module)
                if name not in installed:
                    raise ImportError(f"no module named {module}")
                return LIBRARIES["torch" if name == "torch" else "flash"]
            return real(module)

        monkeypatch.setattr(flash.importlib, "import_module", find)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    return has


@pytest.mark.parametrize(
    ("capability", "installed", "dtype", "head_dim", "name"),
    [
        ((9, 0), ("torch", "flash2", "flash3", "flash4"), torch.bfloat16, 128, "flash3"),
        ((9, 0), ("torch", "flash2", "flash4"), torch.bfloat16, 128, "flash4"),
        ((9, 0), ("torch", "flash2", "flash4"), torch.bfloat16, 256, "flash2"),
        ((9, 0), ("torch",), torch.float16, 128, "torch"),
        ((9, 0), (), torch.float16, 128, "sdpa"),
        ((9, 0), ("torch", "flash3"), torch.float32, 128, "sdpa"),
        ((9, 0), ("torch", "flash3"), torch.bfloat16, 100, "sdpa"),
        ((8, 0), ("torch", "flash3", "flash2"), torch.bfloat16, 128, "flash2"),
        ((10, 0), ("torch", "flash3"), torch.bfloat16, 128, "torch"),
        ((12, 0), ("torch", "flash4"), torch.bfloat16, 128, "torch"),
        ((7, 5), ("torch", "flash2"), torch.float16, 128, "sdpa"),
    ],
)
def test_auto_is_the_fastest_installed_backend_that_fits(
    gpu: Any,
    capability: tuple[int, int],
    installed: tuple[str, ...],
    dtype: torch.dtype,
    head_dim: int,
    name: str,
) -> None:
    gpu(capability, *installed)
    assert pick_attention("auto", device=GPU, dtype=dtype, head_dim=head_dim).name == name


@pytest.mark.parametrize(
    "error", [AttributeError("cute"), RuntimeError("no nvvm"), OSError("libcuda")], ids=repr
)
def test_a_backend_that_fails_to_import_in_any_way_is_skipped(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    gpu((9, 0), "torch", "flash4")
    working = flash.importlib.import_module

    def import_module(name: str) -> Any:
        if name == MODULES["flash4"]:
            raise error
        return working(name)

    monkeypatch.setattr(flash.importlib, "import_module", import_module)
    assert pick_attention("auto", device=GPU, dtype=torch.bfloat16, head_dim=128).name == "torch"
    assert "skipping attention backend flash4" in caplog.text
    with pytest.raises(InvalidRequest, match="cannot be loaded"):
        pick_attention("flash4", device=GPU, dtype=torch.bfloat16, head_dim=128)


def test_auto_on_a_cpu_is_sdpa() -> None:
    picked = pick_attention("auto", device=torch.device("cpu"), dtype=torch.bfloat16, head_dim=128)
    assert (picked.name, picked.reads_device) == ("sdpa", False)


@pytest.mark.parametrize(
    ("requested", "dtype", "head_dim", "problem"),
    [
        ("flash3", torch.float32, 128, "takes bfloat16 or float16"),
        ("flash4", torch.bfloat16, 256, "up to 128"),
        ("flash2", torch.bfloat16, 128, "install flash-attn"),
        ("flash", torch.bfloat16, 128, "use auto or one of sdpa, torch, flash2"),
    ],
)
def test_what_is_asked_for_is_used_or_refused_with_the_reason(
    gpu: Any, requested: str, dtype: torch.dtype, head_dim: int, problem: str
) -> None:
    gpu((9, 0), "torch", "flash3", "flash4")
    assert pick_attention("torch", device=GPU, dtype=torch.bfloat16, head_dim=128).name == "torch"
    with pytest.raises(InvalidRequest, match=problem) as error:
        pick_attention(requested, device=GPU, dtype=dtype, head_dim=head_dim)
    assert error.value.parameter == "attention_backend"
    gpu((8, 6), "flash3")
    with pytest.raises(InvalidRequest, match=r"capability 8\.6"):
        pick_attention("flash3", device=GPU, dtype=torch.bfloat16, head_dim=128)
    with pytest.raises(InvalidRequest, match="GPUs only"):
        pick_attention("torch", device=torch.device("cpu"), dtype=torch.bfloat16, head_dim=128)


def test_without_triton_auto_is_sdpa_because_no_kernel_serves_shadow_rows(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu((9, 0), "torch")
    monkeypatch.setattr(select, "find_spec", lambda _: None)
    assert pick_attention("auto", device=GPU, dtype=torch.bfloat16, head_dim=128).name == "sdpa"


class Compared(AttentionBackend):
    """A backend and another, on numbers of their own wherever a model would attend."""

    name, reads_device = "compared", True

    def __init__(self, own: AttentionBackend, reference: AttentionBackend, dtype: torch.dtype) -> None:
        self.own, self.reference, self.dtype = own, reference, dtype
        self.errors: list[float] = []
        self.num_shadows = 0

    def attend(self, q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, layout: VarlenLayout) -> Tensor:
        device = layout.device
        assert device is not None
        q = torch.randn(len(q_QHd), 8, 128, device=q_QHd.device, dtype=self.dtype)
        k, v = torch.rand(2, len(k_TKd), 2, 128, device=q_QHd.device, dtype=self.dtype) - 0.5
        found = self.own.attend(q, k, v, layout)
        expected = self.reference.attend(q.float(), k.float(), v.float(), layout)
        num_main, rows = int(device.cu_queries[-1]), torch.arange(len(q), device=q.device)
        asked = rows < num_main
        if device.shadows is not None:
            first = len(q) - len(device.shadows.holes)
            for start, end, *_ in device.shadows.tiles.tolist():
                asked |= (rows >= first + start) & (rows < first + end)
                self.num_shadows += end - start
        self.errors.append(float((found.float() - expected)[asked].abs().max()))
        return torch.zeros_like(q_QHd)


def errors(
    backend: AttentionBackend,
    reference: AttentionBackend,
    model: TransformerDenoiser,
    dtype: torch.dtype,
    num_steps: int = 4,
) -> list[float]:
    """Of steps with different sequences and verifying policies."""
    compared = Compared(backend, reference, dtype)
    driver = TransformerDenoiser(model.model, compared, pack_rows=1 << 30, static_shapes=True)
    canvases = [
        new_canvas("r", 0, [5] * prompt_len, resolve(params), seed=1, sample=0, mask_id=0, stop_ids=[])
        for prompt_len, params in (
            (200, SamplingParams(max_tokens=90, block_length=45, remask="wino", unmask="schedule:9")),
            (1, SamplingParams(max_tokens=7, block_length=7, unmask="schedule")),
            (
                40,
                SamplingParams(max_tokens=64, block_length=64, remask="wino:tile=self", unmask="schedule:9"),
            ),
        )
    ]
    batch = StepBatch(
        burst_id=0, num_steps=num_steps, specs=[c.spec for c in canvases], states=[c.state for c in canvases]
    )
    Worker(driver).run(batch)
    assert len(compared.errors) == num_steps * model.config.num_layers
    assert compared.num_shadows > 0
    return compared.errors


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)], ids=str)
def test_steps_attend_as_a_dense_mask_says(
    golden_model: TransformerDenoiser, dense_attention: AttentionBackend, dtype: torch.dtype, bound: float
) -> None:
    assert max(errors(SdpaAttention(), dense_attention, golden_model, dtype)) < bound


@pytest.mark.skipif(torch.cuda.is_available(), reason="in Triton's interpreter, beside a stand-in on the CPU")
@pytest.mark.slow
def test_rows_that_verify_go_to_our_kernel_and_the_others_to_the_librarys(
    golden_model: TransformerDenoiser, dense_attention: AttentionBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = backend(monkeypatch, "flash", "flash2")
    assert max(errors(own, dense_attention, golden_model, torch.float32, num_steps=2)) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", BACKENDS)
def test_a_kernel_attends_as_a_dense_mask_says_in_bf16(
    golden_checkpoint: Path, dense_attention: AttentionBackend, name: str
) -> None:
    try:
        backend = pick_attention(name, device=GPU, dtype=torch.bfloat16, head_dim=128)
    except InvalidRequest as error:
        pytest.skip(str(error))
    model = load_denoiser(golden_checkpoint, dtype="bfloat16", device="cuda")
    assert max(errors(backend, dense_attention, model, torch.bfloat16)) < 2e-3


def test_a_warm_up_runs_every_kernel_in_every_variant(
    golden_model: TransformerDenoiser, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = TransformerDenoiser(
        golden_model.model,
        backend(monkeypatch, "flash", "flash3"),
        pack_rows=1 << 30,
        static_shapes=True,
        kernels=True,
    )
    launched: set[tuple[str, bool | None, bool | None]] = set()
    variants = ("_rms_norm", "_rotate_halves", "_silu_mul"), ("_attend",), ("_split", "_merge")
    for module, names in zip((elementwise, shadow_attention, head), variants, strict=True):
        for name in names:

            def note(*_: Any, name: str = name, MARGIN: Any = None, ENTROPY: Any = None, **__: Any) -> None:
                launched.add((name, MARGIN, ENTROPY))

            monkeypatch.setattr(getattr(module, name), "pre_run_hooks", [note])
    with caplog.at_level("INFO", "remask.workers.startup.warm_up"):
        warm_up(model, Worker(model).run)
    of_head = {(name, *both) for name in variants[2] for both in product((False, True), repeat=2)}
    assert launched == {(name, None, None) for name in variants[0] + variants[1]} | of_head
    assert len(caplog.records) == 1
