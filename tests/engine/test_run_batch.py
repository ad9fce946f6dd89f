"""`remask.batch`: the contents of a file, its results, and faults that are refused before a request runs."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remask import LLM, Engine, EngineOptions, InvalidRequest
from remask.batch.check import CustomIds, InvalidBatch
from remask.batch.run import BatchOptions, Summary, run_batch

Run = Callable[..., Summary]


def results(path: Path) -> dict[str, Any]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    by_id = {result["custom_id"]: result for result in found}
    assert len(by_id) == len(found)
    return by_id


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def chat_line(custom_id: str, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "12..34..2.4.43.1"}]
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": messages, "max_tokens": 20, **body},
    }


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("remask.batch.run._Run", never)  # which is made when the model is loaded


def test_results_are_openai_objects_with_forwards_and_seed(run: Run, tmp_path: Path) -> None:
    source = write(
        tmp_path / "in.jsonl",
        chat_line("a", model="tiny", unmask="schedule", n=1),
        chat_line("b", temperature=1.0, n=2, seed=7),
        {"custom_id": "c", "prompt": "12..34..2.4.43.1=", "max_tokens": 20, "model": "served"},
    )
    summary = run(source, tmp_path / "out.jsonl", model_names=["served"])
    assert (summary.num_lines, summary.num_done_before) == (3, 0)
    found = results(tmp_path / "out.jsonl")
    body = found["a"]["response"]["body"]
    assert found["a"]["error"] is None
    assert found["a"]["response"]["status_code"] == 200
    assert (body["object"], body["model"]) == ("chat.completion", "served")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "1234341221434321"}
    assert (choice["finish_reason"], choice["nfe"], choice["tokens_per_forward"]) == ("stop", 20, 0.8)
    assert body["usage"] == {"prompt_tokens": 17, "completion_tokens": 16, "total_tokens": 33}
    assert [c["seed"] for c in found["b"]["response"]["body"]["choices"]] == [7, 7]
    text = found["c"]["response"]["body"]
    assert (text["object"], text["choices"][0]["text"]) == ("text_completion", "1234341221434321")
    assert len({result["id"] for result in found.values()}) == 3
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


def test_a_batch_writes_what_generate_writes(run: Run, tmp_path: Path) -> None:
    """With equal seeds of the LLM this includes samples: a line's number is its prompt's index."""
    prompts = [f"{i}.{j}." for i in "1234" for j in "1234"]
    source = write(tmp_path / "in.jsonl", *({"prompt": prompt} for prompt in prompts))
    defaults = {"max_tokens": 6, "temperature": 1.0}
    run(source, tmp_path / "out.jsonl", defaults=defaults)
    found = results(tmp_path / "out.jsonl")
    with LLM("tiny", device="cpu") as fresh:
        outputs = fresh.generate(prompts, defaults)
    for number, output in enumerate(outputs, 1):
        (choice,) = found[f"line-{number}"]["response"]["body"]["choices"]
        assert (choice["text"], choice["seed"]) == (output.outputs[0].text, output.outputs[0].seed)


def test_text_is_a_prompt_a_line(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_bytes(b"\xef\xbb\xbf12.34=\r\n\n  \n{1}=\n4\xe2\x80\xa83=")
    run(source, tmp_path / "out.jsonl", defaults={"max_tokens": 4})
    found = results(tmp_path / "out.jsonl")
    assert found.keys() == {"line-1", "line-4", "line-5"}
    usage = [found[f"line-{n}"]["response"]["body"]["usage"]["prompt_tokens"] for n in (1, 4, 5)]
    assert usage == [6, 4, 6], "bytes of the line, without its end"
    run(source, tmp_path / "chat.jsonl", defaults={"max_tokens": 4}, chat=True)
    assert results(tmp_path / "chat.jsonl")["line-1"]["response"]["body"]["object"] == "chat.completion"


def test_a_model_without_tokenizer_takes_and_gives_token_ids(golden_llm: LLM, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": [33, 11], "max_tokens": 4}, {"prompt_token_ids": [33]})
    defaults = {"max_tokens": 3, "ignore_eos": True}
    options = BatchOptions(engine=golden_llm.engine.intake.options, defaults=defaults)
    run_batch(source, tmp_path / "out.jsonl", lambda: nullcontext(golden_llm), options)
    found = results(tmp_path / "out.jsonl")
    for name, count in (("line-1", 4), ("line-2", 3)):
        (choice,) = found[name]["response"]["body"]["choices"]
        assert choice["text"] is None
        assert len(choice["token_ids"]) == count


def test_tokens_without_a_tokenizer_are_written_as_ids(golden_llm: LLM, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": [33, 11], "max_tokens": 3, "logprobs": 0, "echo": True})
    options = BatchOptions(engine=golden_llm.engine.intake.options, defaults={"ignore_eos": True})
    run_batch(source, tmp_path / "out.jsonl", lambda: nullcontext(golden_llm), options)
    (choice,) = results(tmp_path / "out.jsonl")["line-1"]["response"]["body"]["choices"]
    assert choice["token_ids"][:2] == [33, 11]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert [logprob is None for logprob in choice["logprobs"]["token_logprobs"]] == [True] * 2 + [False] * 3


FAULTS: list[tuple[Any, str]] = [
    ("{", "JSON: cannot be read"),
    ("[1]", "JSON: must be an object"),
    ('{"prompt": "\\ud800"}', "JSON: cannot be read"),
    ("[" * 100_000, "JSON: cannot be read"),
    ({}, "prompt: give one of prompt, prompt_token_ids and messages"),
    ({"prompt": "x", "messages": []}, "messages: give one of prompt"),
    ({"prompt": "x", "custom_id": 5}, "custom_id: must be text"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 600}, "max_tokens: prompt of 1 tokens and canvas exceed"),
    ({"prompt": ""}, "prompt: is empty"),
    ({"prompt": "x", "logprobs": 2}, "logprobs: alternatives of a committed token are not known"),
    ({"prompt": "x", "unmask": "treshold"}, "unmask: unknown policy; did you mean"),
    ({"prompt_token_ids": "x"}, "prompt_token_ids: must be a list"),
    ({"prompt": [1, 999]}, "prompt_token_ids: is outside the vocabulary"),
    ({"prompt_token_ids": [19, 0, 21]}, "prompt_token_ids: is the mask id"),
    ({**chat_line("x"), "method": "GET"}, "method: must be POST"),
    ({**chat_line("x"), "url": "/v1/embeddings"}, "url: is not supported; use /v1/chat/completions or"),
    ({**chat_line("x"), "extra": 1}, "extra: unknown key"),
    ({**chat_line("x"), "body": None}, "body: is missing"),
    ({**chat_line("x"), "body": []}, "body: must be a JSON object"),
    ({**chat_line(""), "custom_id": None}, "custom_id: must be text"),
    (chat_line("x", stream=True), "stream: is not supported"),
    (chat_line("x", model="gpt-4o"), "model: is not the model that is served"),
]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("line", "problem"), FAULTS)
def test_a_line_at_fault_refuses_the_file(run: Run, tmp_path: Path, line: Any, problem: str) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "1="}, "", line)
    with pytest.raises(InvalidBatch) as caught:
        run(source, tmp_path / "out.jsonl")
    assert f"in.jsonl: line 3: {problem}" in str(caught.value)
    assert "1 invalid; nothing was run" in str(caught.value)
    assert os.listdir(tmp_path) == ["in.jsonl"]


@pytest.mark.slow
@pytest.mark.usefixtures("no_work")
def test_line_19999_is_found_before_anything_runs(
    run: Run, tmp_path: Path, batch_file: Callable[[int], Path]
) -> None:
    lines = batch_file(20_000).read_text().splitlines()
    lines[19_998] = lines[19_998][:-1]
    with pytest.raises(InvalidBatch, match="line 19,999: JSON: cannot be read"):
        run(write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl")


@pytest.mark.usefixtures("no_work")
def test_twenty_faults_are_listed_and_all_are_counted(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *["{"] * 25)
    with pytest.raises(InvalidBatch) as caught:
        run(source, tmp_path / "out.jsonl")
    assert (len(caught.value.faults), caught.value.num_faults) == (20, 25)
    assert str(caught.value).splitlines()[-2:] == ["and 5 more", "25 invalid; nothing was run"]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("record_invalid", [False, True])
def test_duplicates_are_reported_with_both_lines(run: Run, tmp_path: Path, record_invalid: bool) -> None:
    lines = [{"custom_id": name, "prompt": "1="} for name in ("a", "b", "a", "c", "b", "a", "line-9")]
    source = write(tmp_path / "in.jsonl", "", *lines, {"prompt": "1="})
    with pytest.raises(InvalidBatch) as caught:
        run(source, tmp_path / "out.jsonl", record_invalid=record_invalid)
    assert caught.value.faults == [
        (4, "custom_id: 'a' is already in line 2"),
        (6, "custom_id: 'b' is already in line 3"),
        (7, "custom_id: 'a' is already in line 2"),
        (9, "custom_id: 'line-9' is already in line 8"),
    ]


def test_a_million_ids_take_16_bytes_each() -> None:
    ids = CustomIds()
    tracemalloc.start()
    for i in range(200_000):
        ids.append(f"request number {i}")
    assert tracemalloc.get_traced_memory()[0] < 200_000 * 16 * 1.2
    tracemalloc.stop()
    assert ids.duplicates() == []
    ids.append("request number 123456")
    assert ids.duplicates() == [(123_456, 200_000)]


def test_duplicates_agree_with_a_plain_search() -> None:
    rng = np.random.default_rng(0)
    for size in range(1, 60):
        names = [str(name) for name in rng.integers(0, 20, size)]
        ids = CustomIds()
        for name in names:
            ids.append(name)
        expected = [(names.index(name), i) for i, name in enumerate(names) if names.index(name) < i]
        assert ids.duplicates() == expected


def test_faults_may_be_recorded_as_results(run: Run, tmp_path: Path) -> None:
    source = write(
        tmp_path / "in.jsonl", {"prompt": "1=", "max_tokens": 4}, "{", chat_line("x", temperature=-1)
    )
    summary = run(source, tmp_path / "out.jsonl", record_invalid=True)
    assert (summary.num_lines, summary.num_refused) == (3, 2)
    found = results(tmp_path / "out.jsonl")
    assert found.keys() == {"line-1", "line-2", "x"}
    refused = found["x"]["response"]
    assert refused["status_code"] == 400
    assert refused["body"]["error"]["param"] == "temperature"
    assert refused["body"]["error"]["type"] == "invalid_request_error"
    assert found["line-1"]["response"]["status_code"] == 200


@pytest.mark.usefixtures("no_work")
def test_files_at_fault_are_refused_by_name(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "1="})
    output = tmp_path / "out.jsonl"
    with pytest.raises(InvalidRequest, match="--input-file: cannot be read: No such file"):
        run(tmp_path / "nothing.jsonl", output)
    with pytest.raises(InvalidRequest, match="--input-file: must be a file"):
        run(tmp_path, output)
    with pytest.raises(InvalidRequest, match="--input-file: holds no requests"):
        run(write(tmp_path / "empty.jsonl", ""), output)
    with pytest.raises(InvalidRequest, match="--output-file: cannot be written: No such file"):
        run(source, tmp_path / "nowhere" / "out.jsonl")
    with pytest.raises(InvalidRequest, match="--output-file: cannot be written: Not a directory"):
        run(source, source / "out.jsonl")
    with pytest.raises(InvalidRequest, match="--output-file: exists already"):
        run(source, source)
    assert not output.exists()


@pytest.mark.usefixtures("no_work")
def test_an_unwritable_directory_is_refused(run: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "1="})
    directory = Path("/proc/self")  # not writable, even by root
    with pytest.raises(InvalidRequest, match="--output-file: cannot be written"):
        run(source, directory / "out.jsonl")


@pytest.mark.usefixtures("no_work")
def test_an_input_that_changes_is_noticed(
    tiny_llm: LLM, tmp_path: Path, batch_file: Callable[[int], Path]
) -> None:
    source = batch_file(50)

    def change(phase: str, num: int, total: int | None) -> None:
        if num == 20:
            with source.open("a") as file:
                file.write("{}\n")

    with pytest.raises(InvalidRequest, match="was changed while it was being read"):
        run_batch(
            source,
            tmp_path / "out.jsonl",
            lambda: nullcontext(tiny_llm),
            BatchOptions(engine=EngineOptions(model="tiny")),
            change,
        )


def test_at_most_max_live_requests_are_in_the_engine(
    run: Run,
    tiny_llm: LLM,
    tmp_path: Path,
    batch_file: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = []
    step = Engine.step

    def counted(engine: Engine) -> Any:
        counts.append(engine.admission.num_requests)
        return step(engine)

    monkeypatch.setattr(Engine, "step", counted)
    run(batch_file(40), tmp_path / "out.jsonl", max_live=7)
    assert max(counts) == 7


def test_parquet_goes_in_and_out(run: Run, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [
        {"custom_id": "a", "prompt": "12..34..2.4.43.1=", "max_tokens": 20, "seed": 3},
        {"custom_id": None, "prompt": "12.4=", "max_tokens": None, "seed": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    defaults = {"max_tokens": 4, "temperature": 1.0, "n": 2}
    run(tmp_path / "in.parquet", tmp_path / "out.jsonl", defaults=defaults)
    run(tmp_path / "in.parquet", tmp_path / "out.parquet", defaults=defaults)
    found = results(tmp_path / "out.jsonl")
    assert found.keys() == {"a", "row-2"}
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert len(table) == 4, "a row a sample"
    for row in table:
        body = found[row["custom_id"]]["response"]["body"]
        choice = body["choices"][row["sample"]]
        for name in ("text", "finish_reason", "nfe", "tokens_per_forward", "seed"):
            assert row[name] == choice[name]
        assert row["prompt_tokens"] == body["usage"]["prompt_tokens"]
    for custom_id, result in found.items():
        counts = [row["completion_tokens"] for row in table if row["custom_id"] == custom_id]
        assert sum(counts) == result["response"]["body"]["usage"]["completion_tokens"]
    chats = [{"messages": [{"role": "user", "content": "12.4"}], "max_tokens": 4}]
    pq.write_table(pa.Table.from_pylist(chats), tmp_path / "chats.parquet")
    run(tmp_path / "chats.parquet", tmp_path / "chats.jsonl")
    assert results(tmp_path / "chats.jsonl")["row-1"]["response"]["body"]["object"] == "chat.completion"


def test_a_null_inside_a_struct_of_parquet_is_not_given(run: Run, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    parts = [{"type": "text", "text": "12.4", "image_url": None}, {"type": "text", "text": ""}]
    rows: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": parts, "name": None}],
            "unmask": {"type": "threshold", "t": 0.5},
        },
        {
            "messages": [{"role": "user", "content": parts, "name": None}],
            "remask": {"type": "wino", "t2": 0.9},
        },
        {"prompt": "12.4=", "logit_bias": {"20": 1.0}, "unmask": {"type": "schedule", "steps": 2}},
        {"prompt": "12.4=", "logit_bias": {"21": 1.0}, "unmask": {"type": "factor"}},
        {"prompt": "12.4="},
    ]
    struct = pa.struct
    schema = pa.schema(
        {
            "prompt": pa.string(),
            "messages": pa.list_(
                struct(
                    {
                        "role": pa.string(),
                        "name": pa.string(),
                        "content": pa.list_(
                            struct({"type": pa.string(), "text": pa.string(), "image_url": pa.string()})
                        ),
                    }
                )
            ),
            "unmask": struct({"type": pa.string(), "t": pa.float64(), "steps": pa.int64()}),
            "remask": struct({"type": pa.string(), "t2": pa.float64(), "max_share": pa.float64()}),
            "logit_bias": struct({"20": pa.float64(), "21": pa.float64()}),
        }
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "in.parquet")
    run(tmp_path / "in.parquet", tmp_path / "out.jsonl", defaults={"max_tokens": 4}, record_invalid=True)
    found = results(tmp_path / "out.jsonl")
    assert {name: result["response"]["status_code"] for name, result in found.items()} == {
        f"row-{number}": 200 for number in range(1, 6)
    }


@pytest.mark.usefixtures("no_work")
def test_parquet_without_pyarrow_and_other_files_are_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "1="})
    fake = write(tmp_path / "fake.parquet", "text")
    with pytest.raises(InvalidRequest, match="--input-file: cannot be read as Parquet"):
        run(fake, tmp_path / "out.jsonl")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InvalidRequest, match="--output-file: needs pyarrow; run `pip install pyarrow`"):
        run(source, tmp_path / "out.parquet")
    with pytest.raises(InvalidRequest, match="--input-file: needs pyarrow"):
        run(fake, tmp_path / "out.jsonl")
