"""Parameters that differ from block to block: each canvas reads its own, from tables of all of them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from remask import Remdm, Schedule
from remask.workers.burst.groups import group_policies
from remask.workers.rows.padding import Padding


@given(
    steps=st.lists(st.lists(st.integers(1, 9).map(float), min_size=1, max_size=6), min_size=1, max_size=5),
    blocks=st.lists(st.integers(0, 5), min_size=6, max_size=6),
    padding=st.builds(Padding, num_blocks=st.integers(0, 40), group_size=st.integers(0, 9)),
)
def test_a_canvas_reads_the_parameters_of_its_block(
    steps: list[list[float]], blocks: list[int], padding: Padding
) -> None:
    """The block index of an ended canvas is one past its last block."""
    block_R = torch.tensor([min(block, len(own)) for block, own in zip(blocks, steps, strict=False)])
    params = [{"steps": own} for own in steps]
    (group,) = group_policies([Schedule()] * len(steps), params, padding)
    found = group.params_at(block_R)["steps"].tolist()
    assert found[: len(steps)] == [
        own[min(block, len(own) - 1)] for own, block in zip(steps, block_R.tolist(), strict=True)
    ]
    assert len(found) == len(group.canvases) == max(len(steps), padding.group_size)
    assert len(group.block_fields["steps"]) == max(padding.num_blocks, sum(map(len, steps)))


def test_tables_are_as_long_as_the_blocks_of_all_canvases_together() -> None:
    params = [{"steps": [1.0] * count, "eta": [0.5] * count} for count in (4096, *[1] * 99)]
    (group,) = group_policies([Remdm(8)] * 100, params)
    assert {len(table) for table in group.block_fields.values()} == {4096 + 99}
