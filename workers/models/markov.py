"""An exact model: the posterior of a small Markov chain over the masked positions.

The sampler is then the only source of error, and a policy can be judged by the distribution of its outputs
("Is Your Diffusion Sampler Actually Correct?", arXiv 2602.19619). A directory with a `config.json` like this
takes the place of a checkpoint:

    {"architectures": ["MarkovChain"], "initial": [0.5, 0.5], "transition": [[0.9, 0.1], [0.2, 0.8]]}

States are the token ids 0..S-1 and M is S. There are no end-of-text ids and no tokenizer. `initial` is the
distribution of the first position of a prompt; row s of `transition` is that of the position after state s.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remask.scheduler.errors import InvalidRequest
from remask.workers.head import Statistics, head_statistics
from remask.workers.models.config import ModelConfig
from remask.workers.models.denoiser import Denoiser
from remask.workers.rows.pack import HeadQuery, PackedRows

ARCHITECTURE = "MarkovChain"
MAX_LEN = 4096
PACK_ROWS = 1 << 16


class MarkovDenoiser(Denoiser):
    """Posteriors by forward and backward recursion over all sequences of a pack at once, in fp64.

    Args:
        initial: probabilities [S] of the first state.
        transition: probabilities [S, S] of the next state, a row for each state.
    """

    def __init__(self, initial: Tensor, transition: Tensor) -> None:
        self.initial, self.transition = initial.double(), transition.double()
        num_states = len(initial)
        self.mask_id, self.device, self.pack_rows = num_states, torch.device("cpu"), PACK_ROWS
        self.config = ModelConfig(
            vocab_size=num_states + 1, max_len=MAX_LEN, mask_id=num_states, eos_ids=(), eot_id=None
        )

    def statistics(self, rows: PackedRows, query: HeadQuery) -> Statistics:
        posteriors_HV = self.log_posteriors(*self._sequences(rows)).float()
        return head_statistics(posteriors_HV, torch.clone, self.config.vocab_size, query, self.mask_id)

    def _sequences(self, rows: PackedRows) -> tuple[list[Tensor], Tensor, Tensor]:
        """The sequences that candidates see, and of each candidate [H] its sequence and position.

        A shadow row sees its sequence with its own position masked.
        """
        bounds = rows.layout.cu_keys
        sequences = [rows.ids_T[start:end] for start, end in pairwise(bounds)]
        candidates = rows.candidates_H
        owner = torch.searchsorted(torch.tensor(bounds), candidates, right=True) - 1
        for shadow in rows.candidate_layout.shadows:
            for row in range(*shadow.queries):
                place = rows.candidate_layout.cu_queries[-1] + row
                sequence = sequences[shadow.sequence].clone()
                sequence[rows.positions_T[candidates[place]]] = self.mask_id
                owner[place] = len(sequences)
                sequences.append(sequence)
        return sequences, owner, rows.positions_T[candidates]

    def log_posteriors(self, sequences: Sequence[Tensor], owner: Tensor, position: Tensor) -> Tensor:
        """log p(state at a position | visible part of its sequence), fp64 [H, S + 1]; that of M is -inf.

        Args:
            sequences: int64 ids of each sequence; M is unknown.
            owner, position: int64 [H]: which sequence, and where in it.
        """
        num_states = self.mask_id
        ids = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=self.mask_id)
        # What is known of a position: one state, or (masks and padding) nothing.
        known = torch.ones(*ids.shape, num_states, dtype=torch.float64)
        visible = ids != self.mask_id
        known[visible] = torch.nn.functional.one_hot(ids[visible], num_states).double()
        before, after = torch.empty_like(known), torch.ones_like(known)
        state = self.initial.expand(len(ids), -1)
        for i in range(ids.shape[1]):
            before[:, i] = state
            seen = state * known[:, i]
            state = (seen / seen.sum(-1, keepdim=True)) @ self.transition
        for i in range(ids.shape[1] - 1, 0, -1):
            seen = after[:, i] * known[:, i]
            after[:, i - 1] = (seen / seen.sum(-1, keepdim=True)) @ self.transition.T
        joint = (before * after * known)[owner, position]
        posterior = joint / joint.sum(-1, keepdim=True)
        return torch.nn.functional.pad(posterior.log(), (0, 1), value=-torch.inf)


def load_markov(raw: dict[str, Any], source: str) -> MarkovDenoiser:
    """The chain in a `config.json`.

    Raises:
        InvalidRequest: `initial` and `transition` are not the probabilities of a chain.
    """
    try:
        initial = torch.tensor(raw.get("initial"), dtype=torch.float64)
        transition = torch.tensor(raw.get("transition"), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidRequest("model", source, "needs `initial` [S] and `transition` [S, S]") from None
    if initial.ndim != 1 or len(initial) < 2 or transition.shape != (len(initial), len(initial)):
        raise InvalidRequest("model", source, "needs `initial` [S] and `transition` [S, S], S at least 2")
    for name, table in (("initial", initial), ("transition", transition)):
        if not bool((table > 0).all()) or not torch.allclose(table.sum(-1), torch.ones_like(table.sum(-1))):
            raise InvalidRequest(
                "model", source, f"`{name}` must hold probabilities above 0 that add up to 1"
            )
    return MarkovDenoiser(initial, transition)


def write_markov(directory: Path, initial: Sequence[float], transition: Sequence[Sequence[float]]) -> None:
    """Writes a directory that `LLM` takes as a model."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"architectures": [ARCHITECTURE], "initial": initial, "transition": transition}
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
