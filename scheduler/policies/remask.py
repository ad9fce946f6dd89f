"""Remask policies: which committed positions of the active block turn back into masks in a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from remask.scheduler.errors import InvalidRequest
from remask.scheduler.policies.base import (
    MemoryField,
    Probability,
    RemaskPolicy,
    Steps,
    UnmaskPolicy,
    block_steps,
    tag,
)
from remask.scheduler.policies.unmask import Schedule

__all__ = ["LowProb", "OracleLoo", "RandomRemask", "Rcr", "Remdm", "Saber", "Wino"]

WINO_MEMORY = (MemoryField("prev_accept", per_slot=False, initial=30.0),)
LOW_PROB_MEMORY = (
    MemoryField("times", per_slot=True, initial=0.0),
    MemoryField("posts", per_slot=False, initial=0.0),
)


class Wino(RemaskPolicy, frozen=True, tag="wino"):
    """Remasks committed tokens whose leave-one-out probability, read off shadow rows, is below t2 (WINO,
    arXiv 2507.18578).

    A step that commits a single token remasks nothing. The number of remasked tokens is below the number of
    commits of the previous step (`prev_accept`, as published) or of this one (`cur_accept`).

    Attributes:
        t2: Tokens with a lower probability are remasked.
        budget: Step whose commits bound the number of remasked tokens.
        tile: A shadow row attends to all shadow rows of its block (`all`, as published) or only to itself
            (`self`), which needs fewer rows and in a model of one layer gives the exact leave-one-out
            probability.
        ban_old: Do not propose a removed token again at its position in this block.
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

    def bans_removed(self) -> bool:
        return self.ban_old


class Rcr(RemaskPolicy, frozen=True, tag="rcr"):
    """Commits all masked positions in every step and remasks those of the block whose last proposal was the
    least confident, as many as the schedule leaves masked (running confidence remasking, arXiv 2508.13148).
    Used with `schedule`, which determines the steps.

    Attributes:
        conf: Meaning of confidence, of the softmax that tokens are drawn from: the proposal's probability,
            p1 - p2, or -entropy.
    """

    conf: Literal["prob", "margin", "entropy"] = "prob"

    always_commits: ClassVar[bool] = False
    memory: ClassVar[tuple[MemoryField, ...]] = (MemoryField("stored", per_slot=True, initial=0.0),)

    def head_needs(self) -> frozenset[str]:
        return frozenset({self.conf}) & {"margin", "entropy"}

    def ranks_as_drawn(self) -> bool:
        return True

    def block_params(self, block_lens: Sequence[int], unmask: UnmaskPolicy | None) -> dict[str, list[float]]:
        return unmask.block_params(block_lens) if unmask is not None else {}

    def check(self, unmask: UnmaskPolicy | None) -> None:
        if not isinstance(unmask, Schedule):
            other = "nothing" if unmask is None else tag(unmask)
            raise InvalidRequest("remask", "rcr", f"works beside schedule, not {other}; use unmask=schedule")
        if unmask.score != Schedule().score:
            fix = "means nothing beside rcr, which has its own conf; leave it out"
            raise InvalidRequest("unmask.score", unmask.score, fix)


class Saber(RemaskPolicy, frozen=True, tag="saber"):
    """Commits positions whose confidence exceeds the mean of the block's commits, at least n, and remasks the
    tokens whose row lost most confidence since the previous step (Saber, arXiv 2510.18165). Used without an
    unmask policy.

    Attributes:
        n: Minimum number of commits per step; at least n // 2 tokens are remasked.
        mu: One token is remasked for each `mu` commits.
    """

    n: Annotated[int, Meta(ge=1, le=2**20)] = 2
    mu: Annotated[int, Meta(ge=1, le=2**20)] = 8

    commits: ClassVar[bool] = True
    memory: ClassVar[tuple[MemoryField, ...]] = (
        MemoryField("ever", per_slot=True, initial=0.0),
        MemoryField("log_confidence", per_slot=True, initial=0.0),
        MemoryField("log_top", per_slot=True, initial=-math.inf),
    )

    def needs_committed_rows(self) -> bool:
        return True


class Remdm(RemaskPolicy, frozen=True, tag="remdm"):
    """Commits and remasks at random, so that the share of masks follows a time schedule. A last forward fills
    the remaining masks with the most probable tokens (ReMDM, arXiv 2503.00307). Used without an unmask
    policy.

    Attributes:
        steps: Forwards for the whole canvas, divided among the blocks by length, without the last forward of
            each block. None: the canvas length.
        schedule: Probability with which a committed token is remasked: min(eta, sigma_max) (`cap`),
            eta sigma_max (`rescale`), or its share of sigma_max by softmax of minus the confidence at its
            commit (`conf`).
        eta: None: 0.008 for `cap`, 0.015 for `rescale`. Not used by `conf`.
    """

    steps: Steps | None = None
    schedule: Literal["cap", "rescale", "conf"] = "cap"
    eta: Probability | None = None

    commits: ClassVar[bool] = True
    always_commits: ClassVar[bool] = False
    memory: ClassVar[tuple[MemoryField, ...]] = (MemoryField("stored", per_slot=True, initial=0.0),)

    def random_streams(self) -> frozenset[str]:
        return frozenset({"accept", "remask"})

    def block_params(self, block_lens: Sequence[int], unmask: UnmaskPolicy | None) -> dict[str, list[float]]:
        default = {"cap": 0.008, "rescale": 0.015}.get(self.schedule, 0.0)
        eta = default if self.eta is None else self.eta
        return {**block_steps(self.steps, block_lens), "eta": [eta] * len(block_lens)}

    def check(self, unmask: UnmaskPolicy | None) -> None:
        if self.schedule == "conf" and self.eta is not None:
            raise InvalidRequest("remask.eta", self.eta, "is no parameter of schedule conf; leave it out")


class LowProb(RemaskPolicy, frozen=True, tag="low_prob"):
    """Remasks visible tokens whose probability at their own row fell below t, the lowest first (targeted
    remasking).

    Attributes:
        t: Tokens with a lower probability are remasked.
        max_times: Maximum number of times a position of a block is remasked.
        max_share: Maximum share of the tokens committed before the step that it remasks; at least one token.
        post_steps: Maximum number of forwards after the last mask; the first one that remasks nothing ends
            the block. 0: the block ends with its last mask.
        ban_old: Do not propose a removed token again at its position in this block.
    """

    t: Probability = 0.3
    max_times: Annotated[int, Meta(ge=0, le=2**20)] = 1
    max_share: Probability = 0.25
    post_steps: Annotated[int, Meta(ge=0, le=2**20)] = 0
    ban_old: bool = False

    memory: ClassVar[tuple[MemoryField, ...]] = LOW_PROB_MEMORY

    def needs_committed_rows(self) -> bool:
        return True

    def bans_removed(self) -> bool:
        return self.ban_old


class RandomRemask(RemaskPolicy, frozen=True, tag="random"):
    """Remasks as many positions as another policy would, drawn at random from that policy's candidates. It is
    the control arm of a comparison and costs as much as that policy.

    Attributes:
        like: Policy that determines the number of positions. The other fields are those of that policy.
        t2: See `wino`.
        budget: See `wino`.
        tile: See `wino`.
        t: See `low_prob`.
        max_times: See `low_prob`.
        max_share: See `low_prob`.
        post_steps: See `low_prob`.
        ban_old: See both.
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

    def bans_removed(self) -> bool:
        return self.ban_old

    def check(self, unmask: UnmaskPolicy | None) -> None:
        super().check(unmask)
        own = (Wino if self.like == "wino" else LowProb).__struct_fields__
        for name, value in msgspec.structs.asdict(self).items():
            if name not in ("like", *own) and value != getattr(RandomRemask(), name):
                raise InvalidRequest(f"remask.{name}", value, f"is no parameter of {self.like}; leave it out")


class OracleLoo(RemaskPolicy, frozen=True, tag="oracle_loo"):
    """`wino` with exact leave-one-out probabilities, from an extra sequence for each committed token with its
    position masked. For studies: a forward has up to a block's length of extra sequences.

    Attributes:
        t2: See `wino`.
        budget: See `wino`.
        ban_old: See `wino`.
    """

    t2: Probability = 0.9
    budget: Literal["prev_accept", "cur_accept"] = "prev_accept"
    ban_old: bool = False

    memory: ClassVar[tuple[MemoryField, ...]] = WINO_MEMORY

    def needs_copies(self) -> bool:
        return True

    def bans_removed(self) -> bool:
        return self.ban_old
