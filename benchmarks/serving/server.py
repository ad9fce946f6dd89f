"""Any OpenAI-compatible server as a target: vLLM, SGLang, LMDeploy and others."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

from remask import Unavailable
from remask.benchmarks.serving.targets import MAX_CONCURRENCY, Answer, Target
from remask.benchmarks.workloads import Job
from remask.scheduler.errors import shown

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 600.0
MAX_ERROR_BYTES = 300  # bytes of an error's body


class ServerTarget(Target):
    """Any server with OpenAI's `/v1/completions`, streaming.

    Args:
        url: up to but without `/v1`.
        model: what its requests name; None: the first that the server lists.
        api_key: sent with every request as `Authorization: Bearer KEY`; None: there is none.

    Raises:
        Unavailable: the server does not answer.
    """

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None) -> None:
        self.name = self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        listing = urllib.request.Request(f"{self._url}/v1/models", headers=self._headers)
        try:
            with urllib.request.urlopen(listing, timeout=CONNECT_SECONDS) as response:
                models = [each["id"] for each in json.load(response)["data"]]
        except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
            raise Unavailable(
                f"{self._url} does not answer as an OpenAI-compatible server: {error}"
            ) from None
        if model is None and not models:
            raise Unavailable(f"{self._url} serves no model")
        self._model = model or models[0]
        self._threads = ThreadPoolExecutor(MAX_CONCURRENCY)  # made as they are needed

    async def answer(self, job: Job) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, job)

    async def __aexit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False)

    def _ask(self, job: Job) -> Answer:
        body = {
            "model": self._model,
            "prompt": job.prompt if job.text is None else job.text,
            "max_tokens": job.params.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        request = urllib.request.Request(
            f"{self._url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", **self._headers},
        )
        started = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
                return read_answer(response, started)
        except urllib.error.HTTPError as error:
            body = error.read(MAX_ERROR_BYTES).decode(errors="replace")
            raise Unavailable(f"status {error.code}: {body}") from None


def read_answer(lines: Iterable[bytes], started: float) -> Answer:
    """An answer from an event stream of completions; nothing behind `[DONE]` is read.

    Args:
        lines: of the stream, with their ends.
        started: when the request was sent, on `time.perf_counter`.

    Raises:
        Unavailable: the server reports an error, breaks off, or does not tell the number of tokens.
    """
    first, parts, num_tokens, ended, num_events = None, [], None, False, 0
    for data in events(lines):
        if data == "[DONE]":
            ended = True
            break
        num_events += 1
        event = _object(data)
        if event.get("error") or event.get("object") == "error":
            raise Unavailable(f"the server reports: {shown(event.get('error') or event)}")
        usage, choices = event.get("usage"), event.get("choices")
        if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
            num_tokens = usage["completion_tokens"]
        choices = [each for each in choices if isinstance(each, dict)] if isinstance(choices, list) else []
        ended = ended or any(choice.get("finish_reason") for choice in choices)
        text = "".join(text for choice in choices if isinstance(text := choice.get("text"), str))
        if text and first is None:
            first = time.perf_counter() - started
        parts.append(text)
    if not ended:
        what = "ended before [DONE]" if num_events else "is no event stream"
        raise Unavailable(f"the server's answer {what}")
    if num_tokens is None:
        raise Unavailable("the server does not tell the tokens of an answer (stream_options.include_usage)")
    return Answer("".join(parts), num_tokens, first_token_seconds=first)


def events(lines: Iterable[bytes]) -> Iterator[str]:
    """The data of each event of a stream of server-sent events; events without data are left out.

    A blank line ends an event; newlines join its lines of data. Comments and other fields mean nothing here.
    `[DONE]` does not wait for its blank line: some servers send none and leave the connection open.
    """
    data: list[str] = []
    for text in _lines(lines):
        name, _, value = text.partition(":")
        if name == "data":
            data.append(value.removeprefix(" "))
        if (not text or data == ["[DONE]"]) and any(data):
            yield "\n".join(data)
            data.clear()
    if any(data):
        yield "\n".join(data)


def _lines(lines: Iterable[bytes]) -> Iterator[str]:
    r"""Splits lines that end with "\n" further at "\r\n" and "\r"."""
    for number, line in enumerate(lines):
        text = line.decode("utf-8-sig" if number == 0 else "utf-8", errors="replace")
        yield from text.removesuffix("\n").removesuffix("\r").split("\r")


def _object(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise Unavailable(f"the server sent an event that is no JSON object: {shown(data)}")
    return event
