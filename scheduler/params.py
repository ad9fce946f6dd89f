"""`SamplingParams`: everything a request may ask for, and the one place where it is checked.

The constructor stores what it is given. `resolve` validates it once, at intake, against the model it is for
and gives the engine a form without None, text or dicts. Fields that are part of the surface but cannot be
honoured yet are refused by name unless they hold their neutral value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from remask.scheduler.errors import InvalidRequest, cut, did_you_mean, invalid_field, shown
from remask.scheduler.plain import plain
from remask.scheduler.policies import PRESETS, RemaskPolicy, Threshold, UnmaskPolicy, tag
from remask.scheduler.policies.parsing import parse_policy
from remask.scheduler.sampling import Sampling, bias_bytes, id_bytes

DEFAULT_BLOCK_LENGTH = 32
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request asks for. Names and meanings follow vLLM where vLLM has the field.

    Attributes:
        max_tokens: canvas size in tokens, and the limit. It changes the text as well as its length: a
            bidirectional model sees the whole canvas.
        block_length: slots a block; blocks are denoised left to right and the last may be shorter.
            `max_tokens` means whole-sequence decoding. None: 32, or the canvas where that is smaller or the
            policy (`dream`) works on the whole.
        unmask: which masked positions a step commits: `Threshold(0.9)`, `{"type": "threshold", "t": 0.9}` or
            `"threshold:0.9"`. None: threshold:0.9.
        remask: which committed positions a step turns back into masks; None: none.
        rank: what confidence means at a temperature: "proposal": the probability of the token drawn (as the
            published code); "top": the row's largest probability. The same at temperature 0.
        temperature: 0 takes the most probable token; above, tokens are drawn by Gumbel-max from
            softmax(logits / T).
        top_k, top_p, min_p: which tokens may be drawn at a temperature, of softmax(logits / T): the k most
            probable (0 or -1: all), those with at least `min_p` of the largest probability, and of these the
            fewest that hold `top_p` of the rest. Confidence stays that of the whole, untempered softmax.
        logit_bias: added to the logits of these ids, before everything else; -100 to 100.
        allowed_token_ids: nothing else is proposed.
        bad_token_ids: never proposed.
        cfg_scale: classifier-free guidance w: logits u + (w + 1)(l - u), u those of the same canvas without
            its prompt. It doubles the rows.
        suppress_eos: the model's end-of-sequence ids are never proposed (LLaDA's `logits_eos_inf`).
        suppress_eos_confidence: an end of sequence or turn that is proposed ranks last (LLaDA's
            `confidence_eos_eot_inf`).
        seed: key of the random numbers; None: drawn from `LLM(seed)` and the request's ordinal, and told in
            the output.
        n: samples of the prompt; sample i has random numbers of its own. `LLM(max_n)` is the ceiling.
        ignore_eos: go on after the model's end-of-sequence tokens.
        stop: strings that end the text where they first appear. The text is looked at when a block is
            finished; what stands behind the string is dropped. One that is a special token's text, which no
            text shows, is taken for its id. `LLM(max_stop_strings, max_stop_len)` are ceilings.
        stop_token_ids: ids that end the text like the model's own end-of-sequence tokens.
        include_stop_str_in_output: leave what ended the text in it.
        logprobs: 0 or 1: tell the log-probability of each token at its commit, of the whole, untempered
            softmax.
        trace: tell every commit and every remasking.
        priority: the lower, the sooner; each minute of waiting counts as one.

    The other fields are not supported yet and refused unless neutral.
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
    logprobs: Annotated[int, Meta(ge=0, le=1)] | None = None
    trace: bool = False
    # Not supported yet (see NEUTRAL).
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> SamplingParams:
        """Published settings by name (`PRESETS` in `remask.scheduler.policies`); overrides win.

        Raises:
            InvalidRequest: no such preset, or an override that is no field.
        """
        fields = with_preset(name, overrides)
        _check_names(fields)
        return cls(**fields)


# The values of unsupported fields that change nothing and are therefore accepted.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "repetition_penalty": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
}


class ResolvedParams(msgspec.Struct, frozen=True, kw_only=True):
    """Validated parameters of one request with nothing left to default (but the seed)."""

    max_tokens: int
    block_length: int
    unmask: UnmaskPolicy | None
    remask: RemaskPolicy | None
    sampling: Sampling
    suppress_eos: bool
    suppress_eos_confidence: bool
    seed: int | None
    n: int
    ignore_eos: bool
    stop: list[str]
    stop_token_ids: list[int]
    include_stop_str_in_output: bool
    priority: int
    logprobs: bool
    trace: bool


def with_preset(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The fields of a preset with `overrides` on top; its block length is cut to the canvas."""
    if not isinstance(name, str) or name not in PRESETS:
        raise InvalidRequest("preset", name, f"unknown preset; {did_you_mean(name, PRESETS)}")
    fields = {"max_tokens": SamplingParams().max_tokens, **PRESETS[name], **plain(overrides)}
    if "block_length" not in overrides and isinstance(fields["max_tokens"], int):
        block_length = PRESETS[name].get("block_length")
        fields["block_length"] = None if block_length is None else min(block_length, fields["max_tokens"])
    return fields


def resolve(params: SamplingParams | Mapping[str, Any] | None, **overrides: Any) -> ResolvedParams:
    """Validates what a user wrote and fills in the defaults.

    Args:
        params: an object, or its JSON form as a dict (which may name a `preset`); with NumPy values, too.
        overrides: fields that win over those of `params`.

    Raises:
        InvalidRequest: naming the field, for an unknown field, a wrong type, a value out of range, fields
            that contradict each other or that are not supported yet.
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
    if isinstance(fields.get("rank"), str):
        fields["rank"] = cut(fields["rank"])  # msgspec's message holds all of a wrong word
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
