"""`LLM.score`: likelihoods against a plain loop and against a chain whose likelihoods are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from step_cases import logits_of

from remask import LLM, InvalidRequest, SamplingParams, Score
from remask.benchmarks.exactness import INITIAL, TRANSITION
from remask.scoring import draw_masks, standard_error
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser
from remask.workers.models.markov import write_markov

DREAM = Path(__file__).parents[1] / "data" / "golden" / "dream-tiny"
PROMPT, CONTINUATION = "12..34..2.4.43.1=", "1234341221434321"


@pytest.fixture(scope="module")
def dream_llm() -> Iterator[LLM]:
    with LLM(DREAM, dtype="float32", device="cpu", max_num_rows=512) as llm:
        yield llm


@pytest.mark.parametrize(("num_tokens", "num_samples"), [(1, 8), (5, 20), (5, 23), (40, 16), (7, 2)])
def test_masked_tokens_are_1_to_all_equally_often(num_tokens: int, num_samples: int) -> None:
    sizes = np.zeros(num_tokens + 1)
    positions = np.zeros(num_tokens)
    for seed in range(200):
        masks, samples = draw_masks(num_tokens, num_samples, seed)
        assert masks.shape[1] == num_tokens
        own = masks[samples].sum(1)
        assert (np.diff(own) >= 0).all()
        counts = np.bincount(own, minlength=num_tokens + 1)[1:]
        assert counts.max() - counts.min() <= 1
        sizes[1:] += counts
        positions += masks[samples].mean(0)
    expected = 200 * num_samples / num_tokens
    assert sizes[0] == 0
    assert np.abs(sizes[1:] - expected).max() < 6 * math.sqrt(expected)
    assert np.abs(positions / 200 - (num_tokens + 1) / (2 * num_tokens)).max() < 0.15


def test_masks_are_named_once_and_depend_on_the_seed() -> None:
    masks, samples = draw_masks(3, 64, 5)
    assert len(masks) == len(np.unique(masks, axis=0)) <= 7
    assert len(samples) == 64
    assert not np.array_equal(draw_masks(30, 64, 5).masks, draw_masks(30, 64, 6).masks)
    assert np.array_equal(draw_masks(30, 64, -1).masks, draw_masks(30, 64, -1).masks)


def test_the_standard_error_is_that_within_strata() -> None:
    random = np.random.default_rng(0)
    levels = np.linspace(0, 50, 4000)  # what differs between strata
    estimates = levels + random.normal(size=4000)
    assert standard_error(estimates) == pytest.approx(1 / math.sqrt(4000), rel=0.05)
    assert standard_error([3.0, 3.0]) == 0.0


def plain_estimates(
    model: TransformerDenoiser, prompt: list[int], continuation: list[int], num_samples: int, seed: int
) -> list[float]:
    """The estimates of a loop that forwards the whole sequence for each sample."""
    count, start, estimates = len(continuation), len(prompt) - model.config.shift, []
    masks, samples = draw_masks(count, num_samples, seed)
    for mask in masks[samples]:
        tokens = np.array(prompt + continuation)
        tokens[len(prompt) :][mask] = model.mask_id
        logprobs = logits_of(model, tokens)[start : start + count].log_softmax(-1)
        own = logprobs[torch.arange(count), torch.tensor(continuation)][torch.from_numpy(mask)]
        estimates.append(count / mask.sum() * float(own.sum()))
    return estimates


def test_a_score_is_the_mean_of_a_plain_loop(golden_llm: LLM, golden_model: TransformerDenoiser) -> None:
    prompt, continuation = [5, 6, 7, 8], [9, 10, 11, 12, 13, 14]
    (found,) = golden_llm.score([prompt], [continuation], num_samples=32, seed=3, use_tqdm=False)
    estimates = plain_estimates(golden_model, prompt, continuation, 32, 3)
    assert found.logprob == pytest.approx(np.mean(estimates), abs=1e-4)
    assert found.standard_error == pytest.approx(standard_error(estimates), abs=1e-4)
    assert (found.num_samples, found.num_tokens, found.is_greedy) == (32, 6, None)


def test_scores_of_shifted_logits_are_read_off_the_rows_before(dream_llm: LLM) -> None:
    model = load_denoiser(DREAM, dtype="float32", device="cpu")
    prompt, continuation = [99, 12, 40], [30, 33, 36, 45]
    (found,) = dream_llm.score([prompt], [continuation], num_samples=16, seed=1, use_tqdm=False)
    estimates = plain_estimates(model, prompt, continuation, 16, 1)
    assert found.logprob == pytest.approx(np.mean(estimates), abs=1e-4)


def test_greedy_decoding_of_shifted_logits_is_that_of_generate(dream_llm: LLM) -> None:
    params = {"max_tokens": 8, "block_length": 8, "unmask": "schedule", "ignore_eos": True}
    (output,) = dream_llm.generate([[99, 12, 40]], params, use_tqdm=False)
    written = output.outputs[0].token_ids
    other = [*written[:-1], (written[-1] + 1) % 100]
    scores = dream_llm.score(
        [[99, 12, 40]], [written, other], num_samples=2, check_greedy=True, use_tqdm=False
    )
    assert [score.is_greedy for score in scores] == [True, False]


def test_one_token_is_exact(tiny_llm: LLM) -> None:
    scores = tiny_llm.score("12+34=", ["1", "2"], num_samples=4, seed=9, use_tqdm=False)
    again = tiny_llm.score("12+34=", ["1", "2"], num_samples=64, use_tqdm=False)
    assert [score.standard_error for score in scores] == [0.0, 0.0]
    assert [score.logprob for score in again] == pytest.approx([score.logprob for score in scores])


def test_the_right_answer_is_likelier_and_greedy(tiny_llm: LLM) -> None:
    wrong = CONTINUATION[:-1] + "2"
    right, other = tiny_llm.score(PROMPT, [CONTINUATION, wrong], check_greedy=True, use_tqdm=False)
    assert right.logprob > other.logprob + 3
    assert (right.is_greedy, other.is_greedy) == (True, False)


@pytest.fixture(scope="module")
def invariant_llm() -> Any:
    with LLM("tiny", device="cpu", batch_invariant=True, dtype="float32", max_num_rows=512) as llm:
        yield llm


def test_a_score_is_the_same_in_any_company(invariant_llm: LLM) -> None:
    def score() -> Score:
        return invariant_llm.score(PROMPT, CONTINUATION, num_samples=16, use_tqdm=False)[0]

    alone = score()
    engine = invariant_llm.engine
    params = SamplingParams(max_tokens=20, temperature=1.0, remask="wino", seed=1)
    others = engine.intake.requests([PROMPT] * 12, params)
    served = engine.serve(others)
    next(served)  # the others are live
    beside = score()
    assert beside == alone
    assert len(list(served)) == len(others) - 1


def test_generation_beside_scores_writes_the_same(invariant_llm: LLM) -> None:
    engine = invariant_llm.engine
    params = SamplingParams(max_tokens=20, temperature=1.0, remask="wino", seed=1, n=4)
    (alone,) = invariant_llm.generate([PROMPT], params, use_tqdm=False)
    (request,) = engine.intake.requests([PROMPT], params)
    served = engine.serve([request])
    scores = invariant_llm.score([PROMPT] * 3, [CONTINUATION] * 3, num_samples=8, use_tqdm=False)
    assert len({score.logprob for score in scores}) == 1
    assert [o.token_ids for o in next(served).outputs] == [o.token_ids for o in alone.outputs]


@pytest.mark.parametrize(
    ("given", "parameter"),
    [
        (([PROMPT], [""]), "continuation"),
        (([PROMPT], [[]]), "continuation"),
        (([""], ["1"]), "prompt"),
        (([PROMPT, PROMPT], ["1"]), "continuations"),
        (([PROMPT], [5.5]), "continuation"),
        (([PROMPT], [[10**6]]), "continuation"),
        (([PROMPT], ["1" * 10_000]), "continuation"),
    ],
)
def test_bad_pairs_are_refused_by_name(tiny_llm: LLM, given: Any, parameter: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tiny_llm.score(*given, use_tqdm=False)
    assert caught.value.parameter.removeprefix("prompt 0: ") == parameter


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"num_samples": 1}, "num_samples"),
        ({"num_samples": 2000}, "num_samples"),
        ({"num_samples": "8"}, "num_samples"),
        ({"seed": 0.5}, "seed"),
        ({"check_greedy": "yes"}, "check_greedy"),
    ],
)
def test_bad_options_are_refused_by_name(tiny_llm: LLM, options: Any, parameter: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tiny_llm.score(PROMPT, "1", use_tqdm=False, **options)
    assert caught.value.parameter.removeprefix("prompt 0: ") == parameter


def test_lines_of_a_batch_file_are_scored(run: Callable[..., Any], tiny_llm: LLM, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    body = {"prompt": PROMPT, "continuation": CONTINUATION, "num_samples": 8, "check_greedy": True}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/score", "body": {**body, "model": "tiny"}},
        {"custom_id": "b", **body},
        {"custom_id": "c", "prompt": PROMPT, "max_tokens": 20},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(source, tmp_path / "out.jsonl", defaults={"temperature": 1.0})
    found = {}
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        result = json.loads(line)
        found[result["custom_id"]] = result["response"]["body"]
    (score,) = tiny_llm.score(PROMPT, CONTINUATION, num_samples=8, check_greedy=True, use_tqdm=False)
    assert found["a"]["object"] == "score"
    assert found["a"]["score"] == found["b"]["score"]
    assert found["a"]["score"]["logprob"] == pytest.approx(score.logprob, abs=1e-4)
    assert found["a"]["score"]["is_greedy"] is True
    assert found["a"]["usage"]["prompt_tokens"] == found["c"]["usage"]["prompt_tokens"] + 16


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"prompt": PROMPT, "continuation": ""}, "is empty"),
        ({"prompt": PROMPT, "continuation": "1", "max_tokens": 5}, "unknown field of a score"),
        ({"prompt": PROMPT, "continuation": "1", "num_samples": 1}, "num_samples"),
        ({"messages": [{"role": "user", "content": "a"}], "continuation": "1"}, "needs a prompt"),
    ],
)
def test_bad_lines_are_refused(
    run: Callable[..., Any], tmp_path: Path, line: dict[str, Any], problem: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(line))
    with pytest.raises(ValueError, match=problem):
        run(source, tmp_path / "out.jsonl")


def test_scores_go_into_parquet(run: Callable[..., Any], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"prompt": PROMPT, "continuation": CONTINUATION, "num_samples": 4}))
    run(source, tmp_path / "out.parquet")
    (row,) = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert row["logprob"] < 0
    assert (row["num_samples"], row["text"], row["is_greedy"]) == (4, None, None)


@pytest.mark.slow
def test_scores_of_a_known_chain_are_unbiased_and_know_their_error(tmp_path: Path) -> None:
    """200 seeds: the mean within 3 standard errors of the truth, the truth within 2 reported ones in 90 to
    99 % of them."""
    write_markov(tmp_path, INITIAL, TRANSITION)
    chain = [0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0]
    truth = sum(math.log(TRANSITION[a][b]) for a, b in pairwise(chain))
    with LLM(tmp_path) as llm:
        scores = [
            llm.score([chain[:1]], [chain[1:]], num_samples=64, seed=seed, use_tqdm=False)[0]
            for seed in range(200)
        ]
    found = np.array([score.logprob for score in scores])
    errors = np.array([score.standard_error for score in scores])
    assert abs(found.mean() - truth) < 3 * found.std() / math.sqrt(len(found))
    assert 0.9 <= float((abs(found - truth) <= 2 * errors).mean()) <= 0.99
