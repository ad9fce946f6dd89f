"""Checks third parties' policies when they are loaded, before any request can use them.

A fault in a worker delays the requests of a burst, and one in planning would harm all requests. So every
method that the engine calls is called here once, for the defaults and for each field changed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, Union, get_type_hints

import msgspec
from msgspec import inspect as types

from remask.scheduler.errors import InvalidRequest, shown
from remask.scheduler.policies.base import (
    EXACT,
    MemoryField,
    Policy,
    RemaskPolicy,
    UnmaskPolicy,
    choices,
    tag,
)

LARGEST = 3.4028234e38  # of fp32
BLOCK_LENS = ((1,), (32,), (8, 8, 8, 8), (32, 32, 7))  # canvases that block_params is tried with
STREAMS, NEEDS = frozenset({"order", "accept", "remask"}), frozenset({"margin", "entropy"})
FLAGS = (  # methods that answer yes or no
    "ranks_as_drawn", "needs_shadow_rows", "shadows_see_each_other", "needs_copies", "needs_committed_rows",
    "bans_removed", "verifies",
)  # fmt: skip
KERNELS = {UnmaskPolicy: ("view", "params"), RemaskPolicy: ("view", "commit", "params", "memory")}


class PolicyFault(TypeError):
    """A fault of a policy, as `Class.field: problem; fix`."""


def check_policy(policy: object, name: str, known: Mapping[str, type[Policy]]) -> type[Policy]:
    """Returns the policy of an entry point if it can be used.

    Args:
        policy: the value of the entry point.
        name: the name of the entry point.
        known: the policies loaded before, by name.

    Raises:
        PolicyFault: naming the class, the field and the fix.
    """
    if not isinstance(policy, type) or not issubclass(policy, UnmaskPolicy | RemaskPolicy):
        raise PolicyFault(f"{shown(policy)} is no subclass of UnmaskPolicy or RemaskPolicy; derive from one")
    fault = _Fault(policy)
    _check_struct(policy, name, known, fault)
    _check_attributes(policy, fault)
    fields = {field.name: field for field in _fields(policy, fault)}
    default = _default(policy, known, fault)
    unmasks = [kind() for kind in known.values() if issubclass(kind, UnmaskPolicy)]
    given: set[frozenset[str]] = set()
    for variant in _variants(default, fields):
        _check_answers(variant, fault)
        for beside in _beside(variant, unmasks, fault):
            given |= _block_param_names(variant, beside, fault)
    if len(given) > 1:
        every = " and ".join(str(sorted(names)) for names in sorted(given, key=sorted))
        fault("block_params", f"gives {every}, by its parameters", "give the same names in every case")
    for field in fields.values():
        _check_field(default, field, frozenset().union(*given), fault)
    return policy


class _Fault:
    """Raises PolicyFault for one policy."""

    def __init__(self, policy: type) -> None:
        self.name = policy.__qualname__

    def __call__(self, field: str, problem: str, fix: str) -> NoReturn:
        raise PolicyFault(f"{self.name}{'.' * bool(field)}{field}: {problem}; {fix}")

    def asked(self, method: str, function: Callable[[], Any]) -> Any:
        """The result of a method; an exception is a fault."""
        try:
            return function()
        except Exception as error:
            self(method, f"raises {type(error).__name__}: {error}", "return what its base class describes")


def _check_struct(policy: type[Policy], name: str, known: Mapping[str, type[Policy]], fault: _Fault) -> None:
    """Checks the struct's options: a policy is decoded from a union with all others."""
    config = policy.__struct_config__
    if issubclass(policy, UnmaskPolicy) and issubclass(policy, RemaskPolicy):
        fault("", "is an unmask policy and a remask policy", "derive from one of the two")
    if not config.frozen or config.array_like or config.tag_field != "type":
        fault("", "is no frozen struct in the form of its base class", "pass frozen=True and tag=... only")
    if policy.__struct_encode_fields__ != policy.__struct_fields__:
        fault("", "renames its fields", "leave out `rename` and `field(name=...)`")
    if config.tag != name:
        fault("", f"its tag is {config.tag!r}, the entry point's name {name!r}", f"pass tag={name!r}")
    if name in known:
        fault("", f"there is a policy named {name!r}", "use another name")


def _check_attributes(policy: type[Policy], fault: _Fault) -> None:
    """Checks the class attributes: kernel, memory and flags."""
    for field in policy.__struct_fields__:
        if hasattr(UnmaskPolicy, field) or hasattr(RemaskPolicy, field):
            fault(field, "is an attribute of policies", "use another name, or annotate it as ClassVar")
    parameters = KERNELS[UnmaskPolicy if issubclass(policy, UnmaskPolicy) else RemaskPolicy]
    form = f"make it a static method kernel({', '.join(parameters)})"
    if policy.kernel is None:
        fault("kernel", "is missing", form)
    if not callable(policy.kernel):
        fault("kernel", f"{shown(policy.kernel)} cannot be called", form)
    try:
        inspect.signature(policy.kernel).bind(*parameters)
    except ValueError:
        pass  # callables may have no signature
    except TypeError as error:
        fault("kernel", f"cannot be called with {len(parameters)} arguments: {error}", form)
    for flag in ("always_commits", "whole_canvas", "commits"):
        if not isinstance(getattr(policy, flag, False), bool):
            fault(flag, f"{shown(getattr(policy, flag))} is no bool", "set True or False in the class")
    if issubclass(policy, RemaskPolicy):
        _check_memory(policy.memory, fault)
    elif hasattr(policy, "memory"):
        fix = "leave it out, or derive from RemaskPolicy with commits = True"
        fault("memory", "is for remask policies: an unmask kernel gets none", fix)


def _check_memory(memory: object, fault: _Fault) -> None:
    fix = "give a tuple of MemoryField(name, per_slot, initial) with different identifiers as names"
    if not isinstance(memory, tuple) or not all(isinstance(field, MemoryField) for field in memory):
        fault("memory", f"{shown(memory)} is no tuple of MemoryField", fix)
    for i, field in enumerate(memory):
        is_name = isinstance(field.name, str) and field.name.isidentifier()
        if not is_name or field.name in [other.name for other in memory[:i]]:
            fault("memory", f"the name {shown(field.name)} is no identifier or there twice", fix)
        if not isinstance(field.per_slot, bool):
            fault("memory", f"per_slot of {field.name} is {shown(field.per_slot)}", "use True or False")
        # Minus infinity is the logarithm of no probability.
        if type(field.initial) is not float or not (_is_finite(field.initial) or math.isinf(field.initial)):
            fault("memory", f"initial of {field.name} is {shown(field.initial)}", "use a float of fp32")


def _fields(policy: type[Policy], fault: _Fault) -> Iterable[types.Field]:
    try:
        described = types.type_info(policy)
    except Exception as error:  # annotations may hold anything
        fault("", f"its annotations mean nothing: {error}", "import what they name at run time")
    assert isinstance(described, types.StructType), "policies are structs"
    for field in described.fields:
        if field.required:
            fault(field.name, "has no default", "give it one")
    return described.fields


def _default(policy: type[Policy], known: Mapping[str, type[Policy]], fault: _Fault) -> Policy:
    """The policy with its defaults, which must satisfy its bounds and survive encoding."""
    fields: dict[str, Any] = {}
    try:
        default = policy()
        fields = msgspec.structs.asdict(default)
        msgspec.convert({"type": tag(policy), **fields}, type=policy)
        kinds = (*known.values(), policy)
        travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(default), type=Union[kinds])  # noqa: UP007
    except Exception as error:  # __post_init__ and hooks may raise anything
        fields = {name: value for name, value in fields.items() if f"$.{name}`" in str(error)}
        for name, value in fields.items():
            fault(name, f"{shown(value)} is no valid default: {error}", "give one within the bounds")
        fault("", f"its defaults cannot be used: {error}", "give such as can be checked and sent")
    for name, value in msgspec.structs.asdict(travelled).items():
        if isinstance(value, float) and not math.isfinite(value):
            fault(name, f"{value} is no valid default: it is not finite", "give a finite one")
    return default


def _check_field(default: Policy, field: types.Field, given: frozenset[str], fault: _Fault) -> None:
    """Checks that a kernel can receive the field: as a string, or as an fp64 number without loss."""
    policy, members = type(default), _members(field.type)
    kinds = [kind for kind in members if not isinstance(kind, types.NoneType)]
    is_optional = len(kinds) < len(members)
    kind = kinds[0] if len(kinds) == 1 else None
    if isinstance(kind, types.LiteralType) and field.name in choices(policy) and not is_optional:
        if all(isinstance(word, str) for word in choices(policy)[field.name]):
            return
    elif isinstance(kind, types.IntType) and not _is_exact(kind):
        fix = "use Annotated[int, Meta(ge=..., le=...)]"
        fault(field.name, "is an int without bounds within -2**53 and 2**53, beyond which fp64 rounds", fix)
    elif isinstance(kind, types.IntType | types.FloatType | types.BoolType):
        zero = False if isinstance(kind, types.BoolType) else 0
        if is_optional and field.name not in given and _changed(default, field.name, zero) is not None:
            fix = "exclude 0 with Meta, or give the number in block_params"
            fault(field.name, "may be None and 0, which are the same to a kernel", fix)
        return
    hint = get_type_hints(policy)[field.name]
    name = hint.__name__ if type(hint) is type else str(hint).removeprefix("typing.")
    fix = "use int, float or bool, which may be None, or Literal['a', 'b', ...] of strings without None"
    fault(field.name, f"{name} is no type that a kernel can be given", fix)


def _members(kind: types.Type) -> list[types.Type]:
    """The member types of a union, or the type itself."""
    bare = _bare(kind)
    return [_bare(member) for member in bare.types] if isinstance(bare, types.UnionType) else [bare]


def _bare(kind: types.Type) -> types.Type:
    """The type without its metadata."""
    return _bare(kind.type) if isinstance(kind, types.Metadata) else kind


def _is_exact(kind: types.IntType) -> bool:
    least = kind.ge if kind.ge is not None else kind.gt
    largest = kind.le if kind.le is not None else kind.lt
    return least is not None and largest is not None and least >= -EXACT and largest <= EXACT


def _variants(default: Policy, fields: Mapping[str, types.Field]) -> Iterator[Policy]:
    """The defaults, and the defaults with one field changed: to each string, flag, None, or a number."""
    yield default
    for name, field in fields.items():
        for kind in _members(field.type):
            others: tuple[object, ...] = ()
            if isinstance(kind, types.LiteralType):
                others = kind.values
            elif isinstance(kind, types.BoolType):
                others = (False, True)
            elif isinstance(kind, types.NoneType):
                others = (None,)
            elif isinstance(kind, types.IntType | types.FloatType) and getattr(default, name) is None:
                others = (kind.ge, kind.le, 1)
            yield from filter(None, (_changed(default, name, other) for other in others))


def _changed(default: Policy, name: str, value: object) -> Policy | None:
    """The defaults with another value of one field; None if the policy refuses the value."""
    try:
        fields = {"type": tag(default), **msgspec.structs.asdict(default), name: value}
        return msgspec.convert(fields, type=type(default))
    except msgspec.ValidationError:
        return None


def _beside(policy: Policy, unmasks: Iterable[UnmaskPolicy], fault: _Fault) -> list[UnmaskPolicy | None]:
    """The unmask policies that a policy accepts, as in the check of a request."""
    if isinstance(policy, UnmaskPolicy):
        return [None]
    assert isinstance(policy, RemaskPolicy)
    accepted: list[UnmaskPolicy | None] = []
    for unmask in [None] if policy.commits else unmasks:
        try:
            policy.check(unmask)
        except InvalidRequest:
            continue
        except Exception as error:
            fault("check", f"raises {type(error).__name__}: {error}", "raise InvalidRequest, or nothing")
        accepted.append(unmask)
    return accepted


def _check_answers(policy: Policy, fault: _Fault) -> None:
    for method, known in (("random_streams", STREAMS), ("head_needs", NEEDS)):
        answer = fault.asked(method, getattr(policy, method))
        if not isinstance(answer, frozenset) or not answer <= known:
            fault(method, f"gives {shown(answer)}", f"give a frozenset of {', '.join(sorted(known))}")
    for method in FLAGS:
        answer = fault.asked(method, getattr(policy, method, lambda: False))
        if not isinstance(answer, bool):
            fault(method, f"gives {shown(answer)}", "give True or False")


def _block_param_names(policy: Policy, beside: UnmaskPolicy | None, fault: _Fault) -> set[frozenset[str]]:
    """Checks the values of `block_params`; returns the names in them."""
    names: set[frozenset[str]] = set()
    more = (beside,) if isinstance(policy, RemaskPolicy) else ()
    for block_lens in BLOCK_LENS:
        answer = fault.asked("block_params", lambda lens=block_lens: policy.block_params([*lens], *more))  # type: ignore[attr-defined]
        fix = "give a dict of lists with a finite number for each block"
        if not isinstance(answer, dict) or not all(isinstance(name, str) for name in answer):
            fault("block_params", f"gives {shown(answer)}", fix)
        for name, values in answer.items():
            is_whole = isinstance(values, list) and len(values) == len(block_lens)
            if not is_whole or not all(map(_is_finite, values)):
                fault("block_params", f"gives {name} = {shown(values)} for blocks of {block_lens}", fix)
        names.add(frozenset(answer))
    return names


def _is_finite(value: object) -> bool:
    """Whether the value is a number that is finite in fp32."""
    return isinstance(value, int | float) and abs(value) <= LARGEST
