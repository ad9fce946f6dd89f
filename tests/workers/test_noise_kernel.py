"""The random numbers of the fused head against the reference."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from remask.workers import keyed_random
from remask.workers.kernels import keyed_random as noise_kernel
from remask.workers.keyed_random import stream_keys

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # then they are about what Triton compiles


@triton.jit
def _noise(keys_ptr, uniform_ptr, gumbel_ptr, KEYS: tl.constexpr, IDS: tl.constexpr):
    ids = tl.arange(0, IDS)
    keys = tl.load(keys_ptr + tl.arange(0, KEYS))
    places = tl.arange(0, KEYS)[:, None] * IDS + ids[None, :]
    tl.store(uniform_ptr + places, noise_kernel.uniform(keys, ids))
    tl.store(gumbel_ptr + places, noise_kernel.gumbel(keys, ids))


def noise(keys: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
    out = torch.empty(2, len(keys), num_ids, device=DEVICE)
    _noise[(1,)](keys.to(DEVICE), out[0], out[1], KEYS=len(keys), IDS=num_ids)
    return out[0].cpu(), out[1].cpu()


def key_of(word: int) -> int:
    """The key of the stream whose first word is given, from the inverse of the generator."""

    def unshift(x: int, bits: int) -> int:
        found = x
        for _ in range(64 // bits):
            found = x ^ (found >> bits)
        return found

    for bits, factor in ((31, keyed_random.MUL2), (27, keyed_random.MUL1)):
        word = unshift(word, bits) * pow(factor, -1, 2**64) % 2**64
    key = (unshift(word, 30) - keyed_random.GAMMA) % 2**64
    return key - 2**64 if key >= 2**63 else key


def test_uniform_numbers_are_those_of_the_reference_to_the_bit() -> None:
    keys = stream_keys(torch.arange(64))
    words = keyed_random._mix(keys.unsqueeze(-1) + (torch.arange(128) + 1) * keyed_random.GAMMA)
    assert torch.equal(noise(keys, 128)[0], keyed_random.uniform(words))


def test_noise_is_that_of_the_reference_up_to_rounding() -> None:
    keys = stream_keys(torch.arange(64))
    expected = keyed_random.gumbel(keys, torch.arange(128))
    torch.testing.assert_close(noise(keys, 128)[1], expected, rtol=3e-7, atol=5e-7)


def test_noise_is_precise_where_the_uniform_number_is_almost_0_or_1() -> None:
    words = [0, *(1 << bits for bits in range(24, 64)), 2**64 - 1, 2**64 - 2**39, *range(2**54, 2**59, 2**54)]
    keys = torch.tensor([key_of(word) for word in (words * 2)[:64]])
    found, drawn = (x[:, 0] for x in noise(keys, 16))
    assert found[0] == 2.0**-41
    assert found.max() == 1 - 2.0**-24
    expected = -torch.log(-torch.log1p(-found.double()))
    torch.testing.assert_close(drawn.double(), expected, rtol=2e-7, atol=4e-7)
