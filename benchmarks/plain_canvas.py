"""One sequence of a baseline: its tokens, its active block, and the published decision rules in plain numpy.

The rules are written from the papers and share no code with the engine's kernels, so that equal tokens are
independent evidence. The baselines differ only in how they get from canvases to probabilities.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from remask.scheduler.params import SamplingParams, resolve
from remask.scheduler.policies import (
    CappedThreshold,
    Factor,
    Schedule,
    Threshold,
    UnmaskPolicy,
    Wino,
)
from remask.scheduler.policies.base import share_steps
from remask.scheduler.sampling import Sampling

Reals = NDArray[np.float64]


class Decoded(NamedTuple):
    """A filled canvas and the forwards that it took."""

    token_ids: list[int]
    nfe: int


class Shadows(NamedTuple):
    """The rows that verify the block of a canvas.

    Attributes:
        slots: int64 [B]: the positions that the first B rows verify.
        ids, positions: int64 [S].
        sees: bool [S, L + S]: which rows of the sequence, and which shadow rows, each one sees.
    """

    slots: NDArray[np.int64]
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    sees: NDArray[np.bool_]


class PlainCanvas:
    """A prompt with its canvas, denoised block by block at temperature 0; end-of-text tokens are ignored.

    Attributes:
        ids: int64 [L]: prompt and canvas.
        start, end: the active block.
        nfe: forwards so far.
        reuse: which keys a forward reuses; None: none.
        verifies: whether a forward needs shadow rows.
    """

    def __init__(self, prompt: list[int], params: SamplingParams, mask_id: int) -> None:
        resolved = resolve(params)
        assert resolved.sampling == Sampling(), "the baselines draw no tokens"
        self.ids = np.array(prompt + [mask_id] * resolved.max_tokens, dtype=np.int64)
        self.prompt_len, self.mask_id, self.nfe = len(prompt), mask_id, 0
        self._unmask, self._remask = resolved.unmask, resolved.remask
        self.reuse = resolved.reuse
        assert resolved.refresh is None, "the published loops refresh keys at the start of a block alone"
        self.verifies = isinstance(self._remask, Wino)
        self._block_length = resolved.block_length
        whole, rest = divmod(resolved.max_tokens, resolved.block_length)
        self._block_lens = [resolved.block_length] * whole + [rest] * (rest > 0)
        self._enter_block(0)

    @property
    def finished(self) -> bool:
        return self._block == len(self._block_lens)

    @property
    def begins_block(self) -> bool:
        """Whether no forward of the active block has run."""
        return self._block_forwards == 0

    @property
    def masked(self) -> NDArray[np.bool_]:
        """Slots of the active block that hold M."""
        return self.ids[self.start : self.end] == self.mask_id

    def decoded(self) -> Decoded:
        return Decoded(self.ids[self.prompt_len :].tolist(), self.nfe)

    def shadows(self, shift: int) -> Shadows:
        """The rows that verify the active block; none if the policy does not verify.

        A mask at slot j sees all rows but j, and the other shadow rows. If logits are shifted, a copy of row
        j - 1 answers, which sees neither row j - 1 nor j, but itself and a mask at j; the masks stand behind
        the copies.
        """
        width = self.end - self.start if self.verifies else 0
        block, own = np.arange(self.start, self.start + width), np.arange(width)
        masks, sees = np.full(width, self.mask_id), np.ones((width, len(self.ids)), dtype=bool)
        sees[own, block] = False
        if not shift:
            return Shadows(block, masks, block, np.append(sees, np.ones((width, width), dtype=bool), axis=1))
        before = sees.copy()
        before[own, block - 1] = False
        none, itself = np.zeros((width, width), dtype=bool), np.eye(width, dtype=bool)
        return Shadows(
            block,
            np.append(self.ids[block - 1], masks),
            np.append(block - 1, block),
            np.block([[before, itself, itself], [sees, none, itself]]),
        )

    def step(self, proposal: NDArray[np.int64], confidence: Reals, verified: Reals | None) -> None:
        """Commits and remasks after a forward.

        Args:
            proposal, confidence: of every slot of the active block.
            verified: leave-one-out probabilities of the block's tokens, where the policy verifies.
        """
        masked = self.masked
        # Best first, then by position; slots that are not masked come last.
        order = np.argsort(np.where(masked, -confidence, np.inf), kind="stable")[: masked.sum()]
        num_commits = self._num_commits(self._unmask, confidence[order])
        block = self.ids[self.start : self.end]
        if verified is not None and num_commits > 1:
            doubtful = ~masked & (verified < self._remask.t2)  # type: ignore[union-attr]
            budget = num_commits if self._remask.budget == "cur_accept" else self._prev_accept  # type: ignore[union-attr]
            worst = np.argsort(np.where(doubtful, verified, np.inf), kind="stable")
            block[worst[: min(doubtful.sum(), budget - 1)]] = self.mask_id
        self._prev_accept = num_commits
        block[order[:num_commits]] = proposal[order[:num_commits]]
        self.nfe += 1
        self._block_forwards += 1
        if not self.masked.any():
            self._enter_block(self._block + 1)

    def _num_commits(self, policy: UnmaskPolicy, best_first: Reals) -> int:
        """How many of the masked slots are committed, from their confidences in falling order."""
        count = len(best_first)
        match policy:
            case Threshold(t):
                return max(1, int((best_first >= t).sum()))
            case CappedThreshold(t1):
                cap = min(max(int(0.7 * count), 5), 20)
                return max(1, min(cap, int((best_first > t1).sum())))
            case Schedule(steps, "confidence"):
                total = sum(self._block_lens) if steps is None else steps
                steps_left = share_steps(total, self._block_lens)[self._block] - self._block_forwards
                return -(-count // steps_left) if steps_left > 0 else 1
            case Factor(f, False):
                fails = [n for n in range(1, count) if best_first[n] < 1 - f / (n + 2)]
                kept = fails[0] if fails else count
                return count if kept == count - 1 else max(1, kept)  # the published quirk
        raise NotImplementedError(f"the baselines do not decode with {policy}")

    def _enter_block(self, block: int) -> None:
        self._block, self._block_forwards = block, 0
        self._prev_accept = 30
        self.start = self.prompt_len + block * self._block_length
        self.end = min(self.start + self._block_length, len(self.ids))
