"""The packed bidirectional transformer that all families share: rows in, hidden states of the candidates out.

Fused qkv and gate/up projections, RMSNorm and RoPE in fp32, explicit positions. Inference only. The caller
provides the attention backend and the row operations (`RowOps`). Parameters are created on the meta device
and filled by `remask.workers.models.loading`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from remask.workers.attention.varlen import AttentionBackend, VarlenLayout
from remask.workers.models.config import TransformerConfig
from remask.workers.models.experts import Experts, empty_parameter
from remask.workers.models.fp8 import add_linear, linear
from remask.workers.models.row_ops import EAGER, RowOps
from remask.workers.rows.pack import KeptPlaces, PackedRows

# Kept keys and values of a layer [2, N, K, d], and which of them a pack writes and reads.
LayerKeys: TypeAlias = tuple[Tensor, KeptPlaces]


def _keep(k_TKd: Tensor, v_TKd: Tensor, kept: LayerKeys | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The keys and the values that a pack sees, with the kept ones where they stand behind its own, and all
    kept ones where they do not. Those of the pack are kept."""
    if kept is None:
        return k_TKd, v_TKd, None
    kept_2NKd, places = kept
    for own, fresh in zip(kept_2NKd.unbind(), (k_TKd, v_TKd), strict=True):
        own.index_copy_(0, places.places_T, fresh)
    if places.gathered is None:
        return k_TKd, v_TKd, kept_2NKd
    k, v = (
        torch.cat([fresh[: places.num_fresh], own.index_select(0, places.gathered), fresh[places.num_main :]])
        for own, fresh in zip(kept_2NKd.unbind(), (k_TKd, v_TKd), strict=True)
    )
    return k, v, None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept_2NKd: Tensor | None,
    layout: VarlenLayout,
    attention: AttentionBackend,
) -> Tensor:
    """Attention output [Q, H * d]."""
    if kept_2NKd is None or layout.kept is None:
        return attention.attend(q, k, v, layout).flatten(1)
    return attention.attend_kept(q, k, v, layout, kept_2NKd).flatten(1)


def rope_tables(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, head_dim] in fp32, each half of a head's dimensions with the same angles."""
    half = torch.arange(head_dim // 2, device=positions_T.device, dtype=torch.float32) * 2 / head_dim
    angles = (positions_T.float().unsqueeze(1) * (1.0 / theta**half)).unsqueeze(1)
    return angles.cos().tile(2), angles.sin().tile(2)


class Block(nn.Module):
    """One layer: attention and SwiGLU, each behind a norm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d, heads, kv_heads, head_dim = (
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        self.sizes = (heads, kv_heads, kv_heads)
        self.head_dim, self.eps = head_dim, config.norm_eps
        self.attn_norm = empty_parameter(d)
        qkv_size = (heads + 2 * kv_heads) * head_dim
        self.qkv = empty_parameter(qkv_size, d)
        self.qkv_bias = empty_parameter(qkv_size) if config.qkv_bias else None
        self.attn_out = empty_parameter(d, heads * head_dim)
        self.q_norm, self.k_norm = (empty_parameter(head_dim) if config.qk_norm else None for _ in range(2))
        self.ffn_norm = empty_parameter(d)
        self.experts = None if config.experts is None else Experts(config.experts, d)
        if self.experts is None:
            self.gate_up = empty_parameter(2 * config.ffn_size, d)
            self.down = empty_parameter(d, config.ffn_size)

    def forward(
        self,
        x_TD: Tensor,
        rope: tuple[Tensor, Tensor],
        layout: VarlenLayout,
        attention: AttentionBackend,
        ops: RowOps,
        kept: LayerKeys | None = None,
    ) -> Tensor:
        """Output [T, D] of the layer for all rows."""
        qkv = self._heads(ops.rms_norm(x_TD, self.attn_norm, self.eps), slice(None), ops)
        q_and_k, v = qkv.split((self.sizes[0] + self.sizes[1], self.sizes[2]), dim=1)
        if self.q_norm is not None:
            q, k = q_and_k.split(self.sizes[:2], dim=1)
            q_and_k = torch.cat([self._normed(q, self.q_norm, ops), self._normed(k, self.k_norm, ops)], dim=1)
        q, k = ops.rotate_halves(q_and_k, *rope).split(self.sizes[:2], dim=1)
        k, v, kept_keys = _keep(k, v, kept)
        attended = _attend(q, k, v, kept_keys, layout, attention)
        return self._ffn(add_linear(x_TD, attended, self.attn_out, ops), ops)

    def candidates(
        self,
        x_TD: Tensor,
        rope: tuple[Tensor, Tensor],
        rows_N: Tensor,
        layout: VarlenLayout,
        attention: AttentionBackend,
        ops: RowOps,
        kept: LayerKeys | None = None,
    ) -> Tensor:
        """Output [N, D] of the layer for some rows; all rows give keys and values."""
        normed_TD = ops.rms_norm(x_TD, self.attn_norm, self.eps)
        q_size = self.sizes[0] * self.head_dim
        q = self._heads(normed_TD[rows_N], slice(q_size), ops)
        k, v = self._heads(normed_TD, slice(q_size, None), ops).split(self.sizes[1:], dim=1)
        if self.q_norm is not None:
            q, k = self._normed(q, self.q_norm, ops), self._normed(k, self.k_norm, ops)
        cos, sin = rope
        q, k = ops.rotate_halves(q, cos[rows_N], sin[rows_N]), ops.rotate_halves(k, cos, sin)
        k, v, kept_keys = _keep(k, v, kept)
        if not len(rows_N):
            return x_TD[:0]
        attended = _attend(q, k, v, kept_keys, layout, attention)
        return self._ffn(add_linear(x_TD[rows_N], attended, self.attn_out, ops), ops)

    def _heads(self, x_TD: Tensor, part: slice, ops: RowOps) -> Tensor:
        """Queries, keys and values of some rows, or a part of them, [T, heads, head_dim]."""
        heads = linear(x_TD, self.qkv[part], ops)
        if self.qkv_bias is not None:
            heads += self.qkv_bias[part]
        return heads.unflatten(-1, (-1, self.head_dim))

    def _normed(self, heads_THd: Tensor, weight: Tensor | None, ops: RowOps) -> Tensor:
        """Heads, each normalised by itself."""
        assert weight is not None, "queries and keys are both normalised"
        rows = heads_THd.reshape(-1, self.head_dim)
        return ops.rms_norm(rows, weight, self.eps).view(heads_THd.shape)

    def _ffn(self, x_TD: Tensor, ops: RowOps) -> Tensor:
        normed_TD = ops.rms_norm(x_TD, self.ffn_norm, self.eps)
        if self.experts is not None:
            return self.experts(normed_TD, ops).add_(x_TD)
        return add_linear(x_TD, ops.silu_mul(linear(normed_TD, self.gate_up, ops)), self.down, ops)


class Transformer(nn.Module):
    """Embedding, layers, final norm and head; on the meta device until their weights are loaded."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = empty_parameter(config.embedding_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = empty_parameter(config.hidden_size)
        self.head = (
            None if config.tied_embeddings else empty_parameter(config.embedding_size, config.hidden_size)
        )

    def forward(
        self,
        rows: PackedRows,
        attention: AttentionBackend,
        ops: RowOps = EAGER,
        kept_L2NKd: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [H, D] of the candidates before the final norm. The last layer computes no others.

        Args:
            rows: the pack.
            attention, ops: see above.
            kept_L2NKd: kept keys and values of all layers; the pack writes to it.
        """
        rope = rope_tables(rows.positions_T, self.config.head_dim, self.config.rope_theta)
        x_TD = self.embedding[rows.ids_T]
        kept: list[LayerKeys | None] = [None] * len(self.blocks)
        if rows.kept is not None:
            assert kept_L2NKd is not None, "rows are kept"
            kept = [(layer, rows.kept) for layer in kept_L2NKd.unbind()]
        *blocks, last = self.blocks
        for block, own in zip(blocks, kept, strict=False):
            x_TD = block(x_TD, rope, rows.layout, attention, ops, own)
        chosen = (rows.candidates_H, rows.candidate_layout)
        return last.candidates(x_TD, rope, *chosen, attention, ops, kept[-1])  # type: ignore[operator]

    def normed(self, x_ND: Tensor, ops: RowOps = EAGER) -> Tensor:
        """Hidden states after the final norm."""
        return ops.rms_norm(x_ND, self.final_norm, self.config.norm_eps)

    def products(self) -> Iterator[Tensor]:
        """A weight [O, I] of each shape that rows are multiplied by."""
        first: Block = self.blocks[0]  # type: ignore[assignment]
        q_size = first.sizes[0] * first.head_dim
        weights = (
            first.qkv,
            first.qkv[:q_size],
            first.qkv[q_size:],
            first.attn_out,
            first.gate_up,
            first.down,
        )
        for weight in weights:
            yield weight if isinstance(weight, Tensor) else weight.values.float()
        yield self.head_weight

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        head = self.embedding if self.head is None else self.head
        return head[: self.config.vocab_size]

    def logits(self, x_ND: Tensor, ops: RowOps = EAGER) -> Tensor:
        """Logits [N, V]: on a GPU in fp32, on a CPU in the model's dtype.

        If logits are rounded to bf16, the two largest of some rows are equal. On a CPU torch has no product
        of bf16 inputs with an fp32 output.
        """
        normed_ND, head_VD = self.normed(x_ND, ops), self.head_weight
        if normed_ND.is_cuda:
            return torch.mm(normed_ND, head_VD.t(), out_dtype=torch.float32)
        return ops.linear(normed_ND, head_VD)
