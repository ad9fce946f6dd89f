"""Measures of the study against definitions written another way, and against cases counted by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remask import Trace
from remask.benchmarks.study import measures
from remask.benchmarks.study.grid import Cell
from remask.benchmarks.study.samples import revisions
from remask.benchmarks.study.tasks import STUDY_TASKS, GymTask
from remask.benchmarks.tiny.tasks import SUDOKU_4X4


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(count: int, data: st.DataObject) -> None:
    num_right, k = data.draw(st.integers(0, count)), data.draw(st.integers(1, count))
    subsets = list(itertools.combinations(range(count), k))
    expected = sum(min(subset) < num_right for subset in subsets) / len(subsets)
    assert measures.pass_at_k(count, num_right, k) == pytest.approx(expected)


@given(st.permutations(range(7)), st.permutations(range(7)))
def test_the_common_subsequence_is_that_of_dynamic_programming(a: list[int], b: list[int]) -> None:
    best = np.zeros((8, 8), dtype=int)
    for i, j in itertools.product(range(7), range(7)):
        best[i + 1, j + 1] = best[i, j] + 1 if a[i] == b[j] else max(best[i, j + 1], best[i + 1, j])
    assert measures.common_subsequence(a, b) == best[7, 7]


def test_orders_are_by_step_and_then_from_left_to_right() -> None:
    assert measures.commit_order([2, 0, 1, 2]) == [2, 0, 3]
    assert measures.order_diversity([[0, 1, 2, 3], [3, 2, 1, 0]]) == 0.75
    assert measures.order_diversity([[0, 1], [0, 1], [0, 1]]) == 0
    assert measures.order_diversity([[0, 1]]) == 0
    assert measures.order_diversity([[0, 1, 2], [1, 0]]) == 0.5, (
        "the third position was filled by one of them"
    )
    assert measures.order_diversity([[0], [1]]) == 1


def test_entropy_is_in_bits() -> None:
    assert measures.entropy_bits([3, 3, 3, 3]) == 2
    assert measures.entropy_bits([5]) == 0
    assert measures.entropy_bits([1, 3]) == pytest.approx(2 - 0.75 * math.log2(3))


def test_distinct_ngrams_are_counted_over_all_texts() -> None:
    texts = [["a", "b", "a"], ["a", "b", "c"]]
    assert measures.distinct_ngrams(texts, 1) == 3 / 6
    assert measures.distinct_ngrams(texts, 2) == 3 / 4
    assert measures.distinct_ngrams([["a"]], 2) == 0


def test_self_bleu_tells_equal_texts_from_different_ones() -> None:
    equal = ["the", "earth", "and", "the", "sea"]
    assert measures.self_bleu([equal, equal, equal]) == pytest.approx(100)
    assert measures.self_bleu([equal, ["none", "of", "these", "words", "here"]]) == 0
    assert 0 < measures.self_bleu([equal, ["the", "earth", "is", "the", "lord's"]]) < 50
    # Unigrams 2/2, then (1 + 1) / (1 + 1), (0 + 1) / (0 + 1) twice; a text of 2 words against one of 4.
    one_way = 100 * math.exp(1 - 4 / 2)
    other_way = 100 * (2 / 4 * 2 / 4 * 1 / 3 * 1 / 2) ** 0.25
    assert measures.self_bleu([["a", "b"], ["a", "b", "c", "d"]]) == pytest.approx((one_way + other_way) / 2)


def trace(*events: tuple[int, int, int, bool], canvas_len: int = 3) -> Any:
    """Events of (step, position, token, whether it is a commit)."""
    step, position, token, is_commit = (list(column) for column in zip(*events, strict=True))
    own = Trace(
        step=step, position=position, block=[0] * len(step), token=token, is_commit=is_commit,
        confidence=[0.5] * len(step), is_top=is_commit, canvas_len=canvas_len,
    )  # fmt: skip

    class Sample:
        trace = own

    return Sample()


def test_revisions_are_judged_by_the_nearest_right_answer() -> None:
    sample = trace(
        (1, 0, 7, True), (1, 1, 8, True),
        (2, 0, 7, False), (2, 1, 8, False), (2, 2, 5, True),
        (3, 0, 7, True), (3, 1, 9, True),  # a flip-flop and a repair
        (4, 2, 5, False), (4, 0, 7, False),
        (5, 2, 6, True), (5, 0, 7, True),  # damage and a flip-flop
    )  # fmt: skip
    found = revisions(sample, [[1, 2, 3], [7, 9, 5]])
    assert found == {
        "num_commits": 7,
        "num_non_top": 0,
        "num_remasks": 4,
        "num_refills": 4,
        "num_flip_flops": 2,
        "num_repairs": 1,
        "num_damages": 1,
        "commit_steps": [5, 3, 5],
    }
    assert revisions(sample, [])["num_repairs"] == 0


def rows(*scores_and_texts: tuple[int, float, str], **fields: Any) -> list[dict[str, Any]]:
    common = {
        "error": None, "nfe": 4, "num_query_rows": 100, "num_query_key_pairs": 900, "num_visible_tokens": 8,
        "num_commits": 10, "num_remasks": 2, "num_refills": 2, "num_flip_flops": 1, "num_repairs": 1,
        "num_damages": 0, "num_non_top": 1, "commit_steps": [1, 2], **fields,
    }  # fmt: skip
    return [{**common, "prompt": p, "score": s, "text": text} for p, s, text in scores_and_texts]


def test_a_cell_is_summed_up_over_its_prompts() -> None:
    cell = Cell("addition3", "a", None, None, None, None, 1.0, "top", 0, num_prompts=2, n=4, canvas_len=8)
    samples = rows(
        (0, 1.0, "x"), (0, 1.0, "x"), (0, 1.0, "y"), (0, 0.0, "z"),
        (1, 0.0, "u"), (1, 0.0, "u"), (1, 0.0, "u"), (1, 0.0, "u"),
    )  # fmt: skip
    task = STUDY_TASKS["sudoku4x4_open"]
    texts = ["12..............=", "................="]  # 288 / 12 grids, and all of them
    found = measures.cell_row(cell, task, texts, samples, microseconds=500.0)
    assert (found["score"], found["pass_at_1"], found["pass_at_4"]) == (3 / 8, 3 / 8, 1 / 2)
    assert (found["milliseconds"], found["tokens_per_forward"], found["flip_flop"]) == (2.0, 2.0, 0.5)
    assert (found["unique_texts"], found["right_answers"], found["useful"]) == (2.0, 1.0, 0.5)
    assert found["right_entropy_bits"] == pytest.approx(measures.entropy_bits([2, 1]))
    assert found["valid_answers"] == (24 + 288) / 2
    assert found["uniform_answers"] == pytest.approx(measures.uniform_answers(3, 24) / 2)
    assert found["uniform_entropy_bits"] == pytest.approx(measures.uniform_entropy_bits(3, 24))
    assert "pass_at_16" not in found


def test_failed_samples_are_counted_apart() -> None:
    cell = Cell("addition3", "a", None, None, None, None, 0.0, "top", 0, num_prompts=2, n=1, canvas_len=8)
    samples = rows((0, 1.0, "x")) + rows((1, None, "y"), error="it failed", nfe=99)  # type: ignore[arg-type]
    found = measures.cell_row(cell, STUDY_TASKS["addition3"], ["1+1=", "1+2="], samples, microseconds=500.0)
    assert (found["num_samples"], found["num_failed"], found["nfe"], found["score"]) == (1, 1, 4.0, 1.0)


@given(st.integers(1, 5), st.integers(1, 4))
def test_uniform_draws_have_the_mean_of_all_draws(num_draws: int, num_answers: int) -> None:
    every = [Counter(draw) for draw in itertools.product(range(num_answers), repeat=num_draws)]
    assert measures.uniform_answers(num_draws, num_answers) == pytest.approx(np.mean([len(c) for c in every]))
    assert measures.uniform_entropy_bits(2000, 4) == pytest.approx(2, abs=0.01), "of many, too"
    entropies = [measures.entropy_bits(list(c.values())) for c in every]
    found = measures.uniform_entropy_bits(num_draws, num_answers)
    assert found == pytest.approx(np.mean(entropies), abs=1e-9)


@pytest.mark.parametrize("name", ["sudoku4x4", "sudoku6x6", "addition3", "sudoku4x4_open", "sudoku6x6_open"])
def test_valid_answers_are_right_answers(name: str) -> None:
    task = STUDY_TASKS[name]
    for prompt in task.texts(0, 10):
        answers = task.valid_answers(prompt)
        assert len(answers) == len(set(answers)) >= (4 if name.endswith("open") else 1)
        assert all(task.score(prompt, answer) == 1 for answer in answers)


def test_no_right_answer_is_missing() -> None:
    prompts, _ = SUDOKU_4X4.sample(np.random.default_rng(0), 8, blanks=5)
    for prompt in prompts:
        free = [place for place, cell in enumerate(prompt) if cell == "."]
        expected = []
        for digits in itertools.product("1234", repeat=len(free)):
            cells = list(prompt[:16])
            for place, digit in zip(free, digits, strict=True):
                cells[place] = digit
            expected += ["".join(cells)] * SUDOKU_4X4.is_correct(prompt, "".join(cells))
        assert sorted(SUDOKU_4X4.valid_answers(prompt)) == expected
    assert len(SUDOKU_4X4.valid_answers("................=")) == 288, "all grids of the game"


def test_more_prompts_begin_with_the_same_ones() -> None:
    for task in STUDY_TASKS.values():
        assert task.texts(0, 6)[:4] == task.texts(0, 4)
        assert task.texts(1, 4) != task.texts(0, 4)


def test_generated_problems_are_judged_by_their_generator() -> None:
    task = GymTask("chain_sum", 8, {"max_terms": 2})
    texts = task.texts(0, 5)
    assert task.texts(0, 6)[:5] == texts != task.texts(1, 5)
    for text in texts:
        first, sign, second = text.split(": ")[1].split()[:3]
        answer = int(first) + int(sign + second)
        assert task.score(text, str(answer)) == 1
        assert task.score(text, str(answer + 1)) < 1
    assert task.valid_answers(texts[0]) == ()
