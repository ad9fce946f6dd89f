"""Parses a line of a batch file into a checked request or a fault.

A file may mix two kinds of lines. A line in OpenAI's batch format has `custom_id`, `method`, `url` and
`body`. A plain line is the body: `prompt` (or `prompt_token_ids`) or `messages`, parameters, and an optional
`custom_id`, which defaults to the unit and number of the line (`line-3`). A plain line with a `continuation`
asks for its likelihood.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from remask.batch.source import Content, decode
from remask.intake import CheckedPrompt, Intake
from remask.openai.bodies import (
    CHAT_URL,
    COMPLETION_URL,
    SCORE_URL,
    Asked,
    AskedScore,
    read_body,
    read_score_body,
)
from remask.scheduler.errors import InvalidRequest
from remask.scoring import CheckedScore, check_score

Kind: TypeAlias = Literal["chat", "completion", "score"]
KINDS: dict[str, Kind] = {CHAT_URL: "chat", COMPLETION_URL: "completion", SCORE_URL: "score"}
ENVELOPE = ("custom_id", "method", "url", "body")


class Line(NamedTuple):
    """A parsed line: a request or a fault."""

    number: int
    custom_id: str
    kind: Kind
    checked: CheckedPrompt | CheckedScore | None  # None: the line is invalid
    fault: InvalidRequest | None
    echo: bool = False


class LineReader:
    """Reads the lines of one file for one model.

    Args:
        intake: intake of the model.
        unit: "line" or "row", in errors and in default custom_ids.
        model_names: names of the model that a body may use.
        defaults: default parameters of a line.
        chat: apply the chat template to plain text prompts, as a user message.
    """

    def __init__(
        self,
        intake: Intake,
        *,
        unit: str,
        model_names: Collection[str],
        defaults: Mapping[str, Any],
        chat: bool,
    ) -> None:
        self._intake, self._unit, self._chat = intake, unit, chat
        self._model_names, self._defaults = model_names, defaults

    def read(self, number: int, content: Content) -> Line:
        """Parses the line with this number. If it is invalid, `fault` says why."""
        custom_id, kind = f"{self._unit}-{number}", "completion"
        asked: Asked | AskedScore
        try:
            fields = decode(content)
            enveloped = not fields.keys().isdisjoint(ENVELOPE[1:])
            custom_id = _custom_id(fields, custom_id, required=enveloped)
            if enveloped:
                kind = _kind_of(fields)
                body = fields["body"]
            else:
                body = {name: value for name, value in fields.items() if name != "custom_id"}
                kind = self._plain_kind(body)
            if kind == "score":
                asked = read_score_body(body, model_names=self._model_names)
            else:
                asked = read_body(kind, body, model_names=self._model_names, defaults=self._defaults)
            echo = isinstance(asked, Asked) and asked.echo
            return Line(number, custom_id, kind, self._check(asked), None, echo)
        except InvalidRequest as error:
            return Line(number, custom_id, kind, None, error)

    def _plain_kind(self, body: dict[str, Any]) -> Kind:
        """Kind of request of a plain line. Normalizes `prompt_token_ids` and `--chat`."""
        forms = ("prompt", "prompt_token_ids", "messages")
        given = [name for name in forms if body.get(name) is not None]
        if len(given) != 1:
            problem = "give one of prompt, prompt_token_ids and messages"
            raise InvalidRequest(given[1] if given else "prompt", body, problem)
        content = [body.pop(name, None) for name in forms][forms.index(given[0])]
        if given == ["prompt_token_ids"] and not isinstance(content, list):
            raise InvalidRequest("prompt_token_ids", content, "must be a list of token ids")
        if body.get("continuation") is not None:
            if given == ["messages"]:
                raise InvalidRequest("continuation", body["continuation"], "needs a prompt, not messages")
            body["prompt"] = content
            return "score"
        if self._chat and isinstance(content, str):
            content, given = [{"role": "user", "content": content}], ["messages"]
        kind = "chat" if given == ["messages"] else "completion"
        body["messages" if kind == "chat" else "prompt"] = content
        return kind

    def _check(self, asked: Asked | AskedScore) -> CheckedPrompt | CheckedScore:
        if isinstance(asked, AskedScore):
            return check_score(self._intake, asked.prompt, asked.continuation, asked.params)
        try:
            (checked,) = asked.check(self._intake)
        except InvalidRequest as error:
            raise error.renamed(asked.names) from None
        return checked


def _custom_id(fields: dict[str, Any], derived: str, *, required: bool) -> str:
    custom_id = fields.get("custom_id")
    if custom_id is None and not required:
        return derived
    if not isinstance(custom_id, str) or not custom_id:
        raise InvalidRequest("custom_id", custom_id, "must be text that names the line")
    return custom_id


def _kind_of(fields: dict[str, Any]) -> Kind:
    for name in fields:
        if name not in ENVELOPE:
            raise InvalidRequest(name, fields[name], f"unknown key; a line has {', '.join(ENVELOPE)}")
    for name in ENVELOPE:
        if fields.get(name) is None:
            raise InvalidRequest(name, None, f"is missing; a line has {', '.join(ENVELOPE)}")
    if fields["method"] != "POST":
        raise InvalidRequest("method", fields["method"], "must be POST")
    url = fields["url"]
    if not isinstance(url, str) or url not in KINDS:
        raise InvalidRequest("url", url, f"is not supported; use {' or '.join(KINDS)}")
    return KINDS[url]
