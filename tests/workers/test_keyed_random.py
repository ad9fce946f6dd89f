"""Random numbers keyed by content: known answers, distribution, and independence of tiling."""

from __future__ import annotations

import torch

from remask.workers.keyed_random import Purpose, gumbel, stream_keys, uniform_at

WORD = 2**64


def splitmix64(seed: int, count: int) -> list[int]:
    """The published generator in Python's integers."""
    words = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) % WORD
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
        words.append(z ^ (z >> 31))
    return words


def test_splitmix_in_python_gives_the_published_words() -> None:
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]


def test_a_key_without_fields_is_the_first_word_of_the_seed() -> None:
    for seed in (0, 1234567, -5, 2**63 - 1):
        assert int(stream_keys(torch.tensor(seed))) % WORD == splitmix64(seed % WORD, 1)[0]


def test_token_noise_is_the_gumbel_of_the_keys_stream() -> None:
    key = 42
    words = torch.tensor([((w >> 24) + 0.5) / 2**40 for w in splitmix64(key, 6)], dtype=torch.float64)
    expected = -torch.log(-torch.log(1 - words))
    torch.testing.assert_close(
        gumbel(torch.tensor([key]), torch.arange(6))[0].double(), expected, rtol=1e-4, atol=1e-5
    )


def test_every_field_changes_the_number() -> None:
    seed, sample, forward, position = (torch.tensor(x) for x in (3, 0, 1, 5))
    base = (seed, sample, Purpose.TOKEN, forward, position)
    others = [
        (torch.tensor(4), sample, Purpose.TOKEN, forward, position),
        (seed, torch.tensor(1), Purpose.TOKEN, forward, position),
        (seed, sample, Purpose.ORDER, forward, position),
        (seed, sample, Purpose.TOKEN, torch.tensor(2), position),
        (seed, sample, Purpose.TOKEN, forward, torch.tensor(6)),
    ]
    assert len({int(stream_keys(*fields)) for fields in [base, *others]}) == 6


def test_tiling_the_vocabulary_changes_nothing() -> None:
    keys = stream_keys(torch.arange(7))
    whole = gumbel(keys, torch.arange(1000))
    tiles = [gumbel(keys, ids) for ids in torch.arange(1000).split(33)]
    assert torch.equal(whole, torch.cat(tiles, dim=1))


def test_uniform_numbers_are_uniform_and_never_0_or_1() -> None:
    numbers = uniform_at(stream_keys(torch.arange(200_000)))
    assert float(numbers.min()) > 0
    assert float(numbers.max()) < 1
    counts = torch.histc(numbers, bins=50, min=0, max=1)
    chi_square = float(((counts - 4000) ** 2 / 4000).sum())
    assert chi_square < 89  # the 99.96th percentile at 49 degrees of freedom


def test_gumbel_numbers_stay_finite() -> None:
    noise = gumbel(stream_keys(torch.arange(2000)), torch.arange(500))
    assert torch.isfinite(noise).all()
    assert abs(float(noise.mean()) - 0.5772) < 0.01
