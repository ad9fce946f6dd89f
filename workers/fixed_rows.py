"""Packing in fixed shapes, for devices that the host must not wait for.

Where masks are is only known on the device, so a pack has room for all that a step may need: a candidate row
for every slot of the active blocks, a shadow row for every slot of those that verify, and for those that ask
for the exact answer a copy of the sequence for every slot. Which of them count is data, as is the place of
the active blocks. A plan is made on the host, from what it knows of the canvases; `pack` runs on the device
and never looks back.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from remask.scheduler.canvas import CanvasSpec
from remask.workers.attention.varlen import ShadowSegment, VarlenLayout
from remask.workers.rows import Guidance, HeadQuery, PackedRows, StepInputs, hidden_tokens, shadow_mask


@dataclass(frozen=True)
class FixedPlan:
    """The canvases of one pack. Slots are numbered as in the burst's flattened [R, B].

    The sequences are those of all canvases, second copies of the guided ones, then the copies that the exact
    answer needs.

    Attributes:
        token_index, positions: int64 [T_main]: where in the burst's flat tokens each main row's token stands,
            and its position.
        is_hidden: bool [T_main]: fixed tokens of second copies; None where there are none.
        cu_queries, cu_keys: boundaries of the sequences among candidates and main rows.
        num_main_slots: slots of first copies.
        main: slots of first and second copies.
        copies: the slot that each copy verifies.
        shadows: slots of shadow rows.
        cu_shadows: boundaries of the verifying canvases in `shadows`.
        shadow_owners: the place in the pack of each verifying canvas.
        sees_block: whether the shadow rows of each of these see each other.
        guidance: which hidden states belong together; None where nobody is guided.
        special: int64: which of the N slots are of canvases that `needs_logits`; None: none.
        slots_N: int64 [N]: the slots that are answered for.
    """

    token_index: Tensor
    positions: Tensor
    is_hidden: Tensor | None
    cu_queries: tuple[int, ...]
    cu_keys: tuple[int, ...]
    num_main_slots: int
    main: Slots
    copies: Slots
    shadows: Slots
    cu_shadows: tuple[int, ...]
    shadow_owners: tuple[int, ...]
    sees_block: tuple[bool, ...]
    guidance: Guidance | None
    special: Tensor | None
    slots_N: Tensor

    def pack(self, step: StepInputs) -> tuple[PackedRows, HeadQuery]:
        """See `Plan`; its shapes are the same in every step."""
        blocks = step.blocks
        valid, masked, read, places = (
            part.flatten() for part in (blocks.valid, blocks.masked, blocks.read, blocks.rows)
        )
        ids = step.tokens[self.token_index]
        if self.is_hidden is not None:
            ids = ids.masked_fill(self.is_hidden, step.mask_id)
        copied = self.copies.places(valid, places) + self.copies.shifts
        ids = ids.scatter(0, copied, step.mask_id)
        positions = self.shadows.places(valid, places) - self.shadows.starts
        shadow_rows = torch.arange(len(positions), device=ids.device) + len(ids)
        segments = self._segments(positions, valid[self.shadows.slots])
        rows = PackedRows(
            ids_T=torch.cat([ids, torch.full_like(positions, step.mask_id)]),
            positions_T=torch.cat([self.positions, positions]),
            layout=VarlenLayout(self.cu_keys, self.cu_keys, segments),
            candidates_H=torch.cat([self.main.places(valid, places) + self.main.shifts, copied, shadow_rows]),
            candidate_layout=VarlenLayout(self.cu_queries, self.cu_keys, segments),
            slots_N=self.slots_N,
            num_main_slots=self.num_main_slots,
        )
        committed = valid & ~masked
        is_main = torch.arange(len(self.slots_N), device=ids.device) < self.num_main_slots
        live = torch.where(is_main, read[self.slots_N], committed[self.slots_N])
        return rows, step.ask(
            self.slots_N, self.num_main_slots, self.guidance, live=live, special=self.special
        )

    def _segments(self, positions: Tensor, is_slot: Tensor) -> tuple[ShadowSegment, ...]:
        """The shadow rows of each verifying canvas, all queries; nobody else sees those of no slot."""
        segments = []
        for i, owner in enumerate(self.shadow_owners):
            bounds = first, last = self.cu_shadows[i], self.cu_shadows[i + 1]
            length = self.cu_keys[owner + 1] - self.cu_keys[owner]
            mask = shadow_mask(positions[first:last], length, sees_block=self.sees_block[i])
            itself = torch.eye(last - first, dtype=torch.bool, device=mask.device)
            mask[:, length:] &= is_slot[first:last] | itself
            segments.append(ShadowSegment(owner, bounds, bounds, mask))
        return tuple(segments)


@dataclass(frozen=True)
class Slots:
    """Slots of some sequences' active blocks.

    Attributes:
        slots: int64.
        shifts: int64: row of a sequence's token in the pack minus the token's place in the flat tokens.
        starts: int64: place of a sequence's first token.
    """

    slots: Tensor
    shifts: Tensor
    starts: Tensor

    def places(self, valid: Tensor, places: Tensor) -> Tensor:
        """Where the slots' tokens stand; what is no slot has the first place of its sequence."""
        return torch.where(valid[self.slots], places[self.slots], self.starts)


def plan_fixed(canvases: Sequence[int], specs: Sequence[CanvasSpec], cu_tokens: Sequence[int]) -> FixedPlan:
    """The plan for some canvases of a burst, on the host.

    Args:
        canvases: indices in the burst.
        specs: of all canvases of the burst.
        cu_tokens: boundaries of all sequences of the burst in its flat tokens.
    """
    width = max(spec.block_length for spec in specs)
    guided = [c for c in canvases if specs[c].is_guided]
    copied = [(c, i) for c in canvases for i in range(specs[c].num_copies)]
    sequences = [*canvases, *guided, *(c for c, _ in copied)]
    lens = [cu_tokens[c + 1] - cu_tokens[c] for c in sequences]
    cu_keys = (0, *itertools.accumulate(lens))
    num_blocks = len(canvases) + len(guided)
    block_lens = [specs[c].block_length for c in sequences[:num_blocks]]

    def slots_of(entries: Iterable[tuple[int, int]]) -> Slots:
        """Slots given by the place of their sequence in the pack and their number in the block."""
        which = list(entries)
        owners = [sequences[place] for place, _ in which]
        starts = [cu_tokens[c] for c in owners]
        shifts = [cu_keys[place] - start for (place, _), start in zip(which, starts, strict=True)]
        slots = [c * width + i for c, (_, i) in zip(owners, which, strict=True)]
        return Slots(*(torch.tensor(values, dtype=torch.int64) for values in (slots, shifts, starts)))

    num_shadows = [specs[c].num_shadow_rows for c in canvases]
    verifying = [place for place, count in enumerate(num_shadows) if count]
    main = slots_of((place, i) for place, count in enumerate(block_lens) for i in range(count))
    copies = slots_of((place, i) for place, (_, i) in enumerate(copied, start=num_blocks))
    shadows = slots_of((place, i) for place, count in enumerate(num_shadows) for i in range(count))
    num_first = sum(block_lens[: len(canvases)])
    slots_N = torch.cat([main.slots[:num_first], copies.slots, shadows.slots])
    is_special = torch.isin(slots_N // width, torch.tensor([c for c in canvases if specs[c].needs_logits]))
    ranges = (range(cu_tokens[c], cu_tokens[c + 1]) for c in sequences)
    second = range(len(canvases), num_blocks)
    return FixedPlan(
        token_index=torch.tensor(list(itertools.chain(*ranges)), dtype=torch.int64),
        positions=torch.tensor(list(itertools.chain(*map(range, lens))), dtype=torch.int64),
        is_hidden=hidden_tokens(specs, sequences, lens, second) if guided else None,
        cu_queries=(0, *itertools.accumulate([*block_lens, *[1] * len(copied)])),
        cu_keys=cu_keys,
        num_main_slots=num_first,
        main=main,
        copies=copies,
        shadows=shadows,
        cu_shadows=(0, *itertools.accumulate(num_shadows[place] for place in verifying)),
        shadow_owners=tuple(verifying),
        sees_block=tuple(specs[canvases[place]].shadows_see_each_other for place in verifying),
        guidance=_guidance(specs, canvases, block_lens, len(main.slots), len(slots_N)) if guided else None,
        special=is_special.nonzero().squeeze(1) if bool(is_special.any()) else None,
        slots_N=slots_N,
    )


def _guidance(
    specs: Sequence[CanvasSpec], canvases: Sequence[int], block_lens: Sequence[int], num_main: int, count: int
) -> Guidance:
    """Second copies have their slots in the order of the guided among the first."""
    num_first = sum(block_lens[: len(canvases)])
    first = torch.arange(count)
    first[num_first:] += num_main - num_first
    is_guided = np.repeat([specs[c].is_guided for c in canvases], block_lens[: len(canvases)])
    second = torch.full((count,), -1)
    second[:num_first][torch.from_numpy(is_guided)] = torch.arange(num_first, num_main)
    return Guidance(first, second)
