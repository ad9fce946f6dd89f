"""The trainer's LLaDA: the published layout as plain PyTorch with gradients, for small models on a CPU.

The engine's own transformer (`remask.workers.models`) is for inference: fused weights, packed rows, no
gradients. This one takes padded-free batches of equal length and writes attention out as two matrix products,
whose backward is twice as fast on a CPU as that of `scaled_dot_product_attention`. `export_state` gives the
published tensor names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * self.weight


class Block(nn.Module):
    def __init__(self, d_model: int, n_heads: int, ffn: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attn_norm, self.ff_norm = RMSNorm(d_model), RMSNorm(d_model)
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (
            nn.Linear(d_model, d_model, bias=False) for _ in range(4)
        )
        self.ff_proj, self.up_proj = (nn.Linear(d_model, ffn, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(ffn, d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, d = x.shape
        hd = d // self.n_heads
        h = self.attn_norm(x)
        q, k, v = (
            proj(h).view(b, s, self.n_heads, hd).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        weights = (q @ k.transpose(-1, -2)).float().mul(hd**-0.5).softmax(-1).to(v.dtype)
        x = x + self.attn_out((weights @ v).transpose(1, 2).reshape(b, s, d))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    x1, x2 = x.float().split(half, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


class TrainableLLaDA(nn.Module):
    """ids [B, S] -> logits [B, S - start, V] of the positions from `start` on (the prompt needs none)."""

    def __init__(
        self, vocab_size: int, d_model: int, n_layers: int, n_heads: int, ffn: int, rope_theta: float
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, ffn) for _ in range(n_layers))
        self.ln_f = RMSNorm(d_model)
        self.ff_out = nn.Linear(d_model, vocab_size, bias=False)
        half = d_model // n_heads // 2
        self.inv_freq = 1.0 / rope_theta ** (torch.arange(half, dtype=torch.float32) / half)
        for name, param in self.named_parameters():
            if param.ndim == 2:
                std = 0.02 if "wte" in name else param.shape[1] ** -0.5
                nn.init.normal_(
                    param, std=std / (2 * n_layers) ** 0.5 if "_out" in name and "blocks" in name else std
                )

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        angles = torch.arange(ids.shape[1], dtype=torch.float32)[:, None] * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.ff_out(self.ln_f(x[:, start:]))

    def export_state(self) -> dict[str, Tensor]:
        """bf16 tensors under the names of the published LLaDA checkpoints."""
        return {
            f"model.transformer.{name}": p.detach().to(torch.bfloat16) for name, p in self.named_parameters()
        }
