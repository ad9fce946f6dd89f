"""The steps of a burst: on a host, which reads the canvases between them, and with static shapes, which the
host plans before the first."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from remask.workers.burst.keys import BurstKeys
from remask.workers.burst.state import BurstState
from remask.workers.models.denoiser import Denoiser
from remask.workers.rows.kept import NOTHING_KEPT
from remask.workers.step import Plans, denoise, make_keys, plan_keys, plan_packs

RESERVE_STEPS = 16  # between two reads of the number of removed tokens


class BurstPlans(NamedTuple):
    """What a burst with static shapes forwards.

    Attributes:
        keys: before the first step: the keys that are missing.
        first: in the first step; None: it is like the others. All full forwards of canvases that reuse keys
            are in it: a canvas whose next one is full pauses.
        later: in each of the other steps.
    """

    keys: Plans
    first: Plans | None
    later: Plans


def plan_first(
    state: BurstState, model: Denoiser, pack_rows: int, keys: BurstKeys | None
) -> tuple[Plans, Plans | None]:
    """`keys` and `first` of `BurstPlans`, on the host; `keys` has the rows of canvases that reuse keys."""
    if keys is None:
        return [], None
    kept = keys.rows(*_places(state))
    if not keys.missing and all(own.light is not None for own in kept.values()):
        return [], None
    missing = plan_keys(state, keys.missing, kept, model, pack_rows)
    return missing, plan_packs(state, model, pack_rows, kept)


def plan_burst(state: BurstState, model: Denoiser, pack_rows: int, keys: BurstKeys | None) -> BurstPlans:
    """The plans of a burst with static shapes, on the host; `keys` has the rows of canvases that reuse
    keys."""
    later = NOTHING_KEPT if keys is None else keys.later_rows(*_places(state))
    return BurstPlans(*plan_first(state, model, pack_rows, keys), plan_packs(state, model, pack_rows, later))


def steps_of(
    state: BurstState, plans: BurstPlans, model: Denoiser, run: Callable[[Callable[[], int]], int]
) -> Callable[[], int]:
    """The step of a burst with static shapes; `run` takes all but a first one that differs."""
    first = iter(()) if plans.first is None else iter((plans.first,))

    def later() -> int:
        return denoise(state, plans.later, model)

    def step() -> int:
        own = next(first, None)
        if own is None:
            return run(later)
        return make_keys(state, plans.keys, model) + denoise(state, own, model)

    return step


def _places(state: BurstState) -> tuple[list[int], list[int]]:
    """Where the canvases of a state on the host are: the active blocks, and their forwards so far."""
    return state.block.tolist(), state.block_forwards.tolist()


def advance(
    state: BurstState, num_steps: int, model: Denoiser, pack_rows: int, keys: BurstKeys | None = None
) -> int:
    """Takes up to `num_steps` denoising steps in place; returns the rows forwarded.

    It ends early if a canvas pauses for a search of its text, so that the canvas does not wait for the
    others. `keys` has the rows of canvases that reuse keys.
    """
    num_rows, kept = 0, NOTHING_KEPT
    if keys is not None:
        kept = keys.rows(*_places(state))
        num_rows += make_keys(state, plan_keys(state, keys.missing, kept, model, pack_rows), model)
    plans, planned = plan_packs(state, model, pack_rows, kept), _kinds(state)
    for step in range(num_steps):
        if not plans:
            break
        if step % RESERVE_STEPS == 0:
            state.reserve_removed(RESERVE_STEPS)
        num_rows += denoise(state, plans, model)
        if bool((state.paused & ~state.finished & (state.fault == 0)).any()):
            break
        if (kinds := _kinds(state)) != planned:
            if keys is not None:
                kept = keys.rows(*_places(state))
            plans, planned = plan_packs(state, model, pack_rows, kept), kinds
    return num_rows


def _kinds(state: BurstState) -> tuple[int, list[bool] | None]:
    """What the rows of a step on the host depend on: how many canvases have paused, and which of the others
    take a light forward. (The block of a canvas changes between light forwards only through a full one.)"""
    are_light = state.are_light()
    return int(state.paused.sum()), are_light.tolist() if are_light is not None else None
