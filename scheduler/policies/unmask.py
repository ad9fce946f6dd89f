"""Unmask policies: which masked positions of the active block are committed in a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from remask.scheduler.policies.base import Probability, Steps, UnmaskPolicy, block_steps

__all__ = ["Bernoulli", "CappedThreshold", "Dream", "EntropyBound", "Factor", "Schedule", "Threshold"]


class Schedule(UnmaskPolicy, frozen=True, tag="schedule"):
    """Commits the n best masked positions in each step, so that a block takes its share of `steps` (LLaDA,
    arXiv 2502.09992).

    Attributes:
        steps: Forwards for the whole canvas, divided among the blocks by length. None: one token per step.
        score: Order of the positions: the proposal's probability, random, p1 - p2, or -entropy.
    """

    steps: Steps | None = None
    score: Literal["confidence", "random", "margin", "entropy"] = "confidence"

    def head_needs(self) -> frozenset[str]:
        return frozenset({self.score}) & {"margin", "entropy"}

    def random_streams(self) -> frozenset[str]:
        return frozenset({"order"} if self.score == "random" else ())

    def block_params(self, block_lens: Sequence[int]) -> dict[str, list[float]]:
        return block_steps(self.steps, block_lens)


class Threshold(UnmaskPolicy, frozen=True, tag="threshold"):
    """Commits the best masked position and each other one with confidence >= t (Fast-dLLM, arXiv
    2505.22618).

    Attributes:
        t: Confidence from which a position is committed.
    """

    t: Probability = 0.9


class Factor(UnmaskPolicy, frozen=True, tag="factor"):
    """Commits the longest run of the sorted confidences whose n-th is at least 1 - f/(n+1) (Fast-dLLM's
    factor rule, arXiv 2505.22618).

    Attributes:
        f: Larger values commit more positions.
        strict: Use the paper's rule, (n+1)(1-c) < f. False: the published code's rule, which also commits the
            last masked position if only that one fails.
    """

    f: Annotated[float, Meta(ge=0.0, le=1e6)] = 1.0
    strict: bool = False


class CappedThreshold(UnmaskPolicy, frozen=True, tag="capped_threshold"):
    """Commits positions with confidence > t1: of m masked ones at least the best and at most
    min(max(floor(0.7 m), 5), 20) (WINO's draft rule, arXiv 2507.18578).

    Attributes:
        t1: Confidence above which a position is committed.
    """

    t1: Probability = 0.6


class EntropyBound(UnmaskPolicy, frozen=True, tag="entropy_bound"):
    """Commits the best k positions, with the largest k for which sum H - max H <= g over them, at least one
    (EB-sampler, arXiv 2505.24857).

    Attributes:
        g: Bound on the error of committing them together, in nats. Entropies are of the untempered softmax.
        order: Order of the positions: the lowest entropy, the largest confidence, or the largest p1 - p2.
    """

    g: Annotated[float, Meta(ge=0.0, le=1e6)] = 0.1
    order: Literal["entropy", "confidence", "margin"] = "entropy"

    def head_needs(self) -> frozenset[str]:
        return frozenset({"entropy", self.order}) & {"margin", "entropy"}


class Bernoulli(UnmaskPolicy, frozen=True, tag="bernoulli"):
    """Commits each position with probability c^k, and the best one if none is drawn.

    Attributes:
        k: Larger values commit fewer positions; 0 commits all.
    """

    k: Annotated[float, Meta(ge=0.0, le=1e6)] = 1.0

    def random_streams(self) -> frozenset[str]:
        return frozenset({"accept"})


class Dream(UnmaskPolicy, frozen=True, tag="dream"):
    """Commits floor(m (1 - t_{k+1} / t_k)) of m masked positions in step k, which may be none, and all that
    are left in the last step (Dream's generation code, per sequence). The timesteps are
    t = linspace(1, eps, steps + 1). The canvas is one block.

    Attributes:
        steps: Number of forwards. None: the canvas length.
        alg: Order of the positions, of the softmax that tokens are drawn from: the proposal's probability
            (`maskgit_plus`), p1 - p2 (`topk_margin`) or -entropy (`entropy`). `origin` commits each position
            with probability 1 - t_{k+1} / t_k.
        alg_temp: Above 0, positions are drawn without replacement from softmax(score / alg_temp).
        eps: Last timestep.
    """

    steps: Steps | None = None
    alg: Literal["entropy", "maskgit_plus", "topk_margin", "origin"] = "entropy"
    alg_temp: Annotated[float, Meta(ge=0.0, le=1e6)] = 0.0
    eps: Annotated[float, Meta(gt=0.0, lt=1.0)] = 1e-3

    whole_canvas: ClassVar[bool] = True
    always_commits: ClassVar[bool] = False

    def head_needs(self) -> frozenset[str]:
        return frozenset({{"topk_margin": "margin"}.get(self.alg, self.alg)}) & {"margin", "entropy"}

    def random_streams(self) -> frozenset[str]:
        if self.alg == "origin":
            return frozenset({"accept"})
        return frozenset({"order"} if self.alg_temp > 0 else ())

    def ranks_as_drawn(self) -> bool:
        return True

    def block_params(self, block_lens: Sequence[int]) -> dict[str, list[float]]:
        return block_steps(self.steps, block_lens)
