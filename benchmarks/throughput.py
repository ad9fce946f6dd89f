"""Offline throughput: the engine against two baselines over the same weights, at equal tokens.

    remask bench throughput --output benchmarks/results/throughput.json

The *plain loop* serves one request at a time, the *static batch* sixteen, padded on the left; both compute
what the published code computes (`plain_loop`, `static_batch`). All decoders run in turn in every repetition
and ratios are taken within it, so that a machine with other work slows down both sides. The baselines run in
the first dtype, the engine in each, exactly and with reused keys, whose tokens may differ; every result is
compared with the first baseline's, token by token.

Keys are vLLM's where it has them: `total_num_tokens` and `tokens_per_second` count prompts and visible
tokens; generated tokens and forwards are reported beside them.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import msgspec
from rich.table import Table

from remask import LLM, InvalidRequest
from remask.benchmarks import plain_loop, static_batch
from remask.benchmarks.environment import Steadiness, environment_stamp, unfinished
from remask.benchmarks.plain_canvas import Decoded
from remask.benchmarks.utilization import NOT_COUNTED, Work, gemm_rate
from remask.benchmarks.workloads import Job, workload
from remask.embedded import is_embedded
from remask.workers.models.denoiser import TransformerDenoiser, load_denoiser

Dtype = Literal["float32", "bfloat16"]
Keep = Callable[[dict[str, Any]], None]
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


@dataclass
class Decoder:
    """One way to serve the workload.

    Attributes:
        run: serves jobs.
        model: whose matrix rate its work is compared with; None for the baselines.
        written: what the last repetition wrote.
        work: what the last repetition forwarded.
        seconds, rates: of each repetition; no rates where the work was not counted.
    """

    run: Callable[[Sequence[Job]], list[Decoded]]
    model: TransformerDenoiser | None = None
    written: list[Decoded] = field(default_factory=list)
    work: Work = field(default_factory=Work)
    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def repeat(self, jobs: Sequence[Job]) -> None:
        """Runs one repetition and measures the matrix rate directly after it."""
        with Work() as work:
            started = time.perf_counter()
            self.written = self.run(jobs)
            self.seconds.append(time.perf_counter() - started)
        if self.model is not None and work.packs:
            self.rates.append(gemm_rate(self.model.model, work.sampled_packs()))
        self.work = work

    def figures(self, jobs: Sequence[Job], stop_ids: Sequence[int], tokenizer: Any) -> dict[str, Any]:
        """Visible tokens and forwards of the last repetition, the used share of the matrix rate in all
        repetitions, and the share of correct answers if all jobs have a puzzle."""
        visible = [_visible(decoded.token_ids, stop_ids) for decoded in self.written]
        num_visible, nfe = sum(map(len, visible)), sum(decoded.nfe for decoded in self.written)
        found: dict[str, Any] = {
            "visible_tokens": num_visible,
            "nfe": nfe,
            "tokens_per_forward": round(num_visible / nfe, 3),
            **self.work.rows(),
        }
        if self.rates:
            pairs = zip(self.seconds, self.rates, strict=True)
            found |= {
                "needed_gflop": round(self.work.flops / 1e9, 2),
                "gemm_gflop_per_second": [round(rate / 1e9, 2) for rate in self.rates],
                "gemm_utilization": spread([self.work.flops / (s * rate) for s, rate in pairs]),
            }
        if all(job.puzzle is not None for job in jobs):
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in visible]
            right = [
                job.puzzle is not None and job.puzzle.is_correct(job.text or "", text)
                for job, text in zip(jobs, texts, strict=True)
            ]
            found["solved"] = round(statistics.mean(right), 4)
        return found


def find_model(name: str) -> tuple[Path, Literal["auto", "dummy"]]:
    """The directory of an embedded shape, of the embedded model or of a checkpoint, and how it is loaded."""
    shape, tiny = Path(str(files("remask.benchmarks"))) / "models" / name, Path(str(files("remask"))) / "tiny"
    directory = tiny if is_embedded(name) else shape if (shape / "config.json").is_file() else Path(name)
    return directory, "auto" if any(directory.glob("*.safetensors")) else "dummy"


def check_arguments(num_requests: int, repetitions: int, dtypes: Sequence[str]) -> None:
    """Raises InvalidRequest if a number or the dtype is invalid."""
    for name, value in (("num_requests", num_requests), ("repetitions", repetitions)):
        if value < 1:
            raise InvalidRequest(name, value, "must be at least 1")
    for dtype in dtypes:
        if dtype not in get_args(Dtype):
            raise InvalidRequest("dtype", dtype, f"use one of {', '.join(get_args(Dtype))}")


def measure(
    model: str,
    workload_name: str,
    num_requests: int,
    repetitions: int,
    dtypes: Sequence[Dtype],
    keep: Keep = lambda _: None,
    options: Mapping[str, Any] = NO_OPTIONS,
) -> dict[str, Any]:
    """The report: environment, arguments and the figures of each decoder; `keep` gets it after every
    repetition, so that an interrupted run loses one. `options` are more options of the engine.

    Raises:
        InvalidRequest: an argument cannot be, or the model cannot be loaded or does not fit the workload.
    """
    check_arguments(num_requests, repetitions, dtypes)
    if len(dtypes) > 1 and options.get("distributed_executor_backend") == "ray":
        problem = "the engines of all dtypes run at once, and on Ray they would share the workers; give one"
        raise InvalidRequest("dtype", list(dtypes), problem)
    with ExitStack() as engines:
        environment = environment_stamp()  # taken first: the files may change meanwhile
        directory, load_format = find_model(model)
        decoders: dict[str, Decoder] = {}
        jobs: list[Job] = []
        for dtype in dtypes:
            llm = engines.enter_context(LLM(directory, dtype=dtype, load_format=load_format, **options))
            denoiser = load_denoiser(directory, dtype=dtype, load_format=load_format)
            if not jobs:
                jobs = workload(workload_name, llm.tokenizer, denoiser.config, num_requests)
                decoders[f"plain loop, {dtype}"] = Decoder(plain_loop_decoder(denoiser))
                decoders[f"static batch, {dtype}"] = Decoder(static_batch_decoder(denoiser))
            decoders[f"engine, {dtype}"] = Decoder(engine_decoder(llm), denoiser)
            decoders[f"engine, {dtype}, reuse=both"] = Decoder(engine_decoder(llm, reuse="both"), denoiser)
        for decoder in decoders.values():
            decoder.run(jobs[:1])  # what a first forward sets up stays out of the times
        steadiness = Steadiness()
        for done in range(1, repetitions + 1):
            for decoder in decoders.values():
                decoder.repeat(jobs)
            steadiness.look()
            counted = [] if all(d.rates for d in decoders.values() if d.model is not None) else [NOT_COUNTED]
            content = {
                "benchmark": "throughput",
                "environment": environment,
                "model": model,
                "engine_options": dict(options),
                "attention_backend": denoiser.attention.name,
                "num_parameters": sum(parameter.numel() for parameter in denoiser.model.parameters()),
                "workload": workload_name,
                "num_requests": num_requests,
                "repetitions": done,
                "notes": [*unfinished(done, repetitions, "repetitions"), *counted, *steadiness.notes()],
                "results": _results(decoders, jobs, denoiser.config.eos_ids, llm.tokenizer),
            }
            keep(content)
        return content


def plain_loop_decoder(model: TransformerDenoiser) -> Callable[[Sequence[Job]], list[Decoded]]:
    return lambda jobs: [plain_loop.decode(model, job.prompt, job.params) for job in jobs]


def static_batch_decoder(model: TransformerDenoiser) -> Callable[[Sequence[Job]], list[Decoded]]:
    return lambda jobs: static_batch.decode(model, [(job.prompt, job.params) for job in jobs])


def engine_decoder(llm: LLM, **fields: Any) -> Callable[[Sequence[Job]], list[Decoded]]:
    """The engine, on jobs with other values of some parameters."""

    def run(jobs: Sequence[Job]) -> list[Decoded]:
        params = [msgspec.structs.replace(job.params, **fields) for job in jobs]
        outputs = llm.generate([job.prompt for job in jobs], params, use_tqdm=False)
        return [Decoded(output.outputs[0].token_ids, output.outputs[0].nfe) for output in outputs]

    return run


def _results(
    decoders: dict[str, Decoder], jobs: Sequence[Job], stop_ids: Sequence[int], tokenizer: Any
) -> dict[str, Any]:
    """The figures of each decoder, rounded."""
    baselines = [decoder for decoder in decoders.values() if decoder.model is None]
    reference, best = (
        baselines[0].written,
        [min(times) for times in zip(*(b.seconds for b in baselines), strict=True)],
    )
    results = {}
    for name, decoder in decoders.items():
        elapsed, written = statistics.median(decoder.seconds), decoder.figures(jobs, stop_ids, tokenizer)
        total = written["visible_tokens"] + sum(len(job.prompt) for job in jobs)
        equal = [ours == theirs for ours, theirs in zip(decoder.written, reference, strict=True)]
        results[name] = {
            "elapsed_time": round(elapsed, 4),
            "num_requests": len(jobs),
            "total_num_tokens": total,
            "requests_per_second": round(len(jobs) / elapsed, 4),
            "tokens_per_second": round(total / elapsed, 2),
            "visible_tokens_per_second": round(written["visible_tokens"] / elapsed, 2),
            "equal_requests": sum(equal),
            "seconds": [round(seconds, 4) for seconds in decoder.seconds],
            "times_as_fast": spread([a / b for a, b in zip(best, decoder.seconds, strict=True)]),
            **written,
        }
    return results


def _visible(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most, rounded."""
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def format_spread(found: dict[str, float], digits: int = 2) -> str:
    """What `spread` returns, as text."""
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f} to {found['max']:.{digits}f})"


def as_table(report: dict[str, Any]) -> Table:
    """The report for a terminal."""
    title = f"{report['num_requests']} {report['workload']} requests, {report['model']}"
    has_solved = any("solved" in result for result in report["results"].values())
    table = Table(
        "decoder",
        "equal",
        "NFE",
        "rows/forward",
        "seconds",
        "tokens/s",
        "times as fast (min to max)",
        "GEMM rate used (min to max)",
        *(["solved"] if has_solved else []),
        title=title,
    )
    for name, result in report["results"].items():
        table.add_row(*cells(name, result))
    return table


def cells(name: str, result: dict[str, Any]) -> list[str]:
    """A decoder's line of the table."""
    ratio, used = result["times_as_fast"], result.get("gemm_utilization")
    return [
        name,
        f"{result['equal_requests']}/{result['num_requests']}",
        str(result["nfe"]),
        f"{result['rows_per_forward']:.0f}" if "rows_per_forward" in result else "",
        f"{result['elapsed_time']:.1f}",
        f"{result['visible_tokens_per_second']:.1f}",
        format_spread(ratio),
        f"{100 * used['median']:.0f} % ({100 * used['min']:.0f} to {100 * used['max']:.0f})" if used else "",
        *([f"{100 * result['solved']:.1f} %"] if "solved" in result else []),
    ]


def write_report(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(report, indent=1) + "\n")


def as_json(report: dict[str, Any], indent: int | None = None) -> str:
    """A report as strict JSON: a number that is not finite is null."""
    return json.dumps(_finite(report), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
