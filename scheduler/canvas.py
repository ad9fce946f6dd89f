"""The state of one sequence: what a canvas is (`CanvasSpec`, fixed) and how far it has come (`CanvasState`).

Both travel with every burst and are all a worker needs: a burst is a pure function of them. Arrays are
little-endian bytes, so that the structs encode without hooks. A canvas is a sequence of tokens of which some
positions, the slots, are to be denoised, block by block; everything else is context and never changes.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Union

import msgspec
import numpy as np
from numpy.typing import NDArray

from remask.scheduler.params import ResolvedParams, resolve
from remask.scheduler.policies import MemoryField, RemaskPolicy, UnmaskPolicy, registry
from remask.scheduler.sampling import TOKEN as TOKEN
from remask.scheduler.sampling import Sampling, id_array, id_bytes

# Faults of a canvas: logits that are NaN; no commit where its policy must; a kernel that raises for it alone,
# or does not fit the memory.
NOT_NUMBERS, NO_COMMIT, RAISES, NO_MEMORY = 1, 2, 3, 4

REAL = np.dtype("<f4")
# What happened to one slot in one step: committed, or remasked (then `token` is the one removed).
EVENT = np.dtype(
    [("step", "<i4"), ("slot", "<i4"), ("token", "<i4"), ("confidence", "<f4"), ("is_commit", "<i4")]
)


def _registered(parameter: Literal["unmask", "remask"]) -> Any:
    """The tagged union that decoding needs. Annotations are evaluated when a canvas is first decoded: by then
    the packages that bring policies can be loaded."""
    return Union[tuple(getattr(registry(), parameter).values())]  # noqa: UP007


class CanvasSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is asked of one canvas; never changes."""

    slots: bytes  # int32 [G]: positions of the sequence to denoise, in block order
    block_length: int  # slots a block; the last block may be shorter
    unmask: _registered("unmask") | None  # type: ignore[valid-type]  # None: the remask policy commits
    remask: _registered("remask") | None  # type: ignore[valid-type]
    sampling: Sampling
    seed: int  # with `sample`, the key of every random number
    sample: int
    stop_ids: bytes  # int32, ascending: a finished block that holds one ends the canvas
    pause_at_blocks: bool  # a burst takes it no further than a block's end: its text is looked at
    trace: bool = False  # whether its events are kept

    @property
    def canvas_len(self) -> int:
        return len(self.slots) // TOKEN.itemsize

    @property
    def block_lens(self) -> list[int]:
        whole, rest = divmod(self.canvas_len, self.block_length)
        return [self.block_length] * whole + [rest] * (rest > 0)

    def canvas_tokens(self, state: CanvasState) -> NDArray[np.int32]:
        """Ids [G] in the slots."""
        return state.token_array()[np.frombuffer(self.slots, TOKEN)]

    def first_stop(self, tokens: NDArray[np.int32]) -> int | None:
        """The place of the first token that ends the canvas; None where none does."""
        stop_ids = id_array(self.stop_ids)
        if not len(stop_ids):
            return None
        nearest = np.searchsorted(stop_ids, tokens).clip(max=len(stop_ids) - 1)
        (places,) = (stop_ids[nearest] == tokens).nonzero()
        return int(places[0]) if len(places) else None

    @property
    def memory_fields(self) -> tuple[MemoryField, ...]:
        return self.remask.memory if self.remask is not None else ()

    @property
    def policies(self) -> list[UnmaskPolicy | RemaskPolicy]:
        return [policy for policy in (self.unmask, self.remask) if policy is not None]

    @property
    def always_commits(self) -> bool:
        """Whether each step commits a slot of a block that has masks."""
        return all(policy.always_commits for policy in self.policies)

    @property
    def num_shadow_rows(self) -> int:
        return self.block_length if self.remask is not None and self.remask.needs_shadow_rows() else 0

    @property
    def shadows_see_each_other(self) -> bool:
        return self.remask is not None and self.remask.shadows_see_each_other()

    @property
    def verifies(self) -> bool:
        return self.remask is not None and self.remask.verifies()

    @property
    def reads_committed_rows(self) -> bool:
        """Whether the head must look at the rows of committed slots."""
        return self.remask is not None and self.remask.needs_committed_rows()

    @property
    def num_copies(self) -> int:
        """Extra sequences of one forward, at most: one for each committed slot of the block."""
        return self.block_length if self.remask is not None and self.remask.needs_copies() else 0

    @property
    def bans_removed(self) -> bool:
        return self.remask is not None and self.remask.bans_removed()

    @property
    def needs_logits(self) -> bool:
        """Whether its rows ask for more than the greatest logits and the softmax's sums."""
        return self.sampling.edits or self.sampling.filters or self.sampling.reranks or self.bans_removed

    def num_rows(self, sequence_len: int) -> int:
        """Rows of one forward, at most."""
        return sequence_len * (1 + self.is_guided + self.num_copies) + self.num_shadow_rows

    def unmask_params(self) -> dict[str, list[float]]:
        """The unmask policy's parameters that differ from block to block."""
        return self.unmask.block_params(self.block_lens) if self.unmask is not None else {}

    def remask_params(self) -> dict[str, list[float]]:
        """The remask policy's parameters that differ from block to block."""
        return self.remask.block_params(self.block_lens, self.unmask) if self.remask is not None else {}

    @property
    def is_guided(self) -> bool:
        """Whether a forward needs the sequence a second time, with its fixed tokens masked."""
        return self.sampling.cfg_scale > 0


class CanvasState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far a canvas has come. A worker takes one and returns the next."""

    tokens: bytes  # int32 [L]: the whole sequence; uncommitted slots hold the mask id
    confidences: bytes  # float32 [G]: the confidence each slot's token was committed with; 0 before
    logprobs: bytes  # float32 [G]: its log-probability then; 0 before
    commit_steps: bytes  # int32 [G]: the forward (from 1) that committed it; 0 before
    memory: bytes  # float32: the remask policy's fields one after another (CanvasSpec.memory_fields)
    removed: bytes = b""  # int32 [block_length, k]: ids not to be proposed at a slot of the block; -1: none
    block: int = 0  # index of the active block
    num_forwards: int = 0  # NFE of the canvas
    num_block_forwards: int = 0  # NFE of the active block
    finished: bool = False
    fault: int = 0  # what ended it without an answer: 0 (nothing) or one of the faults above
    error: str = ""  # class and message of what its policy's kernel raised

    @property
    def sequence_len(self) -> int:
        return len(self.tokens) // TOKEN.itemsize

    def token_array(self) -> NDArray[np.int32]:
        return np.frombuffer(self.tokens, TOKEN)


class TextStop(NamedTuple):
    """Where a stop string ended a canvas."""

    num_tokens: int  # up to the token that completes the string
    string: str


class Canvas:
    """One sequence of a request as the scheduler holds it.

    Attributes:
        ordinal: number of the canvas in the engine.
        state: the authoritative copy.
        events: EVENT records of each burst that was applied; empty if the canvas is not traced.
        num_rows: rows of one forward.
        order: its place in the queue.
        last_burst: the last burst in flight that it is in; None where it is ready or has ended.
        aborted: nobody waits for it any more.
        suspected: it waits to run apart from all others, because a worker died while it ran.
        lone_deaths: workers that died in a row while it ran alone.
        survived: bursts that any worker had brought back when the last of them died.
        lone_memory_failures: times in a row that it did not fit a worker's memory alone.
        short_on: workers whose memory was too small for bursts with it, since it last came back.
        text_stop: the stop string that ended it.
    """

    __slots__ = (
        "aborted", "events", "last_burst", "lone_deaths", "lone_memory_failures", "num_rows", "order",
        "ordinal", "request_id", "short_on", "spec", "state", "survived", "suspected", "text_stop",
    )  # fmt: skip

    def __init__(self, request_id: str, ordinal: int, spec: CanvasSpec, state: CanvasState) -> None:
        self.request_id, self.ordinal, self.spec, self.state = request_id, ordinal, spec, state
        self.events: list[bytes] = []
        self.num_rows = spec.num_rows(state.sequence_len)
        self.order: tuple[float, int] = (0.0, ordinal)
        self.last_burst: int | None = None
        self.aborted = self.suspected = False
        self.lone_deaths = self.lone_memory_failures = self.survived = 0
        self.short_on: frozenset[int] = frozenset()
        self.text_stop: TextStop | None = None


def new_canvas(
    request_id: str,
    ordinal: int,
    prompt: list[int],
    params: ResolvedParams,
    *,
    seed: int,
    sample: int,
    mask_id: int,
    stop_ids: list[int],
) -> Canvas:
    """A canvas of `params.max_tokens` masks behind a prompt."""
    canvas_len = params.max_tokens
    spec = CanvasSpec(
        slots=np.arange(len(prompt), len(prompt) + canvas_len, dtype=TOKEN).tobytes(),
        block_length=params.block_length,
        unmask=params.unmask,
        remask=params.remask,
        sampling=params.sampling,
        seed=seed,
        sample=sample,
        stop_ids=id_bytes(stop_ids),
        pause_at_blocks=bool(params.stop),
        trace=params.trace,
    )
    state = CanvasState(
        tokens=np.array(prompt + [mask_id] * canvas_len, dtype=TOKEN).tobytes(),
        confidences=np.zeros(canvas_len, dtype=REAL).tobytes(),
        logprobs=np.zeros(canvas_len, dtype=REAL).tobytes(),
        commit_steps=np.zeros(canvas_len, dtype=TOKEN).tobytes(),
        memory=initial_memory(spec),
    )
    return Canvas(request_id, ordinal, spec, state)


def new_probe(mask_id: int) -> Canvas:
    """A canvas of one token behind a prompt of one."""
    params = resolve({"max_tokens": 1})
    prompt = [0 if mask_id != 0 else 1]
    return new_canvas("probe", 0, prompt, params, seed=2**62, sample=0, mask_id=mask_id, stop_ids=[])


def initial_memory(spec: CanvasSpec) -> bytes:
    """The remask policy's memory at the start of a block."""
    sizes = [spec.block_length if field.per_slot else 1 for field in spec.memory_fields]
    values = [field.initial for field in spec.memory_fields]
    return np.repeat(np.array(values, dtype=REAL), sizes).tobytes()
