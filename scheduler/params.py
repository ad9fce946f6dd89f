"""`SamplingParams`: everything a request may ask for, and the one place where it is checked.

The constructor stores its arguments unchecked. `resolve` validates them once, at intake, and returns a form
without None, text or dicts for the engine. Fields that are not supported are refused by name unless they hold
their neutral value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from remask.scheduler.errors import InvalidRequest, cut, did_you_mean, invalid_field, shown
from remask.scheduler.plain import plain
from remask.scheduler.policies import RemaskPolicy, Threshold, UnmaskPolicy, tag
from remask.scheduler.policies.parsing import parse_policy
from remask.scheduler.policies.presets import preset_fields
from remask.scheduler.sampling import Reuse, Sampling, bias_bytes, id_bytes

DEFAULT_BLOCK_LENGTH = 32
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request asks for. Names and meanings follow vLLM if vLLM has the field.

    Attributes:
        max_tokens: Canvas size in tokens, and the limit of the output. It changes the text as well as its
            length, because a bidirectional model sees the whole canvas.
        block_length: Slots per block. Blocks are denoised from left to right, and the last may be shorter.
            `max_tokens` means whole-sequence decoding. None: 32, or the canvas if that is smaller or if the
            policy (`dream`) works on the whole canvas.
        unmask: Policy that commits masked positions in a step: `Threshold(0.9)`,
            `{"type": "threshold", "t": 0.9}` or `"threshold:0.9"`. None: `threshold:0.9`.
        remask: Policy that turns committed positions back into masks in a step. None: no remasking.
        rank: Meaning of confidence at a temperature. "proposal": the probability of the drawn token, as in
            the published code. "top": the largest probability of the row. Both are equal at temperature 0.
        temperature: 0 takes the most probable token. Above 0, tokens are drawn by Gumbel-max from
            softmax(logits / T).
        top_k: Number of most probable tokens of softmax(logits / T) that may be drawn. 0 or -1: all.
        top_p: Cumulative probability of the tokens that may be drawn: the fewest of those that `top_k` and
            `min_p` leave which hold this share of them. Confidence stays that of the whole, untempered
            softmax.
        min_p: Smallest probability of a token that may be drawn, as a share of the largest.
        logit_bias: Bias in -100 to 100 by token id, added to the logits before everything else.
        allowed_token_ids: Ids that may be proposed. None: all.
        bad_token_ids: Ids that are never proposed.
        cfg_scale: Weight w of classifier-free guidance: logits u + (w + 1)(l - u), with u computed on the
            same canvas without its prompt. Guidance doubles the rows of a forward.
        suppress_eos: Never propose the model's end-of-sequence ids (`logits_eos_inf` of LLaDA).
        suppress_eos_confidence: Rank a proposed end of sequence or turn last (`confidence_eos_eot_inf` of
            LLaDA).
        seed: Random seed. None: derived from `LLM(seed)` and the request's index, and reported as
            `CompletionOutput.seed`.
        n: Number of samples. Each sample has its own random numbers. `LLM(max_n)` is the ceiling.
        ignore_eos: Continue after the model's end-of-sequence tokens.
        stop: Strings that end the text at their first occurrence; the text before it is returned. The engine
            looks for them when a block is finished. A string that is the text of a special token stands for
            its id. `LLM(max_stop_strings, max_stop_len)` are the ceilings.
        stop_token_ids: Ids that end the text like the model's own end-of-sequence tokens.
        include_stop_str_in_output: Keep the stop string or stop token in the text.
        reuse: Keys and values of rows that a forward does not compute are those of the last full forward.
            "prefix": the forward computes the active block and all that follows it. "both": it computes the
            active block alone. It approximates, and is faster. None: every forward computes all rows.
        refresh: Forwards from one full forward of a block to the next. The first forward of every block is
            full. None: no other one is.
        logprobs: 0 or 1: report the log-probability of each token at its commit, of the whole, untempered
            softmax.
        trace: Report every commit and every remasking.
        priority: Lower values run first. A minute of waiting lowers the value by one.
        repetition_penalty: Not supported; 1.0 is accepted.
        presence_penalty: Not supported; 0.0 is accepted.
        frequency_penalty: Not supported; 0.0 is accepted.
    """

    max_tokens: Annotated[int, Meta(ge=1)] = 128
    block_length: Annotated[int, Meta(ge=1)] | None = None
    unmask: Any = None
    remask: Any = None
    rank: Literal["proposal", "top"] = "proposal"
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.0
    seed: Int64 | None = None
    n: Annotated[int, Meta(ge=1, le=2**31 - 1)] = 1
    ignore_eos: bool = False
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool = False
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = 0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100.0, le=100.0)]] | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    bad_token_ids: list[TokenId] | None = None
    cfg_scale: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.0
    suppress_eos: bool = False
    suppress_eos_confidence: bool = False
    reuse: Reuse | None = None
    refresh: Annotated[int, Meta(ge=2)] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=1)] | None = None
    trace: bool = False
    # Not supported (see NEUTRAL).
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> SamplingParams:
        """Published settings by name (`PRESETS` in `remask.scheduler.policies`), or settings from a TOML
        file, whose path has a separator or ends in `.toml`; overrides win.

        Raises:
            InvalidRequest: no such preset, a file that cannot be read, or a field that does not exist.
        """
        fields = with_preset(name, overrides)
        _check_names(fields)
        return cls(**fields)


# Values of unsupported fields that are accepted, because they change nothing.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
}


class ResolvedParams(msgspec.Struct, frozen=True, kw_only=True):
    """Validated parameters of one request. All defaults but the seed are filled in."""

    max_tokens: int
    block_length: int
    unmask: UnmaskPolicy | None
    remask: RemaskPolicy | None
    sampling: Sampling
    suppress_eos: bool
    suppress_eos_confidence: bool
    reuse: Reuse | None
    refresh: int | None
    seed: int | None
    n: int
    ignore_eos: bool
    stop: list[str]
    stop_token_ids: list[int]
    include_stop_str_in_output: bool
    priority: int
    logprobs: bool
    trace: bool


def with_preset(name: object, overrides: dict[str, Any]) -> dict[str, Any]:
    """The fields of a preset with `overrides` on top; its block length is cut to the canvas."""
    preset = preset_fields(name)
    fields = {"max_tokens": SamplingParams().max_tokens, **preset, **plain(overrides)}
    block_length = preset.get("block_length")
    if "block_length" not in overrides and isinstance(fields["max_tokens"], int):
        is_longer = isinstance(block_length, int) and block_length > fields["max_tokens"]
        fields["block_length"] = fields["max_tokens"] if is_longer else block_length
    return fields


def resolve(params: SamplingParams | Mapping[str, Any] | None, **overrides: Any) -> ResolvedParams:
    """Validates sampling parameters and fills in the defaults.

    Args:
        params: an object, or its JSON form as a dict, which may name a `preset`. NumPy values are accepted.
        overrides: fields that win over those of `params`.

    Raises:
        InvalidRequest: a field is unknown, of the wrong type, out of range, not supported or contradicts
            another one; the error names the field.
    """
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        fields = {name: plain(getattr(params, name)) for name in SamplingParams.__struct_fields__}
    elif isinstance(params, Mapping):
        fields = plain(params)
        if "preset" in fields:
            fields = with_preset(fields.pop("preset"), fields)
    else:
        raise InvalidRequest("sampling_params", params, "give SamplingParams or a dict of its fields")
    fields |= plain(overrides)
    _check_names(fields)
    remask = parse_policy("remask", fields["remask"]) if fields.get("remask") not in (None, "none") else None
    unmask = parse_policy("unmask", fields["unmask"]) if fields.get("unmask") is not None else None
    if remask is not None and remask.commits:
        if unmask is not None:
            fix = f"leave it out: {tag(remask)} brings its own commits"
            raise InvalidRequest("unmask", fields["unmask"], fix)
    elif unmask is None:
        unmask = Threshold()
    for name in ("rank", "reuse"):
        if isinstance(fields.get(name), str):
            fields[name] = cut(fields[name])  # msgspec's message holds all of a wrong word
    logprobs = fields.get("logprobs")
    if isinstance(logprobs, int) and logprobs > 1:
        raise InvalidRequest(
            "logprobs", logprobs, "alternatives of a committed token are not known; use 0 or 1"
        )
    try:
        checked = msgspec.convert(
            {**fields, "unmask": None, "remask": None}, type=SamplingParams, str_keys=True
        )
    except msgspec.ValidationError as error:
        raise invalid_field("", fields, error) from None
    for name, neutral in NEUTRAL.items():
        if getattr(checked, name) not in neutral:
            raise InvalidRequest(name, getattr(checked, name), "is not supported yet; leave it out")
    return _cross_check(checked, unmask, remask)


def _check_names(fields: dict[str, Any]) -> None:
    """Raises InvalidRequest for a field that `SamplingParams` does not have."""
    for name, value in fields.items():
        if name not in SamplingParams.__struct_fields__:
            known = SamplingParams.__struct_fields__
            name = name if isinstance(name, str) else shown(name)
            raise InvalidRequest(name, value, f"unknown parameter; {did_you_mean(name, known)}")


def _cross_check(
    params: SamplingParams, unmask: UnmaskPolicy | None, remask: RemaskPolicy | None
) -> ResolvedParams:
    policies = [policy for policy in (unmask, remask) if policy is not None]
    is_random = any(policy.random_streams() for policy in policies)
    if params.n > 1 and params.temperature == 0 and not is_random:
        raise InvalidRequest("n", params.n, "gives equal samples at temperature 0; set a temperature, or n=1")
    if remask is not None:
        remask.check(unmask)
        if remask.verifies() and params.cfg_scale > 0:
            raise InvalidRequest(
                "cfg_scale", params.cfg_scale, "cannot guide a policy that verifies; use 0, or another remask"
            )
    if params.refresh is not None and params.reuse is None:
        raise InvalidRequest("refresh", params.refresh, "is for reused keys; set reuse, or leave it out")
    if params.reuse is not None and remask is not None and remask.needs_copies():
        fix = f"cannot be combined with {tag(remask)}, which computes other sequences; leave it out"
        raise InvalidRequest("reuse", params.reuse, fix)
    stop = [params.stop] if isinstance(params.stop, str) else params.stop or []
    if "" in stop:
        raise InvalidRequest("stop", params.stop, "holds an empty string; leave it out")
    return ResolvedParams(
        max_tokens=params.max_tokens,
        block_length=_block_length(params, unmask),
        unmask=unmask,
        remask=remask,
        sampling=Sampling(
            cfg_scale=params.cfg_scale,
            logit_bias=bias_bytes(params.logit_bias or {}),
            banned_ids=id_bytes(params.bad_token_ids or []),
            allowed_ids=id_bytes(params.allowed_token_ids or []),
            temperature=params.temperature,
            top_k=max(params.top_k, 0),
            top_p=params.top_p,
            min_p=params.min_p,
            rank=params.rank,
            ranks_as_drawn=any(policy.ranks_as_drawn() for policy in policies),
        ),
        suppress_eos=params.suppress_eos,
        suppress_eos_confidence=params.suppress_eos_confidence,
        reuse=params.reuse,
        refresh=params.refresh,
        seed=params.seed,
        n=params.n,
        ignore_eos=params.ignore_eos,
        stop=list(dict.fromkeys(stop)),
        stop_token_ids=sorted(set(params.stop_token_ids or [])),
        include_stop_str_in_output=params.include_stop_str_in_output,
        priority=params.priority,
        logprobs=params.logprobs is not None,
        trace=params.trace,
    )


def _block_length(params: SamplingParams, unmask: UnmaskPolicy | None) -> int:
    given, whole = params.block_length, unmask is not None and unmask.whole_canvas
    if given is None:
        return params.max_tokens if whole else min(DEFAULT_BLOCK_LENGTH, params.max_tokens)
    if given > params.max_tokens:
        fix = f"is larger than max_tokens {params.max_tokens}; use at most that"
        raise InvalidRequest("block_length", given, fix)
    if whole and given != params.max_tokens:
        assert unmask is not None, "whole"
        fix = f"{tag(unmask)} works on the whole canvas; leave it out, or use max_tokens {params.max_tokens}"
        raise InvalidRequest("block_length", given, fix)
    return given
