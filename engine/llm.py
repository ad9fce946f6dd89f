"""`LLM`: offline generation in the caller's process."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress as ProgressBar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from remask.engine import Engine, Progress
from remask.intake import Message, Prompt
from remask.options import EngineOptions, call_signature
from remask.outputs import RequestOutput
from remask.scheduler.params import SamplingParams
from remask.scoring import Score, ScoreParams, check_scores
from remask.thread import EngineThread

MAX_LIVE_SAMPLES = 8192  # of scores: a canvas each, made when the engine has room


class LLM:
    """A masked diffusion language model that serves many requests at once.

    Calls may come from any thread and share every step. A forked process must make its own `LLM`.

    Args:
        model: Local Hugging Face checkpoint directory, or "tiny" for the embedded model.
        options: Any other field of `EngineOptions`.

    Attributes:
        engine: The engine that all calls share.

    Raises:
        InvalidRequest: An option or a file of the checkpoint is invalid; the error names it.
    """

    __signature__ = call_signature()

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.engine = EngineThread(Engine(EngineOptions.parse(model=model, **options)))
        weakref.finalize(self, self.engine.drop)

    @classmethod
    def from_options(cls, options: EngineOptions) -> LLM:
        """Makes an `LLM` from its options."""
        return cls(**msgspec.structs.asdict(options))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer; None: prompts are token ids."""
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams
        | dict[str, Any]
        | Iterable[SamplingParams | dict[str, Any]]
        | None = None,
        *,
        use_tqdm: bool = True,
        priority: Iterable[int] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> list[RequestOutput]:
        """Fills a canvas behind each prompt.

        Args:
            prompts: Text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`; or a list, an array,
                a column or an iterator of these. Ids may be an array.
            sampling_params: Parameters for all prompts, or a list or iterator with those of each prompt.
            use_tqdm: Show progress on a terminal.
            priority: An integer for each prompt; lower values run first. It overrides the parameters.
            on_progress: Called in this thread with the `Progress` of each sample after each burst. Its
                `events` need the parameter `trace`.

        Returns:
            One output for each prompt, in the order of the prompts.

        Raises:
            InvalidRequest: A parameter is invalid; the error names it and the prompt's index. Nothing of the
                call has run.
            Overloaded: The engine's queue is full. Nothing of the call has run.
            EngineDead: The engine was closed, possibly from another thread, or has failed.
            Unavailable: No worker is running and none can be started.
        """
        self.engine.check_alive()
        requests = self.engine.intake.requests(prompts, sampling_params, priority)
        num_tokens = num_forwards = 0
        outputs: dict[str, RequestOutput] = {}
        with _progress_bar(use_tqdm) as bar:
            task = bar.add_task("generating", total=len(requests), rate="")
            for output in self.engine.serve(requests, on_progress=on_progress):
                outputs[output.request_id] = output
                num_tokens += sum(sample.num_visible_tokens for sample in output.outputs)
                num_forwards += sum(sample.nfe for sample in output.outputs)
                bar.update(task, advance=1, rate=f"{num_tokens / max(1, num_forwards):.1f} tokens/forward")
        return [outputs[request.request_id] for request in requests]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams
        | dict[str, Any]
        | Sequence[SamplingParams | dict[str, Any]]
        | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """The assistant's next turn of one conversation or of many; see `generate`.

        The content of a message is text, or a list of parts `{"type": "text", "text": ...}`.
        """
        return self.generate(self.engine.intake.chat_prompts(messages), sampling_params, use_tqdm=use_tqdm)

    def score(
        self,
        prompts: Prompt | Iterable[Prompt],
        continuations: str | list[int] | Iterable[str | list[int]],
        *,
        num_samples: int = 128,
        seed: int = 0,
        check_greedy: bool = False,
        use_tqdm: bool = True,
    ) -> list[Score]:
        """Estimates the log-likelihood of a continuation behind each prompt.

        A sample masks a random part of the continuation's tokens; see `remask.scoring`. A score depends on
        its prompt, its continuation and the seed only; continuations of equal lengths share their masks.

        Args:
            prompts: Prompts as in `generate`, or one prompt for all continuations.
            continuations: Text or token ids behind each prompt. Text is encoded by itself, without special
                tokens.
            num_samples: Samples of each continuation, at least 2. `LLM(max_n)` is the ceiling.
            seed: Random seed of the masks.
            check_greedy: Also decode greedily, one token a step, and report whether that writes the
                continuation. It takes a forward for each token.
            use_tqdm: Show progress on a terminal.

        Returns:
            One score for each continuation, in order.

        Raises:
            InvalidRequest: A parameter is invalid, or a continuation is empty; the error names it and the
                prompt's index. Nothing of the call has run.
            Overloaded: The engine's queue is full.
            EngineDead: The engine was closed, possibly from another thread, or has failed.
            Unavailable: No worker is running and none can be started.
        """
        self.engine.check_alive()
        intake = self.engine.intake
        params = ScoreParams.parse(num_samples=num_samples, seed=seed, check_greedy=check_greedy)
        checked = check_scores(intake, prompts, continuations, params)
        first = intake.reserve(len(checked))
        requests = (own.request(intake, first + index) for index, own in enumerate(checked))
        scores: dict[int, Score] = {}
        with _progress_bar(use_tqdm) as bar:
            task = bar.add_task("scoring", total=len(checked), rate="")
            for output in self.engine.serve(requests, max_live=MAX_LIVE_SAMPLES):
                index = int(output.request_id) - first
                scores[index] = checked[index].score(output)
                bar.update(task, advance=1)
        return [scores[index] for index in range(len(checked))]

    def update_weights(self, weights: Any) -> int:
        """Replaces the weights while requests run; from any thread. A second call waits for the first.

        First every worker reads and checks the new weights in host memory, and the old ones serve. Then
        requests that have not started wait, those that have end, and all workers take the new weights.
        `RequestOutput.weights_version` says which ones wrote an output. A worker that dies is replaced by one
        with the weights that the engine has by then.

        Args:
            weights: Checkpoint directory; or a state dict, which maps the names of a checkpoint to tensors or
                arrays; or a reference of Ray's to a state dict. Workers on Ray may start later, and read the
                directory then: keep it until the next update. Shape and family are those of the model that
                runs. Values are rounded to its dtype, and quantized as at the start.

        Returns:
            The version of the new weights: 1 for the first update.

        Raises:
            InvalidRequest: The weights are of another shape or family, cannot be read, or do not fit into
                host memory beside the old ones. Everything is as it was.
            EngineDead: The engine was closed or has failed.
            Unavailable: No worker could read the weights. Everything is as it was.
        """
        return self.engine.update_weights(weights)

    def scale(self, num_workers: int) -> None:
        """Changes the number of workers on Ray; may be called from any thread, while requests run.

        Raises:
            InvalidRequest: the engine is not on Ray, or the cluster has too little.
        """
        self.engine.scale(num_workers)

    def close(self) -> None:
        """Frees the model and the workers; idempotent, from any thread. Calls that run, and later ones, raise
        EngineDead."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _progress_bar(show: bool) -> ProgressBar:
    console = Console(stderr=True)
    return ProgressBar(
        SpinnerColumn(),
        *ProgressBar.get_default_columns()[:3],
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
        console=console,
        transient=True,
        disable=not (show and console.is_terminal),
    )
