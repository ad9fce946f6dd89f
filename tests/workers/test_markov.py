"""The exact posterior: against enumeration, and what samplers write with it against the chain itself."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from remask import LLM, InvalidRequest, SamplingParams
from remask.scheduler.canvas import TOKEN, new_canvas
from remask.scheduler.params import resolve
from remask.workers.burst.state import BurstState
from remask.workers.keyed_random import stream_keys
from remask.workers.models.markov import MarkovDenoiser, write_markov
from remask.workers.rows.pack import StepInputs
from remask.workers.step import pack, plan_packs

INITIAL = [0.5, 0.2, 0.3]
TRANSITION = [[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.3, 0.6, 0.1]]
MASK = 3


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    write_markov(tmp_path / "chain", INITIAL, TRANSITION)
    return tmp_path / "chain"


def probability(sequence: tuple[int, ...]) -> float:
    p = INITIAL[sequence[0]]
    for a, b in itertools.pairwise(sequence):
        p *= TRANSITION[a][b]
    return p


def continuations(start: tuple[int, ...], length: int) -> dict[tuple[int, ...], float]:
    """p(sequence | it begins with `start`) of all sequences."""
    found = {}
    for rest in itertools.product(range(3), repeat=length):
        found[rest] = probability(start + rest)
    total = sum(found.values())
    return {rest: p / total for rest, p in found.items()}


def test_the_posterior_is_that_of_the_enumeration() -> None:
    model = MarkovDenoiser(torch.tensor(INITIAL), torch.tensor(TRANSITION))
    sequences = [[0, MASK, MASK, 2, MASK], [MASK, MASK, 1], [MASK] * 5, [2, 1, 0]]
    owner = torch.tensor([s for s, ids in enumerate(sequences) for _ in ids])
    position = torch.tensor([i for ids in sequences for i in range(len(ids))])
    found = model.log_posteriors([torch.tensor(ids) for ids in sequences], owner, position).exp()
    row = 0
    for ids in sequences:
        expected = torch.zeros(len(ids), 4, dtype=torch.float64)
        for sequence in itertools.product(range(3), repeat=len(ids)):
            if all(seen in (MASK, state) for seen, state in zip(ids, sequence, strict=True)):
                for i, state in enumerate(sequence):
                    expected[i, state] += probability(sequence)
        expected /= expected.sum(1, keepdim=True)
        torch.testing.assert_close(found[row : row + len(ids)], expected)
        row += len(ids)


def p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """Of the chi-square statistic, by the Wilson-Hilferty approximation."""
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    return float(0.5 * torch.erfc(torch.tensor(z / 2**0.5)))


def written(llm: LLM, num_requests: int, *, seed: int, **fields: Any) -> list[tuple[int, ...]]:
    """What 1,024 samples of each request write behind the state 0."""
    shared = {"max_tokens": 4, "block_length": 4, "temperature": 1.0, "rank": "top", "n": 1024, **fields}
    params = [SamplingParams(seed=seed * num_requests + i, **shared) for i in range(num_requests)]
    outputs = llm.generate([[0]] * num_requests, params, use_tqdm=False)
    return [tuple(sample.token_ids) for output in outputs for sample in output.outputs]


@pytest.mark.slow
def test_one_token_a_step_in_random_order_writes_the_chains_distribution(chain: Path) -> None:
    expected = continuations((0,), 4)
    with LLM(chain) as llm:
        values = []
        for seed in range(10):
            drawn = written(llm, 4, unmask="schedule:score=random", seed=seed)
            counts = np.array([drawn.count(rest) for rest in expected])
            values.append(p_value(counts, len(drawn) * np.array(list(expected.values()))))
    # Uniform p-values: the Kolmogorov-Smirnov distance of 10 of them is below 0.49 with 99 % probability.
    values.sort()
    distance = max(max(abs(p - i / 10), abs(p - (i + 1) / 10)) for i, p in enumerate(values))
    assert distance < 0.49, values


def test_tokens_committed_together_are_drawn_independently(chain: Path) -> None:
    expected = continuations((0,), 4)
    with LLM(chain) as llm:
        drawn = written(llm, 2, unmask="schedule:steps=1", seed=3)
    marginals = [[sum(p for rest, p in expected.items() if rest[i] == s) for s in range(3)] for i in range(4)]
    independent = {rest: np.prod([marginals[i][s] for i, s in enumerate(rest)]) for rest in expected}
    counts = np.array([drawn.count(rest) for rest in expected])
    assert p_value(counts, 2048 * np.array(list(independent.values()))) > 1e-3
    assert p_value(counts, 2048 * np.array(list(expected.values()))) < 1e-6, "and not from the chain"


@pytest.mark.parametrize("remask", ["wino:tile=all", "wino:tile=self", "oracle_loo"])
def test_what_verifies_is_the_exact_leave_one_out(remask: str) -> None:
    model = MarkovDenoiser(torch.tensor(INITIAL), torch.tensor(TRANSITION))
    params = resolve(SamplingParams(max_tokens=5, block_length=5, remask=remask))
    own = new_canvas("r", 0, [0], params, seed=0, sample=0, mask_id=MASK, stop_ids=[])
    ids = [0, 1, MASK, 2, 2, MASK]
    half_way = msgspec.structs.replace(own.state, tokens=np.array(ids, dtype=TOKEN).tobytes())
    state = BurstState([own.spec], [half_way])
    (plan,) = plan_packs(state, model, model.pack_rows)
    slots, valid = state.active_slots()
    step = StepInputs(
        tokens=state.tokens,
        blocks=state.active_blocks(slots, valid, MASK),
        mask_id=MASK,
        sampling=state.sampling,
        keys=stream_keys(state.keys.unsqueeze(1), slots),
        needs=frozenset(),
        removed=None,
    )
    rows, query = pack(plan, step, model)
    found = model.statistics(rows, query).log_given.exp()[rows.num_main_slots :]
    for value, place in zip(found.tolist(), (1, 3, 4), strict=True):
        hidden = [MASK if i == place else token for i, token in enumerate(ids)]
        fits = [
            sequence
            for sequence in itertools.product(range(3), repeat=6)
            if all(seen in (MASK, state) for seen, state in zip(hidden, sequence, strict=True))
        ]
        agreeing = sum(probability(sequence) for sequence in fits if sequence[place] == ids[place])
        assert value == pytest.approx(agreeing / sum(map(probability, fits)), rel=1e-5)


@pytest.mark.parametrize(
    ("initial", "transition"),
    [
        ([0.5, 0.6], [[0.5, 0.5], [0.5, 0.5]]),
        ([0.5, 0.5], [[0.5, 0.5]]),
        ([1.0, 0.0], [[0.5, 0.5], [0.5, 0.5]]),
        ([0.5, 0.5], [[0.5, 0.5], [0.5]]),
        ("even", [[0.5, 0.5], [0.5, 0.5]]),
    ],
)
def test_what_is_no_chain_is_refused(tmp_path: Path, initial: Any, transition: Any) -> None:
    write_markov(tmp_path, initial, transition)
    with pytest.raises(InvalidRequest, match="model"):
        LLM(tmp_path)


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"device": "cuda"}, {"load_format": "dummy"}], ids=str
)
def test_options_that_a_chain_cannot_honour_are_refused(chain: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="a Markov chain takes only"):
        LLM(chain, **options)
