"""Existing outputs: some are continued by `--resume`, the others are refused, and none is replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from remask import LLM, CompletionOutput, InvalidRequest, RequestOutput
from remask.batch.identity import RunName, model_digest, parse_id
from remask.batch.journal import BatchStopped, Journal
from remask.batch.parquet import write_rows
from remask.batch.run import Summary
from remask.openai.responses import completion
from remask.outputs import RequestMetrics

Run = Callable[..., Summary]
MakeFile = Callable[[int], Path]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after which no run may load a model."""

    def never(*_: object) -> None:
        raise AssertionError("the model was loaded")

    return lambda: monkeypatch.setattr("remask.batch.run._Run", never)


def test_resume_starts_a_run_that_has_no_output_and_does_nothing_on_a_finished_one(
    run: Run, batch_file: MakeFile, tmp_path: Path, no_work: Callable[[], None]
) -> None:
    source, output = batch_file(5), tmp_path / "out.jsonl"
    assert run(source, output, resume=True).num_done_before == 0
    before = (output.read_bytes(), output.stat().st_mtime_ns)
    no_work()
    summary = run(source, output, resume=True)
    assert summary == Summary(num_lines=5, num_done_before=5)
    assert (output.read_bytes(), output.stat().st_mtime_ns) == before
    assert sorted(os.listdir(tmp_path)) == ["5.jsonl", "out.jsonl"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.partial"])
def test_an_existing_output_is_refused_without_resume(
    run: Run, batch_file: MakeFile, tmp_path: Path, no_work: Callable[[], None], name: str
) -> None:
    no_work()
    (tmp_path / name).write_text("precious")
    with pytest.raises(InvalidRequest, match=r"--output-file: (exists already|an interrupted run)"):
        run(batch_file(3), tmp_path / "out.jsonl")
    assert (tmp_path / name).read_text() == "precious"


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.partial"])
@pytest.mark.parametrize("content", ["precious", "precious\n", '{"id": "x", "custom_id": "y"}\n', '{"id":\n'])
def test_a_file_that_is_no_output_is_refused_with_resume(
    run: Run, batch_file: MakeFile, tmp_path: Path, no_work: Callable[[], None], name: str, content: str
) -> None:
    no_work()
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidRequest, match="is no output of a batch"):
        run(batch_file(3), tmp_path / "out.jsonl", resume=True)
    assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize("finished", [False, True])
def test_an_output_of_another_run_is_refused(
    run: Run,
    partial_of: Callable[[int], tuple[Path, Path, Path]],
    batch_file: MakeFile,
    no_work: Callable[[], None],
    finished: bool,
) -> None:
    source, output, partial = partial_of(4)
    if finished:
        partial.rename(output)
    there = output if finished else partial
    content = there.read_bytes()
    no_work()
    for options, what in (
        ({"defaults": {"max_tokens": 5}}, "other parameters"),
        ({"seed": 1}, "other parameters"),
        ({"quantization": "fp8"}, "other parameters"),
        ({"chat": True}, "other parameters"),
    ):
        with pytest.raises(InvalidRequest, match=f"another run, with {what}; choose another file"):
            run(source, output, resume=True, **options)
    with pytest.raises(InvalidRequest, match="another run, with another input; choose"):
        run(batch_file(5), output, resume=True)
    assert there.read_bytes() == content


def test_results_that_were_tampered_with_are_refused(
    run: Run, partial_of: Callable[[int], tuple[Path, Path, Path]]
) -> None:
    source, output, partial = partial_of(4)
    lines = sorted(partial.read_bytes().splitlines(keepends=True))  # they come in the order of completion
    assert b'"request 0"' in lines[0]
    for changed in (
        [*lines, lines[0]],
        [lines[0].replace(b'"request 0"', b'"request 1"')],
        [lines[0].replace(b'_0"', b'_9"')],
    ):
        partial.write_bytes(b"".join(changed))
        with pytest.raises(InvalidRequest, match="was changed: the result of 'request"):
            run(source, output, resume=True)
    partial.write_bytes(b"".join(lines[:3]))
    partial.rename(output)
    with pytest.raises(InvalidRequest, match="was changed: it holds 3 of the 4 results"):
        run(source, output, resume=True)


def test_two_processes_cannot_write_one_output(run: Run, batch_file: MakeFile, tmp_path: Path) -> None:
    source, output = batch_file(3), tmp_path / "out.jsonl"
    with Journal(output, resume=False), pytest.raises(InvalidRequest, match="written by another process"):
        run(source, output, resume=True)
    run(source, output)


def test_a_file_that_appears_meanwhile_is_not_replaced(
    run: Run, batch_file: MakeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = batch_file(3), tmp_path / "out.jsonl"
    sync = Journal.sync

    def appear(journal: Journal) -> None:
        output.write_text("precious")
        sync(journal)

    monkeypatch.setattr(Journal, "sync", appear)
    with pytest.raises(BatchStopped, match="File exists: 3 of 3 results are saved"):
        run(source, output)
    assert output.read_text() == "precious"


def test_a_file_system_without_links_is_renamed_on(
    run: Run, batch_file: MakeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    run(batch_file(3), tmp_path / "out.jsonl")
    assert sorted(os.listdir(tmp_path)) == ["3.jsonl", "out.jsonl"]


def test_faults_that_were_recorded_are_not_recorded_again(run: Run, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"prompt": "1=", "max_tokens": 2}\n{"prompt": ""}\n{"prompt": "2=", "max_tokens": 2}\n'
    )
    run(source, output, record_invalid=True)
    partial = tmp_path / "out.jsonl.partial"
    lines = output.read_bytes().splitlines(keepends=True)
    output.unlink()
    for kept in range(3):
        partial.write_bytes(b"".join(lines[:kept]))
        run(source, output, resume=True, record_invalid=True)
        assert len(output.read_bytes().splitlines()) == len({*output.read_bytes().splitlines()}) == 3
        output.unlink()


def test_parquet_tells_the_tokens_that_were_counted(tmp_path: Path) -> None:
    """Also where forwards times tokens per forward are another number."""
    parquet = pytest.importorskip("pyarrow.parquet")
    sample = CompletionOutput(
        index=0, text="7 8", token_ids=[7, 8, 1], finish_reason="stop", stop_reason=None,
        nfe=1000, num_full_forwards=1000, num_query_rows=5000, tokens_per_forward=0.001,
        confidences=[1.0] * 3, commit_steps=[1] * 3, seed=0,
    )  # fmt: skip
    more = msgspec.structs.replace(sample, index=1, token_ids=[7], finish_reason="length", nfe=0)
    times = RequestMetrics(arrival_time=0.0, finish_time=1.0, latency=1.0)
    output = RequestOutput(
        request_id="r", prompt="x", prompt_token_ids=[5], outputs=[sample, more], finished=True, metrics=times
    )
    body = completion("completion", [output], None, id="a", created=0, model="tiny")
    record = {"id": "a", "custom_id": "b", "response": {"status_code": 200, "body": body}}
    write_rows([msgspec.json.encode(record)], tmp_path / "out.parquet")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["completion_tokens"].to_pylist() == [2, 1]
    assert body.usage.completion_tokens == 3


def test_logprobs_have_the_texts_of_the_visible_tokens(run: Run, tiny_llm: LLM, tmp_path: Path) -> None:
    """In both kinds of bodies, behind the prompt with `echo`, and in Parquet."""
    parquet = pytest.importorskip("pyarrow.parquet")
    prompt, fields = "12.34.2=", {"max_tokens": 12}
    (expected,) = tiny_llm.generate(prompt, {**fields, "logprobs": 1})
    (sample,) = expected.outputs
    tokens = [tiny_llm.engine.tokenizer.decode([token]) for token in sample.token_ids]
    visible = tokens[: sample.num_visible_tokens]
    assert 0 < len(visible) < len(tokens), "the end of the text is none of them"
    assert sample.logprobs is not None
    logprobs = sample.logprobs[: len(visible)]
    lines = [
        {"prompt": prompt, **fields, "logprobs": 0},
        {"prompt": prompt, **fields, "logprobs": 1, "echo": True},
        {"prompt": expected.prompt_token_ids, **fields, "echo": True},
        {"messages": [{"role": "user", "content": prompt[:-1]}], **fields, "logprobs": True},
        {"messages": [{"role": "user", "content": prompt[:-1]}], **fields, "logprobs": False},
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("out.jsonl", "out.parquet"):
        run(source, tmp_path / name)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    choices = {line["custom_id"]: line["response"]["body"]["choices"][0] for line in found}
    assert choices["line-1"]["logprobs"] == {
        "tokens": visible,
        "token_logprobs": pytest.approx(logprobs, abs=1e-5),
        "top_logprobs": None,
        "text_offset": list(range(len(visible))),
    }
    assert choices["line-1"]["text"] == sample.text
    echoed = choices["line-2"]
    assert echoed["text"] == choices["line-3"]["text"] == prompt + (sample.text or "")
    assert "".join(echoed["logprobs"]["tokens"]) == echoed["text"]
    assert echoed["logprobs"]["token_logprobs"][: len(prompt)] == [None] * len(prompt)
    assert echoed["logprobs"]["token_logprobs"][len(prompt) :] == pytest.approx(logprobs, abs=1e-5)
    assert echoed["logprobs"]["text_offset"] == list(range(len(echoed["text"])))
    assert choices["line-3"]["logprobs"] is choices["line-5"]["logprobs"] is None
    content = choices["line-4"]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == visible
    assert [entry["logprob"] for entry in content] == pytest.approx(logprobs, abs=1e-5)
    assert content[0]["bytes"] == list(visible[0].encode())
    rows = {row["custom_id"]: row for row in parquet.read_table(tmp_path / "out.parquet").to_pylist()}
    for name in ("line-1", "line-4"):
        assert rows[name]["tokens"] == visible
        assert rows[name]["token_logprobs"] == pytest.approx(logprobs, abs=1e-5)
    assert rows["line-3"]["tokens"] is None


def test_a_refused_line_is_a_row_of_parquet_with_its_error(run: Run, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "1=", "max_tokens": 4}\n{"prompt": "1=", "max_tokens": 0}\n')
    for name in ("out.jsonl", "out.parquet"):
        run(source, tmp_path / name, record_invalid=True)
    lines = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    bodies = {line["custom_id"]: line["response"]["body"] for line in lines}
    good, refused = sorted(
        parquet.read_table(tmp_path / "out.parquet").to_pylist(), key=lambda row: row["status_code"]
    )
    assert (good["status_code"], good["sample"], good["error"]) == (200, 0, None)
    assert (refused["status_code"], refused["sample"], refused["text"]) == (400, None, None)
    assert "max_tokens" in refused["error"]
    assert refused["error"] == bodies[refused["custom_id"]]["error"]["message"]


def test_a_run_is_named_by_input_model_and_parameters(tmp_path: Path, golden_checkpoint: Path) -> None:
    tiny = model_digest("tiny")
    assert tiny == model_digest("tiny") != model_digest(golden_checkpoint)
    name = RunName("0" * 8, tiny, "f" * 8)
    assert parse_id(name.id(12)) == (name, 12)
    for wrong in ("", "batch_req_", name.id(1)[:-1], name.id(1) + "\n", name.id(1) + "x", "x" + name.id(1)):
        assert parse_id(wrong) is None
    copy = tmp_path / "model"
    copy.mkdir()
    for file in golden_checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert model_digest(copy) == model_digest(golden_checkpoint), "wherever it lies"
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_digest(copy) != model_digest(golden_checkpoint)
