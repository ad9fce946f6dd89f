"""Backends on variable-length flash-attention kernels, for GPUs.

Main rows use one call of a library's kernel (Dao 2023; Shah et al. 2024). Shadow rows use our own kernel,
because no library supports their mask. The libraries' calls have the same semantics and differ in module and
return value.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from remask.workers.attention.varlen import AttentionBackend, DeviceLayout, VarlenLayout

# Output [Q, H, d] of queries [Q, H, d], keys and values [T, K, d] of the main rows.
VarlenKernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, DeviceLayout], Tensor]

MODULES = {
    "torch": "torch.nn.attention.varlen",
    "flash2": "flash_attn",
    "flash3": "flash_attn_interface",
    "flash4": "flash_attn.cute",
}


class FlashAttention(AttentionBackend):
    """Half precision on GPUs.

    Args:
        name: the library, a key of `MODULES`.

    Raises:
        ImportError: the library is not installed, or too old.
    """

    reads_device = True

    def __init__(self, name: str) -> None:
        self.name = name
        module = importlib.import_module(MODULES[name])
        try:
            self._main = _torch_kernel(module) if name == "torch" else _flash_kernel(module)
        except AttributeError as error:
            raise ImportError(str(error)) from None

    def attend(self, q_QHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, layout: VarlenLayout) -> Tensor:
        device = layout.device
        assert device is not None, "kernels need static shapes"
        if device.shadows is None:
            return self._main(q_QHd, k_TKd, v_TKd, device)
        from remask.workers.kernels.shadow_attention import shadow_attention

        count = len(device.shadows.holes)
        (q, q_shadow), (k, k_shadow), (v, v_shadow) = (
            x.tensor_split([len(x) - count]) for x in (q_QHd, k_TKd, v_TKd)
        )
        main = self._main(q, k, v, device)
        return torch.cat([main, shadow_attention(q_shadow, k, v, k_shadow, v_shadow, device.shadows)])


def _flash_kernel(module: Any) -> VarlenKernel:
    function = module.flash_attn_varlen_func

    def call(q: Tensor, k: Tensor, v: Tensor, layout: DeviceLayout) -> Tensor:
        out = function(
            q,
            k,
            v,
            cu_seqlens_q=layout.cu_queries,
            cu_seqlens_k=layout.cu_keys,
            max_seqlen_q=layout.max_queries,
            max_seqlen_k=layout.max_keys,
            causal=False,
        )
        return out[0] if isinstance(out, tuple) else out  # some versions add the log-sum-exp

    return call


def _torch_kernel(module: Any) -> VarlenKernel:
    function = module.varlen_attn
    has_groups = "enable_gqa" in inspect.signature(function).parameters  # torch 2.11 has none

    def call(q: Tensor, k: Tensor, v: Tensor, layout: DeviceLayout) -> Tensor:
        group_size, more = q.shape[1] // k.shape[1], {}
        if has_groups:
            more["enable_gqa"] = group_size > 1
        elif group_size > 1:
            k, v = (x.repeat_interleave(group_size, dim=1) for x in (k, v))
        bounds = (layout.cu_queries, layout.cu_keys, layout.max_queries, layout.max_keys)
        return function(q, k, v, *bounds, **more)

    return call
