"""`LLM`: offline generation in the caller's process."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from remask.engine import Engine
from remask.intake import Message, Prompt
from remask.options import EngineOptions, call_signature
from remask.outputs import RequestOutput
from remask.scheduler.params import SamplingParams
from remask.thread import EngineThread


class LLM:
    """A masked diffusion language model that generates for many requests at once.

    Args:
        model: a local Hugging Face checkpoint directory, or "tiny" for the embedded one.
        options: any other field of `EngineOptions`, which documents them all.

    Calls may come from any thread, and share every step. A forked process makes an engine of its own.

    Attributes:
        engine: what all calls share; other faces of the same model may use it, too.

    Raises:
        InvalidRequest: an option or a file of the checkpoint is at fault; it is named.
    """

    __signature__ = call_signature()

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.engine = EngineThread(Engine(EngineOptions.parse(model=model, **options)))
        self._close = weakref.finalize(self, self.engine.close)

    @classmethod
    def from_options(cls, options: EngineOptions) -> LLM:
        """Makes one from all its options."""
        return cls(**msgspec.structs.asdict(options))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's; None: prompts are token ids."""
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
    ) -> list[RequestOutput]:
        """Fills a canvas behind each prompt.

        Args:
            prompts: text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`; or a list, an array,
                a column or an iterator of these. Ids may be an array, too.
            sampling_params: one for all prompts, or a list or iterator with one for each.
            use_tqdm: show progress on a terminal.
            priority: an integer for each prompt, the lower the sooner; overrides that of the parameters.

        Returns:
            One output for each prompt, in their order.

        Raises:
            InvalidRequest: naming the prompt's index and the parameter; nothing of the call has run.
            Overloaded: more is live than the engine's options allow; nothing of the call has run.
            EngineDead: the engine was closed, also from another thread, or has failed.
            Unavailable: there is no worker, and none is coming.
        """
        self.engine.check_alive()
        requests = self.engine.intake.requests(prompts, sampling_params, priority)
        num_tokens = num_forwards = 0
        outputs: dict[str, RequestOutput] = {}
        with _progress_bar(use_tqdm) as bar:
            task = bar.add_task("generating", total=len(requests), rate="")
            for output in self.engine.serve(requests):
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

    def scale(self, num_workers: int) -> None:
        """Wants another number of workers on Ray; may be called from any thread, while requests run.

        Raises:
            InvalidRequest: the engine is not on Ray, or the cluster has too little.
        """
        self.engine.scale(num_workers)

    def close(self) -> None:
        """Frees the model and the workers; idempotent, from any thread. Calls that run, and later ones, raise
        EngineDead."""
        self._close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _progress_bar(show: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        *Progress.get_default_columns()[:3],
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
        console=console,
        transient=True,
        disable=not (show and console.is_terminal),
    )
