"""Ray Data: rows in, the same rows with their texts out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from remask import LLM, InvalidRequest, SamplingParams
from remask.ray import Predictor, RemaskProcessorConfig, build_processor
from remask.ray.predictor import COLUMNS
from remask.ray.processor import _After

PARAMS = {"max_tokens": 6, "unmask": "threshold:0.9"}


@pytest.fixture(scope="module")
def predictor() -> Iterator[Predictor]:
    own = Predictor("tiny", device="cpu", max_num_rows=4096)
    yield own
    own._engine.close()


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


def test_a_refused_row_costs_no_other(predictor: Predictor) -> None:
    params = [PARAMS, {**PARAMS, "max_tokens": 100_000}, {**PARAMS, "n": 2}, PARAMS]
    rows = predictor.predict(table(prompt=["1+1=", "2+2=", "3+3=", None], sampling_params=params)).to_pylist()
    assert [row["error"] is None for row in rows] == [True, False, False, False]
    assert rows[1]["error"].startswith("max_tokens: ")
    assert rows[2]["error"].startswith("n: ")
    assert rows[3]["error"].startswith("prompt: ")
    for row in rows[1:]:
        assert {row[name] for name in COLUMNS.names if name != "error"} == {None}


def test_a_batch_of_refused_rows_has_the_schema_of_all(predictor: Predictor) -> None:
    refused, fine = (predictor.predict(table(prompt=[text])) for text in ("", "1+1="))
    assert refused.schema == fine.schema


def test_a_row_has_the_same_text_in_any_batch(predictor: Predictor) -> None:
    hot = {**PARAMS, "temperature": 1.0}
    alone = predictor.predict(table(prompt=["1+1="], sampling_params=[hot])).to_pylist()[0]
    rows = predictor.predict(table(prompt=["7+7=", "1+1=", "1+1="], sampling_params=[hot] * 3)).to_pylist()
    assert (rows[1]["seed"], rows[1]["generated_text"]) == (alone["seed"], alone["generated_text"])
    assert len({row["seed"] for row in rows}) == 3, "equal rows of a batch have seeds of their own"
    chosen = predictor.predict(table(prompt=["1+1="], sampling_params=[{**hot, "seed": 4}])).to_pylist()[0]
    assert chosen["seed"] == 4


def test_batches_come_as_columns_of_arrays_too(predictor: Predictor) -> None:
    params = np.array([PARAMS, PARAMS], dtype=object)
    batch = {"prompt": np.array(["1+1=", "2+2="], dtype=object), "sampling_params": params}
    found = predictor.predict(batch)
    assert found.equals(predictor.predict(table(prompt=["1+1=", "2+2="], sampling_params=[PARAMS] * 2)))
    ids = predictor.predict({"prompt": [[5, 6, 7], [8, 9, 10]]}).to_pylist()
    assert [row["num_input_tokens"] for row in ids] == [3, 3]


def test_chats_are_messages(predictor: Predictor, tiny_llm: LLM) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("1+1=", "22+3=")]
    rows = predictor.predict(table(messages=chats, sampling_params=[PARAMS] * 2)).to_pylist()
    expected = tiny_llm.chat(chats, PARAMS, use_tqdm=False)
    assert [row["generated_text"] for row in rows] == [own.outputs[0].text for own in expected]
    both = predictor.predict(table(messages=chats[:1], prompt=["1"])).to_pylist()
    assert both[0]["error"].startswith("prompt: give either `prompt` or `messages`")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"text": ["1+1="]}, r"prompt: is not among the columns \['text'\]"),
        ({"prompt": ["1+1="], "nfe": [3]}, "nfe: is a column that the engine adds"),
        ({"prompt": ["1+1=", "2"], "key": [1]}, "batch: columns differ in length.*prompt: 2, key: 1"),
        ([{"prompt": "1+1="}], "batch_format: use batch_format='pyarrow' or 'numpy'"),
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
    ],
)
def test_a_config_is_checked_before_anything_runs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        build_processor(RemaskProcessorConfig(**fields))


def test_a_refused_row_survives_its_postprocessing() -> None:
    after = _After(lambda row: {"answer": row["generated_text"].strip()})
    fine = {"prompt": "1", "generated_text": " 2", "error": None}
    refused = {"prompt": "", "generated_text": None, "error": "prompt: is empty"}
    assert after(fine) == {**fine, "answer": "2"}
    assert after(refused) == refused
    with pytest.raises(AttributeError):
        after({**refused, "error": None})
