"""The floors of the packages, read off their import statements; nothing is imported."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {  # bottom up: folder, import name
    "scheduler": "remask.scheduler",
    "workers": "remask.workers",
    "engine": "remask",
    "benchmarks": "remask.benchmarks",
}
# The command line starts measurements, inside its functions only.
COMMANDS_THAT_MEASURE = re.compile(r"remask\.cli\.")


class Import(NamedTuple):
    module: str
    target: str  # a module of ours, or another distribution's
    names: tuple[str, ...]  # what is taken from the target
    when: str  # "import", "call" (inside a function) or "typing"


def modules() -> dict[str, Path]:
    """Files by import name."""
    found = {}
    for folder, package in FLOORS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports_of(module: str, node: ast.AST, when: str = "import") -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(module, alias.name, (), when)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}: relative imports do not say which floor they reach"
            assert child.module is not None
            names = {alias.name: f"{child.module}.{alias.name}" for alias in child.names}
            for full in set(names.values()) & MODULES.keys():
                yield Import(module, full, (), when)
            taken = tuple(name for name, full in names.items() if full not in MODULES)
            if taken:
                yield Import(module, child.module, taken, when)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports_of(module, child, "call" if when == "import" else when)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from imports_of(module, child, "typing")
        else:
            yield from imports_of(module, child, when)


IMPORTS = [
    found for name, path in MODULES.items() for found in imports_of(name, ast.parse(path.read_text("utf-8")))
]


def is_ours(target: str) -> bool:
    return target.split(".")[0] == "remask"


def floor(module: str) -> int:
    """Number of the floor from below; the longest package name that fits decides."""
    fitting = [package for package in FLOORS.values() if f"{module}.".startswith(f"{package}.")]
    return list(FLOORS.values()).index(max(fitting, key=len))


def loaded_by(module: str) -> set[str]:
    """What importing a module imports by statements of ours, packages above modules included."""
    loaded: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in loaded:
            continue
        loaded.add(name)
        if is_ours(name):
            waiting += [name.rpartition(".")[0]] * ("." in name)
            waiting += [i.target for i in IMPORTS if (i.module, i.when) == (name, "import")]
    return loaded


def test_every_import_of_ours_names_a_module_of_the_tree() -> None:
    assert len(MODULES) > 50
    assert {"remask", "remask.scheduler.params", "remask.workers.step"} <= MODULES.keys()
    assert [found for found in IMPORTS if is_ours(found.target) and found.target not in MODULES] == []


def test_no_import_runs_upward() -> None:
    upward = [i for i in IMPORTS if is_ours(i.target) and floor(i.target) > floor(i.module)]
    assert [i for i in upward if i.when == "import" or not COMMANDS_THAT_MEASURE.match(i.module)] == []
    assert upward, "the commands that measure"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for found in IMPORTS:
        if found.when == "import" and is_ours(found.target):
            graph[found.module].add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("name", ["torch", "ray", "transformers", "triton"])
def test_the_scheduler_is_plain_python(name: str) -> None:
    users = {i.module for i in IMPORTS if i.target.split(".")[0] == name}
    assert users, "some floor uses it"
    assert [module for module in users if floor(module) == 0] == []


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("remask", {"torch", "ray", "transformers"}),
        ("remask.cli", {"torch", "ray", "remask.benchmarks"}),
        ("remask.options", {"torch", "ray", "transformers"}),
        ("remask.workers.executors.base", {"ray", "transformers"}),
        ("remask.llm", {"ray", "remask.benchmarks"}),
    ],
)
def test_an_import_is_spared_what_it_does_not_need(module: str, never: set[str]) -> None:
    loaded = {".".join(name.split(".")[:n]) for name in loaded_by(module) for n in (1, 2)}
    assert not never & loaded


def test_no_module_takes_anothers_private_names() -> None:
    private = [
        found for found in IMPORTS if is_ours(found.target) and any(n.startswith("_") for n in found.names)
    ]
    assert private == []


def test_no_file_is_longer_than_400_lines() -> None:
    folders = ("engine", "scheduler", "workers", "benchmarks", "tests", "docs", "examples")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 300
    assert [str(path) for path in paths if len(path.read_text(encoding="utf-8").splitlines()) > 400] == []
