"""Likelihoods of continuations, estimated as in LLaDA's evaluation.

A sample masks l of the L tokens of a continuation and adds up the log-probabilities of the masked ones. L/l
times the sum is an unbiased estimate of the model's bound of the log-likelihood, and of the log-likelihood
itself if the model's conditional distributions agree with each other. A sample is a canvas of one forward, so
that scoring shares batches with generation.

Source: Nie et al., "Large Language Diffusion Models" (arXiv 2502.09992), `get_log_likelihood.py` of its
repository.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from remask.limits import check_num_prompts, check_score_size
from remask.outputs import RequestOutput
from remask.scheduler.canvas import TOKEN, Canvas, new_canvas, new_scored_canvas
from remask.scheduler.errors import InvalidRequest, invalid_field
from remask.scheduler.params import Int64, resolve
from remask.scheduler.plain import plain
from remask.scheduler.request import Request

if TYPE_CHECKING:
    from remask.intake import Intake


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """The likelihood of a continuation.

    Attributes:
        logprob: Estimated log-likelihood of the continuation behind its prompt, in nats.
        standard_error: Standard error of the estimate, in nats. 0 for a single token, whose likelihood is
            exact.
        num_samples: Number of samples.
        num_tokens: Number of tokens of the continuation.
        is_greedy: Whether greedy decoding, one token a step, writes the continuation. None: not checked.
        error: Message of the error that ended the request; the figures are then NaN. None: it has finished.
    """

    logprob: float
    standard_error: float
    num_samples: int
    num_tokens: int
    is_greedy: bool | None = None
    error: str | None = None


class ScoreParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a continuation is scored; see `LLM.score`."""

    num_samples: Annotated[int, Meta(ge=2, le=2**20)] = 128  # as in the published evaluation
    seed: Int64 = 0
    check_greedy: bool = False

    @classmethod
    def parse(cls, **given: object) -> ScoreParams:
        """Raises InvalidRequest for a value that a field does not take."""
        fields = plain(given)
        try:
            return msgspec.convert(fields, cls)
        except msgspec.ValidationError as error:
            raise invalid_field("", fields, error) from None


class Masks(NamedTuple):
    """The masks of the samples of a continuation of L tokens.

    Attributes:
        masks: bool [different masks, L]: the tokens that are masked.
        samples: int64 [samples]: the mask of each sample, in ascending order of the number of masked tokens.
    """

    masks: NDArray[np.bool_]
    samples: NDArray[np.int64]


class CheckedScore(NamedTuple):
    """A validated prompt and its continuation."""

    text: str | None
    ids: list[int]
    continuation: list[int]
    params: ScoreParams

    @property
    def masks(self) -> Masks:
        """The masks of its samples. Continuations of equal lengths have equal masks."""
        return draw_masks(len(self.continuation), self.params.num_samples, self.params.seed)

    def request(self, intake: Intake, ordinal: int | None = None) -> Request:
        """A request with a canvas of one forward for each mask, and one that greedy decoding fills if that is
        checked.

        Args:
            intake: of the model.
            ordinal: number of the request; None: the next.
        """
        request_id = str(intake.reserve() if ordinal is None else ordinal)
        return Request(
            request_id=request_id,
            prompt=self.text,
            prompt_token_ids=self.ids,
            canvases=self._canvases(request_id, intake),
            priority=0,
            stop_token_ids=(),
            include_stop_in_text=False,
            logprobs=True,
            trace=False,
            stop=(),
            find_stop=None,
            arrival_time=time.monotonic(),
        )

    def _canvases(self, request_id: str, intake: Intake) -> list[Canvas]:
        masks, mask_id = self.masks.masks, intake.config.mask_id
        first_ordinal = intake.reserve_canvases(len(masks) + self.params.check_greedy)
        tokens = np.array(self.ids + self.continuation, dtype=TOKEN)
        found = [
            new_scored_canvas(
                request_id,
                first_ordinal + sample,
                tokens,
                len(self.ids) + mask.nonzero()[0],
                seed=self.params.seed,
                sample=sample,
                mask_id=mask_id,
                shift=intake.config.shift,
            )
            for sample, mask in enumerate(masks)
        ]
        if self.params.check_greedy:
            whole = {"max_tokens": len(self.continuation), "block_length": len(self.continuation)}
            found.append(
                new_canvas(
                    request_id,
                    first_ordinal + len(found),
                    self.ids,
                    resolve({**whole, "unmask": "schedule"}),
                    seed=self.params.seed,
                    sample=len(found),
                    mask_id=mask_id,
                    shift=intake.config.shift,
                    stop_ids=[],
                )
            )
        return found

    def score(self, output: RequestOutput) -> Score:
        """The score, from the output of the request."""
        num_tokens, num_samples = len(self.continuation), self.params.num_samples
        if output.error is not None:
            return Score(
                logprob=math.nan,
                standard_error=math.nan,
                num_samples=num_samples,
                num_tokens=num_tokens,
                error=output.error,
            )
        masks, samples = self.masks
        sums = [output.outputs[place].cumulative_logprob for place in range(len(masks))]
        estimates = (np.array(sums, dtype=np.float64) * num_tokens / masks.sum(1))[samples]
        is_greedy = output.outputs[-1].token_ids == self.continuation if self.params.check_greedy else None
        return Score(
            logprob=float(estimates.mean()),
            standard_error=standard_error(estimates),
            num_samples=num_samples,
            num_tokens=num_tokens,
            is_greedy=is_greedy,
        )


def check_score(intake: Intake, prompt: object, continuation: object, params: ScoreParams) -> CheckedScore:
    """A prompt and its continuation, validated.

    Raises:
        InvalidRequest: names the invalid parameter.
    """
    text, ids = intake.read_prompt(prompt)
    own = intake.read_continuation(continuation)
    intake.check_lengths(ids, len(own), "continuation")
    check_score_size(intake.options, params.num_samples, len(own))
    return CheckedScore(text, ids, own, params)


def check_scores(
    intake: Intake, prompts: object, continuations: object, params: ScoreParams
) -> list[CheckedScore]:
    """Prompts and their continuations, or one prompt for all continuations, validated.

    Raises:
        InvalidRequest: names the index of the first invalid pair and its parameter.
    """
    own, behind = intake.listed("prompts", prompts), intake.listed("continuations", continuations)
    check_num_prompts(intake.options, len(behind))
    own = own * len(behind) if len(own) == 1 else own
    if len(own) != len(behind):
        problem = f"give one for each of the {len(own)} prompts"
        raise InvalidRequest("continuations", len(behind), problem)
    checked: list[CheckedScore] = []
    num_tokens = 0
    for index, (prompt, continuation) in enumerate(zip(own, behind, strict=True)):
        try:
            checked.append(check_score(intake, prompt, continuation, params))
            num_tokens = check_score_size(
                intake.options, params.num_samples, len(checked[-1].continuation), num_tokens
            )
        except InvalidRequest as error:
            raise error.at(f"prompt {index}") from None
    return checked


@lru_cache(maxsize=16)
def draw_masks(num_tokens: int, num_samples: int, seed: int) -> Masks:
    """The masks of the samples of a continuation.

    The number of masked tokens takes the values 1 to `num_tokens` equally often: the samples are equally
    spaced behind a random start. Which tokens are masked is uniform.
    """
    random = np.random.default_rng(seed % 2**64)
    start = random.random() * num_tokens
    spaced = np.floor(start + np.arange(num_samples) * (num_tokens / num_samples))
    sizes = np.sort(spaced.astype(np.int64) % num_tokens) + 1
    ranks = random.random((num_samples, num_tokens)).argsort(1).argsort(1)
    masks, samples = np.unique(ranks < sizes[:, None], axis=0, return_inverse=True)
    samples = samples.reshape(-1)
    masks.flags.writeable = samples.flags.writeable = False  # calls share them
    return Masks(masks, samples)


def standard_error(estimates: Sequence[float] | NDArray[np.float64]) -> float:
    """Standard error of the mean of a systematic sample, from the differences of neighbours, so that what
    differs between strata does not count (Wolter, "Introduction to Variance Estimation", 2007, v2).

    Args:
        estimates: at least two, in the order of the strata.
    """
    with np.errstate(invalid="ignore"):  # the difference of two likelihoods of 0 is not a number
        steps = np.diff(estimates)
    return math.sqrt(float((steps**2).mean()) / (2 * len(estimates)))
