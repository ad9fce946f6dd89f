"""Decoding policies: torch-free structs, their bounds, the rows and memory they need.

Each policy has two halves. The *spec* here is what travels on the wire and what planning reads; the *kernel*
in `remask.workers.strategies` is the tensor function of the same name. `UNMASK` and `REMASK` are the
registries that tie them: the tagged unions for decoding are built from what they hold. What each policy
computes is specified by the papers and reference decoders named in the docstrings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import msgspec
from msgspec import Meta

from remask.scheduler.errors import InvalidRequest

WHOLE_CANVAS = 2**31 - 1  # a preset's block length is cut to the canvas
Probability = Annotated[float, Meta(ge=0.0, le=1.0)]


class MemoryField(NamedTuple):
    """One fp32 tensor that a policy carries from step to step; it is reset when a block begins."""

    name: str
    per_slot: bool  # one number a slot of the block, else one a canvas
    initial: float


class UnmaskPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Decides which masked positions of the active block are committed in a step."""

    memory: ClassVar[tuple[MemoryField, ...]] = ()

    def head_needs(self) -> frozenset[str]:
        """Statistics beyond the proposal's probability that the kernel reads: of "margin" and "entropy"."""
        return frozenset()

    def random_streams(self) -> frozenset[str]:
        """Which of the streams order, accept and remask the kernel reads, whatever the temperature."""
        return frozenset()

    def block_params(self, block_lens: Sequence[int]) -> dict[str, list[float]]:
        """Parameters that differ from block to block, one value a block, for blocks of these lengths."""
        return {}


class RemaskPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Decides which committed positions of the active block turn back into masks in a step."""

    memory: ClassVar[tuple[MemoryField, ...]] = ()
    commits: ClassVar[bool] = False  # brings its own commits: there is no unmask policy beside it

    def needs_shadow_rows(self) -> bool:
        """Whether a forward needs one extra row a slot of the active block."""
        return False

    def shadows_see_each_other(self) -> bool:
        """Whether a shadow row sees all shadow rows of its block, or only itself."""
        return True

    def needs_committed_rows(self) -> bool:
        """Whether the kernel reads statistics of the rows of committed slots, too."""
        return False

    def random_streams(self) -> frozenset[str]:
        """Which of the streams order, accept and remask the kernel reads, whatever the temperature."""
        return frozenset()

    def check(self, unmask: UnmaskPolicy | None) -> None:
        """Raises InvalidRequest where this policy cannot work together with `unmask`."""


class Schedule(UnmaskPolicy, frozen=True, tag="schedule"):
    """The n best masked positions a step, so that a block takes its share of `steps` (LLaDA, arXiv
    2502.09992).

    Attributes:
        steps: forwards for the whole canvas, shared out over the blocks by length; None: one token a step.
        score: what "best" means: the proposal's probability, a random order, p1 - p2, or -entropy.
    """

    steps: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    score: Literal["confidence", "random", "margin", "entropy"] = "confidence"

    def head_needs(self) -> frozenset[str]:
        return frozenset({self.score}) & {"margin", "entropy"}

    def random_streams(self) -> frozenset[str]:
        return frozenset({"order"} if self.score == "random" else ())

    def block_params(self, block_lens: Sequence[int]) -> dict[str, list[float]]:
        total = self.steps if self.steps is not None else sum(block_lens)
        return {"block_steps": [float(n) for n in share_steps(total, block_lens)]}


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


WINO_MEMORY = (MemoryField("prev_accept", per_slot=False, initial=30.0),)
LOW_PROB_MEMORY = (
    MemoryField("times", per_slot=True, initial=0.0),
    MemoryField("posts", per_slot=False, initial=0.0),
)


class Wino(RemaskPolicy, frozen=True, tag="wino"):
    """Remasks committed tokens whose leave-one-out probability, read off shadow rows, is below t2 (WINO,
    arXiv 2507.18578).

    Nothing is remasked in a step that commits a single token, and fewer tokens are remasked than were
    committed: by the step before (`prev_accept`, the published code) or by this one (`cur_accept`).

    Attributes:
        t2: tokens below this probability are remasked.
        budget: whose number of commits bounds the remasked.
        tile: whether a shadow row sees all shadow rows of its block (published) or only itself, which in a
            model of one layer gives the exact leave-one-out probability, and needs fewer rows.
        ban_old: a removed token may not be proposed again at its position in this block.
    """

    t2: Probability = 0.9
    budget: Literal["prev_accept", "cur_accept"] = "prev_accept"
    tile: Literal["all", "self"] = "all"
    ban_old: bool = False

    memory: ClassVar[tuple[MemoryField, ...]] = WINO_MEMORY

    def needs_shadow_rows(self) -> bool:
        return True

    def shadows_see_each_other(self) -> bool:
        return self.tile == "all"

    def check(self, unmask: UnmaskPolicy | None) -> None:
        _refuse_ban_old(self.ban_old)


class Saber(RemaskPolicy, frozen=True, tag="saber"):
    """Commits what is surer than the block's commits were on average, at least n, and takes back the tokens
    whose row lost most certainty since the step before (Saber, arXiv 2510.18165). Brings its own commits.

    Attributes:
        n: least commits of a step; n // 2 are taken back at least.
        mu: one token is taken back for each `mu` commits.
    """

    n: Annotated[int, Meta(ge=1, le=2**20)] = 2
    mu: Annotated[int, Meta(ge=1, le=2**20)] = 8

    commits: ClassVar[bool] = True
    memory: ClassVar[tuple[MemoryField, ...]] = (
        MemoryField("ever", per_slot=True, initial=0.0),
        MemoryField("last_confidence", per_slot=True, initial=0.0),
        MemoryField("top_before", per_slot=True, initial=0.0),
    )

    def needs_committed_rows(self) -> bool:
        return True


class LowProb(RemaskPolicy, frozen=True, tag="low_prob"):
    """Remasks visible tokens whose probability at their own row fell below t, the lowest first (targeted
    remasking).

    Attributes:
        t: tokens below this probability are remasked.
        max_times: how often a position of a block may be remasked.
        max_share: of the tokens committed before the step, the share that it may remask; at least one.
        post_steps: forwards after the last mask, until one of them remasks nothing; 0: the block ends then.
        ban_old: a removed token may not be proposed again at its position in this block.
    """

    t: Probability = 0.3
    max_times: Annotated[int, Meta(ge=0, le=2**20)] = 1
    max_share: Probability = 0.25
    post_steps: Annotated[int, Meta(ge=0, le=2**20)] = 0
    ban_old: bool = False

    memory: ClassVar[tuple[MemoryField, ...]] = LOW_PROB_MEMORY

    def needs_committed_rows(self) -> bool:
        return True

    def check(self, unmask: UnmaskPolicy | None) -> None:
        _refuse_ban_old(self.ban_old)


class RandomRemask(RemaskPolicy, frozen=True, tag="random"):
    """Remasks as many positions as another policy would, drawn from the same candidates: the control arm of a
    comparison, at that policy's cost.

    Attributes:
        like: the policy that says how many; the other fields are that policy's.
    """

    like: Literal["wino", "low_prob"] = "wino"
    t2: Probability = 0.9
    budget: Literal["prev_accept", "cur_accept"] = "prev_accept"
    tile: Literal["all", "self"] = "all"
    t: Probability = 0.3
    max_times: Annotated[int, Meta(ge=0, le=2**20)] = 1
    max_share: Probability = 0.25
    post_steps: Annotated[int, Meta(ge=0, le=2**20)] = 0
    ban_old: bool = False

    memory: ClassVar[tuple[MemoryField, ...]] = WINO_MEMORY + LOW_PROB_MEMORY

    def needs_shadow_rows(self) -> bool:
        return self.like == "wino"

    def shadows_see_each_other(self) -> bool:
        return self.tile == "all"

    def needs_committed_rows(self) -> bool:
        return self.like == "low_prob"

    def random_streams(self) -> frozenset[str]:
        return frozenset({"remask"})

    def check(self, unmask: UnmaskPolicy | None) -> None:
        _refuse_ban_old(self.ban_old)
        own = (Wino if self.like == "wino" else LowProb).__struct_fields__
        for name, value in msgspec.structs.asdict(self).items():
            if name not in ("like", *own) and value != getattr(RandomRemask(), name):
                raise InvalidRequest(f"remask.{name}", value, f"is no parameter of {self.like}; leave it out")


def _refuse_ban_old(ban_old: bool) -> None:
    if ban_old:
        raise InvalidRequest("remask.ban_old", ban_old, "is not supported yet; use False")


UNMASK: dict[str, type[UnmaskPolicy]] = {
    "schedule": Schedule,
    "threshold": Threshold,
    "factor": Factor,
    "capped_threshold": CappedThreshold,
    "entropy_bound": EntropyBound,
    "bernoulli": Bernoulli,
}
REMASK: dict[str, type[RemaskPolicy]] = {
    "wino": Wino,
    "saber": Saber,
    "low_prob": LowProb,
    "random": RandomRemask,
}

PRESETS: dict[str, dict[str, Any]] = {
    "llada": {"unmask": Schedule()},
    "fast-dllm": {"unmask": Threshold(0.9)},
    "wino": {"unmask": CappedThreshold(0.6), "remask": Wino(0.9), "block_length": 128},
    "saber": {"remask": Saber(), "block_length": WHOLE_CANVAS},
}


def share_steps(total: int, block_lens: Sequence[int]) -> list[int]:
    """Steps for each block, by length: largest remainder (the lower block first), at least one each."""
    slots = sum(block_lens)
    shares = [total * length // slots for length in block_lens]
    by_remainder = sorted(range(len(block_lens)), key=lambda i: (-(total * block_lens[i] % slots), i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return [max(1, share) for share in shares]
