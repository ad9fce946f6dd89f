"""Parses policies: from an object, a dict, or text such as `wino:t2=0.9`."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from remask.scheduler.errors import InvalidRequest, cut, did_you_mean, invalid_field, shown
from remask.scheduler.plain import plain
from remask.scheduler.policies.base import Policy, tag
from remask.scheduler.policies.registry import registry


def parse_policy(parameter: Literal["unmask", "remask"], value: object) -> Any:
    """Parses and validates a policy.

    Args:
        parameter: the field that the policy is for; errors name it.
        value: a policy object, a dict `{"type": "threshold", "t": 0.9}`, or text `threshold:0.9` or
            `wino:t2=0.9`.

    Raises:
        InvalidRequest: unknown policy or field, value out of range, text that does not parse.
    """
    kinds: dict[str, Any] = getattr(registry(), parameter)
    if isinstance(value, str):
        fields = _parse_text(parameter, value, kinds)
    elif isinstance(value, dict):
        fields = dict(value)
    elif isinstance(value, Policy) and type(value) in kinds.values():
        fields = {"type": tag(value), **plain(msgspec.structs.asdict(value))}
    else:
        example = "threshold:0.9" if parameter == "unmask" else "wino:t2=0.9"
        raise InvalidRequest(parameter, value, f"give a policy object, a dict or text such as {example!r}")
    name = fields.get("type")
    _check_name(parameter, name, name, kinds)
    assert isinstance(name, str), "checked"
    unknown = [field for field in fields if field != "type" and field not in kinds[name].__struct_fields__]
    if unknown:
        known = kinds[name].__struct_fields__
        raise InvalidRequest(
            f"{parameter}.{cut(unknown[0]) if isinstance(unknown[0], str) else shown(unknown[0])}",
            fields[unknown[0]],
            f"unknown field of {name}; {did_you_mean(unknown[0], known)}",
        )
    # msgspec's message holds all of a wrong word.
    fields = {key: cut(entry) if isinstance(entry, str) else entry for key, entry in fields.items()}
    try:
        return msgspec.convert(fields, type=kinds[name])
    except msgspec.ValidationError as error:
        raise invalid_field(parameter, fields, error) from None


def _check_name(parameter: str, name: object, value: object, kinds: dict[str, Any]) -> None:
    """Raises InvalidRequest if no policy has this name; `value` is the user's text."""
    if isinstance(name, str) and name in kinds:
        return
    if isinstance(name, str) and name in registry().broken:
        problem = f"the package that brings it cannot be used: {registry().broken[name]}"
        raise InvalidRequest(parameter, value, problem)
    other = "remask" if parameter == "unmask" else "unmask"
    if isinstance(name, str) and name in getattr(registry(), other):
        raise InvalidRequest(parameter, value, f"is a policy for {other}; give it there")
    raise InvalidRequest(parameter, value, f"unknown policy; {did_you_mean(name, kinds)}")


def _parse_text(parameter: str, text: str, kinds: dict[str, Any]) -> dict[str, Any]:
    name, _, arguments = text.partition(":")
    _check_name(parameter, name, text, kinds)
    positional = list(kinds[name].__struct_fields__)
    fields: dict[str, Any] = {"type": name}
    for i, argument in enumerate(arguments.split(",") if arguments else ()):
        key, equals, raw = (part.strip() for part in argument.partition("="))
        if not equals:
            if not key or i >= len(positional) or len(fields) != i + 1:
                raise InvalidRequest(
                    parameter, text, f"cannot place {shown(argument)}; {name} takes {', '.join(positional)}"
                )
            key, raw = positional[i], key
        if key in fields:
            raise InvalidRequest(f"{parameter}.{key}", text, "is given twice")
        fields[key] = _parse_value(raw)
    return fields


def _parse_value(raw: str) -> Any:
    """The value of a JSON scalar, or of Python's True, False and None; any other text unchanged."""
    try:
        return msgspec.json.decode({"True": "true", "False": "false", "None": "null"}.get(raw, raw))
    except msgspec.DecodeError:
        return raw
