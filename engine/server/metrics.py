"""Prometheus metrics of the server. Names have the suffixes of vLLM's metrics, with the prefix `remask:`.

The engine's thread counts what workers do (`heard`); the endpoints count responses.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
from time import monotonic

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from remask.engine import Progress
from remask.outputs import RequestOutput
from remask.scheduler.canvas import TOKEN
from remask.scheduler.messages import StepResult
from remask.service import EngineService

SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.3, 0.5, 0.8, 1, 1.5, 2.5, 5, 10, 20, 40, 80, 160, 640,
)  # fmt: skip
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
PER_FORWARD = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class _Watched:
    """A canvas that has run: what of it was counted, and when a block last became stable."""

    def __init__(self, arrival_time: float) -> None:
        self.since, self.num_stable = arrival_time, 0
        self.num_forwards = self.num_filled = self.num_remasked = 0


class Metrics(Collector):
    """Counts what an engine and its server do.

    Args:
        engine: the engine; its observer is this object from now on.
        model: value of the label `model_name`.
    """

    def __init__(self, engine: EngineService, model: str) -> None:
        self._engine, self._model = engine, model
        self._running: dict[str, dict[int, _Watched]] = {}  # by request and sample; the engine's thread's own
        self._registry = CollectorRegistry()
        self._registry.register(self)
        counters = {
            "prompt_tokens": "Tokens of the prompts of requests that have run.",
            "generation_tokens": "Visible tokens of responses.",
            "denoising_steps": "Forwards of canvases; a step of a batch is one of each canvas.",
            "committed_tokens": "Tokens that were committed to a slot.",
            "remasked_tokens": "Tokens that were taken back.",
            "forward_rows": "Rows that were forwarded.",
        }
        self._counters = {
            name: Counter(f"remask:{name}", text, ["model_name"], registry=self._registry).labels(model)
            for name, text in counters.items()
        }
        self._success = self._counter_of(
            "request_success", "Samples that have ended, by the reason.", "finished_reason"
        )
        self._errors = self._counter_of(
            "request_errors", "Requests that got an error, by HTTP status.", "status"
        )
        histograms = {
            "time_to_first_token_seconds": (
                "From the arrival of a sample to its first stable block.",
                SECONDS,
            ),
            "inter_token_latency_seconds": ("Time between two stable blocks, for each token.", SECONDS),
            "e2e_request_latency_seconds": ("From the arrival of a request to its end.", SECONDS),
            "request_prompt_tokens": ("Tokens of a prompt.", TOKENS),
            "request_generation_tokens": ("Visible tokens of a sample.", TOKENS),
            "request_params_n": ("Samples of a request.", TOKENS),
            "request_params_max_tokens": ("Tokens of a canvas.", TOKENS),
            "tokens_per_forward": ("Visible tokens of a sample for each of its forwards.", PER_FORWARD),
            "rows_per_step": ("Rows of a step of a batch.", TOKENS),
            "sequences_per_step": ("Canvases of a step of a batch.", TOKENS),
        }
        self._histograms = {
            name: Histogram(
                f"remask:{name}", text, ["model_name"], registry=self._registry, buckets=buckets
            ).labels(model)
            for name, (text, buckets) in histograms.items()
        }
        engine.observer = self

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The gauges, read from the engine."""
        num_running = len(self._running)
        gauges = {
            "num_requests_running": ("Requests of which a sample has run.", num_running),
            "num_requests_waiting": ("Other live requests.", max(0, self._engine.num_live - num_running)),
            "num_live_tokens": ("Tokens of the canvases of live requests.", self._engine.num_live_tokens),
            "num_workers": ("Workers that run.", self._engine.num_workers),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"remask:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge

    def heard(self, found: Sequence[Progress], result: StepResult | None) -> None:
        """Counts a burst; called by the engine's thread, so that a counter is written once a burst."""
        now, num_steps = monotonic(), 0
        gained = collections.Counter[str]()
        for progress in found:
            samples = self._running.setdefault(progress.request_id, {})
            if progress.sample not in samples:
                samples[progress.sample] = _Watched(progress.arrival_time)
            watched, num_before = samples[progress.sample], gained["denoising_steps"]
            self._count(progress, watched, now, gained)
            num_steps = max(num_steps, gained["denoising_steps"] - num_before)
            if progress.has_ended:
                del self._running[progress.request_id]
        if result is not None and num_steps:
            gained["forward_rows"] = result.num_rows
            self._histograms["rows_per_step"].observe(result.num_rows / num_steps)
            self._histograms["sequences_per_step"].observe(len(result.states))
        for name, number in gained.items():
            self._counters[name].inc(number)

    def dropped(self, request_ids: Iterable[str]) -> None:
        """Forgets requests; called by the engine's thread."""
        for request_id in request_ids:
            self._running.pop(request_id, None)

    def request_ended(self, output: RequestOutput, *, n: int, max_tokens: int) -> None:
        """Counts a request that has finished, by its whole output or the last of a stream."""
        self._counters["prompt_tokens"].inc(len(output.prompt_token_ids))
        self._histograms["request_prompt_tokens"].observe(len(output.prompt_token_ids))
        self._histograms["e2e_request_latency_seconds"].observe(output.metrics.latency)
        self._histograms["request_params_n"].observe(n)
        self._histograms["request_params_max_tokens"].observe(max_tokens)

    def sample_ended(self, num_tokens: int, tokens_per_forward: float, finish_reason: str) -> None:
        """Counts a sample that has ended."""
        self._counters["generation_tokens"].inc(num_tokens)
        self._histograms["request_generation_tokens"].observe(num_tokens)
        self._histograms["tokens_per_forward"].observe(tokens_per_forward)
        self._success.labels(model_name=self._model, finished_reason=finish_reason).inc()

    def failed(self, status: int) -> None:
        """Counts a response that is an error, or a stream that has ended with one."""
        self._errors.labels(model_name=self._model, status=str(status)).inc()

    def _count(
        self, progress: Progress, watched: _Watched, now: float, gained: collections.Counter[str]
    ) -> None:
        state = progress.state
        num_filled = int(np.count_nonzero(np.frombuffer(state.commit_steps, TOKEN)))
        num_removed = state.num_remasked - watched.num_remasked
        gained["denoising_steps"] += state.num_forwards - watched.num_forwards
        gained["remasked_tokens"] += num_removed
        gained["committed_tokens"] += num_filled - watched.num_filled + num_removed
        watched.num_forwards, watched.num_remasked = state.num_forwards, state.num_remasked
        watched.num_filled = num_filled
        if (num_new := progress.num_stable_tokens - watched.num_stable) > 0:
            if watched.num_stable == 0:
                self._histograms["time_to_first_token_seconds"].observe(now - watched.since)
            else:
                self._histograms["inter_token_latency_seconds"].observe((now - watched.since) / num_new)
            watched.since, watched.num_stable = now, progress.num_stable_tokens

    def _counter_of(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"remask:{name}", text, ["model_name", label], registry=self._registry)
