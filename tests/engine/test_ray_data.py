"""Ray Data: rows in, the same rows with their texts out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from remask import LLM, InvalidRequest, SamplingParams
from remask.ray import Predictor, RemaskProcessorConfig, build_processor
from remask.ray.files import FilesSummary, counted
from remask.ray.predictor import COLUMNS
from remask.ray.processor import _After, _typed

PARAMS = {"max_tokens": 6, "unmask": "threshold:0.9"}


@pytest.fixture(scope="module")
def predictor() -> Iterator[Predictor]:
    own = Predictor("tiny", device="cpu", max_num_rows=4096)
    yield own
    own.close()


def table(**columns: Any) -> pa.Table:
    return pa.table(columns)


def test_rows_keep_their_columns_and_get_the_engines(predictor: Predictor, tiny_llm: LLM) -> None:
    prompts = ["1+1=", "12+30=", "5+5="]
    batch = table(key=["a", "b", "c"], prompt=prompts, sampling_params=[PARAMS] * 3)
    found = predictor.predict(batch)
    assert found.schema == pa.schema([*batch.schema, *COLUMNS])
    assert found.column("key").to_pylist() == ["a", "b", "c"]
    expected = [o.outputs[0] for o in tiny_llm.generate(prompts, SamplingParams(**PARAMS), use_tqdm=False)]
    for row, own in zip(found.to_pylist(), expected, strict=True):
        assert row["generated_text"] == own.text
        assert row["generated_tokens"] == own.token_ids
        assert (row["num_generated_tokens"], row["nfe"]) == (len(own.token_ids), own.nfe)
        assert row["error"] is None


def test_rows_set_what_defaults_do_not(tiny_llm: LLM) -> None:
    defaults = {"max_tokens": 6, "preset": "wino", "seed": 3}
    own = Predictor("tiny", device="cpu", max_num_rows=4096, sampling_defaults=defaults)
    params = [{"max_tokens": 3, "block_length": None}, {"max_tokens": None, "block_length": 2}]
    rows = own.predict(table(prompt=["1+1="] * 2, sampling_params=params)).to_pylist()
    own.close()
    for row, fields in zip(rows, ({"max_tokens": 3}, {"block_length": 2}), strict=True):
        expected = tiny_llm.generate("1+1=", {**defaults, **fields})[0].outputs[0]
        assert (row["generated_text"], row["nfe"], row["seed"]) == (expected.text, expected.nfe, 3)


def test_errors_of_json_lines_are_counted_wherever_they_stand(tmp_path: Path) -> None:
    assert counted(tmp_path / "none", is_parquet=False) == FilesSummary(0, 0)
    rows = [{"id": 1, "error": None}] * 3
    for name, more in (("a", []), ("b", [{"id": 4, "error": "prompt: is empty"}])):
        lines = [json.dumps(row) for row in [*rows, *more]]
        (tmp_path / f"{name}.json").write_text("\n".join(lines) + "\n")
    assert counted(tmp_path, is_parquet=False) == FilesSummary(7, 1)


def test_a_refused_row_costs_no_other(predictor: Predictor) -> None:
    wrong = [{"max_tokens": 100_000}, {"n": 2}, {"max_tokens": 6.5}, {"logprobs": 1}, {"trace": True}]
    params = [PARAMS, *({**PARAMS, **own} for own in wrong), PARAMS]
    prompts = ["1+1="] * 6 + [None]
    rows = predictor.predict(table(prompt=prompts, sampling_params=params)).to_pylist()
    names = [(row["error"] or "").partition(":")[0] for row in rows]
    assert names == ["", "max_tokens", "n", "max_tokens", "logprobs", "trace", "prompt"]
    for row in rows[1:]:
        assert {row[name] for name in COLUMNS.names if name != "error"} == {None}


def test_a_batch_of_refused_rows_has_the_schema_of_all(predictor: Predictor) -> None:
    refused, fine = (predictor.predict(table(prompt=[text])) for text in ("", "1+1="))
    assert refused.schema == fine.schema


def test_a_full_queue_is_waited_for(tiny_llm: LLM) -> None:
    own = Predictor("tiny", device="cpu", max_num_rows=4096, max_queued_requests=3)
    with ThreadPoolExecutor(4) as pool:
        batches = [table(prompt=[f"{i}+{k}=" for k in range(3)]) for i in range(4)]
        found = list(pool.map(own.predict, batches))
    assert [batch.column("error").null_count for batch in found] == [3] * 4
    with pytest.raises(InvalidRequest, match="max_queued_requests; a call may have at most 3"):
        own.predict(table(prompt=["1+1="] * 50))
    own.close()


def test_a_row_has_the_same_text_in_any_batch(predictor: Predictor) -> None:
    hot = {**PARAMS, "temperature": 1.0}
    alone = predictor.predict(table(prompt=["1+1="], sampling_params=[hot])).to_pylist()[0]
    rows = predictor.predict(table(prompt=["7+7=", "1+1=", "1+1="], sampling_params=[hot] * 3)).to_pylist()
    assert (rows[1]["seed"], rows[1]["generated_text"]) == (alone["seed"], alone["generated_text"])
    assert len({row["seed"] for row in rows}) == 3, "equal rows of a batch have seeds of their own"
    pictures = [np.zeros(2000), np.zeros(2000)]
    pictures[1][1000] = 1.0
    seeds = [
        predictor.predict({"prompt": ["1+1="], "picture": [own], "sampling_params": [hot]})["seed"][0]
        for own in pictures
    ]
    assert seeds[0] != seeds[1], "long arrays count to their last number"
    chosen = predictor.predict(table(prompt=["1+1="], sampling_params=[{**hot, "seed": 4}])).to_pylist()[0]
    assert chosen["seed"] == 4


def test_batches_come_as_columns_of_arrays_too(predictor: Predictor) -> None:
    params = np.array([PARAMS, PARAMS], dtype=object)
    batch = {"prompt": np.array(["1+1=", "2+2="], dtype=object), "sampling_params": params}
    batch["key"] = np.array(["2026-01-01", "2026-01-02"], dtype="datetime64[D]")
    found = predictor.predict(batch)
    assert found["key"] is batch["key"]
    typed = predictor.predict(table(prompt=["1+1=", "2+2="], sampling_params=[PARAMS] * 2))
    assert found["generated_text"].tolist() == typed.column("generated_text").to_pylist()
    mixed = {
        "prompt": [[5, 6, 7], "1+1=", 7],
        "sampling_params": [PARAMS, {"unmask": {"type": "threshold"}}, None],
    }
    found = predictor.predict(mixed)
    assert found["num_input_tokens"].tolist() == [3, 4, None]
    assert found["error"][2].startswith("prompt: ")


def test_chats_are_messages(predictor: Predictor, tiny_llm: LLM) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("1+1=", "22+3=")]
    rows = predictor.predict(table(messages=chats, sampling_params=[PARAMS] * 2)).to_pylist()
    expected = tiny_llm.chat(chats, PARAMS, use_tqdm=False)
    assert [row["generated_text"] for row in rows] == [own.outputs[0].text for own in expected]
    parts = [{"type": "text", "text": "1+1=", "url": None}]
    asked = {"messages": [[{"role": "user", "content": parts}]], "sampling_params": [PARAMS]}
    assert predictor.predict(asked)["generated_text"][0] == rows[0]["generated_text"]
    both = predictor.predict(
        {"messages": [chats[0], 5], "prompt": ["7", "7"], "sampling_params": [PARAMS] * 2}
    )
    assert both["generated_text"][0] == rows[0]["generated_text"], "as in Ray, a chat comes first"
    assert both["error"][1].startswith("messages: ")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"text": ["1+1="]}, r"prompt: is not among the columns \['text'\]"),
        ({"prompt": ["1+1="], "nfe": [3]}, "nfe: is a column that the engine adds"),
        ({"prompt": ["1+1=", "2"], "key": [1]}, "batch: columns differ in length.*prompt: 2, key: 1"),
        ([{"prompt": "1+1="}], "batch_format: use 'pyarrow' or 'numpy'"),
    ],
)
def test_other_batches_are_refused_by_name(predictor: Predictor, batch: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        predictor.predict(batch)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "model: is missing"),
        ({"model": "tiny", "model_source": "tiny"}, "model: is given by model and by model_source"),
        ({"model": "tiny", "engine_kwargs": {"model": "tiny"}}, r"model: .* engine_kwargs\['model'\]; keep"),
        ({"model": "tiny", "engine_kwargs": {"max_seqs": 3}}, "engine_kwargs: .*'max_seqs'; did you"),
        ({"model": "tiny", "engine_kwargs": {"burst": 0}}, "burst: "),
        ({"model": "tiny", "batch_size": 0}, "batch_size: "),
        ({"model": "tiny", "concurrency": "two"}, "concurrency: "),
        ({"model": "tiny", "concurrency": (3, 2)}, "concurrency: give a number of actors, or"),
        ({"model": "tiny", "tokenize": "no"}, "tokenize: "),
        ({"model": "tiny", "has_image": True}, "has_image: is not supported: there are no images"),
        ({"model": "tiny", "prepare_image_stage": True}, "prepare_image_stage: is not supported"),
    ],
)
def test_a_config_is_checked_before_anything_runs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        build_processor(RemaskProcessorConfig(**fields))


def test_the_flags_of_vllms_stages_change_nothing() -> None:
    flags = dict.fromkeys(["apply_chat_template", "tokenize", "detokenize", "has_image"], False)
    found = build_processor(RemaskProcessorConfig(model="tiny", **flags))
    assert found._actors() == build_processor(RemaskProcessorConfig(model="tiny"))._actors()


def test_a_refused_row_survives_its_postprocessing() -> None:
    after = _After(lambda row: {"answer": row["generated_text"].strip()})
    fine = {"prompt": "1", "generated_text": " 2", "error": None}
    refused = {"prompt": "", "generated_text": None, "error": "prompt: is empty"}
    assert after(fine) == {**fine, "answer": "2"}
    assert after(refused) == refused
    with pytest.raises(AttributeError):
        after({**refused, "error": None})
    with pytest.raises(InvalidRequest, match="postprocess: is the engine's column"):
        _After(lambda _: {"error": ""})(fine)


def test_columns_of_nulls_keep_their_types() -> None:
    rows = pa.Table.from_pylist(
        [{"key": 1, "nfe": None, "error": "no"}, {"key": 2, "nfe": None, "error": "no"}]
    )
    found = _typed(rows)
    assert found.schema.field("nfe").type == pa.int64()
    assert found.to_pylist() == rows.to_pylist()
    fine = pa.Table.from_pylist([{"generated_text": "1", "nfe": 3, "error": None}])
    assert _typed(fine).schema.field("error").type == pa.string()


def test_a_models_path_is_the_callers() -> None:
    (model,) = build_processor(RemaskProcessorConfig(model=Path("models/own")))._actors()[
        "fn_constructor_args"
    ]
    assert model == str(Path.cwd() / "models/own")
    (model,) = build_processor(RemaskProcessorConfig(model_source="tiny"))._actors()["fn_constructor_args"]
    assert model == "tiny"
