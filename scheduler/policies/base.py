"""Base classes of decoding policies: torch-free structs that are sent to workers and that planning reads.

A policy declares what it needs before it runs: rows, memory, random numbers and statistics. Its
kernel, a tensor function in `remask.workers.strategies`, chooses the positions.
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
    """An fp32 tensor that a policy keeps from step to step. It is reset at the start of a block."""

    name: str
    per_slot: bool  # one number per slot of the block; False: one per canvas
    initial: float


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of unmask and remask policies.

    The fields of a policy are its parameters; each has a default. The kernel receives numbers as fp64
    tensors, one entry per canvas, and strings unchanged. The type of a field is one of these:

    - `int` with bounds (`Meta`) within -2**53 and 2**53, which fp64 represents exactly;
    - `float`;
    - `bool`: 0 or 1;
    - `Literal` of strings: the string. All canvases of a kernel call have equal strings;
    - one of the first three or None. None becomes 0, so the bounds must exclude 0, or `block_params` must
      return a number under the field's name.

    Attributes:
        kernel: Tensor function of a third party's policy, a static method: an `UnmaskKernel` or a
            `RemaskKernel` of `remask.workers.strategies.view`. The kernel of a policy of remask is the
            function of its name in `remask.workers.strategies`. A kernel must decide each canvas by its own
            numbers. If it raises, it is called again with fewer canvases, and a canvas for which it raises
            alone fails.
        always_commits: Each step commits at least one slot of a block with masks; otherwise the request
            fails. False for policies that follow a time schedule.
    """

    kernel: ClassVar[Callable[..., Any] | None] = None
    always_commits: ClassVar[bool] = True

    def head_needs(self) -> frozenset[str]:
        """Additional statistics that the kernel reads, of "margin" and "entropy"."""
        return frozenset()

    def random_streams(self) -> frozenset[str]:
        """Streams of random numbers that the kernel reads, of "order", "accept" and "remask"."""
        return frozenset()

    def ranks_as_drawn(self) -> bool:
        """Whether confidence, margin and entropy are those of the softmax that tokens are drawn from, after
        temperature and filters. False: those of the untempered softmax."""
        return False


class UnmaskPolicy(Policy, frozen=True):
    """Base of policies that choose the masked positions of the active block to commit in a step.

    Attributes:
        whole_canvas: The canvas is one block.
    """

    whole_canvas: ClassVar[bool] = False

    def block_params(self, block_lens: Sequence[int]) -> dict[str, list[float]]:
        """Parameters that differ from block to block.

        Args:
            block_lens: lengths of the blocks in slots.

        Returns:
            One finite number per block, by name. The names must not depend on the policy's fields. A name of
            a field replaces that field.
        """
        return {}


class RemaskPolicy(Policy, frozen=True):
    """Base of policies that choose the committed positions of the active block to mask again in a step.

    Attributes:
        commits: The policy chooses commits as well; it is used without an unmask policy.
        memory: Tensors that the kernel keeps from step to step. Unmask policies have none.
    """

    commits: ClassVar[bool] = False
    memory: ClassVar[tuple[MemoryField, ...]] = ()

    def block_params(self, block_lens: Sequence[int], unmask: UnmaskPolicy | None) -> dict[str, list[float]]:
        """See `UnmaskPolicy.block_params`; `unmask` is the unmask policy of the request."""
        return {}

    def needs_shadow_rows(self) -> bool:
        """Whether a forward needs an extra row for each slot of the active block."""
        return False

    def shadows_see_each_other(self) -> bool:
        """Whether a shadow row attends to all shadow rows of its block. False: only to itself."""
        return True

    def needs_copies(self) -> bool:
        """Whether a forward needs an extra sequence for each committed slot of the active block, with that
        slot masked."""
        return False

    def needs_committed_rows(self) -> bool:
        """Whether the kernel reads statistics of the rows of committed slots."""
        return False

    def bans_removed(self) -> bool:
        """Whether a removed token is not proposed again at its position in this block."""
        return False

    def verifies(self) -> bool:
        """Whether the policy needs the model's probability of a committed token without that token."""
        return self.needs_shadow_rows() or self.needs_copies()

    def check(self, unmask: UnmaskPolicy | None) -> None:
        """Raises InvalidRequest if the policy cannot be combined with `unmask`."""
        if unmask is not None and unmask.whole_canvas:
            name, other = tag(unmask), tag(self)
            raise InvalidRequest("remask", other, f"cannot work with {name}; use another of the two, or none")


@cache
def choices(kind: type[Policy]) -> dict[str, tuple[str, ...]]:
    """The strings that each `Literal` field of a policy allows, by field."""
    hints = get_type_hints(kind)
    return {
        name: get_args(hints[name]) for name in kind.__struct_fields__ if get_origin(hints[name]) is Literal
    }


def tag(policy: Policy | type[Policy]) -> str:
    """The name of a policy."""
    return str(policy.__struct_config__.tag)


def share_steps(total: int, block_lens: Sequence[int]) -> list[int]:
    """Divides steps among blocks by length, with the largest-remainder method; at least one step each."""
    slots = sum(block_lens)
    shares = [total * length // slots for length in block_lens]
    by_remainder = sorted(range(len(block_lens)), key=lambda i: (-(total * block_lens[i] % slots), i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return [max(1, share) for share in shares]


def block_steps(steps: int | None, block_lens: Sequence[int]) -> dict[str, list[float]]:
    """The parameter `block_steps`: the share of each block in `steps` (None: one step per slot)."""
    total = sum(block_lens) if steps is None else steps
    return {"block_steps": [float(n) for n in share_steps(total, block_lens)]}
