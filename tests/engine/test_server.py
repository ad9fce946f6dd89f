"""The endpoints of `remask serve`: what they answer, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from served import Running, joined, running

from remask import AsyncLLM

SUDOKU = "12..34..2.4.43.1="
HARD = "513264.26..12.1..33...2.1.25......1.="
REMASKS = {
    "max_tokens": 36, "block_length": 36, "seed": 5, "unmask": "capped_threshold:0.4", "remask": "wino:0.95",
    "temperature": 1.5,
}  # fmt: skip
ASKED = [{"role": "user", "content": "1+2="}]
ASK: dict[str, Any] = {"max_tokens": 16, "block_length": 8, "seed": 5}
POLICIES: list[dict[str, Any]] = [
    {"unmask": "schedule"},
    {"unmask": "capped_threshold:0.7", "remask": "wino", "temperature": 1.0, "n": 3},
    {"unmask": {"type": "threshold", "t": 0.6}, "remask": "low_prob:0.6,max_times=2", "temperature": 1.5},
    {"preset": "fast-dllm", "stop": ["34", "21"], "temperature": 1.2, "n": 2},
    {"unmask": "bernoulli", "temperature": 1.0, "logprobs": 1},
]


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    own = AsyncLLM("tiny", device="cpu", max_num_rows=512, max_prompts_per_call=4, max_n=8)
    yield own
    own.close()


@pytest.fixture(scope="module")
def server(llm: AsyncLLM) -> Iterator[Running]:
    with running(llm) as own:
        yield own


def test_a_completion_has_the_engines_output_in_openais_form(server: Running) -> None:
    response = server.post("/v1/completions", prompt=SUDOKU, model="tiny", **ASK)
    body = response.json()
    assert response.headers["x-request-id"] == body["id"].removeprefix("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    (choice,) = body["choices"]
    assert choice["text"] == "1234341221434321"
    assert choice["finish_reason"] == "length"
    assert choice["seed"] == 5
    assert choice["nfe"] * choice["tokens_per_forward"] == 16
    assert body["usage"] == {"prompt_tokens": 17, "completion_tokens": 16, "total_tokens": 33}


def test_several_prompts_have_their_samples_one_after_another(server: Running) -> None:
    fields = {**ASK, "temperature": 1.5, "n": 2}
    prompts = [SUDOKU, "1+2=", [19, 13, 20, 31]]
    together = server.answer(prompt=prompts, **fields)
    assert [choice["index"] for choice in together["choices"]] == list(range(6))
    texts = [choice["text"] for choice in together["choices"]]
    alone = [server.answer(prompt=prompt, **fields) for prompt in prompts]
    assert texts == [choice["text"] for own in alone for choice in own["choices"]]
    assert together["usage"]["prompt_tokens"] == sum(own["usage"]["prompt_tokens"] for own in alone)
    events = server.events(prompt=prompts, stream_options={"include_usage": True}, **fields)
    assert joined(events) == dict(enumerate(texts))
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == together["usage"]
    assert {event["usage"] for event in events[:-1]} == {None}
    events = server.events(prompt=prompts, stream_options={"continuous_usage_stats": True}, **fields)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == together["usage"]["completion_tokens"]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.get("unmask") or policy["preset"])
def test_a_stream_joined_is_the_response(server: Running, policy: dict[str, Any]) -> None:
    whole = server.answer(prompt=SUDOKU, **ASK, **policy)
    events = server.events(prompt=SUDOKU, **ASK, **policy)
    assert joined(events) == {choice["index"]: choice["text"] for choice in whole["choices"]}
    last = {
        choice["index"]: choice
        for event in events
        for choice in event["choices"]
        if choice["finish_reason"] is not None
    }
    for choice in whole["choices"]:
        figures = ("finish_reason", "stop_reason", "completion_tokens", "nfe", "tokens_per_forward", "seed")
        assert {name: last[choice["index"]][name] for name in figures} == {
            name: choice[name] for name in figures
        }
    if "logprobs" in policy:
        parts = [event["choices"][0]["logprobs"] for event in events]
        for name in ("tokens", "token_logprobs", "text_offset"):
            assert [own for part in parts for own in part[name]] == whole["choices"][0]["logprobs"][name]


def test_a_stream_of_a_chat_has_deltas_and_tells_the_role_once(server: Running) -> None:
    fields = {"messages": [{"role": "user", "content": "1+2="}], "logprobs": True, **ASK}
    body = server.post("/v1/chat/completions", **fields).json()
    events = server.events("/v1/chat/completions", **fields)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert joined(events) == {0: body["choices"][0]["message"]["content"]}
    roles = [event["choices"][0]["delta"].get("role") for event in events]
    assert roles == ["assistant"] + [None] * (len(events) - 1)
    content = [own for event in events for own in event["choices"][0]["logprobs"]["content"]]
    assert content == body["choices"][0]["logprobs"]["content"]


def test_canvas_events_rebuild_the_text(server: Running) -> None:
    events = server.events(prompt=HARD, stream_options={"canvas": True}, **REMASKS)
    slots: dict[int, str] = {}
    num_removed = 0
    for event in events:
        canvas = event["choices"][0]["canvas"]
        assert (canvas["length"], canvas["block_length"]) == (36, 36)
        for own in canvas["events"]:
            if own["is_commit"]:
                slots[own["position"]] = own["text"]
            else:
                assert slots.pop(own["position"]) == own["text"]
                num_removed += 1
    assert num_removed
    (text,) = joined(events).values()
    assert "".join(slots[position] for position in sorted(slots))[: len(text)] == text
    assert events[-1]["choices"][0]["canvas"]["nfe"] == events[-1]["choices"][0]["nfe"]


def test_echo_puts_the_prompt_before_the_text(server: Running) -> None:
    whole = server.answer(prompt="1+2=", echo=True, **ASK)["choices"][0]["text"]
    assert whole.startswith("1+2=")
    assert joined(server.events(prompt="1+2=", echo=True, **ASK)) == {0: whole}


@pytest.mark.parametrize(
    ("body", "parameter", "text"),
    [
        ({"prompt": "a", "top_q": 1}, "top_q", "did you mean 'top_p'"),
        ({"prompt": "a", "temperature": -1}, "temperature", ""),
        ({"prompt": "a", "unmask": "thresold:0.9"}, "unmask", "did you mean"),
        ({"prompt": "a", "best_of": 2}, "best_of", "is not supported"),
        ({"prompt": "a", "min_tokens": 1}, "min_tokens", "is not supported; leave it out"),
        ({"prompt": "a", "logprobs": 5}, "logprobs", "alternatives of a committed token are not known"),
        ({"prompt": [9999]}, "prompt", "is outside the vocabulary"),
        ({"prompt": "a", "trace": True}, "trace", "is not supported"),
        ({"prompt": ["a", ""]}, "prompt", "prompt 1: prompt: is empty; give at least one token (got '')"),
        ({"prompt": ["a", {"a": 1}]}, "prompt", "must be text"),
        ({"prompt": ["a"] * 5}, "prompt", "use at most 4"),
        ({"prompt": ["a", "b"], "max_tokens": 600}, "max_tokens", "prompt 0: max_tokens: prompt of 1 tokens"),
        ({"prompt": "a", "n": 9, "temperature": 1}, "n", "use at most 8"),
        ({"prompt": "a", "preset": "/etc/passwd"}, "preset", "is no published preset"),
        ({"prompt": "a", "stream": "yes"}, "stream", "true or false"),
        ({"prompt": "a", "stream_options": {}}, "stream_options", "set stream to true"),
        ({"prompt": "a", "stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "known"),
        ({}, "prompt", "is missing"),
    ],
)
def test_an_invalid_body_is_refused_by_the_parameter(
    server: Running, body: dict[str, Any], parameter: str, text: str
) -> None:
    response = server.post("/v1/completions", **body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", parameter)
    assert text in error["message"]


def test_what_is_no_json_or_another_model_is_refused(server: Running) -> None:
    json_type = {"content-type": "application/json"}
    response = server.client.post("/v1/completions", content=b'{"prompt": ', headers=json_type)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "body"
    assert response.json()["error"]["message"].endswith("(got '{\"prompt\": ')")
    assert server.post("/v1/completions", prompt="a", model="gpt-4o").status_code == 404
    response = server.post("/v1/chat/completions", messages=[], model="gpt-4o")
    assert response.json()["error"]["code"] == "model_not_found"
    assert server.client.get("/v1/models/gpt-4o").status_code == 404
    response = server.client.get("/v2")
    assert response.status_code == 404
    assert "no endpoint '/v2'" in response.json()["error"]["message"]
    response = server.client.get("/v1/completions")
    assert response.status_code == 405
    assert "does not take GET; use OPTIONS or POST" in response.json()["error"]["message"]


def test_an_error_has_the_bodys_name_of_a_parameter(server: Running) -> None:
    for path, body in (("completions", {"prompt": "1+2="}), ("chat/completions", {"messages": ASKED})):
        for name in ("max_tokens", "max_completion_tokens"):
            if (path, name) == ("completions", "max_completion_tokens"):
                continue  # a chat's alone
            response = server.post(f"/v1/{path}", **body, **{name: 600})
            assert response.json()["error"]["param"] == name
            assert response.json()["error"]["message"].startswith(f"{name}: prompt of ")


def test_a_reported_seed_repeats_all_samples_and_survives_a_double(server: Running) -> None:
    fields = {"prompt": HARD, "max_tokens": 36, "temperature": 1.5, "n": 3}
    first = server.answer(**fields)
    seeds = {choice["seed"] for choice in first["choices"]}
    assert len(seeds) == 1
    assert all(int(float(seed)) == seed for seed in seeds)
    again = server.answer(**fields, seed=seeds.pop())
    assert [own["text"] for own in again["choices"]] == [own["text"] for own in first["choices"]]


def test_models_and_tokens(server: Running) -> None:
    (own,) = server.client.get("/v1/models").json()["data"]
    assert (own["id"], own["owned_by"], own["max_model_len"]) == ("tiny", "remask", 512)
    assert server.client.get("/v1/models/tiny").json() == own
    ids = server.post("/tokenize", prompt="1+2=").json()
    assert ids == {"count": 4, "max_model_len": 512, "tokens": [19, 13, 20, 31], "token_strs": None}
    asked = {"prompt": "1+2=", "return_token_strs": True, "add_special_tokens": True}
    assert server.post("/tokenize", **asked).json() == {**ids, "token_strs": ["1", "+", "2", "="]}
    assert server.post("/detokenize", tokens=ids["tokens"]).json() == {"prompt": "1+2="}
    neutral = {"add_generation_prompt": True, "continue_final_message": False, "tools": None}
    chat = server.post("/tokenize", messages=ASKED, **neutral).json()
    assert "1+2=" in server.post("/detokenize", tokens=chat["tokens"]).json()["prompt"]
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"prompt": "a", "messages": []}),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}),
        ("/tokenize", {"prompt": "a", "user": "me"}),
        ("/tokenize", {"messages": ASKED, "add_special_tokens": True}),
        ("/tokenize", {"messages": ASKED, "chat_template": "{{ messages }}"}),
        ("/tokenize", {"messages": ASKED, "add_generation_prompt": False}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/detokenize", {"ids": [1]}),
    ):
        assert server.post(path, **body).status_code == 400, (path, body)


def test_health_version_and_description(server: Running) -> None:
    for path in ("/health", "/ready", "/version", "/openapi.json"):
        assert server.client.get(path).status_code == 200
    description = server.client.get("/openapi.json").json()
    body = description["components"]["schemas"]["CompletionBody"]["properties"]
    assert {"prompt", "unmask", "remask", "stream", "preset", "max_tokens"} <= body.keys()
    assert "wino" in body["preset"]["enum"]
    page = server.client.get("/")
    assert "sha256-" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]


def test_metrics_count_what_ran(server: Running) -> None:
    def read() -> dict[str, float]:
        lines = server.client.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name.replace('{model_name="tiny"}', ""): float(value) for name, value in pairs}

    before = read()
    events = server.events(prompt=HARD, stream_options={"canvas": True}, **REMASKS)
    canvas = [own for event in events for own in event["choices"][0]["canvas"]["events"]]
    last = events[-1]["choices"][0]
    after = read()
    gained = {name: after[name] - before.get(name, 0) for name in after}
    assert gained["remask:denoising_steps_total"] == last["nfe"]
    assert gained["remask:committed_tokens_total"] == sum(own["is_commit"] for own in canvas)
    assert gained["remask:remasked_tokens_total"] == sum(not own["is_commit"] for own in canvas) > 0
    assert gained["remask:generation_tokens_total"] == last["completion_tokens"]
    assert gained["remask:prompt_tokens_total"] == 37
    assert gained["remask:e2e_request_latency_seconds_count"] == 1
    assert gained["remask:time_to_first_token_seconds_count"] == 1
    assert gained["remask:rows_per_step_count"] > 0
    server.client.get("/nowhere")
    server.post("/v1/completions", prompt="a", top_q=1)
    errors = {name: number for name, number in read().items() if "request_errors_total" in name}
    for status in (400, 404):
        name = f'remask:request_errors_total{{model_name="tiny",status="{status}"}}'
        assert errors[name] == after.get(name, 0) + 1
    assert after["remask:num_requests_running"] == after["remask:num_requests_waiting"] == 0
