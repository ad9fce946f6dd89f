"""How much of the machine's matrix rate a run turned into arithmetic that its steps need.

Counted from the run itself: a hook on the transformer sees every pack that is forwarded and adds up, from the
pack's own description, 2 m n k for each linear layer (all rows in every layer but the last; in the last all
rows for keys and values and the candidates for the rest; the candidates in the head) and, for each visible
query and key, the two products of attention. Candidates are the masked slots of the active blocks and the
shadow rows of committed slots. Of a layer of experts the router and the active ones are counted. Norms,
rotations, softmax, policies, packing and Python are not counted: their time lowers the utilization.

Packs with static shapes, which GPUs use, are not counted: they have rows that no step reads, and
graphs replay them out of the hook's sight. What their steps need is measured by `benchmarks/gpu`.

The rate is measured in the same repetition by running nothing but the linear layers of some of these packs,
with the model's own weights, in the same dtype and on the same threads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook

from remask.workers.attention.varlen import VarlenLayout
from remask.workers.models.config import TransformerConfig
from remask.workers.models.transformer import Block, Transformer
from remask.workers.rows.pack import PackedRows

NUM_SAMPLED_PACKS = 3
NOT_COUNTED = (
    "The engine's rows and its share of the matrix rate are counted in process on a CPU alone; for a GPU "
    "benchmarks/gpu/run.py measures them."
)


@dataclass
class Work:
    """The packs of a run, as a context manager that counts while it is open.

    Attributes:
        model: the model whose forwards count; every model's of this process if None.
        packs: rows and candidates of each forward; none with static shapes.
        flops: arithmetic that they need.
    """

    model: Transformer | None = None
    packs: list[tuple[int, int]] = field(default_factory=list)
    flops: int = 0

    def __enter__(self) -> Work:
        self._hook = register_module_forward_pre_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _count(self, module: nn.Module, inputs: Any) -> None:
        if not isinstance(module, Transformer) or self.model not in (None, module):
            return
        rows: PackedRows = inputs[0]
        if rows.layout.device is None:
            self.packs.append((len(rows.ids_T), len(rows.candidates_H)))
            self.flops += pack_flops(module.config, rows)

    def sampled_packs(self) -> list[tuple[int, int]]:
        """A few packs, evenly spread over the run's by size."""
        ordered = sorted(self.packs)
        return [
            ordered[len(ordered) * (2 * i + 1) // (2 * NUM_SAMPLED_PACKS)] for i in range(NUM_SAMPLED_PACKS)
        ]

    def figures(self, duration: float, rate: float) -> dict[str, float]:
        """Rows of a forward, and the share of the matrix rate `rate` that the counted arithmetic needed in
        `duration` seconds; empty if nothing was counted."""
        if not self.packs:
            return {}
        return {**self.rows(), "gemm_utilization": round(self.flops / (duration * rate), 3)}

    def rows(self) -> dict[str, float]:
        """Rows of a forward; empty if nothing was counted."""
        if not self.packs:
            return {}
        return {"rows_per_forward": round(sum(rows for rows, _ in self.packs) / len(self.packs), 1)}


def pack_flops(config: TransformerConfig, rows: PackedRows) -> int:
    """Arithmetic of one forward and the head."""
    pairs = (config.num_layers - 1) * visible_pairs(rows.layout) + visible_pairs(rows.candidate_layout)
    attention = 4 * pairs * config.num_heads * config.head_dim
    return linear_flops(config, len(rows.ids_T), len(rows.candidates_H)) + attention


def linear_flops(config: TransformerConfig, num_rows: int, num_candidates: int) -> int:
    """Arithmetic of the linear layers of one forward, and of the head."""
    d, head_dim = config.hidden_size, config.head_dim
    keys_and_values = 2 * config.num_kv_heads * head_dim
    the_rest = 2 * config.num_heads * head_dim + _mlp_columns(config)  # queries, output, MLP
    in_all_rows = config.num_layers * keys_and_values + (config.num_layers - 1) * the_rest
    return 2 * d * (num_rows * in_all_rows + num_candidates * (the_rest + config.vocab_size))


def _mlp_columns(config: TransformerConfig) -> int:
    """Inputs and outputs, of D numbers each, that the MLP of a layer has for a row."""
    if (experts := config.experts) is None:
        return 3 * config.ffn_size
    return experts.count + 3 * (experts.num_active * experts.size + (experts.shared_size or 0))


def visible_pairs(layout: VarlenLayout) -> int:
    """How many pairs of query and key see each other."""
    main = sum(run.num_queries * run.num_keys for run in layout.sequences)
    return main + sum(int(shadow.mask.sum()) for shadow in layout.shadows)


def wait(device: torch.device) -> None:
    """Waits until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def gemm_rate(model: Transformer, packs: list[tuple[int, int]]) -> float:
    """Arithmetic a second of the linear layers alone, for packs of these sizes."""
    flops, seconds = 0, 0.0
    for num_rows, num_candidates in packs:
        flops += linear_flops(model.config, num_rows, num_candidates)
        inputs = linear_inputs(model, num_rows, num_candidates)
        wait(model.embedding.device)
        started = time.perf_counter()
        run_linear_layers(model, num_rows, num_candidates, inputs)
        wait(model.embedding.device)
        seconds += time.perf_counter() - started
    return flops / seconds


def linear_inputs(
    model: Transformer, num_rows: int, num_candidates: int
) -> dict[tuple[int, int], torch.Tensor]:
    """Random rows of each size that a linear layer takes, by their number and size."""
    return {
        (count, size): torch.randn(count, size).to(model.embedding)
        for count in (num_rows, num_candidates)
        for size in {parameter.shape[-1] for parameter in model.parameters() if parameter.ndim > 1}
    }


def run_linear_layers(
    model: Transformer, num_rows: int, num_candidates: int, inputs: dict[tuple[int, int], torch.Tensor]
) -> None:
    """Nothing but the products of one forward and its head."""
    config = model.config
    *blocks, last = model.blocks
    q_size = config.num_heads * config.head_dim

    def linear(count: int, weight: torch.Tensor) -> None:
        F.linear(inputs[count, weight.shape[1]], weight)

    for block in blocks:
        assert isinstance(block, Block)
        for weight in (block.qkv, block.attn_out, *mlp_weights(block)):
            linear(num_rows, weight)
    assert isinstance(last, Block)
    linear(num_rows, last.qkv[q_size:])
    head = model.embedding if model.head is None else model.head
    for weight in (last.qkv[:q_size], last.attn_out, *mlp_weights(last), head[: config.vocab_size]):
        linear(num_candidates, weight)


def mlp_weights(block: Block) -> Iterator[torch.Tensor]:
    """The matrices [O, I] that a layer's MLP multiplies a row by; those of as many experts as are active,
    joined."""
    if (experts := block.experts) is None:
        yield from (block.gate_up, block.down)
        return
    yield experts.router
    yield from (weight[: experts.num_active].flatten(0, 1) for weight in (experts.gate_up, experts.down))
    if experts.shared_gate_up is not None and experts.shared_down is not None:
        yield from (experts.shared_gate_up, experts.shared_down)
