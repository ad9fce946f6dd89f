"""The OpenAPI description of the server, from the structs that read and write its bodies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from remask.openai.bodies import (
    CHAT_ASKS_NOTHING,
    COMPLETION_ASKS_NOTHING,
    LABELS,
    ROLES,
    TEMPLATE_ASKS_NOTHING,
    StreamOptions,
)
from remask.openai.chunks import ChatChunkChoice, Chunk, TextChunkChoice
from remask.openai.responses import ChatChoice, Completion, TextChoice
from remask.scheduler.params import SamplingParams
from remask.scheduler.policies import PRESETS
from remask.server.tokens import Detokenized, Tokenized

REFUSALS = {
    "400": "The body is invalid; the error names the parameter.",
    "401": "A key is needed.",
    "404": "Another model is served.",
    "413": "The body, or a step of the request, is too large.",
    "415": "The body is not JSON.",
    "429": "The queue is full; try again later.",
    "499": "The client has closed its connection.",
    "500": "The request has failed.",
    "503": "The server is shutting down, or no worker runs.",
}
MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                        "additionalProperties": False,
                    },
                },
            ]
        },
    },
    "required": ["role", "content"],
}
MESSAGES = {"type": "array", "items": MESSAGE, "minItems": 1}
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
PROMPT = {
    "anyOf": [
        {"type": "string"},
        {**IDS, "minItems": 1},
        {"type": "array", "items": {"anyOf": [{"type": "string"}, {**IDS, "minItems": 1}]}, "minItems": 1},
    ]
}
FLAG = {"type": ["boolean", "null"]}
TEXT = {"type": ["string", "null"]}
NULL = {"type": "null"}
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": TEXT,
                "param": TEXT,
                "code": TEXT,
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def description(version: str) -> dict[str, Any]:
    """The description, OpenAPI 3.1."""
    structs = (
        SamplingParams, Completion[ChatChoice], Completion[TextChoice], Chunk[ChatChunkChoice],
        Chunk[TextChunkChoice], Tokenized, Detokenized,
    )  # fmt: skip
    _, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    params = schemas.pop("SamplingParams")["properties"]
    schemas |= {
        "CompletionBody": _body(params, "completion"),
        "ChatBody": _body(params, "chat"),
        "TokenizeBody": _object(
            {
                **_neutral(TEMPLATE_ASKS_NOTHING),
                "model": TEXT,
                "prompt": TEXT,
                "messages": {"anyOf": [MESSAGES, NULL]},
                "add_special_tokens": FLAG,
                "return_token_strs": FLAG,
            }
        ),
        "DetokenizeBody": _object({"model": TEXT, "tokens": IDS}, ["tokens"]),
        "Error": ERROR,
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "remask", "version": version},
        "paths": {
            "/v1/completions": _post("CompletionBody", "Completion_TextChoice_", streams=True),
            "/v1/chat/completions": _post("ChatBody", "Completion_ChatChoice_", streams=True),
            "/tokenize": _post("TokenizeBody", "Tokenized"),
            "/detokenize": _post("DetokenizeBody", "Detokenized"),
            "/v1/models": _get("The names of the model."),
            "/v1/models/{name}": {
                **_get("One name of the model.", missing=True),
                "parameters": [
                    {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
                ],
            },
            "/health": _get("The process serves.", may_be_unavailable=True),
            "/ready": _get("Requests may be sent here.", may_be_unavailable=True),
            "/version": _get("The version."),
            "/metrics": _get("Prometheus metrics.", "text/plain"),
            "/openapi.json": _get("This description."),
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _body(params: dict[str, Any], kind: Literal["chat", "completion"]) -> dict[str, Any]:
    """Schema of a body: null means that a field is not given."""
    neutral = CHAT_ASKS_NOTHING if kind == "chat" else COMPLETION_ASKS_NOTHING
    properties = {name: _or_null(schema) for name, schema in params.items()}
    properties |= _neutral(neutral)
    properties |= dict.fromkeys(("model", *LABELS), TEXT)
    properties |= {
        "preset": {"enum": [*PRESETS, None]},
        "stream": FLAG,
        "stream_options": _or_null(_object(dict.fromkeys(StreamOptions._fields, FLAG))),
    }
    if kind == "chat":
        properties |= {
            "messages": MESSAGES,
            "logprobs": FLAG,
            "max_completion_tokens": {"type": ["integer", "null"], "minimum": 1},
        }
        return _object(properties, ["messages"])
    return _object({**properties, "prompt": PROMPT, "echo": FLAG}, ["prompt"])


def _neutral(values: Mapping[str, tuple[object, ...]]) -> dict[str, Any]:
    """Properties of fields that must ask for nothing."""
    return {name: {"enum": [*own, None]} for name, own in values.items()}


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required or [],
        "additionalProperties": False,
    }


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    bare = {name: value for name, value in schema.items() if name != "default"}
    choices = bare.get("anyOf", [bare])
    return bare if not bare or NULL in choices else {"anyOf": [*choices, NULL]}


def _content(schema: dict[str, Any], kind: str = "application/json") -> dict[str, Any]:
    return {kind: {"schema": schema}}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _refused(statuses: tuple[str, ...]) -> dict[str, Any]:
    return {
        status: {"description": REFUSALS[status], "content": _content(_reference("Error"))}
        for status in statuses
    }


def _post(body: str, response: str, *, streams: bool = False) -> dict[str, Any]:
    content = _content(_reference(response))
    if streams:  # the data of each event is a chunk
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "post": {
            "requestBody": {"required": True, "content": _content(_reference(body))},
            "responses": {
                "200": {"description": "The answer.", "content": content},
                **_refused(tuple(REFUSALS)),
            },
        }
    }


def _get(
    text: str, kind: str = "application/json", *, missing: bool = False, may_be_unavailable: bool = False
) -> dict[str, Any]:
    statuses = ("401",) + ("404",) * missing + ("503",) * may_be_unavailable
    schema = {"type": "object"} if kind == "application/json" else {"type": "string"}
    answer = {"description": text, "content": _content(schema, kind)}
    refusals = {status: {"description": REFUSALS[status]} for status in statuses}
    return {"get": {"responses": {"200": answer, **refusals}}}
