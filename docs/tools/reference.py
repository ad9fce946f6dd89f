"""What the reference pages hold, read off the package: public names, policies, presets and commands."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
import typer

import remask
from remask.cli import app
from remask.scheduler.params import NEUTRAL
from remask.scheduler.policies import PRESETS, Policy
from remask.scheduler.policies import remask as remask_policies
from remask.scheduler.policies import unmask as unmask_policies
from remask.scheduler.policies.base import tag

BAR = "\\|"  # in a cell
OUTPUTS = ("RequestOutput", "CompletionOutput", "CanvasEvent", "RequestMetrics", "Score", "Trace")
BASES = ("UnmaskPolicy", "RemaskPolicy", "MemoryField")


def own_policies() -> dict[str, type[Policy]]:
    """remask's own policies by name; those of installed packages are left out."""
    found = [
        getattr(module, name) for module in (unmask_policies, remask_policies) for name in module.__all__
    ]
    return {tag(policy): policy for policy in found}


def names(page: str) -> list[str]:
    """The public names that a page of the reference documents; "llm" has all that no other page has."""
    policies = {policy.__name__ for policy in own_policies().values()}
    errors = [name for name in remask.__all__ if _is_error(name)]
    pages = {
        "sampling-params": ["SamplingParams"],
        "outputs": [name for name in remask.__all__ if name in OUTPUTS],
        "errors": sorted(errors, key=lambda name: (name != "RemaskError", name)),
        "policies": [name for name in BASES if name in remask.__all__],
    }
    elsewhere = policies.union(*pages.values())
    return pages[page] if page in pages else [name for name in remask.__all__ if name not in elsewhere]


def _is_error(name: str) -> bool:
    value = getattr(remask, name)
    return isinstance(value, type) and issubclass(value, Exception)


def autoclasses(page: str) -> str:
    """Directives that take the page's classes from their docstrings."""
    return "\n".join(_autoclass(name) for name in names(page))


def autopolicies() -> str:
    """The same for all policies."""
    return "\n".join(_autoclass(kind.__name__, members=False) for kind in own_policies().values())


def _autoclass(name: str, members: bool = True) -> str:
    own = "   :members:\n" if members else ""
    return f"```{{eval-rst}}\n.. autoclass:: remask.{name}\n{own}```\n"


def parameters(name: str) -> str:
    """The parameters of a policy: type and bounds, default, meaning."""
    kind = own_policies()[name]
    meanings = _attributes(kind)
    lines = ["| parameter | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in msgspec.structs.fields(kind):
        default, meaning = f"`{_word(field.default)}`", meanings.get(field.name, "").rstrip(".")
        lines.append(f"| `{field.name}` | {_type(field.type)} | {default} | {meaning} |")
    return "\n".join(lines)


def sampling_parameters() -> str:
    """The parameters of a request that are supported: name, default, meaning."""
    params = remask.SamplingParams
    return _meanings(params, [name for name in params.__struct_fields__ if name not in NEUTRAL])


def options(*chosen: str) -> str:
    """Some options of an engine: name, default, meaning."""
    return _meanings(remask.EngineOptions, chosen)


def _meanings(struct: Any, chosen: Sequence[str]) -> str:
    defaults = {field.name: field.default for field in msgspec.structs.fields(struct)}
    meanings = _attributes(struct)
    lines = ["| name | default | meaning |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | `{_word(defaults[name])}` | {meanings[name]} |" for name in chosen]
    return "\n".join(lines)


def _type(kind: Any) -> str:
    """A field's type for readers, with its bounds or words."""
    if get_origin(kind) is Literal:
        return " or ".join(f"`{word}`" for word in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_type(part) for part in get_args(kind))
    if get_origin(kind) is Annotated:
        base, meta = get_args(kind)[:2]
        bounds = [
            f"{sign} {bound:,.0f}"
            for sign, bound in (("≥", meta.ge), (">", meta.gt), ("≤", meta.le), ("<", meta.lt))
            if bound is not None and abs(bound) < 2**31 - 1
        ]
        return ", ".join(filter(None, [base.__name__, *bounds]))
    return "`None`" if kind is type(None) else kind.__name__


def _attributes(kind: type) -> dict[str, str]:
    """What a class's docstring says of its attributes; `a, b: ...` is about both."""
    _, _, section = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \w)", section):
        left, _, meaning = " ".join(entry.split()).partition(": ")
        found |= dict.fromkeys(left.split(", "), meaning)
    return found


def policy_table() -> str:
    """All policies: name, kind, rule, and the text form with the first parameter."""
    lines = ["| policy | kind | rule | text form |", "| --- | --- | --- | --- |"]
    for name, kind in own_policies().items():
        half = "unmask" if issubclass(kind, remask.UnmaskPolicy) else "remask"
        rule = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
        lines.append(f"| [`{kind.__name__}`]({name}.md) | {half} | {rule} | `{_short_text(kind())}` |")
    return "\n".join(lines)


def as_text(policy: Policy, only_changed: bool = False) -> str:
    """A policy in the text form, with its parameters."""
    fields = {name: getattr(policy, name) for name in policy.__struct_fields__}
    if only_changed:
        fields = {name: value for name, value in fields.items() if value != getattr(type(policy)(), name)}
    words = ",".join(f"{name}={_word(value)}" for name, value in fields.items() if value is not None)
    return f"{tag(policy)}:{words}" if words else tag(policy)


def _short_text(policy: Policy) -> str:
    """A policy in the text form, with its first parameter that has a default."""
    return as_text(policy).split(",")[0]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def preset_table() -> str:
    """The presets and the parameters that they set."""
    lines = ["| preset | sets |", "| --- | --- |"]
    for name, fields in PRESETS.items():
        words = []
        for field, value in fields.items():
            if isinstance(value, Policy):
                words.append(f'`{field}="{as_text(value, only_changed=True)}"`')
            elif field == "block_length" and value > 2**20:
                words.append("`block_length`: the whole canvas")
            else:
                words.append(f"`{field}={value}`")
        lines.append(f"| `{name}` | {', '.join(words)} |")
    return "\n".join(lines)


def commands() -> Iterator[tuple[str, Any]]:
    """All commands, by how they are typed."""
    yield from _commands("remask", typer.main.get_command(app))


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
        return
    for word, sub in inner.items():
        yield from _commands(f"{name} {word}", sub)


def cli() -> str:
    """A section for each command: what it does, its arguments and its options."""
    return "\n\n".join(_section(name, command) for name, command in commands())


def _section(name: str, command: Any) -> str:
    panels: dict[str, list[Any]] = {}
    for parameter in command.params:
        if parameter.name != "help":
            panels.setdefault(getattr(parameter, "rich_help_panel", None) or "", []).append(parameter)
    parts = [f"## `{name}`", command.help or ""]
    for panel, parameters in panels.items():
        lines = ["| argument or option | default | meaning |", "| --- | --- | --- |", *map(_row, parameters)]
        parts += [f"### {panel} options of `{name}`"] * bool(panel) + ["\n".join(lines)]
    return "\n\n".join(parts)


def _row(parameter: Any) -> str:
    """A line of the table; the help of generated flags ends with their default, as markup."""
    is_option = parameter.param_type_name == "option"
    spelled = ", ".join(f"`{word}`" for word in parameter.opts) if is_option else f"`{parameter.name}`"
    meaning, _, told = (parameter.help or "").replace("\\[", "[").partition("  [default: ")
    default = told.removesuffix("]") or parameter.default
    is_shown = not (default in (None, False, ()) or callable(default))
    return f"| {spelled} | {f'`{default}`' if is_shown else ''} | {meaning.replace('|', BAR)} |"
