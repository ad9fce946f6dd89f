"""Validates prompts and parameters and makes requests of them. Nothing invalid reaches a queue."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import msgspec
import numpy as np
from transformers import PreTrainedTokenizerBase

from remask.entries import entries_of, one_each
from remask.limits import check_num_prompts, check_params, keeps_keys
from remask.options import EngineOptions
from remask.scheduler.canvas import Canvas, new_canvas
from remask.scheduler.errors import InvalidRequest
from remask.scheduler.params import ResolvedParams, SamplingParams, resolve
from remask.scheduler.plain import listed, plain
from remask.scheduler.request import Request
from remask.scheduler.sampling import BIAS, TOKEN, id_array
from remask.stops import StopStrings
from remask.text import (
    PromptEncoder,
    decoder_of,
    render_chat,
    special_tokens,
    split_stops,
    text_messages,
)
from remask.workers.models.config import ModelConfig

EMPTY = "is empty; give at least one token"
Prompt = str | list[int] | dict[str, Any]
Message = dict[str, Any]


class CheckedPrompt(NamedTuple):
    """A validated prompt and its parameters."""

    text: str | None
    ids: list[int]
    params: ResolvedParams


class Intake:
    """Makes requests for one model; from any thread.

    Args:
        config: shape and special ids of the model.
        tokenizer: tokenizer of the model; None: prompts must be token ids.
        options: options of the engine, for the maximum length, the seed and the ceilings of a call.

    Attributes:
        config: shape and special ids of the model.
        options: options of the engine.
        tokenizer: as given.
        max_key_rows: rows whose keys a worker keeps, 0: none; None: not known yet.
        decode: converts visible ids to text; None without a tokenizer.
        max_len: maximum tokens of prompt and canvas together.

    Raises:
        InvalidRequest: `max_model_len` exceeds the model's.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        options: EngineOptions,
    ) -> None:
        self.config, self.options, self.tokenizer = config, options, tokenizer
        self.max_key_rows: int | None = None
        self.max_len = config.max_len if options.max_model_len is None else options.max_model_len
        if not 2 <= self.max_len <= config.max_len:
            problem = f"must lie between 2 and the model's {config.max_len}"
            raise InvalidRequest("max_model_len", options.max_model_len, problem)
        self._encoder = None if tokenizer is None else PromptEncoder(tokenizer, config.mask_id)
        self.decode = None if tokenizer is None else decoder_of(tokenizer)
        self._special = {} if tokenizer is None else special_tokens(tokenizer)
        self._num_requests = self._num_canvases = 0  # under the lock
        self._lock = threading.Lock()
        turn_ends = [] if config.eot_id is None else [config.eot_id]
        if not turn_ends and tokenizer is not None:
            vocabulary = tokenizer.get_vocab()
            turn_ends = [vocabulary[text] for text in config.turn_ends if text in vocabulary]
        self._end_ids: list[int] = sorted({*config.eos_ids, *turn_ends})

    def requests(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | dict[str, Any] | Iterable[SamplingParams | dict[str, Any]] | None,
        priorities: Iterable[int] | None = None,
    ) -> list[Request]:
        """Requests for one prompt or a list of them, all valid.

        Raises:
            InvalidRequest: names the index of the first invalid prompt and its parameter.
        """
        every = self.listed("prompts", prompts)
        check_num_prompts(self.options, len(every))
        params = one_each("sampling_params", sampling_params, len(every))
        own_priorities = one_each("priority", priorities, len(every))
        if priorities is not None and listed(priorities, 0) is None:
            raise InvalidRequest("priority", priorities, "give a list of an integer for each prompt")
        checked = self.check_each(every, params, own_priorities)
        first = self.reserve(len(checked))
        return [self.request(entry, first + index) for index, entry in enumerate(checked)]

    def check_each(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams | dict[str, Any] | None],
        priorities: Sequence[int | None],
    ) -> list[CheckedPrompt]:
        """The prompts of one call, with a value of each of the others for each prompt.

        Raises:
            InvalidRequest: names the index of the first invalid prompt and its parameter.
        """
        checked: list[CheckedPrompt] = []
        num_tokens = 0  # of the canvases so far
        for index, (prompt, own, priority) in enumerate(zip(prompts, params, priorities, strict=True)):
            try:
                checked.append(self.check(prompt, own, priority))
                num_tokens = check_params(self.options, checked[-1].params, num_tokens)
            except InvalidRequest as error:
                raise error.at(f"prompt {index}") from None
        return checked

    def reserve(self, num_requests: int = 1) -> int:
        """The first ordinal of requests that follow each other, whatever other threads do meanwhile."""
        with self._lock:
            first = self._num_requests
            self._num_requests += num_requests
        return first

    def reserve_canvases(self, num_canvases: int) -> int:
        """The number of the first of some canvases that follow each other."""
        with self._lock:
            first = self._num_canvases
            self._num_canvases += num_canvases
        return first

    def check(
        self, prompt: Prompt, params: SamplingParams | dict[str, Any] | None, priority: int | None = None
    ) -> CheckedPrompt:
        """One prompt and its parameters, validated; makes no request yet.

        Args:
            prompt: in any of its forms.
            params: as a user writes them.
            priority: overrides that of `params`.

        Raises:
            InvalidRequest: names the invalid parameter.
        """
        text, ids = self.read_prompt(prompt)
        resolved = resolve(params, **({} if priority is None else {"priority": priority}))
        check_params(self.options, resolved)
        self.check_lengths(ids, resolved.max_tokens)
        num_rows = (len(ids) + resolved.max_tokens) * (1 + (resolved.sampling.cfg_scale > 0))
        if resolved.reuse is not None and not keeps_keys(resolved.reuse, num_rows, self.max_key_rows):
            resolved = msgspec.structs.replace(resolved, reuse=None, refresh=None)
        return CheckedPrompt(text, ids, self._with_own_ids(self._with_stops(resolved)))

    def request(
        self, checked: CheckedPrompt, ordinal: int | None = None, *, place: int | None = None
    ) -> Request:
        """A request of its own id.

        Args:
            checked: what `check` returned.
            ordinal: its number, which `reserve` gave; None: the next.
            place: what a request without a seed derives its seed from, with `LLM(seed)`; None: the ordinal.
                A caller that may leave requests out (a resumed batch file) says their places.
        """
        text, ids, params = checked
        if ordinal is None:
            ordinal = self.reserve()
        canvas_ordinal = self.reserve_canvases(params.n)
        seed = params.seed
        if seed is None:
            seed = _derived_seed(self.options.seed, ordinal if place is None else place)
        request_id = str(ordinal)
        end_ids = [] if params.ignore_eos else self._end_ids
        stop_token_ids = frozenset(params.stop_token_ids).difference(end_ids)
        first = new_canvas(
            request_id,
            canvas_ordinal,
            ids,
            params,
            seed=seed,
            sample=0,
            mask_id=self.config.mask_id,
            stop_ids=[*end_ids, *stop_token_ids],
            shift=self.config.shift,
        )
        more = [
            Canvas(
                request_id,
                canvas_ordinal + sample,
                msgspec.structs.replace(first.spec, sample=sample),
                first.state,
            )
            for sample in range(1, params.n)
        ]
        return Request(
            request_id=request_id,
            prompt=text,
            prompt_token_ids=ids,
            canvases=[first, *more],
            priority=params.priority,
            stop_token_ids=stop_token_ids,
            include_stop_in_text=params.include_stop_str_in_output,
            logprobs=params.logprobs,
            trace=params.trace,
            stop=params.stop,
            find_stop=self.search_of(params.stop),
            arrival_time=time.monotonic(),
        )

    def search_of(self, stop: Sequence[str]) -> StopStrings | None:
        """`Request.find_stop` for stop strings."""
        return StopStrings(stop, self.decode, self._special.values()) if stop and self.decode else None

    def chat_prompts(self, messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Prompt]:
        """Conversations (or one) through the tokenizer's chat template, ready for the assistant's turn.

        Raises:
            InvalidRequest: no tokenizer, no chat template, or a message without role and content.
        """
        self._check_template()
        ceiling = self.options.max_prompts_per_call
        given = (
            None if isinstance(messages, Mapping) else entries_of(messages, Mapping, self.max_len, ceiling)
        )
        if not given:
            raise InvalidRequest("messages", messages, "give a list of messages, or a list of such lists")
        conversations: list[Any] = [given] if isinstance(given[0], Mapping) else given
        return [
            self.chat_prompt(conversation, name=f"messages[{index}]")
            for index, conversation in enumerate(conversations)
        ]

    def chat_prompt(self, conversation: Sequence[Message], *, name: str = "messages") -> Prompt:
        """One conversation, as `chat_prompts`; `name` is what errors call it."""
        self._check_template()
        assert self.tokenizer is not None, "checked with the template"
        messages = text_messages(name, plain(conversation))
        text = render_chat(self.tokenizer, messages, name=name)
        assert self._encoder is not None, "there is a tokenizer"
        ids = self._encoder.encode(text, add_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": ids}

    def _check_template(self) -> None:
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise InvalidRequest("messages", None, "the model's tokenizer has no chat template; use generate")

    def listed(self, name: str, prompts: Any) -> list[Any]:
        """A list of prompts from one (text, a dict, or ids) or a list, column or iterator of them; `name` is
        what errors call it."""
        if isinstance(prompts, str | Mapping):
            return [prompts]
        every = entries_of(prompts, Integral, self.max_len, self.options.max_prompts_per_call)
        if every is None:
            raise InvalidRequest(name, prompts, f"give a {name.removesuffix('s')} or a list of {name}")
        return [every] if every and all(isinstance(entry, Integral) for entry in every) else every

    def read_prompt(self, prompt: object) -> tuple[str | None, list[int]]:
        """Text and ids of a prompt in any of its forms.

        Raises:
            InvalidRequest: the prompt is invalid.
        """
        text: object = None
        prompt = plain(prompt)
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown or not prompt:
                raise InvalidRequest("prompt", prompt, "give {'prompt': text} or {'prompt_token_ids': ids}")
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        elif isinstance(prompt, str):
            text, ids = prompt, None
        else:
            ids = prompt
        if ids is None:
            if text == "":
                raise InvalidRequest("prompt", text, EMPTY)
            ids = self.encode("prompt", text, add_special_tokens=True)
        return text if isinstance(text, str) else None, self._check_ids("prompt", ids)

    def read_continuation(self, continuation: object) -> list[int]:
        """Ids of what stands behind a prompt: text, without special tokens of its own, or ids.

        Raises:
            InvalidRequest: the continuation is invalid or empty.
        """
        name, ids = "continuation", plain(continuation)
        if isinstance(ids, str):
            ids = self.encode(name, ids, add_special_tokens=False)
        return self._check_ids(name, ids)

    def encode(self, name: str, text: object, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text, which errors call `name`; raises InvalidRequest if there can be none."""
        if not isinstance(text, str):
            raise InvalidRequest(name, text, "must be text or a list of token ids")
        if self._encoder is None:
            raise InvalidRequest(name, text, "the model has no tokenizer; give token ids")
        return self._encoder.encode(text, name=name, add_special_tokens=add_special_tokens) if text else []

    def _check_ids(self, name: str, ids: object) -> list[int]:
        if not isinstance(ids, list) or any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
            has_parts = isinstance(ids, list) and any(isinstance(i, str | Mapping) for i in ids)
            kind = "canvas prompts with holes are not supported yet; give" if has_parts else "must be"
            raise InvalidRequest(name, ids, f"{kind} text or a list of token ids")
        if not ids:
            raise InvalidRequest(name, ids, EMPTY)
        name = f"{name}_token_ids" if name == "prompt" else name
        outside = [i for i in ids if not 0 <= i < self.config.vocab_size]
        if outside:
            problem = f"is outside the vocabulary 0..{self.config.vocab_size - 1}"
            raise InvalidRequest(name, outside[0], problem)
        if self.config.mask_id in ids:
            problem = "is the mask id, which a canvas alone may hold; leave it out"
            raise InvalidRequest(name, self.config.mask_id, problem)
        return ids

    def check_lengths(self, ids: list[int], max_tokens: int, name: str = "max_tokens") -> None:
        """Raises InvalidRequest, for the parameter `name`, if prompt and canvas are longer than the model."""
        room = self.max_len - len(ids)
        if max_tokens > room:
            fix = f"use {name} <= {room}" if room > 0 else "shorten the prompt"
            raise InvalidRequest(
                name,
                max_tokens,
                f"prompt of {len(ids)} tokens and canvas exceed the model's length {self.max_len}; {fix}",
            )

    def _with_own_ids(self, params: ResolvedParams) -> ResolvedParams:
        """Checks the ids of the sampling parameters and adds the model's stop ids if they apply."""
        sampling, vocab_size = params.sampling, self.config.vocab_size
        biased = np.frombuffer(sampling.logit_bias, BIAS)["id"]
        allowed, banned = id_array(sampling.allowed_ids), id_array(sampling.banned_ids)
        for name, ids in (
            ("logit_bias", biased),
            ("allowed_token_ids", allowed),
            ("bad_token_ids", banned),
        ):
            if len(ids) and ids[-1] >= vocab_size:  # they are in ascending order
                raise InvalidRequest(name, int(ids[-1]), f"is outside the vocabulary 0..{vocab_size - 1}")
        if params.suppress_eos:
            banned = np.union1d(banned, self.config.eos_ids).astype(TOKEN)
        never = np.union1d(banned, [self.config.mask_id])
        if len(allowed) and np.isin(allowed, never).all():
            fix = "leaves no token to propose; allow one that is not banned"
            raise InvalidRequest("allowed_token_ids", allowed.tolist(), fix)
        if len(never) >= vocab_size:
            fix = "leaves no token to propose; ban fewer"
            raise InvalidRequest("bad_token_ids", f"{len(banned)} ids", fix)
        unranked = self._end_ids if params.suppress_eos_confidence else []
        sampling = msgspec.structs.replace(sampling, banned_ids=banned.tobytes(), unranked_ids=unranked)
        return msgspec.structs.replace(params, sampling=sampling)

    def _with_stops(self, params: ResolvedParams) -> ResolvedParams:
        """Checks what ends a text; stop strings that are a special token become its id."""
        if params.stop and self.tokenizer is None:
            raise InvalidRequest("stop", params.stop, "needs a tokenizer; use stop_token_ids")
        stop, ids = split_stops(params.stop, self._special, mask_id=self.config.mask_id)
        ids = list(dict.fromkeys([*params.stop_token_ids, *ids]))
        for stop_id in ids:
            if stop_id >= self.config.vocab_size or stop_id == self.config.mask_id:
                raise InvalidRequest(
                    "stop_token_ids",
                    stop_id,
                    f"must lie in 0..{self.config.vocab_size - 1} and not be the mask id",
                )
        return msgspec.structs.replace(params, stop=stop, stop_token_ids=ids)


def _derived_seed(seed: int, ordinal: int) -> int:
    """A seed below 2**53, which JSON's readers keep exactly if their numbers are doubles."""
    digest = hashlib.blake2b(f"{seed}:{ordinal}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 11
