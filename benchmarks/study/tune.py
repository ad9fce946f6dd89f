"""`remask study tune`: the settings to use for a task, by successive halving on accuracy and forwards.

All settings run on a few rows of the task, the better half of them on more, and so on. Half of the rows
choose. On the other half the settings that are left run one after another, which gives their reported
accuracy, with intervals, and their time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np

from remask import LLM, InvalidRequest
from remask.benchmarks.study.analysis import Point, Values, interpolated, interval, resampled_means
from remask.benchmarks.study.candidates import Candidate, candidates
from remask.benchmarks.study.sandbox import CheckFailed
from remask.benchmarks.study.tasks import StudyTask
from remask.scheduler.request import Request

SEED = 0  # of the split of the rows, and of the bootstrap
SLACK = 0.01  # a setting this far below the best is as good, if no bound is given
MIN_ROWS = 4
FEWEST_ROWS = 2  # of a round
KEPT = 12  # settings in the last round
FINALISTS = 5  # of those with remasking and of those without, whose figures are reported
CHOOSE_SHARE = 0.5  # of the time
REPORT_BATCH = 64  # canvases of a timed batch
MAX_LIVE = 512  # samples in the engine at a time
UNSHARED = 1.5  # times as long as in the batches of all settings, which share rows

Progress: TypeAlias = Callable[[str, int, int], None]


class Goal(NamedTuple):
    """What is sought: the best accuracy within `max_forwards`, or the fewest forwards from `min_accuracy` on,
    or (both None) the fewest forwards at most `SLACK` below the best."""

    max_forwards: float | None = None
    min_accuracy: float | None = None

    def order(self, results: Sequence[Result]) -> list[Result]:
        """Results from the best to the worst."""
        if self.max_forwards is not None:
            bound = self.max_forwards
            return sorted(results, key=lambda r: (max(0.0, r.forwards - bound), -r.accuracy, r.forwards))
        wanted = self.min_accuracy
        if wanted is None:
            wanted = max(r.accuracy for r in results) - SLACK
        return sorted(
            results, key=lambda r: (max(0.0, round(wanted - r.accuracy, 9)), r.forwards, -r.accuracy)
        )

    def is_reached(self, result: Result) -> bool:
        if self.max_forwards is not None:
            return result.forwards <= self.max_forwards
        return self.min_accuracy is None or result.accuracy >= self.min_accuracy


class Result(NamedTuple):
    """A setting on some rows.

    Attributes:
        scores, nfe: of each row.
        milliseconds: of a sample in batches of its own; 0: not measured.
    """

    candidate: Candidate
    scores: Values
    nfe: Values
    milliseconds: float = 0.0

    @property
    def accuracy(self) -> float:
        return float(self.scores.mean())

    @property
    def forwards(self) -> float:
        return float(self.nfe.mean())

    @property
    def point(self) -> Point:
        """As the study compares settings."""
        costs = {"nfe": self.forwards, "milliseconds": self.milliseconds}
        return Point(None, costs, {"score": self.scores})


class Gain(NamedTuple):
    """What a setting with remasking adds to the best ones without at an equal cost: the difference of the
    accuracies with its interval, and whether it costs more than all of them."""

    cost: str
    difference: float
    low: float
    high: float
    beyond: bool


class Tuned(NamedTuple):
    """The outcome.

    Attributes:
        chosen: the settings to use, with their figures on the reporting rows.
        is_reached: whether they reach the goal on the rows that chose.
        finalists: all settings with reported figures, by forwards.
        remasking: the best setting with remasking among them; None: there is none.
        gains: what it adds at equal forwards and at equal time.
        num_choosing, num_reporting: rows.
        num_failed: samples that could not be judged.
    """

    chosen: Result
    is_reached: bool
    finalists: list[Result]
    remasking: Result | None
    gains: list[Gain]
    num_choosing: int
    num_reporting: int
    num_failed: int


class Tuner:
    """Chooses settings for a task within a time.

    Args:
        llm: the engine.
        task: the task, of at least two rows.
        goal: what is sought.
        deadline: monotonic seconds.
        progress: called with the work, the samples done and all samples.
    """

    def __init__(self, llm: LLM, task: StudyTask, goal: Goal, deadline: float, progress: Progress) -> None:
        num_rows = task.num_prompts
        assert num_rows is not None, "a file has an end"
        self._llm, self._task, self._goal, self._progress = llm, task, goal, progress
        self._started, self._deadline = time.monotonic(), deadline
        texts = task.texts(SEED, num_rows)
        self._choosing, self._reporting = texts[: num_rows // 2], texts[num_rows // 2 :]
        self._prompts = dict(zip(texts, task.prompts(llm, texts), strict=True))
        self._found: dict[Candidate, dict[int, tuple[float, int]]] = {}  # score and forwards by row
        self._num_failed = 0
        self._seconds_a_sample = 0.0  # while choosing

    def run(self) -> Tuned:
        """Chooses, and measures what is reported.

        Raises:
            InvalidRequest: the time is too short for one row of all settings.
        """
        left = self._choose()
        ordered = self._goal.order(left)
        finalists = self._report(_finalists(ordered))
        by_candidate = {result.candidate: result for result in finalists}
        chosen = by_candidate[ordered[0].candidate]
        best = next((r.candidate for r in ordered if r.candidate.remask is not None), None)
        remasking = by_candidate[best] if best is not None else None
        plain = [result for result in finalists if result.candidate.remask is None]
        return Tuned(
            chosen=chosen,
            is_reached=self._goal.is_reached(ordered[0]),
            finalists=sorted(finalists, key=lambda result: result.forwards),
            remasking=remasking,
            gains=gains(remasking, plain) if remasking is not None and plain else [],
            num_choosing=len(ordered[0].scores),
            num_reporting=len(chosen.scores),
            num_failed=self._num_failed,
        )

    def _choose(self) -> list[Result]:
        """The settings that are left after all rounds, on the rows that choose."""
        left = candidates(self._task.canvas_len)
        num_rounds = max(1, math.ceil(math.log2(len(left) / KEPT)) + 1)
        ends = [max(2, len(self._choosing) >> (num_rounds - 1 - i)) for i in range(num_rounds)]
        work = [(len(left) >> i) * (end - begin) for i, (begin, end) in enumerate(pairwise([0, *ends]))]
        end_of_choosing = self._started + CHOOSE_SHARE * (self._deadline - self._started)
        results: list[Result] = []
        started = time.monotonic()
        for i, end in enumerate(ends):
            share = work[i] / max(1, sum(work[i:]))
            soft = time.monotonic() + share * (end_of_choosing - time.monotonic())
            self._try(left, end, soft, end_of_choosing)
            results = self._results(left)
            if i + 1 < num_rounds:
                left = [result.candidate for result in self._better_half(results)]
        self._seconds_a_sample = (time.monotonic() - started) / sum(map(len, self._found.values()))
        return results

    def _try(self, left: Sequence[Candidate], num_rows: int, soft: float, hard: float) -> None:
        """Runs settings on the first rows, row by row.

        Args:
            left: the settings.
            num_rows: how many rows.
            soft: monotonic seconds from which on `FEWEST_ROWS` rows are enough.
            hard: monotonic seconds at which it ends.
        """
        waiting: dict[str, tuple[Candidate, int]] = {}
        total = len(left) * num_rows
        done = sum(len(self._found.get(own, ())) for own in left)
        enough = len(left) * FEWEST_ROWS
        served = self._llm.engine.serve(self._requests(left, num_rows, waiting), max_live=MAX_LIVE)
        for output in served:
            candidate, row = waiting.pop(output.request_id)
            text = self._choosing[row]
            score = self._score(text, output.outputs[0].text, output.error)
            self._found.setdefault(candidate, {})[row] = score, output.outputs[0].nfe
            done += 1
            self._progress(f"choosing among {len(left)}", done, total)
            now = time.monotonic()
            if now > hard or (now > soft and done >= enough):
                served.close()
                return

    def _requests(
        self, left: Sequence[Candidate], num_rows: int, waiting: dict[str, tuple[Candidate, int]]
    ) -> Iterator[Request]:
        intake = self._llm.engine.intake
        for row, text in enumerate(self._choosing[:num_rows]):
            for candidate in left:
                if row not in self._found.get(candidate, ()):
                    params = candidate.params(self._task.canvas_of(text))
                    request = intake.request(intake.check(self._prompts[text], params))
                    waiting[request.request_id] = candidate, row
                    yield request

    def _score(self, text: str, answer: str | None, error: str | None) -> float:
        """The score of a sample; 0 if it cannot be judged."""
        try:
            if error is None:
                return self._task.score(text, answer or "")
        except CheckFailed:
            pass
        self._num_failed += 1
        return 0.0

    def _results(self, left: Sequence[Candidate]) -> list[Result]:
        """Of settings, on the rows that all of them have."""
        rows = sorted(set.intersection(*(set(self._found.get(own, ())) for own in left)))
        if not rows:
            problem = f"is too short: not one row was finished with all {len(left)} settings; give more"
            raise InvalidRequest("minutes", round((self._deadline - self._started) / 60, 2), problem)
        found = []
        for candidate in left:
            pairs = [self._found[candidate][row] for row in rows]
            scores, nfe = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
            found.append(Result(candidate, scores, nfe))
        return found

    def _better_half(self, results: Sequence[Result]) -> list[Result]:
        """Half of the settings: in turn the best ones for the goal, and those nearest to the frontiers with
        and without remasking, so that what is reported is not missing."""
        plain, remasking = _by_kind(results)
        queues = [self._goal.order(results), _by_regret(plain), _by_regret(remasking)]
        kept: dict[Candidate, Result] = {}
        wanted = max(KEPT, -(-len(results) // 2))
        for place in range(len(results)):
            for queue in queues:
                if place < len(queue) and len(kept) < wanted:
                    kept.setdefault(queue[place].candidate, queue[place])
        return list(kept.values())

    def _report(self, finalists: Sequence[Candidate]) -> list[Result]:
        """Runs settings on the reporting rows, in turn in batches of their own, until the time is over; every
        setting has the same rows."""
        found: dict[Candidate, list[tuple[float, int]]] = {own: [] for own in finalists}
        seconds = dict.fromkeys(finalists, 0.0)
        texts, done = self._reporting, 0
        a_row = UNSHARED * len(finalists) * self._seconds_a_sample
        size = min(REPORT_BATCH, -(-len(texts) // 2))
        while done < len(texts):
            started = time.monotonic()
            size = min(size, max(done == 0, int((self._deadline - started) / a_row)))
            if size < 1:
                break
            batch = texts[done : done + size]
            prompts = [self._prompts[text] for text in batch]
            for candidate in finalists:
                params = [candidate.params(self._task.canvas_of(text)) for text in batch]
                before = time.monotonic()
                outputs = self._llm.generate(prompts, params, use_tqdm=False)
                seconds[candidate] += time.monotonic() - before
                for text, output in zip(batch, outputs, strict=True):
                    score = self._score(text, output.outputs[0].text, output.error)
                    found[candidate].append((score, output.outputs[0].nfe))
                num = done * len(finalists) + len(batch) * (finalists.index(candidate) + 1)
                self._progress("measuring", num, len(texts) * len(finalists))
            done += len(batch)
            a_row = (time.monotonic() - started) / len(batch)
        results = []
        for candidate, pairs in found.items():
            scores, nfe = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
            results.append(Result(candidate, scores, nfe, 1000 * seconds[candidate] / len(pairs)))
        return results


def gains(own: Result, plain: Sequence[Result]) -> list[Gain]:
    """What a setting adds to those of `plain` at equal forwards and at equal time."""
    curve, found = [result.point for result in plain], []
    for cost in ("nfe", "milliseconds"):
        base, beyond = interpolated(curve, cost, own.point.costs[cost], "score")
        difference = own.scores - base
        low, high = accuracy_interval(difference)
        found.append(Gain(cost, float(difference.mean()), low, high, beyond))
    return found


def accuracy_interval(scores: Values) -> tuple[float, float]:
    """The interval of a mean, by a bootstrap over rows."""
    return interval(resampled_means(scores, np.random.default_rng(SEED)))


def _by_kind(results: Sequence[Result]) -> tuple[list[Result], list[Result]]:
    """Those without and those with remasking."""
    return (
        [result for result in results if result.candidate.remask is None],
        [result for result in results if result.candidate.remask is not None],
    )


def _by_regret(results: Sequence[Result]) -> list[Result]:
    """Results by what they lack to the best accuracy for as many forwards; those on the frontier first."""

    def regret(own: Result) -> float:
        return max(other.accuracy for other in results if other.forwards <= own.forwards) - own.accuracy

    return sorted(results, key=lambda own: (regret(own), own.forwards))


def _finalists(ordered: Sequence[Result]) -> list[Candidate]:
    """The settings whose figures are reported: of those with and of those without remasking the first in the
    order of the goal and the others of the frontier, evenly chosen by forwards."""
    found: dict[Candidate, None] = {ordered[0].candidate: None}
    for own in _by_kind(ordered):
        if own:
            frontier = _frontier(own)
            places = np.linspace(0, len(frontier) - 1, min(len(frontier), FINALISTS)).round().astype(int)
            found |= dict.fromkeys([own[0].candidate, *(frontier[place].candidate for place in places)])
    return list(found)


def _frontier(results: Sequence[Result]) -> list[Result]:
    """Results that are better than all with as few forwards, by forwards."""
    found: list[Result] = []
    for own in sorted(results, key=lambda result: (result.forwards, -result.accuracy)):
        if not found or own.accuracy > found[-1].accuracy:
            found.append(own)
    return found
