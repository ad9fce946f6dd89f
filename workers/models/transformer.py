"""The packed bidirectional transformer that all families share: rows in, final hidden states out.

Fused qkv and gate/up projections, RMSNorm and RoPE in fp32, positions given with the rows. Inference only.
Parameters are made on the meta device and filled by `remask.workers.models.loading`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remask.workers.attention.varlen import AttentionBackend, VarlenLayout
from remask.workers.models.config import ModelConfig


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalises in fp32, casts back, then multiplies."""
    x32 = x_TD.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x_TD.dtype) * weight_D


def rope_tables(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, head_dim / 2] in fp32."""
    half = torch.arange(head_dim // 2, device=positions_T.device, dtype=torch.float32) * 2 / head_dim
    angles = positions_T.float().unsqueeze(1) * (1.0 / theta**half)
    return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def rotate_halves(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each head's first half against its second (NeoX layout), in fp32."""
    x1, x2 = x_THd.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x_THd.dtype)


class Block(nn.Module):
    """One layer: attention and SwiGLU, each behind a norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, heads, kv_heads, head_dim = (
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        self.sizes = (heads, kv_heads, kv_heads)
        self.head_dim, self.eps = head_dim, config.norm_eps
        self.attn_norm = _empty(d)
        self.qkv = _empty((heads + 2 * kv_heads) * head_dim, d)
        self.attn_out = _empty(d, heads * head_dim)
        self.ffn_norm = _empty(d)
        self.gate_up = _empty(2 * config.ffn_size, d)
        self.down = _empty(d, config.ffn_size)

    def forward(
        self, x_TD: Tensor, rope: tuple[Tensor, Tensor], layout: VarlenLayout, attention: AttentionBackend
    ) -> Tensor:
        qkv = F.linear(rms_norm(x_TD, self.attn_norm, self.eps), self.qkv).unflatten(-1, (-1, self.head_dim))
        q_and_k, v = qkv.split((self.sizes[0] + self.sizes[1], self.sizes[2]), dim=1)
        q, k = rotate_halves(q_and_k, *rope).split(self.sizes[:2], dim=1)
        x_TD = x_TD + F.linear(attention.attend(q, k, v, layout).flatten(1), self.attn_out)
        gate, up = F.linear(rms_norm(x_TD, self.ffn_norm, self.eps), self.gate_up).chunk(2, dim=-1)
        return x_TD + F.linear(F.silu(gate) * up, self.down)


class Transformer(nn.Module):
    """Embedding, layers, final norm, and the head's matrix (which `remask.workers.head` applies)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = _empty(config.embedding_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = _empty(config.hidden_size)
        self.head = (
            self.embedding if config.tied_embeddings else _empty(config.embedding_size, config.hidden_size)
        )

    def forward(
        self, ids_T: Tensor, positions_T: Tensor, layout: VarlenLayout, attention: AttentionBackend
    ) -> Tensor:
        """Hidden states [T, D] before the final norm."""
        rope = rope_tables(positions_T, self.config.head_dim, self.config.rope_theta)
        x_TD = self.embedding[ids_T]
        for block in self.blocks:
            x_TD = block(x_TD, rope, layout, attention)
        return x_TD

    def final_hidden(self, x_ND: Tensor) -> Tensor:
        """What the head reads, for the rows that need it."""
        return rms_norm(x_ND, self.final_norm, self.config.norm_eps)
