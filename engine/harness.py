"""remask as a model of the Language Model Evaluation Harness (`lm-eval`), under the name `remask`.

`remask eval` registers it and runs the harness. `--model_args` are options of the engine, parameters of
`SamplingParams` for `generate_until`, and `num_samples` and `score_seed` for `loglikelihood`.
"""

from __future__ import annotations

from typing import Any

import msgspec
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from remask.llm import LLM
from remask.options import EngineOptions
from remask.scheduler.errors import InvalidRequest, RequestFailed, did_you_mean
from remask.scheduler.params import SamplingParams
from remask.scoring import ScoreParams

NAME = "remask"
DEFAULT_DEVICE = "cuda:0"  # of the harness, which cannot be told from a wish
NOT_GIVEN = ("stop", "priority", "n", "seed")  # parameters that the harness or the engine sets
GENERATION = ("until", "do_sample", "max_gen_toks")  # the harness's own names, translated here


@register_model(NAME)
class RemaskLM(TemplateLM):
    """A model for `lm_eval.simple_evaluate(model="remask", model_args={...})`.

    Args:
        batch_size, max_batch_size: the harness's; the engine batches by itself, and they change nothing.
        device: the harness's; "cuda:0", its default, leaves the choice to the engine.
        args: options of `EngineOptions`, fields of `SamplingParams` and `preset`, and `num_samples` and
            `score_seed` of `ScoreParams`. `max_tokens` wins over that of a task; other fields give way.

    Raises:
        InvalidRequest: an argument is unknown or invalid; the error names it.
    """

    def __init__(
        self,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **args: Any,
    ) -> None:
        super().__init__()
        del batch_size, max_batch_size
        if "pretrained" in args:  # as the harness's other models call it
            args.setdefault("model", args.pop("pretrained"))
        if "model" not in args:
            raise InvalidRequest("model_args", args, "name no model; give model=DIRECTORY")
        engine, sampling = EngineOptions.__struct_fields__, SamplingParams.__struct_fields__
        known = {*engine, *sampling, "preset", "num_samples", "score_seed"} - {*NOT_GIVEN} | {"seed"}
        for name in args:
            if name not in known:
                hint = did_you_mean(name, sorted(known))
                raise InvalidRequest(name, args[name], f"unknown model argument; {hint}")
        self._score = ScoreParams.parse(
            num_samples=args.pop("num_samples", ScoreParams().num_samples),
            seed=args.pop("score_seed", 0),
            check_greedy=True,
        )
        self._sampling = {
            name: args.pop(name) for name in list(args) if name not in engine and name != "seed"
        }
        if device not in (None, DEFAULT_DEVICE):
            args["device"] = device
        model = args["model"]
        self._llm = LLM(**args)
        if self._llm.tokenizer is None:
            self._llm.close()
            raise InvalidRequest("model", model, "has no tokenizer, which the harness needs")
        self.tokenizer: Any = self._llm.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self._llm.engine.intake.config.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text. Without `add_special_tokens`, they are added unless the text begins with them."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The texts of all requests, decoded in one call."""
        asked: list[Any] = [request.args for request in requests]  # text and `generation_kwargs`
        params = [self._params(options) for _, options in asked]
        prompts: list[Any] = [{"prompt_token_ids": self.tok_encode(text)} for text, _ in asked]
        outputs = self._llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        texts = []
        for request, output in zip(requests, outputs, strict=True):
            if output.error is not None:
                raise RequestFailed(output.error)
            text = output.outputs[0].text or ""
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether greedy decoding writes it."""
        scores = self._llm.score(
            [context for _, context, _ in requests],
            [continuation for _, _, continuation in requests],
            use_tqdm=not kwargs.get("disable_tqdm", False),
            **msgspec.structs.asdict(self._score),
        )
        found = []
        for (texts, _, _), score in zip(requests, scores, strict=True):
            if score.error is not None:
                raise RequestFailed(score.error)
            found.append((score.logprob, bool(score.is_greedy)))
            self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not supported: the likelihood of a document in overlapping windows has no estimator here."""
        raise NotImplementedError("remask has no loglikelihood_rolling; choose tasks without perplexity")

    def _params(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Sampling parameters of a request.

        Args:
            asked: the task's `generation_kwargs`.
        """
        given: dict[str, Any] = dict(
            normalize_gen_kwargs(asked, default_max_gen_toks=SamplingParams().max_tokens)
        )
        own = {name: value for name, value in given.items() if name not in GENERATION}
        if "temperature" not in asked and not given.get("do_sample"):
            own.pop("temperature", None)  # the task has no wish
        fields = {"max_tokens": given["max_gen_toks"], **self._sampling, **own}
        if "max_tokens" in self._sampling:
            fields["max_tokens"] = self._sampling["max_tokens"]
        return {**fields, "stop": [text for text in given["until"] if text] or None}
