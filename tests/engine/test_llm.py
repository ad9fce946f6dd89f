"""`LLM` as a user meets it: what is refused, what comes back, and what survives."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remask import LLM, EngineDead, InvalidRequest, SamplingParams, Schedule
from remask.benchmarks.tiny.tasks import SUDOKU_6X6
from remask.scheduler.messages import StepBatch
from remask.thread import EngineThread
from remask.workers.executors.in_process import InProcessExecutor
from remask.workers.worker import Worker

PUZZLE = "...543.....2341256..6.3..631.51.5...="
ASK = SamplingParams(max_tokens=40, block_length=40)


@pytest.mark.parametrize(
    ("prompts", "named", "fix"),
    [
        ([""], "prompt 0: prompt", "at least one token"),
        ([[]], "prompt 0: prompt", "at least one token"),
        (["a", ""], "prompt 1: prompt", "at least one token"),
        ([[5, 259]], "prompt 0: prompt_token_ids", "vocabulary 0..258"),
        ([[5, -1]], "prompt 0: prompt_token_ids", "vocabulary 0..258"),
        ([[5, 1.5]], "prompt 0: prompt", "list of token ids"),
        ([[True]], "prompt 0: prompt", "list of token ids"),
        ([3.5], "prompt 0: prompt", "list of token ids"),
        ([{"text": "a"}], "prompt 0: prompt", "{'prompt': text}"),
        ([{"prompt": 5}], "prompt 0: prompt", "must be text"),
        ([{"prompt_token_ids": "abc"}], "prompt 0: prompt", "list of token ids"),
        ([["a", {"hole": 3}]], "prompt 0: prompt", "holes are not supported yet"),
        (np.array([1.5, 2.0]), "prompt 0: prompt", "must be text or a list of token ids"),
        ([np.array([1.5])], "prompt 0: prompt", "prompt: must be text or a list of token ids"),
        ({"prompt": {"a", "b"}}, "prompt 0: prompt", "must be text"),
        ({"a", "b"}, "prompts", "list of prompts"),
        (b"123", "prompts", "list of prompts"),
        (["x" * 400], "prompt 0: max_tokens", "use max_tokens <= 112"),
        (["x" * 600], "prompt 0: max_tokens", "shorten the prompt"),
        (7, "prompts", "list of prompts"),
        ("\ud800", "prompt 0: prompt", "not valid Unicode"),
    ],
)
def test_bad_prompts_are_refused_with_their_index_and_the_fix(
    tiny_llm: LLM, prompts: Any, named: str, fix: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tiny_llm.generate(prompts)
    assert caught.value.parameter == named
    assert fix in str(caught.value)


def test_prompts_may_be_arrays_columns_and_iterators(tiny_llm: LLM) -> None:
    assert tiny_llm.tokenizer is not None
    ids = tiny_llm.tokenizer.encode("123+456=")
    alone: list[Any] = ["123+456=", ids, np.array(ids), [np.int64(i) for i in ids], tuple(ids), iter(ids)]
    alone += [{"prompt_token_ids": np.array(ids)}, {"prompt": np.str_("123+456=")}]
    many: list[Any] = [
        np.array(["123+456="] * 2, object),
        [np.array(ids), tuple(ids)],
        np.array([ids, ids]),
        ("123+456=" for _ in range(2)),
        {1: "123+456=", 2: "123+456="}.values(),
        iter([{"prompt_token_ids": iter(ids)}, range(ids[0], ids[0] + 1)]),
    ]
    for prompts, count in [*((one, 1) for one in alone), *((several, 2) for several in many)]:
        outputs = tiny_llm.generate(prompts, {"max_tokens": np.int64(8), "temperature": np.float64(0)})
        assert len(outputs) == count
        assert outputs[0].outputs[0].text == "0579"
        assert outputs[0].prompt_token_ids == ids
        assert {type(i) for output in outputs for i in output.prompt_token_ids} == {int}


def test_parameters_and_priorities_may_come_from_iterators(tiny_llm: LLM) -> None:
    params = ({"max_tokens": size, "ignore_eos": True} for size in (2, 4))
    outputs = tiny_llm.generate(["1+1="] * 2, params, priority=np.array([1, 0]))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 4]
    with pytest.raises(InvalidRequest, match=r"one for each of the 2 prompts \(got 3\)"):
        tiny_llm.generate(["1+1="] * 2, itertools.repeat(ASK))
    with pytest.raises(InvalidRequest, match=r"priority: give one for each of the 2 prompts \(got 3\)"):
        tiny_llm.generate(["1+1="] * 2, ASK, priority=itertools.count())
    with pytest.raises(
        InvalidRequest, match=r"sampling_params: give one for each of the 1 prompts \(got 5\)"
    ):
        tiny_llm.generate("1+1=", [ASK] * 5)


def test_numbers_of_the_engine_may_be_numpys() -> None:
    with LLM(
        "tiny", device="cpu", seed=np.int64(3), max_num_rows=np.int64(512), max_model_len=np.int16(64)
    ) as llm:
        assert llm.generate("123+456=", {"max_tokens": 8})[0].outputs[0].text == "0579"


def test_one_bad_request_stops_the_call_before_anything_runs(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("work has started")

    monkeypatch.setattr(EngineThread, "add", never)
    with pytest.raises(InvalidRequest, match=r"prompt 1: unmask\.t"):
        tiny_llm.generate([PUZZLE, PUZZLE], [ASK, SamplingParams(unmask="threshold:7")])


def test_the_number_of_parameters_must_fit_the_prompts(tiny_llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="one for each of the 2 prompts"):
        tiny_llm.generate([PUZZLE, PUZZLE], [ASK])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"dtype": "float8"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:99"}, "device"),
        ({"max_model_len": 513}, "max_model_len"),
        ({"max_model_len": "long"}, "max_model_len"),
        ({"max_num_rows": 0}, "max_num_rows"),
        ({"max_num_seqs": 2.5}, "max_num_seqs"),
        ({"burst": -1}, "burst"),
        ({"max_num_seqs": None}, "max_num_seqs"),
        ({"max_prompts_per_call": 0}, "max_prompts_per_call"),
        ({"max_tokens_per_call": 1.5}, "max_tokens_per_call"),
        ({"max_n": True}, "max_n"),
        ({"max_stop_strings": -1}, "max_stop_strings"),
        ({"max_stop_len": "long"}, "max_stop_len"),
        ({"tokenizer": 5}, "tokenizer"),
        ({"dtype": []}, "dtype"),
        ({"seed": None}, "seed"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"load_format": "safetensors"}, "load_format"),
        ({"quantization": "int8"}, "quantization"),
        ({"quantization": "fp8", "dtype": "float32"}, "quantization"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"data_parallel_size": 2}, "data_parallel_size"),
        ({"distributed_executor_backend": "mp"}, "distributed_executor_backend"),
        ({"batch_invariant": "yes"}, "batch_invariant"),
        ({"attention_backend": "flash"}, "attention_backend"),
        ({"attention_backend": "flash3"}, "attention_backend"),
        ({"tokenizer": "/nonexistent"}, "tokenizer"),
        ({"model": "/nonexistent"}, "model"),
        ({"model": "GSAI-ML/LLaDA-8B-Instruct"}, "model"),
        ({"model": None}, "model"),
    ],
)
def test_bad_arguments_of_the_engine_are_refused_by_name(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        LLM(**{"model": "tiny", "device": "cpu", **arguments})
    assert caught.value.parameter == named


@pytest.mark.parametrize(
    "arguments", [{"max_model_len": 513}, {"tokenizer": "/nonexistent"}, {"model": "/nonexistent"}], ids=str
)
def test_options_that_do_not_suit_the_checkpoint_are_refused_before_workers_start(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: Any) -> None:
        raise AssertionError("workers start")

    monkeypatch.setattr("remask.engine.start_executor", start)
    with pytest.raises(InvalidRequest):
        LLM(**{"model": "tiny", "device": "cpu", **arguments})


def test_a_broken_tokenizer_is_refused_by_name(tmp_path: Path, golden_checkpoint: Path) -> None:
    directory = Path(shutil.copytree(golden_checkpoint, tmp_path / "model"))
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidRequest, match=r"tokenizer: cannot be read"):
        LLM(directory, device="cpu")


def test_urgent_prompts_are_served_first_and_results_keep_the_order_of_the_prompts() -> None:
    prompts = [PUZZLE, "12..=", "1=" * 20]
    with LLM("tiny", device="cpu", max_num_seqs=1) as llm:
        outputs = llm.generate(prompts, {"max_tokens": 8, "priority": 9}, priority=[2, 3, 1])
        by_params = llm.generate(prompts, [{"max_tokens": 8, "priority": p} for p in (0, 0, -1)])
    assert [output.prompt for output in outputs] == prompts
    finished = [output.metrics.finish_time for output in outputs]
    assert finished[2] < finished[0] < finished[1]
    finished = [output.metrics.finish_time for output in by_params]
    assert finished[2] < finished[0] < finished[1]


def test_bad_priorities_are_refused(tiny_llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="priority: give one for each of the 1 prompts"):
        tiny_llm.generate([PUZZLE], ASK, priority=[1, 2])
    with pytest.raises(InvalidRequest, match="priority: give a list of an integer for each prompt"):
        tiny_llm.generate([PUZZLE], ASK, priority=3)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="prompt 0: priority"):
        tiny_llm.generate([PUZZLE], ASK, priority=[0.5])  # type: ignore[list-item]


def test_a_model_without_tokenizer_takes_ids_and_says_so(golden_llm: LLM) -> None:
    (output,) = golden_llm.generate([33, 11], SamplingParams(max_tokens=8))
    assert output.outputs[0].text is None
    assert len(output.outputs[0].token_ids) > 0
    with pytest.raises(InvalidRequest, match="has no tokenizer; give token ids"):
        golden_llm.generate("text")
    with pytest.raises(InvalidRequest, match="no chat template"):
        golden_llm.chat([{"role": "user", "content": "text"}])


def test_the_ways_to_write_a_prompt_give_the_same_text(tiny_llm: LLM) -> None:
    ids = tiny_llm.tokenizer.encode(PUZZLE)  # type: ignore[union-attr]
    prompts = [PUZZLE, ids, {"prompt": PUZZLE}, {"prompt_token_ids": ids}]
    outputs = tiny_llm.generate(prompts, ASK) + tiny_llm.generate(PUZZLE, ASK) + tiny_llm.generate(ids, ASK)
    assert len({output.outputs[0].text for output in outputs}) == 1
    assert [output.prompt for output in outputs[:4]] == [PUZZLE, None, PUZZLE, None]


def test_chat_puts_the_message_through_the_template(tiny_llm: LLM) -> None:
    message = [{"role": "user", "content": PUZZLE.removesuffix("=")}]
    (chatted,) = tiny_llm.chat(message, ASK)
    (written,) = tiny_llm.generate(PUZZLE, ASK)
    assert chatted.prompt == PUZZLE
    assert chatted.outputs[0].token_ids == written.outputs[0].token_ids
    assert len(tiny_llm.chat([message, message], ASK)) == 2


@pytest.mark.parametrize(
    "messages", [[], "hello", [[]], [{"role": "user"}], [{"role": "user", "content": 3}]]
)
def test_bad_messages_are_refused(tiny_llm: LLM, messages: Any) -> None:
    with pytest.raises(InvalidRequest, match="messages"):
        tiny_llm.chat(messages)


def test_an_output_tells_what_happened(tiny_llm: LLM) -> None:
    (output,) = tiny_llm.generate(PUZZLE, SamplingParams(max_tokens=40, block_length=40, unmask=Schedule()))
    (sample,) = output.outputs
    assert output.finished
    assert (sample.finish_reason, sample.stop_reason) == ("stop", None)
    assert sample.text is not None
    assert len(sample.text) == 36 == sample.num_visible_tokens == len(sample.token_ids) - 1
    assert sample.nfe == 40
    assert sample.tokens_per_forward == 36 / 40
    assert len(sample.confidences) == len(sample.commit_steps) == len(sample.token_ids)
    assert len(set(sample.commit_steps)) == len(sample.commit_steps), "one token a step"
    assert output.metrics.latency == output.metrics.finish_time - output.metrics.arrival_time > 0


def test_samples_differ_and_can_be_repeated_by_their_seed(tiny_llm: LLM) -> None:
    # The temperature is so high that no two of four samples are equal, for any seed.
    hot = {"max_tokens": 36, "temperature": 8.0, "rank": "top", "n": 4}
    (first,) = tiny_llm.generate(PUZZLE, SamplingParams(**hot))
    assert len({tuple(sample.token_ids) for sample in first.outputs}) == 4
    assert [sample.index for sample in first.outputs] == [0, 1, 2, 3]
    (again,) = tiny_llm.generate(PUZZLE, SamplingParams(**hot, seed=first.outputs[0].seed))
    assert [s.token_ids for s in again.outputs] == [s.token_ids for s in first.outputs]
    (other,) = tiny_llm.generate(PUZZLE, SamplingParams(**hot))
    assert other.outputs[0].seed != first.outputs[0].seed, "a request without a seed gets one of its own"


def test_results_come_in_the_order_of_the_prompts(tiny_llm: LLM) -> None:
    prompts = [PUZZLE, "12..=", PUZZLE, "....=", "1=" * 30]
    params = [{"max_tokens": n} for n in (40, 4, 17, 9, 30)]
    outputs = tiny_llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == prompts
    for prompt, own, output in zip(prompts, params, outputs, strict=True):
        (alone,) = tiny_llm.generate(prompt, own)
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids


def test_no_prompts_give_no_outputs(tiny_llm: LLM) -> None:
    assert tiny_llm.generate([]) == []


def test_a_second_burst_in_the_queue_changes_no_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bursts that continue canvases kept by the worker, tested from the scheduler to the text."""
    asked = [
        {"max_tokens": 40, "block_length": 8, "unmask": "schedule"},
        {"max_tokens": 24, "block_length": 8, "stop": "4", "unmask": "threshold:0.7", "seed": 3},
        {"max_tokens": 30, "block_length": 30, "preset": "wino", "temperature": 1.0, "n": 3, "seed": 4},
        {"max_tokens": 12, "priority": -1},
    ]
    launch: Callable[..., Any] = Worker.launch
    followed: list[int | None] = []

    def recorded(self: Worker, batch: StepBatch) -> Any:
        followed.append(batch.follows)
        return launch(self, batch)

    monkeypatch.setattr(Worker, "launch", recorded)
    outputs = []
    for depth in (1, 2):
        followed.clear()
        with LLM("tiny", device="cpu", dtype="float32", burst=2, max_num_rows=256) as llm:
            llm.engine._engine.executor.queue_depth = depth  # as on a GPU
            outputs.append([output.outputs for output in llm.generate([PUZZLE] * 4, asked)])
        assert any(burst is not None for burst in followed) == (depth == 2)
    assert [[(s.text, s.nfe, s.commit_steps, s.stop_reason) for s in o] for o in outputs[0]] == [
        [(s.text, s.nfe, s.commit_steps, s.stop_reason) for s in o] for o in outputs[1]
    ]


def test_a_failed_engine_says_why_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM("tiny", device="cpu")

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(InProcessExecutor, "submit", fail)
    with pytest.raises(EngineDead, match="out of memory") as caught:
        llm.generate(PUZZLE, ASK)
    assert isinstance(caught.value.__cause__, RuntimeError)
    monkeypatch.undo()
    with pytest.raises(EngineDead, match="out of memory"):
        llm.generate(PUZZLE, ASK)


def test_a_closed_engine_refuses_work_and_closes_twice() -> None:
    llm = LLM("tiny", device="cpu")
    llm.close()
    llm.close()
    with pytest.raises(EngineDead, match="closed"):
        llm.generate(PUZZLE, ASK)


def test_the_embedded_model_solves_sudokus(tiny_llm: LLM) -> None:
    """The committed evaluation has the exact rates (400 puzzles); this guards against a broken model."""
    import numpy as np

    prompts, _ = SUDOKU_6X6.held_out(np.random.default_rng(5), 24)
    outputs = tiny_llm.generate(prompts, SamplingParams(max_tokens=40, block_length=40, unmask="schedule"))
    solved = sum(
        SUDOKU_6X6.is_correct(prompt, output.outputs[0].text or "")
        for prompt, output in zip(prompts, outputs, strict=True)
    )
    assert solved >= 14


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"logit_bias": {82: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": [5, 500]}, "allowed_token_ids"),
        ({"bad_token_ids": [82]}, "bad_token_ids"),
        ({"bad_token_ids": list(range(82))}, "bad_token_ids"),
        ({"bad_token_ids": list(range(1, 82))}, "bad_token_ids"),
        ({"allowed_token_ids": [5], "bad_token_ids": [5]}, "allowed_token_ids"),
        ({"allowed_token_ids": [0]}, "allowed_token_ids"),
        ({"allowed_token_ids": [1], "suppress_eos": True}, "allowed_token_ids"),
    ],
    ids=str,
)
def test_ids_that_cannot_be_honoured_are_refused(golden_llm: LLM, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        golden_llm.generate([[5, 6]], {"max_tokens": 4, **fields})
    assert caught.value.parameter == f"prompt 0: {named}"


def test_ids_are_allowed_and_banned_for_each_request(golden_llm: LLM) -> None:
    free, few, biased, endless = golden_llm.generate(
        [[33, 11, 12, 14]] * 4,
        [
            {"max_tokens": 16, "ignore_eos": True},
            {"max_tokens": 16, "ignore_eos": True, "allowed_token_ids": [7, 8, 9], "bad_token_ids": [8]},
            {"max_tokens": 16, "ignore_eos": True, "logit_bias": {40: 100.0}},
            {"max_tokens": 16, "ignore_eos": True, "suppress_eos": True},
        ],
    )
    assert set(few.outputs[0].token_ids) <= {7, 9}
    assert set(biased.outputs[0].token_ids) == {40}
    assert 1 not in endless.outputs[0].token_ids
    assert free.outputs[0].token_ids not in (few.outputs[0].token_ids, biased.outputs[0].token_ids)
