"""The decisions of the policies of a burst in a step, and the canvases for which a kernel raises.

A kernel decides each canvas by its own numbers, so it can be called with a part of its group. If it raises,
it is called with halves of the group, until it raises for single canvases. These are at fault, and the step
continues for all others. So a policy that raises, or needs too much memory, costs its neighbours no forward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from remask.scheduler.canvas import NO_MEMORY, RAISES
from remask.workers.burst.groups import PolicyGroup
from remask.workers.burst.state import BurstState
from remask.workers.failures import describe, is_out_of_memory, loses_device
from remask.workers.strategies.view import BlockView, Memory

logger = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """Decisions about all canvases: `commit` and `remask` bool [R, B], `holds` and `takes_top` bool [R]."""

    commit: Tensor
    remask: Tensor
    holds: Tensor
    takes_top: Tensor


def decide(state: BurstState, view: BlockView) -> Outcome:
    """Calls all policies and updates their memory. Canvases for which a kernel raises pause."""
    outcome = Outcome(
        commit=torch.zeros_like(view.masked),
        remask=torch.zeros_like(view.masked),
        holds=torch.zeros_like(state.paused),
        takes_top=torch.zeros_like(state.paused),
    )
    for group in state.unmask:
        _ask(state, group, _unmask(state, view, group, outcome))
    for group, memory in zip(state.remask, state.memory, strict=True):
        _ask(state, group, _remask(state, view, group, outcome, memory))
    return outcome


def _unmask(
    state: BurstState, view: BlockView, group: PolicyGroup, outcome: Outcome
) -> Callable[[slice], None]:
    """A function that calls an unmask kernel with a part of its group."""

    def ask(part: slice) -> None:
        own = _canvases(group, part)
        outcome.commit[own] = group.kernel(view.select(own), group.params_at(state.block, part))

    return ask


def _remask(
    state: BurstState, view: BlockView, group: PolicyGroup, outcome: Outcome, memory: Memory
) -> Callable[[slice], None]:
    """A function that calls a remask kernel with a part of its group. The kernel's inputs are written last,
    after everything that may raise, because it may be called again."""

    def ask(part: slice) -> None:
        own, held = _canvases(group, part), {name: values[part] for name, values in memory.items()}
        decision = group.kernel(
            view.select(own), outcome.commit[own], group.params_at(state.block, part), held
        )
        paused = state.paused[own]  # nothing changes for those that take no step
        after = {
            name: torch.where(
                paused.view(-1, *[1] * (values.ndim - 1)), values, decision.memory[name]
            ).expand_as(values)
            for name, values in held.items()
        }
        outcome.remask[own] = decision.remask
        if decision.holds is not None:
            outcome.holds[own] = decision.holds
        if decision.takes_top is not None:
            outcome.takes_top[own] = decision.takes_top
        outcome.commit[own] = decision.commit
        for name, values in held.items():
            values.copy_(after[name])

    return ask


def _canvases(group: PolicyGroup, part: slice) -> Tensor | slice:
    """The canvases of a part of a group; a slice, which copies nothing, if the group is the whole burst."""
    return part if group.is_whole else group.canvases[part]


def _ask(state: BurstState, group: PolicyGroup, ask: Callable[[slice], None]) -> None:
    """Calls a kernel with its group; canvases for which it raises are at fault."""
    if not state.errors and _error_of(state, ask, slice(None)) is None:
        return
    paused = state.paused.tolist()  # paused canvases take no step and are left out
    parts = [(0, len(group.members))]
    while parts:
        first, last = parts.pop()
        live = [not paused[canvas] for canvas in group.members[first:last]]
        if not any(live):
            continue
        error = _error_of(state, ask, slice(first, last)) if all(live) else None
        if error is not None and len(live) == 1:
            fault = NO_MEMORY if is_out_of_memory(error) else RAISES
            logger.warning("a policy's kernel has failed", exc_info=error)
            state.blame(group.members[first], fault, describe(error))
        elif error is not None or not all(live):
            half = (first + last) // 2
            parts += [(half, last), (first, half)]


def _error_of(state: BurstState, ask: Callable[[slice], None], part: slice) -> Exception | None:
    """The exception of a kernel that is called with a part of its group; None: it returned.

    An error that loses the GPU is raised, and so is any error while a graph is captured: a replay would
    repeat its consequences.
    """
    try:
        ask(part)
    except Exception as error:
        if loses_device(error) or (state.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            raise
        if is_out_of_memory(error):
            error.__traceback__ = None  # it holds the kernel's tensors
        return error
    return None
