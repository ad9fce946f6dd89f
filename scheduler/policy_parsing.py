"""Policies from what a user may write: an object, a dict, or text such as `wino:t2=0.9`."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from remask.scheduler.errors import InvalidRequest, did_you_mean, invalid_field
from remask.scheduler.policies import REMASK, UNMASK


def parse_policy(parameter: Literal["unmask", "remask"], value: object) -> Any:
    """A policy struct from what a user may write, every bound checked.

    Args:
        parameter: the field the policy is for; names it in errors and picks the registry.
        value: a policy object, a dict `{"type": "threshold", "t": 0.9}`, or text `threshold:0.9` or
            `wino:t2=0.9`.

    Raises:
        InvalidRequest: unknown policy or field, value out of range, text that does not parse.
    """
    registry: dict[str, Any] = UNMASK if parameter == "unmask" else REMASK
    if isinstance(value, str):
        fields = _parse_text(parameter, value, registry)
    elif isinstance(value, dict):
        fields = dict(value)
    elif type(value) in registry.values():
        fields = {"type": value.__struct_config__.tag, **msgspec.structs.asdict(value)}  # type: ignore[type-var]
    else:
        raise InvalidRequest(
            parameter, value, f"give a policy object, a dict or text such as {example(registry)!r}"
        )
    name = fields.get("type")
    if not isinstance(name, str) or name not in registry:
        raise InvalidRequest(parameter, name, f"unknown policy; {did_you_mean(name, registry)}")
    unknown = [field for field in fields if field != "type" and field not in registry[name].__struct_fields__]
    if unknown:
        known = registry[name].__struct_fields__
        raise InvalidRequest(
            f"{parameter}.{unknown[0]}",
            fields[unknown[0]],
            f"unknown field of {name}; {did_you_mean(unknown[0], known)}",
        )
    try:
        return msgspec.convert(fields, type=registry[name])
    except msgspec.ValidationError as error:
        raise invalid_field(parameter, fields, error) from None


def _parse_text(parameter: str, text: str, registry: dict[str, Any]) -> dict[str, Any]:
    name, _, arguments = text.partition(":")
    if name not in registry:
        raise InvalidRequest(parameter, text, f"unknown policy; {did_you_mean(name, registry)}")
    positional = list(registry[name].__struct_fields__)
    fields: dict[str, Any] = {"type": name}
    for i, argument in enumerate(arguments.split(",") if arguments else ()):
        key, equals, raw = (part.strip() for part in argument.partition("="))
        if not equals:
            if not key or i >= len(positional) or len(fields) != i + 1:
                raise InvalidRequest(
                    parameter, text, f"cannot place {argument!r}; {name} takes {', '.join(positional)}"
                )
            key, raw = positional[i], key
        if key in fields:
            raise InvalidRequest(f"{parameter}.{key}", text, "is given twice")
        fields[key] = _parse_value(raw)
    return fields


def _parse_value(raw: str) -> Any:
    """A JSON scalar where the text is one (Python's True, False and None included), else the text."""
    try:
        return msgspec.json.decode({"True": "true", "False": "false", "None": "null"}.get(raw, raw))
    except msgspec.DecodeError:
        return raw


def example(registry: dict[str, Any]) -> str:
    return "threshold:0.9" if registry is UNMASK else "wino:t2=0.9"
