"""CUDA graphs of whole steps: a short step then costs one launch instead of hundreds.

A graph reads and writes fixed memory and runs kernels of static shapes, so it serves every burst of its
*shape*: bursts are padded to sizes that many of them share (`padding_for`) and copied into the memory of the
shape. A shape is captured the second time it occurs. Bursts of many rows, which keep a GPU busy anyway, take
the plain path, and so do those that need more than numbers in fixed places (guidance, copies, traces, logits
that are edited, filtered or ranked twice). Both paths run the same code. If canvases reuse keys, graphs serve
all steps but the first, which alone has full forwards.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch

from remask.scheduler.canvas import REAL, TOKEN, CanvasSpec, CanvasState
from remask.scheduler.sampling import Sampling
from remask.workers.burst.staging import Buffer, load, new_buffer, signature, to_device
from remask.workers.burst.state import BurstState
from remask.workers.burst.stop_ids import num_stops
from remask.workers.models.denoiser import Denoiser, TransformerDenoiser
from remask.workers.rows.kept import NOTHING_KEPT, KeptCanvases
from remask.workers.rows.packer import plan_pack
from remask.workers.rows.padding import Padding
from remask.workers.rows.plan import Plan
from remask.workers.tensors import tensors_of

logger = logging.getLogger(__name__)

GRAPH_BYTES = 1 << 30  # that captured steps may hold
MAX_ROWS = 4096  # longer steps hide the launches of their kernels
SLOT_STEP = 64
MAX_SHAPES = 64  # kept, captured or not

# The finished canvas that bursts are padded with. It has no rows, so that a burst whose rows need no padding
# computes none: a single extra row can cost the matrix products another tile of 128.
FILLING_SPEC = CanvasSpec(
    slots=bytes(TOKEN.itemsize),
    block_length=1,
    unmask=None,
    remask=None,
    sampling=Sampling(),
    seed=0,
    sample=0,
    stop_ids=b"",
    pause_at_blocks=False,
)
FILLING_STATE = CanvasState(
    tokens=b"",
    confidences=bytes(REAL.itemsize),
    logprobs=bytes(REAL.itemsize),
    commit_steps=bytes(TOKEN.itemsize),
    memory=b"",
    finished=True,
)


class Graph(Protocol):
    """A captured step."""

    def replay(self) -> Any:
        """Runs the step on the contents of its memory."""


# Captures a step, which may not run meanwhile. Returns the graph, the result of the step, and the growth in
# bytes of the working memory that all graphs share.
Capture: TypeAlias = Callable[[Callable[[], int]], tuple[Graph, int, int]]


@dataclass
class Shape:
    """A shape that has occurred.

    Attributes:
        main_rows: rows of its canvases.
        buffer: memory for bursts of this shape; None: met once.
        graph: None: not captured yet, or too large.
        num_rows: rows of a step.
        is_plain: no graph of it could be made.
    """

    main_rows: int
    buffer: Buffer | None = None
    graph: Graph | None = None
    num_rows: int = 0
    is_plain: bool = False

    @property
    def num_bytes(self) -> int:
        """What it holds beside the working memory."""
        return 0 if self.buffer is None else self.buffer.words.nbytes


class Placed(NamedTuple):
    """A burst on the device.

    Attributes:
        state: on the device.
        host: the same on the host.
        plans: of its steps, of the later ones if the first differs.
        shape: None if the burst is not in the memory of a graph.
    """

    state: BurstState
    host: BurstState
    plans: list[Plan]
    shape: Shape | None


class StepGraphs:
    """The graphs of a worker.

    Args:
        device: the GPU.
        capture: captures a step.
        budget_bytes: maximum bytes of buffers; the least recently used are freed first. Working memory is
            shared and freed only with all graphs. If it exceeds the budget, smaller bursts are captured.
    """

    def __init__(self, device: torch.device, capture: Capture, budget_bytes: int = GRAPH_BYTES) -> None:
        self._device, self._capture, self._budget = device, capture, budget_bytes
        self._shapes: OrderedDict[Hashable, Shape] = OrderedDict()
        self._max_rows, self._working_bytes = MAX_ROWS, 0

    def place(
        self,
        specs: Sequence[CanvasSpec],
        states: Sequence[CanvasState],
        kept: KeptCanvases = NOTHING_KEPT,
    ) -> Placed | None:
        """Padded canvases on the device; None if no graph can serve them.

        Args:
            specs, states: of the canvases.
            kept: rows of those that reuse keys in all steps but the first; the others of them take none.
        """
        padding = padding_for(specs, [state.sequence_len for state in states], kept, self._max_rows)
        if padding is None:
            return None
        num_more = padding.group_size - len(specs)
        state = BurstState(
            [*specs, *[FILLING_SPEC] * num_more], [*states, *[FILLING_STATE] * num_more], padding
        )
        fresh = [c for c, spec in enumerate(specs) if spec.reuse is None]
        filling = range(len(specs), padding.group_size)
        order = [*fresh, filling[0], *kept, *filling[1:]] if kept else [*fresh, *filling]
        bounds = np.array(state.cu_tokens)
        plan = plan_pack(
            order, state.specs, bounds, state.max_block_len, padding, kept, gathers=len(kept) > 0
        )
        tree = state, [plan]
        tensors = tensors_of(tree)
        key = (signature(tensors), _constants(*tree))
        shape = self._shapes.get(key)
        if shape is None:
            self._shapes[key] = Shape(padding.main_rows)
            while len(self._shapes) > MAX_SHAPES:
                self._shapes.popitem(last=False)
        else:
            self._shapes.move_to_end(key)
        if shape is None or shape.is_plain:
            own, plans = to_device(tree, self._device)
            return Placed(own, state, plans, shape=None)
        if shape.buffer is None:
            shape.buffer = new_buffer(tensors, self._device)
        own, plans = load(tree, shape.buffer)
        return Placed(own, state, plans, shape)

    def clear(self) -> None:
        """Frees the graphs and their memory; shapes are met anew."""
        self._shapes.clear()
        self._working_bytes = 0

    def step(self, shape: Shape, step: Callable[[], int]) -> int:
        """Takes a step of a burst in the memory of a shape; returns the rows forwarded."""
        if shape.graph is not None:
            shape.graph.replay()
            return shape.num_rows
        num_rows = step()  # what kernels set up when they first run stays out of the graph
        if not shape.is_plain:
            self._make(shape, step)
        return num_rows

    def _make(self, shape: Shape, step: Callable[[], int]) -> None:
        try:
            shape.graph, shape.num_rows, num_bytes = self._capture(step)
        except Exception as error:
            # The step itself has just run, so nothing is wrong with the burst.
            shape.is_plain = True
            logger.warning(
                "cannot capture a step; bursts of this shape run without a graph: %s: %s",
                type(error).__name__,
                error,
            )
            return
        self._working_bytes += num_bytes
        logger.info(
            "captured a step of %d rows; graphs work in %d bytes", shape.num_rows, self._working_bytes
        )
        if self._working_bytes > self._budget:
            self._max_rows = shape.main_rows // 2
            logger.warning(
                "the working memory of captured steps is above %d bytes; bursts of more than %d rows run "
                "without graphs",
                self._budget,
                self._max_rows,
            )
            shape.graph, shape.is_plain = None, True
            self.clear()
            return
        for key, other in list(self._shapes.items()):
            held = self._working_bytes + sum(each.num_bytes for each in self._shapes.values())
            if held <= self._budget:
                break
            if other is not shape:
                del self._shapes[key]


def graphs_for(model: Denoiser) -> StepGraphs | None:
    """For a model whose steps can be captured; None: they cannot."""
    if model.device.type != "cuda" or not isinstance(model, TransformerDenoiser):
        return None
    if not (model.kernels and model.attention.reads_device):
        return None
    return StepGraphs(model.device, capture_cuda(model.device))


def capture_cuda(device: torch.device) -> Capture:
    """Captures with CUDA; all graphs share their working memory, because they run one after another."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Callable[[], int]) -> tuple[Graph, int, int]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            before = torch.cuda.memory_reserved(device)  # entering has freed what the cache held
            num_rows = step()
        return graph, num_rows, max(0, torch.cuda.memory_reserved(device) - before)

    return capture


def padding_for(
    specs: Sequence[CanvasSpec],
    lens: Sequence[int],
    kept: KeptCanvases = NOTHING_KEPT,
    max_rows: int = MAX_ROWS,
) -> Padding | None:
    """The sizes that canvases are filled up to, with at least one more canvas, with two if keys are reused;
    None: the plain path, which also takes more than `max_rows` rows.

    Rows grow in steps of at most an eighth, everything else in larger ones, because it costs little.
    """
    plain = any(s.is_guided or s.num_copies or s.needs_logits or s.trace for s in specs)
    num_canvases = _power(len(specs) + 1 + (len(kept) > 0))
    num_tokens, num_gathered = sum(lens), sum(lens[c] for c in kept)
    planned = [c for c, spec in enumerate(specs) if spec.reuse is None or c in kept]
    num_fresh = sum(lens[c] for c in planned if c not in kept)
    num_rows = num_fresh + sum(len(own.light.positions) for own in kept.values() if own.light is not None)
    if plain or not 0 < num_rows <= max_rows:
        return None
    row_step, token_step, key_step = map(_row_step, (num_rows, num_tokens, num_gathered))
    widest = _power(max(spec.block_length for spec in specs))
    return Padding(
        tokens=_multiple(num_tokens, token_step),
        main_rows=(main_rows := _multiple(num_rows, row_step)),
        fresh_keys=min(_multiple(num_fresh, row_step), main_rows) if kept else 0,
        # What fills up has a key, so that its attention is a number.
        gathered=_multiple(num_gathered + 1, key_step) if kept else 0,
        slots=_multiple(sum(specs[c].block_length for c in planned), SLOT_STEP),
        shadow_rows=_multiple(sum(specs[c].num_shadow_rows for c in planned), SLOT_STEP),
        max_keys=max(_power(max(lens)), row_step, key_step),
        max_queries=max(widest, SLOT_STEP),
        widest=widest,
        canvas_len=_power(max(spec.canvas_len for spec in specs)),
        num_blocks=_power(sum(-(-spec.canvas_len // spec.block_length) for spec in specs)),
        num_stops=_power(num_stops([spec.stop_ids for spec in specs])),
        group_size=num_canvases,
    )


def _row_step(num_rows: int) -> int:
    return max(SLOT_STEP, _power(num_rows) // 16)


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


def _power(size: int) -> int:
    """The power of two that is not smaller."""
    return 1 << max(0, size - 1).bit_length()


def _constants(state: BurstState, plans: list[Plan]) -> Hashable:
    """What a graph holds of a burst beside the shapes of its tensors."""
    (plan,) = plans
    layouts = plan.layout.device, plan.candidate_layout.device
    return (
        tuple(group.kind for group in (*state.unmask, *state.remask)),
        state.needs,
        state.targets is not None,
        state.random_streams,
        state.sampling.any_hot,
        state.max_block_len,
        plan.num_main_slots,
        None if plan.kept is None else (plan.kept.num_fresh, plan.kept.num_main),
        *((device.max_queries, device.max_keys) for device in layouts if device is not None),
    )
