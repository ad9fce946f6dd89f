"""Flags of the commands: each option of an engine and each sampling parameter has one, and it arrives."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import typer

from remask import EngineOptions, SamplingParams
from remask.cli import app
from remask.cli.options import documentation
from remask.scheduler.params import NEUTRAL

Command = Callable[..., subprocess.CompletedProcess[str]]
ENGINE = {*EngineOptions.__struct_fields__} - {"placement_group"}
SAMPLING = {*SamplingParams.__struct_fields__, "preset"} - {*NEUTRAL}
BENCH = ENGINE - {"load_format", "seed"}  # found out from the model, and of the workload
FIELDS = {
    "generate": ENGINE | SAMPLING,
    "run-batch": ENGINE | SAMPLING - {"logprobs", "trace"},
    **dict.fromkeys(("bench throughput", "bench latency", "bench serve-load", "bench compare"), BENCH),
}


def parameters(*names: str) -> dict[str, list[str]]:
    """The flags of a command, by the names of its parameters."""
    command: Any = typer.main.get_command(app)
    for name in names:
        command = command.commands[name]
    return {parameter.name: parameter.opts for parameter in command.params}


@pytest.mark.parametrize("command", FIELDS)
def test_every_option_has_a_flag_of_its_name(command: str) -> None:
    flags, fields = parameters(*command.split()), FIELDS[command]
    assert fields <= flags.keys()
    for name in fields:
        assert "--" + name.replace("_", "-") in flags[name]


def test_some_flags_have_a_second_name() -> None:
    flags = parameters("generate")
    for name, second in (
        ("distributed_executor_backend", "--executor"),
        ("n", "-n"),
        ("stop_token_ids", "--stop-token-id"),
    ):
        assert second in flags[name]


@pytest.mark.parametrize("struct", [EngineOptions, SamplingParams])
def test_every_field_is_documented(struct: Any) -> None:
    assert {*struct.__struct_fields__} - {*NEUTRAL} <= documentation(struct).keys()
    assert documentation(struct).keys() <= {*struct.__struct_fields__}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-num-rows", "0"), "max_num_rows: must be a positive integer"),
        (("--tensor-parallel-size", "2"), "tensor_parallel_size: is not supported yet; use 1"),
        (("--trust-remote-code",), "trust_remote_code: is not supported yet; use False"),
        (("--data-parallel-size", "2"), "data_parallel_size: is for workers on Ray"),
        (("--executor", "mp"), "distributed_executor_backend: is not supported yet; use 'uni' or 'ray'"),
        (("--max-n", "3", "-n", "4", "--temperature", "1"), "n: is above the engine's max_n"),
        (("--max-model-len", "20", "--max-tokens", "40"), "exceed the model's length 20"),
        (("--logit-bias", "5=1"), "--logit-bias: must be JSON"),
        (("--logit-bias", '{"5": 101}'), "logit_bias"),
        (("--bad-token-id", "5", "--bad-token-ids", "-1"), "bad_token_ids"),
        (("--tokenizer", "/nowhere"), "tokenizer: holds no tokenizer.json"),
    ],
    ids=str,
)
def test_what_is_given_is_checked_by_the_structs(
    remask: Command, arguments: tuple[str, ...], message: str
) -> None:
    run = remask("generate", "1=", "--max-tokens", "4", *arguments)
    assert run.returncode == 2
    assert run.stderr.startswith("remask: error: ")
    assert message in run.stderr


def test_a_bias_of_the_logits_is_json(remask: Command) -> None:
    run = remask(
        "generate", "1=", "--max-tokens", "4", "--ignore-eos", "--json", "--logit-bias", '{"7": 100}'
    )
    assert json.loads(run.stdout)["outputs"][0]["token_ids"] == [7] * 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_commands_reach_workers_on_ray(cluster: None, remask: Command, tmp_path: Path) -> None:
    on_ray = ("--executor", "ray", "--max-num-rows", "512", "--device", "cpu")
    source, output = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("12.4=\n.23.=\n")
    batch = remask("run-batch", "-i", source, "-o", output, "--max-tokens", "4", *on_ray)
    assert batch.returncode == 0, batch.stderr
    here = tmp_path / "here.jsonl"
    assert remask("run-batch", "-i", source, "-o", here, "--max-tokens", "4").returncode == 0
    texts = [
        sorted(json.loads(line)["response"]["body"]["choices"][0]["text"] for line in path.open())
        for path in (output, here)
    ]
    assert len(texts[0]) == 2
    assert texts[0] == texts[1]

    load = ("--num-prompts", "4", "--max-concurrency", "2", "--json")
    measured = remask("bench", "serve-load", *load, *on_ray)
    assert measured.returncode == 0, measured.stderr
    report = json.loads(measured.stdout)
    assert report["completed"] == 4
    assert report["engine_options"]["distributed_executor_backend"] == "ray"
