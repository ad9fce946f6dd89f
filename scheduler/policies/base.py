"""What a decoding policy is: a torch-free struct that travels on the wire and that planning reads.

Everything the engine must know before it runs a policy is asked here: rows, memory, random numbers,
statistics. The answer to "which positions" is the kernel's, a tensor function (`remask.workers.strategies`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from remask.scheduler.errors import InvalidRequest

Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
EXACT = 2**53  # fp64 holds every integer up to it
Steps = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class MemoryField(NamedTuple):
    """One fp32 tensor that a policy carries from step to step; it is reset when a block begins."""

    name: str
    per_slot: bool  # one number a slot of the block, else one a canvas
    initial: float


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """What unmask and remask policies have in common.

    The fields of a policy are the parameters that a user may set; each has a default. The kernel gets
    numbers as fp64, one a canvas, and words as they are. So a field's type is one of these:

    - `int` with bounds (`Meta`) within -2**53 and 2**53: fp64 holds these integers exactly;
    - `float`;
    - `bool`: 0 or 1;
    - `Literal` of strings: the word; a kernel call has canvases of one word;
    - one of the first three, or None: None is 0, so that bounds must exclude 0, or `block_params` must give
      the number under the field's name.

    Attributes:
        kernel: the tensor function of a third party's policy, a static method: an `UnmaskKernel` or a
            `RemaskKernel` of `remask.workers.strategies.view`. Those of remask's own policies stand in
            `remask.workers.strategies`. It must decide every canvas by its own numbers: if it raises, it is
            asked again about fewer canvases, and those that it raises for alone fail.
        always_commits: each step commits a slot of a block that has masks; if one does not, the request
            fails. False for policies that follow a time schedule.
    """

    kernel: ClassVar[Callable[..., Any] | None] = None
    always_commits: ClassVar[bool] = True

    def head_needs(self) -> frozenset[str]:
        """Statistics beyond the proposal's probability that the kernel reads: of "margin" and "entropy"."""
        return frozenset()

    def random_streams(self) -> frozenset[str]:
        """Which of the streams order, accept and remask the kernel reads, whatever the temperature."""
        return frozenset()

    def ranks_as_drawn(self) -> bool:
        """Whether confidence, margin and entropy are those of the softmax that tokens are drawn from (after
        temperature and filters), instead of the untempered one."""
        return False


class UnmaskPolicy(Policy, frozen=True):
    """Decides which masked positions of the active block are committed in a step.

    Attributes:
        whole_canvas: the canvas is one block.
    """

    whole_canvas: ClassVar[bool] = False

    def block_params(self, block_lens: Sequence[int]) -> dict[str, list[float]]:
        """Parameters that differ from block to block, for blocks of these lengths.

        Returns:
            By name one finite number a block. The names are the same in every case; one that is a field's
            replaces that field.
        """
        return {}


class RemaskPolicy(Policy, frozen=True):
    """Decides which committed positions of the active block turn back into masks in a step.

    Attributes:
        commits: brings its own commits: there is no unmask policy beside it.
        memory: what the kernel carries from step to step. An unmask policy has none.
    """

    commits: ClassVar[bool] = False
    memory: ClassVar[tuple[MemoryField, ...]] = ()

    def block_params(self, block_lens: Sequence[int], unmask: UnmaskPolicy | None) -> dict[str, list[float]]:
        """As `UnmaskPolicy.block_params`, beside that policy."""
        return {}

    def needs_shadow_rows(self) -> bool:
        """Whether a forward needs one extra row a slot of the active block."""
        return False

    def shadows_see_each_other(self) -> bool:
        """Whether a shadow row sees all shadow rows of its block, or only itself."""
        return True

    def needs_copies(self) -> bool:
        """Whether a forward needs one extra sequence a committed slot of the active block, with that slot
        masked."""
        return False

    def needs_committed_rows(self) -> bool:
        """Whether the kernel reads statistics of the rows of committed slots, too."""
        return False

    def bans_removed(self) -> bool:
        """Whether a removed token may not be proposed again at its position in this block."""
        return False

    def verifies(self) -> bool:
        """Whether it asks what the model says of a token that it does not see."""
        return self.needs_shadow_rows() or self.needs_copies()

    def check(self, unmask: UnmaskPolicy | None) -> None:
        """Raises InvalidRequest where this policy cannot work together with `unmask`."""
        if unmask is not None and unmask.whole_canvas:
            name, other = tag(unmask), tag(self)
            raise InvalidRequest("remask", other, f"cannot work with {name}; use another of the two, or none")


@cache
def choices(kind: type[Policy]) -> dict[str, tuple[str, ...]]:
    """The words that a policy's fields choose from, by field."""
    hints = get_type_hints(kind)
    return {
        name: get_args(hints[name]) for name in kind.__struct_fields__ if get_origin(hints[name]) is Literal
    }


def tag(policy: Policy | type[Policy]) -> str:
    """The name of a policy's kind."""
    return str(policy.__struct_config__.tag)


def share_steps(total: int, block_lens: Sequence[int]) -> list[int]:
    """Steps for each block, by length: largest remainder (the lower block first), at least one each."""
    slots = sum(block_lens)
    shares = [total * length // slots for length in block_lens]
    by_remainder = sorted(range(len(block_lens)), key=lambda i: (-(total * block_lens[i] % slots), i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return [max(1, share) for share in shares]


def block_steps(steps: int | None, block_lens: Sequence[int]) -> dict[str, list[float]]:
    """The blocks' shares of `steps` (None: one for each slot), as a kernel reads them."""
    total = sum(block_lens) if steps is None else steps
    return {"block_steps": [float(n) for n in share_steps(total, block_lens)]}
