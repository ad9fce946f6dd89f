"""The trainer's transformer: LLaDA, or Llama with causal attention, as plain PyTorch with gradients.

The engine's own transformer (`remask.workers.models`) is for inference: fused weights, packed rows, no
gradients. This one takes batches of equal length without padding and writes attention out as two matrix
products, whose backward is twice as fast on a CPU as that of `scaled_dot_product_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remask.benchmarks.tiny.tokenizer import VOCAB_SIZE


@dataclass(frozen=True)
class Shape:
    """The architecture: 2.76 million parameters."""

    d_model: int = 192
    n_layers: int = 6
    n_heads: int = 4
    ffn: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    vocab_size: int = VOCAB_SIZE


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, self.n_heads = shape.d_model, shape.n_heads
        self.attn_norm, self.ff_norm = RMSNorm(d, shape.norm_eps), RMSNorm(d, shape.norm_eps)
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.ff_proj, self.up_proj = (nn.Linear(d, shape.ffn, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(shape.ffn, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
        b, s, d = x.shape
        hd = d // self.n_heads
        h = self.attn_norm(x)
        q, k, v = (
            proj(h).view(b, s, self.n_heads, hd).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        scores = (q @ k.transpose(-1, -2)).float().mul(hd**-0.5)
        weights = (scores if bias is None else scores + bias).softmax(-1).to(v.dtype)
        x = x + self.attn_out((weights @ v).transpose(1, 2).reshape(b, s, d))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    x1, x2 = x.float().split(half, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


class TinyTransformer(nn.Module):
    """ids [B, S] -> logits [B, L, V] of the last L positions (the prompt needs none)."""

    def __init__(self, shape: Shape, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.wte = nn.Embedding(shape.vocab_size, shape.d_model)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.ln_f = RMSNorm(shape.d_model, shape.norm_eps)
        self.ff_out = nn.Linear(shape.d_model, shape.vocab_size, bias=False)
        half = shape.d_model // shape.n_heads // 2
        self.inv_freq = 1.0 / shape.rope_theta ** (torch.arange(half, dtype=torch.float32) / half)
        for name, param in self.named_parameters():
            if param.ndim == 2:
                std = 0.02 if "wte" in name else param.shape[1] ** -0.5
                is_residual = "_out" in name and "blocks" in name
                nn.init.normal_(param, std=std / (2 * shape.n_layers) ** 0.5 if is_residual else std)

    def forward(self, ids: Tensor, num_last: int) -> Tensor:
        seq_len = ids.shape[1]
        angles = torch.arange(seq_len, dtype=torch.float32)[:, None] * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        bias = torch.full((seq_len, seq_len), -torch.inf).triu(1) if self.causal else None
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x, cos, sin, bias)
        return self.ff_out(self.ln_f(x[:, seq_len - num_last :]))
