"""Any OpenAI-compatible server as a target: vLLM, SGLang, LMDeploy and others."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from remask import Unavailable
from remask.benchmarks.serving.targets import MAX_CONCURRENCY, Answer, Target
from remask.benchmarks.workloads import Job

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 600.0


class ServerTarget(Target):
    """Any server with OpenAI's `/v1/completions`, streaming.

    Args:
        url: up to but without `/v1`.
        model: what its requests name; None: the first that the server lists.

    Raises:
        Unavailable: the server does not answer.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        self.name = self._url = url.rstrip("/").removesuffix("/v1")
        try:
            with urllib.request.urlopen(f"{self._url}/v1/models", timeout=CONNECT_SECONDS) as response:
                models = json.load(response)["data"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Unavailable(
                f"{self._url} does not answer as an OpenAI-compatible server: {error}"
            ) from None
        if model is None and not models:
            raise Unavailable(f"{self._url} serves no model")
        self._model = model or models[0]["id"]
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
            {"Content-Type": "application/json"},
        )
        started, first, parts, num_tokens = time.perf_counter(), None, [], None
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
                for line in response:
                    data = line.removeprefix(b"data:").strip()
                    if not data or data == b"[DONE]" or line.startswith(b":"):
                        continue
                    event = json.loads(data)
                    if event.get("usage"):
                        num_tokens = event["usage"]["completion_tokens"]
                    text = "".join(choice.get("text") or "" for choice in event.get("choices", ()))
                    if text and first is None:
                        first = time.perf_counter() - started
                    parts.append(text)
        except urllib.error.HTTPError as error:
            told = error.read(300).decode(errors="replace")
            raise Unavailable(f"status {error.code}: {told}") from None
        text = "".join(parts)
        if num_tokens is None:
            raise Unavailable(
                "the server does not tell the tokens of an answer (stream_options.include_usage)"
            )
        return Answer(text, num_tokens, first_token_seconds=first)
