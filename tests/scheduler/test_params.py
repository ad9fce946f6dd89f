"""`SamplingParams`: defaults, presets, and everything that is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from remask import CappedThreshold, InvalidRequest, SamplingParams, Schedule, Threshold, Wino
from remask.scheduler.params import NEUTRAL, resolve
from remask.scheduler.sampling import Sampling, bias_bytes, id_array, id_bytes


def test_defaults_are_the_documented_ones() -> None:
    params = resolve(None)
    assert (params.max_tokens, params.block_length, params.unmask, params.remask) == (
        128,
        32,
        Threshold(0.9),
        None,
    )
    assert (params.sampling, params.seed, params.n) == (Sampling(), None, 1)


def test_a_small_canvas_is_one_block() -> None:
    assert resolve({"max_tokens": 20}).block_length == 20


def test_an_object_and_its_json_mean_the_same() -> None:
    params = SamplingParams(max_tokens=64, unmask=CappedThreshold(0.5), remask=Wino(0.8), temperature=0.5)
    as_json = msgspec.json.decode(msgspec.json.encode(params))
    assert resolve(as_json) == resolve(params)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_token": 5}, "max_token"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 8.5}, "max_tokens"),
        ({"block_length": 0}, "block_length"),
        ({"max_tokens": 16, "block_length": 32}, "block_length"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"n": 0, "temperature": 1.0}, "n"),
        ({"n": 2}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": True}, "seed"),
        ({"rank": "best"}, "rank"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"unmask": "threshold:2"}, "unmask.t"),
        ({"remask": "wino:tile=none"}, "remask.tile"),
        ({"remask": "wino:ban_old=perhaps"}, "remask.ban_old"),
        ({"remask": "threshold"}, "remask"),
        ({"preset": "winno"}, "preset"),
        ({"preset": ["wino"]}, "preset"),
        ({"max_tokens": None}, "max_tokens"),
        ({"preset": "wino", "max_tokens": "many"}, "max_tokens"),
        ({"preset": "wino", "max_tokens": 0}, "max_tokens"),
        ({"unmask": {"type": ["threshold"]}}, "unmask"),
        ({"unmask": Schedule(10**400)}, "unmask.steps"),
        ({"unmask": "threshold:t=0.9, t=0.8"}, "unmask.t"),
        ({"unmask": "threshold:,0.5"}, "unmask"),
        ({"unmask": Threshold(object())}, "unmask.t"),  # type: ignore[arg-type]
        ({"stop": ["x", ""]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"include_stop_str_in_output": "yes"}, "include_stop_str_in_output"),
        ({"priority": 2**31}, "priority"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"bad_token_ids": ["x"]}, "bad_token_ids"),
        ({"cfg_scale": -1}, "cfg_scale"),
        ({"cfg_scale": 1.0, "remask": "wino"}, "cfg_scale"),
        ({"suppress_eos": "yes"}, "suppress_eos"),
        ({"suppress_eos_confidence": 1}, "suppress_eos_confidence"),
        ({"priority": 0.5}, "priority"),
        ({"reuse": "dual"}, "reuse"),
        ({"reuse": True}, "reuse"),
        ({"refresh": 4}, "refresh"),
        ({"reuse": "both", "refresh": 1}, "refresh"),
        ({"reuse": "both", "refresh": 2.5}, "refresh"),
        ({"reuse": "prefix", "remask": "oracle_loo"}, "reuse"),
    ],
)
def test_bad_fields_are_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve(fields)
    assert caught.value.parameter == named
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
    ],
)
def test_fields_that_are_not_supported_yet_are_refused_by_name(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(InvalidRequest, match="not supported yet") as caught:
        resolve(fields)
    assert caught.value.parameter == name


def test_neutral_values_of_unsupported_fields_are_accepted() -> None:
    for name, values in NEUTRAL.items():
        for value in values:
            assert resolve({name: value}) == resolve(None)


def test_sampling_parameters_reach_the_canvas_with_ids_as_json_writes_them() -> None:
    params = resolve(
        {"logit_bias": {"7": 1.5}, "top_k": -1, "bad_token_ids": [2], "allowed_token_ids": [7, 8]}
    )
    assert params.sampling == Sampling(
        logit_bias=bias_bytes({7: 1.5}), banned_ids=id_bytes([2]), allowed_ids=id_bytes([7, 8])
    )


def test_ids_that_are_given_twice_count_once() -> None:
    params = resolve(
        {"bad_token_ids": [9, 2] * 999, "allowed_token_ids": [7] * 999, "stop_token_ids": [5, 4] * 999}
    )
    assert id_array(params.sampling.banned_ids).tolist() == [2, 9]
    assert id_array(params.sampling.allowed_ids).tolist() == [7]
    assert params.stop_token_ids == [4, 5]


def test_something_else_than_parameters_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="sampling_params"):
        resolve(3)  # type: ignore[arg-type]


def test_presets_are_published_settings_and_give_way_to_overrides() -> None:
    assert resolve(SamplingParams.preset("llada")).unmask == Schedule()
    assert resolve({"preset": "fast-dllm"}).unmask == Threshold(0.9)
    wino = resolve(SamplingParams.preset("wino"))
    assert (wino.unmask, wino.remask, wino.block_length) == (CappedThreshold(0.6), Wino(0.9), 128)
    small = resolve(SamplingParams.preset("wino", max_tokens=64, remask=Wino(0.8)))
    assert (small.block_length, small.remask) == (64, Wino(0.8))


def test_random_order_gives_different_samples_without_a_temperature() -> None:
    assert resolve({"n": 3, "unmask": "schedule:score=random"}).n == 3


def test_a_preset_with_an_unknown_override_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="max_token: unknown parameter; did you mean 'max_tokens'"):
        SamplingParams.preset("wino", max_token=5)
