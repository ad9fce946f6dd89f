"""The state of one sequence: what a canvas is (`CanvasSpec`, fixed) and how far it has come (`CanvasState`).

Both are sent with every burst and are all that a worker needs: a burst is a pure function of them. Arrays
are little-endian bytes, so that the structs encode without hooks. A canvas is a sequence of tokens. Some
positions, the slots, are denoised block by block; all others are context and never change.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal, NamedTuple, Union

import msgspec
import numpy as np
from numpy.typing import NDArray

from remask.scheduler.light_rows import LightRows, light_rows
from remask.scheduler.params import ResolvedParams
from remask.scheduler.policies import MemoryField, RemaskPolicy, Schedule, UnmaskPolicy, registry
from remask.scheduler.sampling import TOKEN as TOKEN
from remask.scheduler.sampling import Reuse, Sampling, id_array, id_bytes

# Faults of a canvas: logits that are NaN; a step without a commit although the policy must commit; a kernel
# that raises for the canvas alone, or does not fit the memory.
NOT_NUMBERS, NO_COMMIT, RAISES, NO_MEMORY = 1, 2, 3, 4

REAL = np.dtype("<f4")
# A commit or a remasking of one slot in one step; `token` is the committed or the removed token. `is_top`: a
# commit of the most probable token.
EVENT = np.dtype(
    [
        ("step", "<i4"),
        ("slot", "<i4"),
        ("token", "<i4"),
        ("confidence", "<f4"),
        ("is_commit", "<i2"),
        ("is_top", "<i2"),
    ]
)


def _registered(parameter: Literal["unmask", "remask"]) -> Any:
    """The tagged union for decoding. Annotations are evaluated when a canvas is first decoded, when packages
    that add policies can be loaded."""
    return Union[tuple(getattr(registry(), parameter).values())]  # noqa: UP007


class CanvasSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """The constant part of a canvas. What is derived from it is computed once and kept with it."""

    slots: bytes  # int32 [G]: positions of the sequence to denoise, in block order
    block_length: int  # slots a block; the last block may be shorter
    unmask: _registered("unmask") | None  # type: ignore[valid-type]  # None: the remask policy commits
    remask: _registered("remask") | None  # type: ignore[valid-type]
    sampling: Sampling
    seed: int  # with `sample`, the key of every random number
    sample: int
    stop_ids: bytes  # int32, ascending: a finished block with one of them ends the canvas
    pause_at_blocks: bool  # a burst ends at the end of a block, so that the engine can look for stop strings
    trace: bool = False  # whether its events are recorded
    shift: int = 0  # row i - shift predicts position i
    reuse: Reuse | None = None  # whether light forwards compute the active block, and what follows it, alone
    refresh: int = 0  # forwards from one full forward of a block to the next; 0: only the first is full
    targets: bytes = b""  # int32 [G]: the tokens to commit, whatever the model proposes; empty: the proposals

    @cached_property
    def canvas_len(self) -> int:
        return len(self.slots) // TOKEN.itemsize

    @cached_property
    def slot_array(self) -> NDArray[np.int64]:
        """The positions [G] in `slots`."""
        return np.frombuffer(self.slots, TOKEN).astype(np.int64)

    @cached_property
    def num_leading(self) -> int:
        """How many fixed tokens stand before all slots."""
        return int(self.slot_array.min())

    @cached_property
    def block_lens(self) -> list[int]:
        whole, rest = divmod(self.canvas_len, self.block_length)
        return [self.block_length] * whole + [rest] * (rest > 0)

    def canvas_tokens(self, state: CanvasState) -> NDArray[np.int32]:
        """Ids [G] in the slots."""
        return state.token_array()[self.slot_array]

    def first_stop(self, tokens: NDArray[np.int32]) -> int | None:
        """The index of the first token that ends the canvas; None if there is none."""
        stop_ids = id_array(self.stop_ids)
        if not len(stop_ids):
            return None
        nearest = np.searchsorted(stop_ids, tokens).clip(max=len(stop_ids) - 1)
        (places,) = (stop_ids[nearest] == tokens).nonzero()
        return int(places[0]) if len(places) else None

    @cached_property
    def memory_fields(self) -> tuple[MemoryField, ...]:
        return self.remask.memory if self.remask is not None else ()

    @cached_property
    def policies(self) -> list[UnmaskPolicy | RemaskPolicy]:
        return [policy for policy in (self.unmask, self.remask) if policy is not None]

    @cached_property
    def random_streams(self) -> frozenset[str]:
        """Streams of random numbers that its policies read, except that of tokens."""
        return frozenset[str]().union(*(policy.random_streams() for policy in self.policies))

    @cached_property
    def head_needs(self) -> frozenset[str]:
        """Additional statistics that its policies read."""
        return frozenset[str]().union(*(policy.head_needs() for policy in self.policies))

    @cached_property
    def always_commits(self) -> bool:
        """Whether each step commits a slot of a block that has masks."""
        return all(policy.always_commits for policy in self.policies)

    @cached_property
    def shadow_rows_per_slot(self) -> int:
        """Shadow rows that verify a slot. With shifted logits the row before the slot answers for it, so that
        this row has a copy that does not see the slot, beside a mask in the place of the slot."""
        return 1 + (self.shift > 0) if self.remask is not None and self.remask.needs_shadow_rows() else 0

    @cached_property
    def num_shadow_rows(self) -> int:
        return self.block_length * self.shadow_rows_per_slot

    @cached_property
    def shadows_see_each_other(self) -> bool:
        return self.remask is not None and self.remask.shadows_see_each_other()

    @cached_property
    def verifies(self) -> bool:
        return self.remask is not None and self.remask.verifies()

    @cached_property
    def reads_committed_rows(self) -> bool:
        """Whether the head computes statistics of the rows of committed slots."""
        return self.remask is not None and self.remask.needs_committed_rows()

    @cached_property
    def num_copies(self) -> int:
        """Maximum number of extra sequences of a forward: one for each committed slot of the block."""
        return self.block_length if self.remask is not None and self.remask.needs_copies() else 0

    @cached_property
    def bans_removed(self) -> bool:
        return self.remask is not None and self.remask.bans_removed()

    @cached_property
    def needs_logits(self) -> bool:
        """Whether its rows need whole logits, not only the largest ones and sums of the softmax."""
        return self.sampling.edits or self.sampling.filters or self.sampling.reranks or self.bans_removed

    def verifying_rows(self, sequence_len: int) -> tuple[int, int]:
        """The rows that verify in a forward, for each slot of the active block and for each of its committed
        slots."""
        return self.shadow_rows_per_slot, sequence_len if self.num_copies else 0

    def num_rows(self, sequence_len: int, light: LightRows | None = None) -> int:
        """Maximum number of rows of a forward; `light` are those of a light one."""
        verifying = sum(self.verifying_rows(sequence_len)) * self.block_length
        return self.num_main_rows(sequence_len, light) + verifying

    def num_main_rows(self, sequence_len: int, light: LightRows | None = None) -> int:
        """Rows of a forward without those that verify."""
        own = sequence_len if light is None else len(light.positions)
        return own * (1 + self.is_guided)

    def is_light(self, num_block_forwards: int) -> bool:
        """Whether a forward reuses keys, by the number of forwards of its block before it. The others are
        full."""
        is_first = num_block_forwards == 0 or (self.refresh > 0 and num_block_forwards % self.refresh == 0)
        return self.reuse is not None and not is_first

    def num_key_rows(self, sequence_len: int) -> int:
        """Rows whose keys and values are kept between forwards."""
        return self.num_main_rows(sequence_len) if self.reuse is not None else 0

    def next_light(self, sequence_len: int, block: int, num_block_forwards: int) -> LightRows | None:
        """The main rows of the next forward if it is light; None: it is full.

        Args:
            sequence_len: rows of the sequence.
            block: the active block.
            num_block_forwards: its forwards so far.
        """
        if self.reuse is None or not self.is_light(num_block_forwards):
            return None
        if block not in self._light_rows:
            slots = self.slot_array[block * self.block_length : (block + 1) * self.block_length]
            self._light_rows[block] = light_rows(slots, self.shift, self.reuse, sequence_len)
        return self._light_rows[block]

    @cached_property
    def _light_rows(self) -> dict[int, LightRows]:
        return {}

    @cached_property
    def unmask_params(self) -> dict[str, list[float]]:
        """The unmask policy's parameters that differ from block to block."""
        return self.unmask.block_params(self.block_lens) if self.unmask is not None else {}

    @cached_property
    def remask_params(self) -> dict[str, list[float]]:
        """The remask policy's parameters that differ from block to block."""
        return self.remask.block_params(self.block_lens, self.unmask) if self.remask is not None else {}

    @cached_property
    def is_guided(self) -> bool:
        """Whether a forward needs a second copy of the sequence, with its context masked."""
        return self.sampling.cfg_scale > 0


class CanvasState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The progress of a canvas. A worker receives one and returns the next."""

    tokens: bytes  # int32 [L]: the whole sequence; uncommitted slots hold the mask id
    confidences: bytes  # float32 [G]: the confidence each slot's token was committed with; 0 before
    logprobs: bytes  # float32 [G]: its log-probability then; 0 before
    commit_steps: bytes  # int32 [G]: the forward (from 1) that committed it; 0 before
    memory: bytes  # float32: the remask policy's fields one after another (CanvasSpec.memory_fields)
    removed: bytes = b""  # int32 [block_length, k]: ids not to be proposed at a slot of the block; -1: none
    block: int = 0  # index of the active block
    full_tokens: bytes = b""  # int32 [L]: the sequence at the last full forward, if the next one is light
    num_forwards: int = 0  # NFE of the canvas
    num_block_forwards: int = 0  # NFE of the active block
    num_full_forwards: int = 0  # of those of the canvas; not counted if it reuses no keys
    num_query_rows: int = 0  # rows of its forwards, whatever a backend leaves out
    num_remasked: int = 0  # tokens that were taken back
    finished: bool = False
    fault: int = 0  # the fault that ended it, one of those above; 0: none
    error: str = ""  # class and message of the exception of its policy's kernel

    @property
    def sequence_len(self) -> int:
        return len(self.tokens) // TOKEN.itemsize

    def token_array(self) -> NDArray[np.int32]:
        return np.frombuffer(self.tokens, TOKEN)


class TextStop(NamedTuple):
    """The place where a stop string ended a canvas."""

    num_tokens: int  # up to and including the token that completes the string
    string: str


class Canvas:
    """One sequence of a request in the scheduler.

    Attributes:
        ordinal: number of the canvas in the engine.
        state: the authoritative copy of its progress.
        events: EVENT records of each applied burst; empty if the canvas is not traced.
        num_rows: rows of its next forward.
        num_key_rows: rows whose keys and values a worker keeps between its forwards.
        order: its sort key in the queue.
        home: the worker that holds its keys; None: no worker has to.
        last_burst: the last burst in flight with this canvas; None if it is ready or has ended.
        aborted: the request was aborted or has failed.
        queued: it is in the queue of ready canvases.
        suspected: it waits to run apart from all others, because a burst with it failed.
        lone_deaths: consecutive deaths of workers that ran it alone.
        survived: number of bursts that had come back, of any worker, at the last of these deaths.
        lone_memory_failures: consecutive failures to fit a worker's memory alone.
        short_on: workers whose memory was too small for a burst with it since it last came back.
        text_stop: the stop string that ended it.
    """

    __slots__ = (
        "aborted", "events", "home", "last_burst", "lone_deaths", "lone_memory_failures", "num_key_rows",
        "num_rows", "order", "ordinal", "queued", "request_id", "short_on", "spec", "state", "survived",
        "suspected", "text_stop",
    )  # fmt: skip

    def __init__(self, request_id: str, ordinal: int, spec: CanvasSpec, state: CanvasState) -> None:
        self.request_id, self.ordinal, self.spec, self.num_rows = request_id, ordinal, spec, 0
        self.events: list[bytes] = []
        self.num_key_rows = spec.num_key_rows(state.sequence_len)
        self.move(state)
        self.order: tuple[float, int] = (0.0, ordinal)
        self.home: int | None = None
        self.last_burst: int | None = None
        self.aborted = self.queued = self.suspected = False
        self.lone_deaths = self.lone_memory_failures = self.survived = 0
        self.short_on: frozenset[int] = frozenset()
        self.text_stop: TextStop | None = None

    def move(self, state: CanvasState) -> None:
        """Notes its state after a burst."""
        self.state = state
        if not state.finished:
            length = state.sequence_len
            light = self.spec.next_light(length, state.block, state.num_block_forwards)
            self.num_rows = self.spec.num_rows(length, light)

    @property
    def goes_on(self) -> bool:
        """Whether it needs further bursts."""
        return not (self.aborted or self.state.finished)


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
    shift: int = 0,
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
        shift=shift,
        reuse=params.reuse,
        refresh=params.refresh or 0,
    )
    tokens = np.array(prompt + [mask_id] * canvas_len, dtype=TOKEN)
    return Canvas(request_id, ordinal, spec, _new_state(spec, tokens))


def new_scored_canvas(
    request_id: str,
    ordinal: int,
    tokens: NDArray[np.int32],
    slots: NDArray[np.int32],
    *,
    seed: int,
    sample: int,
    mask_id: int,
    shift: int = 0,
) -> Canvas:
    """A canvas of one forward, whose `logprobs` are those of given tokens.

    Args:
        request_id: id of the request.
        ordinal: number of the canvas.
        tokens: the whole sequence [L].
        slots: positions [G] of the tokens that are masked and whose log-probabilities are wanted.
        seed, sample, shift: see `CanvasSpec`; nothing is drawn.
        mask_id: M.
    """
    spec = CanvasSpec(
        slots=slots.astype(TOKEN).tobytes(),
        block_length=len(slots),
        unmask=Schedule(steps=1),
        remask=None,
        sampling=Sampling(),
        seed=seed,
        sample=sample,
        stop_ids=b"",
        pause_at_blocks=False,
        shift=shift,
        targets=tokens[slots].astype(TOKEN).tobytes(),
    )
    masked = tokens.astype(TOKEN)
    masked[slots] = mask_id
    return Canvas(request_id, ordinal, spec, _new_state(spec, masked))


def _new_state(spec: CanvasSpec, tokens: NDArray[np.int32]) -> CanvasState:
    """The state of a canvas before its first step."""
    return CanvasState(
        tokens=tokens.tobytes(),
        confidences=np.zeros(spec.canvas_len, dtype=REAL).tobytes(),
        logprobs=np.zeros(spec.canvas_len, dtype=REAL).tobytes(),
        commit_steps=np.zeros(spec.canvas_len, dtype=TOKEN).tobytes(),
        memory=initial_memory(spec),
    )


def initial_memory(spec: CanvasSpec) -> bytes:
    """The remask policy's memory at the start of a block."""
    sizes = [spec.block_length if field.per_slot else 1 for field in spec.memory_fields]
    values = [field.initial for field in spec.memory_fields]
    return np.repeat(np.array(values, dtype=REAL), sizes).tobytes()
