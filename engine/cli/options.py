"""Flags of the commands, generated from the structs of engine options and sampling parameters.

A field becomes a flag with its name, and the first sentence of its documentation is the help. Only given
flags are passed on: the structs have the defaults and the checks.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import msgspec
import typer
from rich.markup import escape

from remask.options import EngineOptions, choices, plain_type
from remask.scheduler.errors import InvalidRequest
from remask.scheduler.params import NEUTRAL, SamplingParams
from remask.scheduler.policies import PRESETS

SHORT = {"distributed_executor_backend": "--executor", "n": "-n"}
NOT_TEXT = ("placement_group",)  # an object of Ray's
PRESET_HELP = f"Published settings ({', '.join(PRESETS)}), or a TOML file of settings."

Command = Callable[..., Any]


def with_flags(
    *,
    defaults: Mapping[str, Any] | None = None,
    engine_except: Collection[str] = (),
    sampling_except: Collection[str] | None = None,
    server: type[msgspec.Struct] | None = None,
) -> Callable[[Command], Command]:
    """A decorator that gives a command a flag for each option of the engine and each sampling parameter.

    The command receives the given flags as the arguments `engine`, `sampling` and `server`, dicts by field
    name.

    Args:
        defaults: defaults of this command for options of the engine.
        engine_except: options of the engine without a flag.
        sampling_except: parameters without a flag; None: the command has no sampling parameters.
        server: the options of a server; None: the command has none.
    """
    own_defaults = dict(defaults or {})
    engine = _flags(EngineOptions, "Engine", {*engine_except, *NOT_TEXT}, own_defaults)
    served = _flags(server, "Server", (), {}) if server is not None else {}
    sampling: dict[str, inspect.Parameter] = {}
    if sampling_except is not None:
        preset = typer.Option(None, "--preset", help=PRESET_HELP, rich_help_panel="Sampling")
        sampling["preset"] = _parameter("preset", str, preset)
        sampling |= _flags(SamplingParams, "Sampling", {*sampling_except, *NEUTRAL}, {})

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [p for p in own if p.name not in ("engine", "sampling", "server")]

        def run(**given: Any) -> Any:
            given["engine"] = own_defaults | _taken(given, engine)
            if sampling:
                given["sampling"] = _taken(given, sampling)
            if served:
                given["server"] = _taken(given, served)
            return command(**given)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        every = [*parameters, *served.values(), *sampling.values(), *engine.values()]
        every = [p.replace(kind=p.KEYWORD_ONLY) for p in every]
        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in every}
        return run

    return decorate


def documentation(struct: type[msgspec.Struct]) -> dict[str, str]:
    """The first sentence on each field in a struct's docstring."""
    section = (inspect.getdoc(struct) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found = {}
    for entry in re.split(r"\n(?=    \w)", section):
        name, _, text = entry.strip().partition(": ")
        sentence = re.split(r"(?<=\.)\s+(?=[A-Z`])", " ".join(text.split()))[0]
        found[name] = sentence[:1].upper() + sentence[1:]
    return found


def _flags(
    struct: type[msgspec.Struct], panel: str, without: Collection[str], defaults: Mapping[str, Any]
) -> dict[str, inspect.Parameter]:
    texts, found = documentation(struct), {}
    for field in sorted(msgspec.structs.fields(struct), key=lambda field: not field.required):
        if field.name in without:
            continue
        kind = flag_type(field.type)
        shown = defaults.get(field.name, field.default)
        help_text = texts.get(field.name, "")
        if get_origin(kind) is list:
            help_text += " May be repeated."
        if not isinstance(shown, bool | NoneType) and shown is not msgspec.NODEFAULT:
            help_text += f"  [default: {shown}]"
        option = typer.Option(
            None,
            *_names(field.name, kind),
            help=escape(help_text),
            show_default=False,
            rich_help_panel=panel,
        )
        found[field.name] = _parameter(field.name, kind, option)
    return found


def _names(name: str, kind: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    names = [flag, SHORT[name]] if name in SHORT else [flag]
    if get_origin(kind) is list and flag.endswith("s"):  # repeatable; one value each time
        names.append(flag.removesuffix("s"))
    return names


def flag_type(kind: Any) -> Any:
    """Type of the flag for a field of this type; text if the command line has no such type."""
    kind = plain_type(kind)
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    kinds = [plain_type(member) for member in members if member is not NoneType]
    for own in kinds:
        if get_origin(own) is list:
            return list[plain_type(get_args(own)[0])]  # type: ignore[misc]
    if listed := [choice for choice in choices(kinds[0]) if choice is not None]:
        return type(listed[0])
    return str if kinds[0] is Any or get_origin(kinds[0]) is dict or Path in kinds else kinds[0]


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind | None)


def _taken(given: dict[str, Any], flags: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Removes the values of some flags and returns those that were given."""
    taken = {name: given.pop(name) for name in flags}
    return {name: _value(name, value) for name, value in taken.items() if value is not None}


def _value(name: str, value: Any) -> Any:
    if name != "logit_bias":
        return value
    try:
        return msgspec.json.decode(value)
    except msgspec.DecodeError as error:
        raise InvalidRequest("--logit-bias", value, f'must be JSON, such as {{"5": -1.5}}: {error}') from None
