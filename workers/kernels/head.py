"""The head as one pass over [live rows, V] in tiles: every logit is used up where it is made.

The product with the head's weights keeps an online softmax (Milakov and Gimelshein 2018) for each row, beside
the values that are ranked and drawn. The vocabulary is cut into splits of a fixed number of ids, which run in
parallel; a second, small kernel merges them. `remask.workers.head` is the reference.

Nothing is read on the host: grids and memory follow from shapes, and how many rows are live is on the device.
A row's numbers do not depend on the rows beside it, on its place or on how many are live. One model has as
many variants of the kernels as `needs` has: no number of rows makes another.
"""

# Inside kernels Triton's functions take and give what their annotations do not say.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from remask.workers.head import Statistics
from remask.workers.kernels.keyed_random import gumbel
from remask.workers.kernels.logarithms import log1p, log_difference
from remask.workers.kernels.sizes import head_sizes

# Tiles of the vocabulary of one program. A split writes 40 bytes a row: 10 KB at V = 126464.
SPLIT_TILES = 4
MERGED_ROWS = 8  # rows of a program of the second kernel

# The fields that a split stores for a row. The largest logit and M are apart from the softmax's sum, so that
# small numbers are never added to 1. fp32: logits, but for the sums of exp(x - top) and exp(x - top)(x - top)
# over the ids that are neither the top token nor M, and the drawn token's score less `top`. int32: ids.
_TOP, _REST, _MOMENT, _SECOND, _SCORE, _DRAWN, _GIVEN, _MASK = (tl.constexpr(field) for field in range(8))
_TOP_ID, _DRAWN_ID = tl.constexpr(0), tl.constexpr(1)
_NUM_REALS, _NUM_IDS = tl.constexpr(8), tl.constexpr(2)

_NO_ID = tl.constexpr(2**31 - 1)  # larger than any id, so that an id wins a tie against it
# What is as far below the largest logit weighs 0 in fp32, and 0 times this is no NaN.
_FAR = tl.constexpr(-200.0)


def fused_statistics(
    normed_ND: Tensor,
    head_VD: Tensor,
    *,
    live_N: Tensor,
    count: Tensor,
    given_N: Tensor,
    temperature_N: Tensor,
    keys_N: Tensor,
    mask_id: int,
    needs: frozenset[str],
    out: Statistics,
) -> None:
    """Statistics of the live rows, as `remask.workers.head.logits_statistics` of unedited logits.

    Logits are accumulated in fp32 and not rounded. May be captured in a CUDA graph.

    Args:
        normed_ND: final hidden states after the final norm, [N, D]. Like `head_VD` it may be a view of which
            the last dimension is contiguous.
        head_VD: the head's weights [V, D], of the same dtype.
        live_N: int32 [N]: numbers of rows, the live ones first.
        count: int32 [1]: how many are live.
        given_N: int64 [N]: the token whose probability is wanted.
        temperature_N: fp32 [N]: of the proposal; 0: the most probable token.
        keys_N: int64 [N]: keys of the token stream; any numbers where all temperatures are 0.
        mask_id: M.
        needs: statistics to compute beside the others: "margin", "entropy", both or none.
        out: where the live rows' statistics are written; the others are left as they are.
    """
    (num_rows, depth), vocab_size = normed_ND.shape, head_VD.shape[0]
    sizes = head_sizes(is_fp32=normed_ND.dtype == torch.float32)
    num_splits = triton.cdiv(vocab_size, SPLIT_TILES * sizes.tile_v)
    reals = torch.empty(num_splits, _NUM_REALS.value, num_rows, device=normed_ND.device)
    ids = torch.empty(num_splits, _NUM_IDS.value, num_rows, dtype=torch.int32, device=normed_ND.device)
    needed = {"MARGIN": "margin" in needs, "ENTROPY": "entropy" in needs}
    # Programs that start together differ in their rows and share the split, whose weights are then read once
    # into the second-level cache.
    _split[(triton.cdiv(num_rows, sizes.tile_n), num_splits)](
        normed_ND,
        head_VD,
        live_N,
        count,
        given_N,
        temperature_N,
        keys_N,
        reals,
        ids,
        normed_ND.stride(0),
        head_VD.stride(0),
        num_rows,
        vocab_size,
        depth,
        mask_id,
        **needed,
        SPLIT_TILES=SPLIT_TILES,
        TILE_N=sizes.tile_n,
        TILE_V=sizes.tile_v,
        TILE_D=sizes.tile_bytes // normed_ND.element_size(),
        PARTS=sizes.parts,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        maxnreg=sizes.max_registers,
    )
    _merge[(triton.cdiv(num_rows, MERGED_ROWS),)](
        reals,
        ids,
        live_N,
        count,
        temperature_N,
        out.reals,
        out.ids,
        out.reals.stride(0),
        out.ids.stride(0),
        num_rows,
        num_splits,
        vocab_size,
        mask_id,
        **needed,
        SPLITS=triton.next_power_of_2(num_splits),
        ROWS=MERGED_ROWS,
        num_warps=8,
    )


@triton.jit
def _finite(x):
    """A number to subtract; 0 if no id has any weight."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _below(x, base):
    """x - base, and so large that 0 times it is no NaN."""
    return tl.maximum(x - base, _FAR)


@triton.jit
def _find(values, ids):
    """The largest of each row [N, V], and its id; ties go to the lower id."""
    best = tl.max(values, 1)
    return best, tl.min(tl.where(values == best[:, None], ids, _NO_ID), 1)


@triton.jit
def _wins(value, token, best, best_token):
    """Ties go to the lower id."""
    return (value > best) | ((value == best) & (token < best_token))


@triton.jit
def _logits(
    row_ptrs, id_ptrs, is_live, is_id, depth, TILE_N: tl.constexpr, TILE_V: tl.constexpr, TILE_D: tl.constexpr
):
    """fp32 [N, V]; -inf beyond the vocabulary."""
    logits = tl.zeros([TILE_N, TILE_V], dtype=tl.float32)
    for start in range(0, depth, TILE_D):
        dims = start + tl.arange(0, TILE_D)
        inside = dims < depth
        normed_ptrs, head_ptrs = row_ptrs[:, None] + dims[None, :], id_ptrs[None, :] + dims[:, None]
        normed = tl.load(normed_ptrs, mask=is_live[:, None] & inside[None, :], other=0.0)
        head = tl.load(head_ptrs, mask=is_id[None, :] & inside[:, None], other=0.0)
        logits = tl.dot(normed, head, logits, input_precision="ieee")
    return tl.where(is_id[None, :], logits, float("-inf"))


@triton.jit
def _absorb(
    state, x, ids, given, temperature, keys, is_hot, mask_id, MARGIN: tl.constexpr, ENTROPY: tl.constexpr
):
    """What a split leaves, with some more logits [N, V] taken in."""
    top, rest, moment, second, score, drawn, given_logit, mask_logit, top_id, drawn_id = state
    is_given = ids[None, :] == given[:, None]
    given_logit = tl.maximum(given_logit, tl.max(tl.where(is_given, x, float("-inf")), 1))
    is_mask = (ids == mask_id)[None, :]
    mask_logit = tl.maximum(mask_logit, tl.max(tl.where(is_mask, x, float("-inf")), 1))
    # From here on M is excluded: it has no id to be found by. (Those beyond the vocabulary lose every tie.)
    x = tl.where(is_mask, float("-inf"), x)
    allowed = tl.where(is_mask, _NO_ID, ids[None, :])

    top_here, id_here = _find(x, allowed)
    top_id = tl.where(_wins(top_here, id_here, top, top_id), id_here, top_id)
    old_top, loser, top = top, tl.minimum(top, top_here), tl.maximum(top, top_here)
    base = _finite(top)
    others = tl.where(allowed == id_here[:, None], float("-inf"), x)
    offset, shift, fall = _below(others, base[:, None]), _below(old_top, base), _below(loser, base)
    weight, shrink, fallen = tl.exp(offset), tl.exp(shift), tl.exp(fall)
    if ENTROPY:
        moment = shrink * (moment + shift * rest) + fallen * fall + tl.sum(weight * offset, 1)
    rest = shrink * rest + (fallen + tl.sum(weight, 1))
    if MARGIN:
        second = tl.maximum(tl.maximum(second, loser), tl.max(others, 1))
    if is_hot:
        scores = (x - base[:, None]) + temperature[:, None] * gumbel(keys, ids)
        score_here, id_here = _find(scores, allowed)
        logit = tl.max(tl.where(allowed == id_here[:, None], x, float("-inf")), 1)
        score += old_top - base
        wins = _wins(score_here, id_here, score, drawn_id)
        score = tl.maximum(score, score_here)
        drawn = tl.where(wins, logit, drawn)
        drawn_id = tl.where(wins, id_here, drawn_id)
    return top, rest, moment, second, score, drawn, given_logit, mask_logit, top_id, drawn_id


@triton.jit
def _halves(x):
    """The left and the right half of [N, V]; nothing moves between threads."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def _part(x, part: tl.constexpr, PARTS: tl.constexpr):
    """One of PARTS equal parts of the columns of [N, V]; PARTS is a power of 2."""
    if PARTS > 1:
        left, right = _halves(x)
        if part < PARTS // 2:
            x = _part(left, part, PARTS // 2)
        else:
            x = _part(right, part - PARTS // 2, PARTS // 2)
    return x


@triton.jit(do_not_specialize=["num_rows"])
def _split(
    normed_ptr,
    head_ptr,
    live_ptr,
    count_ptr,
    given_ptr,
    temperature_ptr,
    keys_ptr,
    reals_ptr,
    ids_ptr,
    normed_stride,
    head_stride,
    num_rows,
    vocab_size,
    depth,
    mask_id,
    MARGIN: tl.constexpr,
    ENTROPY: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_V: tl.constexpr,
    TILE_D: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Partial results of a tile of live rows over one split of the vocabulary."""
    PART_V: tl.constexpr = TILE_V // PARTS
    first_row, split = tl.program_id(0) * TILE_N, tl.program_id(1)
    count = tl.load(count_ptr)
    if first_row >= count:
        return
    places = first_row + tl.arange(0, TILE_N)
    is_live = places < count
    rows = tl.load(live_ptr + places, mask=is_live, other=0)
    given = tl.load(given_ptr + rows, mask=is_live, other=0).to(tl.int32)
    temperature = tl.load(temperature_ptr + rows, mask=is_live, other=0.0)
    keys = tl.load(keys_ptr + rows, mask=is_live, other=0)
    is_hot = tl.max(temperature, 0) > 0

    row_ptrs = normed_ptr + rows.to(tl.int64) * normed_stride
    nothing = tl.full([TILE_N], float("-inf"), dtype=tl.float32)
    zero = tl.zeros([TILE_N], dtype=tl.float32)
    no_id = tl.full([TILE_N], _NO_ID, dtype=tl.int32)
    state = (nothing, zero, zero, nothing, nothing, nothing, nothing, nothing, no_id, no_id)
    first_id = split * (SPLIT_TILES * TILE_V)
    end = tl.minimum(first_id + SPLIT_TILES * TILE_V, vocab_size)
    for start in range(first_id, end, TILE_V):
        ids = start + tl.arange(0, TILE_V)
        id_ptrs = head_ptr + ids.to(tl.int64) * head_stride
        x = _logits(row_ptrs, id_ptrs, is_live, ids < vocab_size, depth, TILE_N, TILE_V, TILE_D)
        # A part at a time, so that values derived from the logits stay in registers.
        for part in tl.static_range(PARTS):
            part_x, part_ids = _part(x, part, PARTS), start + part * PART_V + tl.arange(0, PART_V)
            state = _absorb(
                state, part_x, part_ids, given, temperature, keys, is_hot, mask_id, MARGIN, ENTROPY
            )
    real_ptrs = reals_ptr + split.to(tl.int64) * (_NUM_REALS * num_rows) + places
    for field in tl.static_range(_NUM_REALS):
        tl.store(real_ptrs + field * num_rows, state[field], mask=is_live)
    id_ptrs = ids_ptr + split.to(tl.int64) * (_NUM_IDS * num_rows) + places
    for field in tl.static_range(_NUM_IDS):
        tl.store(id_ptrs + field * num_rows, state[_NUM_REALS + field], mask=is_live)


@triton.jit
def _read(ptr, field, num_rows, splits, places, is_read, nothing, NUM_FIELDS: tl.constexpr):
    """[splits, rows] of one field."""
    rows_before = splits.to(tl.int64)[:, None] * (NUM_FIELDS * num_rows) + field * num_rows
    return tl.load(ptr + rows_before + places[None, :], mask=is_read, other=nothing)


@triton.jit
def _best(values, ids):
    """Of the largest over the splits its id, and which split has it; ties go to the lower id."""
    best_id = tl.min(tl.where(values == tl.max(values, 0)[None, :], ids, _NO_ID), 0)
    return best_id, ids == best_id[None, :]


@triton.jit(do_not_specialize=["out_reals_stride", "out_ids_stride", "num_rows"])
def _merge(
    reals_ptr,
    ids_ptr,
    live_ptr,
    count_ptr,
    temperature_ptr,
    out_reals_ptr,
    out_ids_ptr,
    out_reals_stride,
    out_ids_stride,
    num_rows,
    num_splits,
    vocab_size,
    mask_id,
    MARGIN: tl.constexpr,
    ENTROPY: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Statistics of some live rows from what the splits left."""
    first_row = tl.program_id(0) * ROWS
    count = tl.load(count_ptr)
    if first_row >= count:
        return
    places, splits = first_row + tl.arange(0, ROWS), tl.arange(0, SPLITS)
    is_live = places < count
    is_read = (splits < num_splits)[:, None] & is_live[None, :]
    nothing: tl.constexpr = float("-inf")

    tops = _read(reals_ptr, _TOP, num_rows, splits, places, is_read, nothing, _NUM_REALS)
    top_ids = _read(ids_ptr, _TOP_ID, num_rows, splits, places, is_read, _NO_ID, _NUM_IDS)
    top_id, has_top = _best(tops, top_ids)
    top = tl.max(tops, 0)
    top_base = _finite(top)[None, :]
    shift = _below(tops, top_base)
    shrink = tl.exp(shift)
    rests = _read(reals_ptr, _REST, num_rows, splits, places, is_read, 0.0, _NUM_REALS)
    rest = tl.sum(shrink * tl.where(has_top, rests, 1.0 + rests), 0)

    # M comes in last, and is what others are relative to where it is the most probable of all.
    masks = _read(reals_ptr, _MASK, num_rows, splits, places, is_read, nothing, _NUM_REALS)
    mask = tl.max(masks, 0)
    base = _finite(tl.maximum(top, mask))
    below, mask_below = _below(top, base), _below(mask, base)
    others = tl.where(mask > top, tl.exp(below) * (1.0 + rest), rest + tl.exp(mask_below))
    log_norm = log1p(others)
    log_top = top - base - log_norm
    neg_entropy = tl.zeros([ROWS], dtype=tl.float32)
    log_margin = tl.full([ROWS], nothing, dtype=tl.float32)
    if ENTROPY:
        moments = _read(reals_ptr, _MOMENT, num_rows, splits, places, is_read, 0.0, _NUM_REALS)
        moment = tl.sum(shrink * (moments + shift * (1.0 + rests)), 0)
        moment = tl.exp(below) * (moment + below * (1.0 + rest)) + tl.exp(mask_below) * mask_below
        neg_entropy = tl.div_rn(moment, 1.0 + others) - log_norm
    if MARGIN:
        seconds = _read(reals_ptr, _SECOND, num_rows, splits, places, is_read, nothing, _NUM_REALS)
        second = tl.max(tl.maximum(seconds, tl.where(has_top, nothing, tops)), 0)
        log_margin = log_difference(log_top, _finite(top) - second)

    scores = _read(reals_ptr, _SCORE, num_rows, splits, places, is_read, nothing, _NUM_REALS)
    drawn_ids = _read(ids_ptr, _DRAWN_ID, num_rows, splits, places, is_read, _NO_ID, _NUM_IDS)
    drawn_id, has_drawn = _best(scores + (tops - top_base), drawn_ids)
    drawns = _read(reals_ptr, _DRAWN, num_rows, splits, places, is_read, nothing, _NUM_REALS)
    drawn = tl.max(tl.where(has_drawn, drawns, nothing), 0)
    givens = _read(reals_ptr, _GIVEN, num_rows, splits, places, is_read, nothing, _NUM_REALS)
    given = tl.max(givens, 0)

    rows = tl.load(live_ptr + places, mask=is_live, other=0)
    is_hot = tl.load(temperature_ptr + rows, mask=is_live, other=0.0) > 0
    # A row of NaN has no largest logit and so no id. Its statistics are NaN and its proposal is a token of
    # the vocabulary: the next step looks it up in the embedding, where any other id ends the CUDA context.
    is_nan = top_id >= vocab_size
    some_id = tl.where(mask_id == 0, 1, 0)
    top_id = tl.where(is_nan, some_id, top_id)
    drawn_id = tl.where(drawn_id >= vocab_size, some_id, drawn_id)
    proposal, proposal_id = tl.where(is_hot, drawn, top), tl.where(is_hot, drawn_id, top_id)
    tl.store(out_ids_ptr + rows, proposal_id.to(tl.int64), mask=is_live)
    tl.store(out_ids_ptr + out_ids_stride + rows, top_id.to(tl.int64), mask=is_live)
    log_proposal = proposal - base - log_norm
    log_given = given - base - log_norm
    found = (log_proposal, log_top, log_given, log_margin, neg_entropy, log_proposal, log_top)
    for field in tl.static_range(7):
        values = tl.where(is_nan, float("nan"), found[field])
        tl.store(out_reals_ptr + field * out_reals_stride + rows, values, mask=is_live)
