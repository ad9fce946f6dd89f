"""Unmask policies: which masked positions of the active block are committed in a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from remask.scheduler.policies.base import Probability, Steps, UnmaskPolicy, block_steps

__all__ = ["Bernoulli", "CappedThreshold", "Dream", "EntropyBound", "Factor", "Schedule", "Threshold"]


class Schedule(UnmaskPolicy, frozen=True, tag="schedule"):
    """The n best masked positions a step, so that a block takes its share of `steps` (LLaDA, arXiv
    2502.09992).

    Attributes:
        steps: forwards for the whole canvas, shared out over the blocks by length; None: one token a step.
        score: what "best" means: the proposal's probability, a random order, p1 - p2, or -entropy.
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
    """The best masked position always, each other with confidence >= t (Fast-dLLM, arXiv 2505.22618)."""

    t: Probability = 0.9


class Factor(UnmaskPolicy, frozen=True, tag="factor"):
    """The longest run of the sorted confidences whose n-th is at least 1 - f/(n+1) (Fast-dLLM's factor rule).

    Attributes:
        f: larger commits more.
        strict: the paper's rule, (n+1)(1-c) < f, instead of the published code's, which also commits the last
            masked position when only that one fails.
    """

    f: Annotated[float, Meta(ge=0.0, le=1e6)] = 1.0
    strict: bool = False


class CappedThreshold(UnmaskPolicy, frozen=True, tag="capped_threshold"):
    """WINO's draft rule: c > t1, at most min(max(floor(0.7 m), 5), 20) of m masked, at least the best."""

    t1: Probability = 0.6


class EntropyBound(UnmaskPolicy, frozen=True, tag="entropy_bound"):
    """The best k positions, k as large as sum H - max H <= g over them allows, at least one (EB-sampler,
    arXiv 2505.24857).

    Attributes:
        g: bound on the error of committing them together, in nats; entropies are of the untempered softmax.
        order: what "best" means: the lowest entropy, the largest confidence, or the largest p1 - p2.
    """

    g: Annotated[float, Meta(ge=0.0, le=1e6)] = 0.1
    order: Literal["entropy", "confidence", "margin"] = "entropy"

    def head_needs(self) -> frozenset[str]:
        return frozenset({"entropy", self.order}) & {"margin", "entropy"}


class Bernoulli(UnmaskPolicy, frozen=True, tag="bernoulli"):
    """Each position with probability c^k; the best one where none is drawn.

    Attributes:
        k: the larger, the more cautious; 0 commits everything.
    """

    k: Annotated[float, Meta(ge=0.0, le=1e6)] = 1.0

    def random_streams(self) -> frozenset[str]:
        return frozenset({"accept"})


class Dream(UnmaskPolicy, frozen=True, tag="dream"):
    """Dream's timesteps t = linspace(1, eps, steps + 1): of m masked positions floor(m (1 - t_{k+1} / t_k))
    are committed in step k, which may be none, and all that are left in the last (Dream's generation code,
    per sequence). The canvas is one block.

    Attributes:
        steps: forwards; None: the canvas length.
        alg: which positions: by the proposal's probability (`maskgit_plus`), by p1 - p2 or by -entropy, all
            of the softmax that tokens are drawn from; `origin`: each by chance, with 1 - t_{k+1} / t_k.
        alg_temp: above 0, positions are drawn without replacement from softmax(score / alg_temp) instead.
        eps: where the timesteps end.
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
