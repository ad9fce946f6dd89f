"""Measures over the samples of a cell: quality, diversity, remasking and cost."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from remask.benchmarks.study.grid import Cell
from remask.benchmarks.study.tasks import StudyTask

MAX_NGRAM = 3  # of distinct-n
BLEU_NGRAM = 4
PASS_AT = (1, 4, 16, 64)
_COUNTS = (
    "nfe",
    "num_visible_tokens",
    "num_commits",
    "num_remasks",
    "num_refills",
    "num_flip_flops",
    "num_repairs",
    "num_damages",
    "num_non_top",
)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The unbiased estimate of the probability that one of `k` samples is right (Chen et al. 2021):
    1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def entropy_bits(counts: Sequence[int]) -> float:
    """The entropy of a sample in bits, without correction for its size."""
    share = np.array([count for count in counts if count], dtype=np.float64)
    share /= share.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0


def uniform_answers(num_draws: int, num_answers: int) -> float:
    """The expected number of different answers if some are drawn uniformly, with replacement."""
    return num_answers * (1 - (1 - 1 / num_answers) ** num_draws)


def uniform_entropy_bits(num_draws: int, num_answers: int) -> float:
    """The expected `entropy_bits` of answers that are drawn uniformly, with replacement."""
    count = np.arange(1, num_draws)  # (of 0 and of all draws the entropy is 0)
    p = 1 / num_answers
    if p == 1 or not len(count):
        return 0.0
    log_factorial = np.array([math.lgamma(k + 1) for k in range(num_draws + 1)])
    log_ways = log_factorial[-1] - log_factorial[count] - log_factorial[num_draws - count]
    weight = np.exp(log_ways + count * math.log(p) + (num_draws - count) * math.log1p(-p))
    return float(-num_answers * (weight * count / num_draws * np.log2(count / num_draws)).sum())


def distinct_ngrams(texts: Sequence[Sequence[str]], n: int) -> float:
    """Unique n-grams of some texts divided by all; 0 if there are none (Li et al. 2016)."""
    grams = [gram for words in texts for gram in _ngrams(words, n)]
    return len(set(grams)) / max(1, len(grams))


def self_bleu(texts: Sequence[Sequence[str]]) -> float:
    """The mean BLEU of each text against the others, 0 to 100 (Zhu et al. 2018). Counts of n-grams of more
    than one word are smoothed by 1 (Lin and Och 2004)."""
    scores = []
    for index, words in enumerate(texts):
        others = [other for place, other in enumerate(texts) if place != index]
        if not others or not words:
            continue
        precisions = [_precision(words, others, n) for n in range(1, BLEU_NGRAM + 1)]
        nearest = min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        brevity = math.exp(min(0.0, 1 - nearest / len(words)))
        scores.append(100 * brevity * math.prod(precisions) ** (1 / BLEU_NGRAM))
    return float(np.mean(scores)) if scores else 0.0


def _precision(words: Sequence[str], others: Sequence[Sequence[str]], n: int) -> float:
    """The share of a text's n-grams that another text has, as often as one of them has it."""
    own, most = Counter(_ngrams(words, n)), Counter[tuple[str, ...]]()
    for other in others:
        most |= Counter(_ngrams(other, n))
    smooth = n > 1
    return ((own & most).total() + smooth) / (own.total() + smooth)


def order_diversity(orders: Sequence[Sequence[int]]) -> float:
    """The mean over pairs of 1 - LCS / n of the orders in which two samples filled the n positions that both
    have filled; 0: all samples have one order."""
    distances = []
    for a, b in itertools.combinations(orders, 2):
        shared = set(a) & set(b)
        first, second = ([position for position in own if position in shared] for own in (a, b))
        distances.append(1 - common_subsequence(first, second) / max(1, len(shared)))
    return _mean(distances)


def common_subsequence(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common subsequence of two permutations of the same numbers: the longest ascending
    subsequence of the places that `a`'s entries have in `b`."""
    place = {entry: index for index, entry in enumerate(b)}
    tails: list[int] = []
    for index in (place[entry] for entry in a):
        where = int(np.searchsorted(tails, index))
        tails[where : where + 1] = [index]
    return len(tails)


def commit_order(commit_steps: Sequence[int]) -> list[int]:
    """The filled positions in the order of their commits, equal steps from left to right."""
    filled = [position for position, step in enumerate(commit_steps) if step]
    return sorted(filled, key=lambda position: commit_steps[position])


def mean_score(samples: Sequence[dict[str, Any]]) -> float:
    """The mean score of the samples of a prompt."""
    return _mean([sample["score"] for sample in samples])


def unique_texts(samples: Sequence[dict[str, Any]]) -> int:
    """Distinct texts of the samples of a prompt."""
    return len({sample["text"] for sample in samples})


def right_answers(samples: Sequence[dict[str, Any]]) -> int:
    """Distinct right answers of the samples of a prompt."""
    return len({sample["text"] for sample in samples if sample["score"] == 1})


def pass_at(samples: Sequence[dict[str, Any]], k: int) -> float:
    """pass@k of a prompt from its samples, at least `k`."""
    return pass_at_k(len(samples), sum(sample["score"] == 1 for sample in samples), k)


def cell_row(
    cell: Cell,
    task: StudyTask,
    texts: Sequence[str],
    samples: Sequence[dict[str, Any]],
    microseconds: float,
) -> dict[str, Any]:
    """The measures of a cell.

    Args:
        cell: the setting.
        task: its task.
        texts: the prompts of the task.
        samples: rows of its samples, ordered by prompt.
        microseconds: of one forward.
    """
    good = [sample for sample in samples if sample["error"] is None]
    by_prompt = [list(own) for _, own in itertools.groupby(good, key=lambda sample: sample["prompt"])]
    total = {name: sum(sample[name] for sample in good) for name in _COUNTS}
    row: dict[str, Any] = {
        "num_prompts": len(by_prompt),
        "num_samples": len(good),
        "num_failed": len(samples) - len(good),
        "score": _mean([sample["score"] for sample in good]),
        "nfe": _mean([sample["nfe"] for sample in good]),
        "query_rows": _mean([sample["num_query_rows"] for sample in good]),
        "query_key_pairs": _mean([sample["num_query_key_pairs"] for sample in good]),
        "milliseconds": _mean([sample["nfe"] for sample in good]) * microseconds / 1000,
        "tokens_per_forward": total["num_visible_tokens"] / max(1, total["nfe"]),
        "remasks": total["num_remasks"] / max(1, len(good)),
        "remask_rate": total["num_remasks"] / max(1, total["num_commits"]),
        "flip_flop": _share(total["num_flip_flops"], total["num_refills"]),
        "useful": _share(total["num_repairs"] - total["num_damages"], total["num_refills"]),
        "non_top": _share(total["num_non_top"], total["num_commits"]),
    }
    if task.is_puzzle:
        for k in PASS_AT:
            if k <= cell.n:
                row[f"pass_at_{k}"] = _mean([pass_at(own, k) for own in by_prompt if len(own) >= k])
    if cell.n > 1:
        row |= _diversity(task, texts, by_prompt)
    return row


def _diversity(
    task: StudyTask, texts: Sequence[str], by_prompt: Sequence[Sequence[dict[str, Any]]]
) -> dict[str, float]:
    """Means over prompts of the diversity of each prompt's samples.

    `uniform_answers` and `uniform_entropy_bits` are what as many right samples have on average if they are
    drawn uniformly from all right answers.
    """
    row = {
        "unique_texts": _mean([unique_texts(own) for own in by_prompt]),
        "order_diversity": _mean(
            [order_diversity([commit_order(sample["commit_steps"]) for sample in own]) for own in by_prompt]
        ),
    }
    words = [[(sample["text"] or "").split() for sample in own] for own in by_prompt]
    if task.is_puzzle:
        right = [Counter(sample["text"] for sample in own if sample["score"] == 1) for own in by_prompt]
        row["right_answers"] = _mean([right_answers(own) for own in by_prompt])
        row["right_entropy_bits"] = _mean([entropy_bits(list(found.values())) for found in right if found])
        num_valid = [len(task.valid_answers(texts[int(own[0]["prompt"])])) for own in by_prompt]
        if all(num_valid):
            drawn = [(found.total(), count) for found, count in zip(right, num_valid, strict=True)]
            row["valid_answers"] = _mean(num_valid)
            row["uniform_answers"] = _mean([uniform_answers(*numbers) for numbers in drawn])
            row["uniform_entropy_bits"] = _mean(
                [uniform_entropy_bits(*numbers) for numbers in drawn if numbers[0]]
            )
    else:
        for n in range(1, MAX_NGRAM + 1):
            row[f"distinct_{n}"] = _mean([distinct_ngrams(own, n) for own in words])
        row["self_bleu_diversity"] = 100 - _mean([self_bleu(own) for own in words])
    return row


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _share(part: int, whole: int) -> float | None:
    """None: of nothing."""
    return part / whole if whole else None
