"""Checks of third parties' policies: each fault is refused when the policy is loaded, with the fix."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import pytest
from msgspec import Meta

from remask.scheduler.errors import InvalidRequest
from remask.scheduler.policies import MemoryField, Policy, RemaskPolicy, UnmaskPolicy
from remask.scheduler.policies.registry import Registry, load, registry
from remask.workers.strategies import kernel_of

Load = Callable[..., Registry]
Named = Literal["a", "b"]
PER_SLOT = MemoryField("m", per_slot=True, initial=0.0)


def unmask_kernel(view: Any, params: Any) -> Any: ...


def remask_kernel(view: Any, commit: Any, params: Any, memory: Any) -> Any: ...


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Load:
    """The registry with entry points of a package whose module holds these objects."""

    def loaded(**policies: object) -> Registry:
        module = ModuleType("remask_extra")
        vars(module).update(policies)
        monkeypatch.setitem(sys.modules, "remask_extra", module)
        return load(EntryPoint(name, f"remask_extra:{name}", "remask.strategies") for name in policies)

    return loaded


def unmask(
    fields: dict[str, tuple[Any, ...]] | None = None, *, tag: str = "new", **namespace: Any
) -> type[UnmaskPolicy]:
    """An unmask policy `New` with fields (type and default) and attributes."""
    namespace = {"kernel": staticmethod(unmask_kernel), **namespace}
    own = [(name, *rest) for name, rest in (fields or {}).items()]
    return msgspec.defstruct("New", own, bases=(UnmaskPolicy,), namespace=namespace, frozen=True, tag=tag)  # type: ignore[return-value]


def remask(fields: dict[str, tuple[Any, ...]] | None = None, **namespace: Any) -> type[RemaskPolicy]:
    """A remask policy `New`."""
    namespace = {"kernel": staticmethod(remask_kernel), **namespace}
    own = [(name, *rest) for name, rest in (fields or {}).items()]
    return msgspec.defstruct("New", own, bases=(RemaskPolicy,), namespace=namespace, frozen=True, tag="new")  # type: ignore[return-value]


def fault(loaded: Load, policy: object) -> str:
    """The message about one faulty policy of an entry point. Asserts that all other policies are loaded."""
    found = loaded(new=policy)
    own = registry()
    assert (found.unmask.keys(), found.remask.keys()) == (own.unmask.keys(), own.remask.keys())
    (message,) = found.broken.values()
    assert "\n" not in message
    assert message.startswith("entry point new = remask_extra:new: ")
    return message.removeprefix("entry point new = remask_extra:new: ")


class Everything(RemaskPolicy, frozen=True, tag="everything"):
    """All that is supported."""

    count: Annotated[int, Meta(ge=-(2**53), le=2**53)] = 3
    share: float = 0.1
    bound: Annotated[float, Meta(ge=0.0)] = 1.0
    strict: bool = True
    word: Named = "a"
    steps: Annotated[int, Meta(gt=0, lt=100)] | None = None
    low: Annotated[float, Meta(le=-1.0, description="below")] | None = -1.5
    eta: Annotated[float, Meta(ge=0.0)] | None = None

    commits = True
    memory = (PER_SLOT, MemoryField("n", per_slot=False, initial=1.5))
    kernel = staticmethod(remask_kernel)

    def block_params(self, block_lens: Any, unmask: Any) -> dict[str, list[float]]:
        return {"eta": [0.5 if self.eta is None else self.eta] * len(block_lens)}


def test_all_that_is_documented_is_loaded(loaded: Load) -> None:
    found = loaded(everything=Everything, new=unmask({"p": (float, 0.5)}))
    assert (found.broken, found.remask["everything"]) == ({}, Everything)
    assert "new" in found.unmask


@pytest.mark.parametrize("own", [*registry().unmask.values(), *registry().remask.values()])
def test_remasks_own_policies_pass_as_third_parties(own: type[Policy], loaded: Load) -> None:
    namespace = {"kernel": staticmethod(kernel_of(own))}
    copy = msgspec.defstruct("New", [], bases=(own,), namespace=namespace, frozen=True, tag="new")
    assert loaded(new=copy).broken == {}


@pytest.mark.parametrize(
    ("field", "problem", "fix"),
    [
        ((str, "x"), "str is no type", "Literal['a', 'b', ...]"),
        ((list[int], ()), "list[int] is no type", "use int, float or bool"),
        ((float | int, 1), "float | int is no type", "use int, float or bool"),
        ((Literal[1, 2], 1), "Literal[1, 2] is no type", "of strings"),
        ((Literal["a", None], "a"), "is no type", "without None"),
        ((Named | None, "a"), "is no type", "without None"),
        ((int, 1), "int without bounds", "Annotated[int, Meta"),
        ((Annotated[int, Meta(ge=0)], 1), "int without bounds", "Annotated[int, Meta"),
        ((Annotated[int, Meta(ge=0, le=2**53 + 1)], 1), "fp64 rounds", "Annotated[int, Meta"),
        ((Annotated[int, Meta(ge=0, le=9)] | None, None), "None and 0", "exclude 0 with Meta"),
        ((Annotated[float, Meta(ge=-1.0, le=1.0)] | None, 1.0), "None and 0", "block_params"),
        ((bool | None, None), "None and 0", "block_params"),
        ((float,), "has no default", "give it one"),
        ((Annotated[float, Meta(le=1.0)], 2.0), "2.0 is no valid default", "within the bounds"),
        ((Named, "c"), "'c' is no valid default", "within the bounds"),
        ((float, float("inf")), "inf is no valid default", "finite"),
    ],
)
def test_a_field_that_a_kernel_cannot_be_given_is_refused(
    field: tuple[Any, ...], problem: str, fix: str, loaded: Load
) -> None:
    message = fault(loaded, unmask({"p": field}))
    assert message.startswith("New.p: ")
    assert problem in message
    assert fix in message


@pytest.mark.parametrize(
    ("memory", "problem"),
    [
        ([PER_SLOT], "no tuple of MemoryField"),
        ((("m", True, 0.0),), "no tuple of MemoryField"),
        ((PER_SLOT, PER_SLOT), "'m' is no identifier or there twice"),
        ((PER_SLOT._replace(name="a b"),), "'a b' is no identifier"),
        ((PER_SLOT._replace(per_slot=1),), "per_slot of m is 1"),
        ((PER_SLOT._replace(initial=0),), "initial of m is 0"),
        ((PER_SLOT._replace(initial=1e39),), "initial of m is 1e+39"),
        ((PER_SLOT._replace(initial=float("nan")),), "initial of m is nan"),
    ],
)
def test_wrong_memory_is_refused(memory: object, problem: str, loaded: Load) -> None:
    message = fault(loaded, remask(memory=memory))
    assert message.startswith("New.memory: ")
    assert problem in message


def test_an_unmask_policy_has_no_memory(loaded: Load) -> None:
    message = fault(loaded, unmask(memory=(PER_SLOT,)))
    assert message.startswith("New.memory: is for remask policies")
    assert "derive from RemaskPolicy with commits = True" in message


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        (unmask(kernel=None), "is missing"),
        (unmask(kernel=3), "3 cannot be called"),
        (unmask(kernel=staticmethod(remask_kernel)), "cannot be called with 2 arguments"),
        (remask(kernel=staticmethod(unmask_kernel)), "cannot be called with 4 arguments"),
    ],
)
def test_a_wrong_kernel_is_refused(policy: type, problem: str, loaded: Load) -> None:
    message = fault(loaded, policy)
    assert message.startswith(f"New.kernel: {problem}")
    assert "make it a static method kernel(view, " in message


def test_callables_of_other_kinds_are_kernels(loaded: Load) -> None:
    class Callable_:
        def __call__(self, view: Any, params: Any, more: Any = None) -> Any: ...

    for kernel in (Callable_(), staticmethod(lambda *arguments: None), unmask_kernel, max):
        assert loaded(new=unmask(kernel=kernel)).broken == {}


def fails(*_: object) -> Any:
    raise ZeroDivisionError("division by zero")


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (fails, "raises ZeroDivisionError: division by zero"),
        (lambda *_: None, "gives None"),
        (lambda *_: {1: [1.0]}, "gives {1: [1.0]}"),
        (lambda *_: {"t": 1.0}, "gives t = 1.0"),
        (lambda *_: {"t": [1.0]}, "gives t = [1.0] for blocks of (8, 8, 8, 8)"),
        (lambda self, lens, *_: {"t": ["1"] * len(lens)}, "gives t = ['1']"),
        (lambda self, lens, *_: {"t": [float("nan")] * len(lens)}, "gives t = [nan]"),
        (lambda self, lens, *_: {"t": [1.0] * len(lens)} if len(lens) > 1 else {}, "gives [] and ['t']"),
        (lambda self, *_: {} if self.word == "a" else fails(), "raises ZeroDivisionError"),
        (lambda self, *_: {} if self.n is None else fails(), "raises ZeroDivisionError"),
    ],
)
@pytest.mark.parametrize("make", [unmask, remask])
def test_block_params_must_give_a_number_for_each_block(
    make: Any, answer: Any, problem: str, loaded: Load
) -> None:
    fields = {"word": (Named, "a"), "n": (Annotated[int, Meta(ge=1, le=9)] | None, None)}
    message = fault(loaded, make(fields, block_params=answer))
    assert message.startswith(f"New.block_params: {problem}")


def test_block_params_need_not_serve_what_check_refuses(loaded: Load) -> None:
    def check(self: Any, unmask: Any) -> None:
        if self.word == "b" or unmask.__struct_config__.tag != "schedule":
            raise InvalidRequest("remask", self.word, "is not for this")

    def block_params(self: Any, block_lens: Any, unmask: Any) -> dict[str, list[float]]:
        return unmask.block_params(block_lens) if self.word == "a" else fails()

    both = {"check": check, "block_params": block_params}
    assert loaded(new=remask({"word": (Named, "a")}, **both)).broken == {}


@pytest.mark.parametrize(
    ("namespace", "problem"),
    [
        ({"head_needs": lambda self: frozenset({"margn"})}, "head_needs: gives frozenset({'margn'})"),
        ({"random_streams": lambda self: ["accept"]}, "random_streams: gives ['accept']"),
        ({"random_streams": fails}, "random_streams: raises ZeroDivisionError"),
        ({"needs_shadow_rows": lambda self: None}, "needs_shadow_rows: gives None"),
        ({"verifies": fails}, "verifies: raises ZeroDivisionError"),
        ({"check": fails}, "check: raises ZeroDivisionError"),
        ({"commits": "yes"}, "commits: 'yes' is no bool"),
    ],
)
def test_wrong_answers_to_the_engine_are_refused(
    namespace: dict[str, Any], problem: str, loaded: Load
) -> None:
    assert fault(loaded, remask(**namespace)).startswith(f"New.{problem}")


class Both(UnmaskPolicy, RemaskPolicy, frozen=True, tag="new"):
    kernel = staticmethod(unmask_kernel)


class Array(UnmaskPolicy, frozen=True, tag="new", array_like=True):
    kernel = staticmethod(unmask_kernel)


class OtherTag(UnmaskPolicy, frozen=True, tag="new", tag_field="kind"):
    kernel = staticmethod(unmask_kernel)


class Renamed(UnmaskPolicy, frozen=True, tag="new", rename="camel"):
    the_share: float = 0.5
    kernel = staticmethod(unmask_kernel)


class FieldNotAttribute(RemaskPolicy, frozen=True, tag="new"):
    memory: tuple[MemoryField, ...] = (PER_SLOT,)  # type: ignore[misc]
    kernel = staticmethod(remask_kernel)


class Unresolved(UnmaskPolicy, frozen=True, tag="new"):
    p: NowhereToBeFound = 1  # type: ignore[name-defined]  # noqa: F821
    kernel = staticmethod(unmask_kernel)


class RefusesItself(UnmaskPolicy, frozen=True, tag="new"):
    kernel: ClassVar[Any] = staticmethod(unmask_kernel)

    def __post_init__(self) -> None:
        raise ValueError("not today\nnor tomorrow")


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        (3, "3 is no subclass"),
        (Policy, "is no subclass"),
        (unmask(tag="old"), "New: its tag is 'old', the entry point's name 'new'; pass tag='new'"),
        (unmask(tag=7), "New: its tag is 7"),  # type: ignore[arg-type]
        (Both, "Both: is an unmask policy and a remask policy"),
        (Array, "Array: is no frozen struct in the form of its base class; pass frozen=True and tag="),
        (OtherTag, "OtherTag: is no frozen struct in the form"),
        (Renamed, "Renamed: renames its fields"),
        (FieldNotAttribute, "FieldNotAttribute.memory: is an attribute of policies; use another name"),
        (Unresolved, "Unresolved: its annotations mean nothing: name 'NowhereToBeFound' is not defined"),
        (RefusesItself, "RefusesItself: its defaults cannot be used: not today nor tomorrow; give"),
    ],
)
def test_what_is_no_policy_is_refused(policy: object, problem: str, loaded: Load) -> None:
    assert problem in fault(loaded, policy)


def test_an_import_that_fails_in_any_way_harms_no_other_policy() -> None:
    def fails(error: BaseException) -> Any:
        class Failing(EntryPoint):
            def load(self) -> Any:
                raise error

        return Failing("new", "remask_extra:new", "remask.strategies")

    for error in (ImportError("gone"), SystemExit(3), RuntimeError("two\nlines")):
        assert load([fails(error)]).broken["new"].endswith(" ".join(repr(error).split()))


def test_a_name_is_taken_once(loaded: Load) -> None:
    found = loaded(wino=Everything, new=unmask({"p": (float, 0.5)}))
    assert found.remask["wino"] is registry().remask["wino"]
    assert "tag is 'everything'" in found.broken["wino"]
    first = unmask(tag="threshold")
    assert "there is a policy named 'threshold'" in loaded(threshold=first).broken["threshold"]
