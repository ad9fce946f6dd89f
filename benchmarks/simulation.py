"""A worker without a model, and requests for it: what the scheduler is tested and measured with.

Each forward commits one token, so that the forwards of a canvas are known in advance.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from remask.scheduler.blame import new_probe
from remask.scheduler.canvas import Canvas, CanvasSpec, CanvasState, TextStop, new_canvas
from remask.scheduler.messages import StepBatch, StepResult
from remask.scheduler.params import resolve
from remask.scheduler.request import Request

MASK, TOKEN_ID = 0, 5
PROBE = new_probe(MASK)


class SimulatedWorker:
    """Commits one token a step and keeps the canvases of its last burst, as a real worker does."""

    def __init__(self) -> None:
        self.batches: list[StepBatch] = []
        self._last: tuple[int, list[CanvasState]] | None = None

    def run(self, batch: StepBatch) -> StepResult:
        self.batches.append(batch)
        states = [
            self._advance(*entry, batch.num_steps)
            for entry in zip(batch.specs, self.resolve(batch), strict=True)
        ]
        self._last = (batch.burst_id, states)
        return StepResult(burst_id=batch.burst_id, states=states, num_rows=0, seconds=0.0)

    def resolve(self, batch: StepBatch) -> list[CanvasState]:
        """The states that a burst starts from."""
        if batch.follows is None:
            assert not any(isinstance(state, int) for state in batch.states)
        else:
            assert self._last is not None
            assert self._last[0] == batch.follows, "a burst follows the worker's last one"
        kept = self._last[1] if self._last is not None else []
        return [kept[state] if isinstance(state, int) else state for state in batch.states]

    def _advance(self, spec: CanvasSpec, state: CanvasState, num_steps: int) -> CanvasState:
        tokens, num_forwards, block = state.token_array().copy(), state.num_forwards, state.block
        block_forwards, full_tokens = state.num_block_forwards, state.full_tokens
        prompt_len = len(tokens) - spec.canvas_len
        for _ in range(num_steps if not state.finished else 0):
            if not spec.is_light(block_forwards):
                full_tokens = tokens.tobytes()
            place = int(np.flatnonzero(tokens == MASK)[0])
            tokens[place] = TOKEN_ID
            num_forwards += 1
            block_forwards += 1
            done = place - prompt_len + 1
            if done == spec.canvas_len or done % spec.block_length == 0:
                block += 1
                block_forwards = 0
                if spec.pause_at_blocks or done == spec.canvas_len:
                    break
        return msgspec.structs.replace(
            state,
            tokens=tokens.tobytes(),
            full_tokens=full_tokens if spec.is_light(block_forwards) else b"",
            num_forwards=num_forwards,
            num_block_forwards=block_forwards,
            block=block,
            finished=not (tokens == MASK).any(),
        )


class Requests:
    """Makes requests with ordinals of their own."""

    def __init__(self) -> None:
        self.num_canvases = self.count = 0

    def make(
        self,
        prompt_len: int,
        canvas_len: int,
        *,
        arrival_time: float = 0.0,
        stop_after: int | None = None,
        **fields: Any,
    ) -> Request:
        """A request whose text holds a stop string after `stop_after` tokens."""
        params = resolve(
            {
                "max_tokens": canvas_len,
                "temperature": 1.0,
                "stop": None if stop_after is None else "stop",
                **fields,
            }
        )
        request_id = str(self.count)
        self.count += 1

        def find_stop(canvas: Canvas, state: CanvasState) -> TextStop | None:
            assert stop_after is not None
            done = min(state.block * canvas.spec.block_length, canvas.spec.canvas_len)
            return TextStop(stop_after, "stop") if done >= stop_after else None

        canvases = [
            new_canvas(
                request_id,
                self.num_canvases + sample,
                [7] * prompt_len,
                params,
                seed=self.num_canvases + sample,
                sample=sample,
                mask_id=MASK,
                stop_ids=[],
            )
            for sample in range(params.n)
        ]
        self.num_canvases += params.n
        return Request(
            request_id=request_id,
            prompt=None,
            prompt_token_ids=[7] * prompt_len,
            canvases=canvases,
            priority=params.priority,
            stop_token_ids=[],
            include_stop_in_text=False,
            logprobs=False,
            trace=False,
            stop=(),
            find_stop=None if stop_after is None else find_stop,
            arrival_time=arrival_time,
        )
