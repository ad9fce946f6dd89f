"""The grid of a study: a TOML file, and the cells that it asks for.

A file names a model, arms (an unmask and a remask policy; `{t}` in them is replaced by each threshold) and
sections. A section is the product of its lists. Settings that mean the same run once: a block at or above the
canvas of its task is `whole`, ranks count only if tokens are drawn, and thresholds only if an arm has one.
"""

from __future__ import annotations

import itertools
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from remask import InvalidRequest, SamplingParams
from remask.benchmarks.study.task_files import DEFAULT_CHECKER, FileTask
from remask.benchmarks.study.tasks import STUDY_TASKS, GymTask, StudyTask
from remask.scheduler.errors import did_you_mean, invalid_field
from remask.scheduler.params import ResolvedParams, resolve

WHOLE = "whole"
THRESHOLD = "{t}"
SEED_STRIDE = 1 << 20  # between the seeds of two repetitions; a task has fewer prompts

Positive = Annotated[int, Meta(ge=1)]
Seed = Annotated[int, Meta(ge=0, lt=1 << 31)]
TaskName = Annotated[str, Meta(pattern=r"^[\w.-]+$")]  # names of pictures begin with it


class Arm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The policies of an arm, as `SamplingParams` takes them."""

    unmask: str | None = None
    remask: str | None = None

    @property
    def has_threshold(self) -> bool:
        return THRESHOLD in f"{self.unmask}{self.remask}"

    def at(self, threshold: float | None) -> Arm:
        """The arm with its threshold filled in."""
        if threshold is None:
            return self
        return Arm(
            *(
                None if text is None else text.replace(THRESHOLD, str(threshold))
                for text in (self.unmask, self.remask)
            )
        )


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A product of settings.

    Attributes:
        tasks: Names of tasks.
        arms: Names of arms.
        num_prompts: Prompts of each task.
        block_lengths: Slots per block, or "whole".
        thresholds: Values of `{t}` in the arms.
        temperatures: Temperatures of the proposals.
        ranks: See `SamplingParams`.
        seeds: Repetitions of arms that draw; others run once.
        n: Samples of each prompt if tokens are drawn; else one.
    """

    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    num_prompts: Positive
    block_lengths: tuple[int | Literal["whole"], ...]
    thresholds: tuple[float, ...] = ()
    temperatures: tuple[float, ...] = (0.0,)
    ranks: tuple[Literal["proposal", "top"], ...] = ("proposal",)
    seeds: tuple[Seed, ...] = (0,)
    n: Positive = 1


class Posterior(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The second stage: arms decode with a model that makes no error, the exact posterior of a Markov chain.

    Attributes:
        arms: Names of arms.
        block_lengths: Slots per block, or "whole".
        temperatures: Temperatures of the proposals.
        thresholds: Values of `{t}` in the arms.
        rank: See `SamplingParams`.
        num_samples: Sequences of each setting.
    """

    arms: tuple[str, ...]
    block_lengths: tuple[int | Literal["whole"], ...]
    temperatures: tuple[float, ...]
    thresholds: tuple[float, ...] = ()
    rank: Literal["proposal", "top"] = "top"
    num_samples: Positive = 8192


class OwnTask(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task that reasoning-gym generates, or that a file holds.

    Attributes:
        reasoning_gym: Name of a dataset of reasoning-gym.
        options: Settings of the dataset.
        file: JSON lines of prompts and answers (`remask.benchmarks.study.task_files`), relative to the grid.
        checker: Checker of the rows that do not say.
        max_tokens: Tokens of a canvas. A file may leave it out: those of the longest answer, and 4 more.
    """

    reasoning_gym: str | None = None
    options: dict[str, Any] = {}
    file: str | None = None
    checker: str = DEFAULT_CHECKER
    max_tokens: Positive | None = None

    def task(self, grid: Grid, folder: Path, allow_code: bool) -> StudyTask:
        """The task of a grid in this folder.

        Raises:
            InvalidRequest: a field is missing or does not go with another.
        """
        if self.file is not None:
            if self.reasoning_gym is not None or self.options:
                problem = "is not for the rows of a file; leave it out"
                raise InvalidRequest("reasoning_gym", self.reasoning_gym or self.options, problem)
            return FileTask(
                folder / self.file,
                grid.model,
                max_tokens=self.max_tokens,
                checker=self.checker,
                allow_code=allow_code,
            )
        if self.reasoning_gym is None or self.max_tokens is None:
            raise InvalidRequest("tasks", None, "give reasoning_gym and max_tokens, or a file")
        return GymTask(self.reasoning_gym, self.max_tokens, self.options)


class Grid(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A study.

    Attributes:
        arms: Arms by name.
        grid: The sections.
        tasks: Tasks by name, beside the built-in ones.
        model: Directory of a checkpoint, or "tiny".
        seed: Seed of the tasks' prompts.
        posterior: The second stage. None: there is none.
        timing_repetitions: Batches from which the cost of a forward is measured, for each setting.
    """

    arms: dict[str, Arm]
    grid: tuple[Section, ...]
    tasks: dict[TaskName, OwnTask] = {}
    posterior: Posterior | None = None
    model: str = "tiny"
    seed: Seed = 0
    timing_repetitions: Positive = 3


class Cell(msgspec.Struct, frozen=True, order=True):
    """One setting and how much of it is run. `block_length` None: the whole canvas."""

    task: str
    arm: str
    unmask: str | None
    remask: str | None
    threshold: float | None
    block_length: int | None
    temperature: float
    rank: str
    seed: int
    num_prompts: int
    n: int
    canvas_len: int

    @property
    def name(self) -> str:
        """A short name, unique within a grid."""
        block = WHOLE if self.block_length is None else str(self.block_length)
        parts = [self.task, self.arm, f"B={block}", f"T={self.temperature:g}"]
        if self.threshold is not None:
            parts.append(f"t={self.threshold:g}")
        if self.temperature > 0:
            parts.append(self.rank)
        return "/".join([*parts, f"seed={self.seed}"])

    def params(self, prompt: int, canvas_len: int | None = None) -> SamplingParams:
        """Parameters for a prompt. Cells of equal seeds share the random numbers of a prompt.

        Args:
            prompt: its number.
            canvas_len: tokens of its canvas; None: as the cell.
        """
        canvas_len = canvas_len or self.canvas_len
        return SamplingParams(
            max_tokens=canvas_len,
            block_length=min(self.block_length or canvas_len, canvas_len),
            unmask=self.unmask,
            remask=self.remask,
            temperature=self.temperature,
            rank=self.rank,  # type: ignore[arg-type]
            seed=self.seed * SEED_STRIDE + prompt,
            n=self.n,
            trace=True,
        )


def read_grid(path: Path) -> Grid:
    """A grid from a TOML file.

    Raises:
        InvalidRequest: the file cannot be read or is no grid; the error names the place.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidRequest("grid", str(path), f"cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest("grid", str(path), f"is no TOML: {error}") from None
    try:
        grid = msgspec.convert(content, Grid)
    except msgspec.ValidationError as error:
        place = str(error).rpartition(" - at ")[2].strip("`") if " - at " in str(error) else "$"
        raise invalid_field("", content, error).at(f"{path}, {place}") from None
    known = [*STUDY_TASKS, *grid.tasks]
    for index, section in enumerate(grid.grid):
        _check_section(grid, section, f"{path}, grid[{index}]")
        _check_names("tasks", section.tasks, known, f"{path}, grid[{index}]")
    if grid.posterior is not None:
        _check_section(grid, grid.posterior, f"{path}, posterior")
    if not grid.grid:
        raise InvalidRequest(f"{path}, grid", [], "must have a section")
    return grid


def tasks_of(grid: Grid, path: Path | str = "grid", *, allow_code: bool = False) -> dict[str, StudyTask]:
    """The tasks of a grid by name.

    Args:
        grid: the grid.
        path: its file.
        allow_code: whether checkers of the user's may run.

    Raises:
        InvalidRequest: a task of the grid is invalid; the error names the place.
    """
    found = dict(STUDY_TASKS)
    for name, own in grid.tasks.items():
        if name in STUDY_TASKS:
            raise InvalidRequest(f"{path}, tasks", name, "is the name of a built-in task; choose another")
        try:
            found[name] = own.task(grid, Path(path).parent, allow_code)
        except InvalidRequest as error:
            raise error.at(f"{path}, tasks.{name}") from None
    return found


def cells(grid: Grid, tasks: Mapping[str, StudyTask], path: Path | str = "grid") -> list[Cell]:
    """The cells of a grid, each once, in a fixed order. Of equal settings the most prompts and samples count.

    Args:
        grid: the grid.
        tasks: from `tasks_of`.
        path: the grid's file.

    Raises:
        InvalidRequest: policies are invalid or do not go together; the error names the place.
    """
    found: dict[Cell, tuple[int, int]] = {}
    for index, section in enumerate(grid.grid):
        try:
            for cell in _cells_of(grid, section, tasks):
                setting = msgspec.structs.replace(cell, num_prompts=0, n=0)
                num_prompts, n = found.get(setting, (0, 0))
                found[setting] = max(num_prompts, cell.num_prompts), max(n, cell.n)
        except InvalidRequest as error:
            raise error.at(f"{path}, grid[{index}]") from None
    every = [
        msgspec.structs.replace(setting, num_prompts=num_prompts, n=n)
        for setting, (num_prompts, n) in found.items()
    ]
    names = Counter(cell.name for cell in every)
    for name, count in names.items():
        if count > 1:
            raise InvalidRequest(
                f"{path}, grid", name, "names two settings; their values must differ in six digits"
            )
    return sorted(every, key=lambda cell: (cell.task, cell.temperature, cell.name))


def _check_section(grid: Grid, section: Section | Posterior, place: str) -> None:
    for name in ("tasks", "arms", "block_lengths", "temperatures", "ranks", "seeds"):
        if not getattr(section, name, True):
            raise InvalidRequest(f"{place}.{name}", [], "must not be empty")
    _check_names("arms", section.arms, list(grid.arms), place)
    for block_length in section.block_lengths:
        if block_length != WHOLE and int(block_length) < 1:
            raise InvalidRequest(f"{place}.block_lengths", block_length, "must be 1 or more, or 'whole'")
    wanting = next((arm for arm in section.arms if grid.arms[arm].has_threshold), None)
    if wanting is not None and not section.thresholds:
        raise InvalidRequest(f"{place}.thresholds", [], f"must not be empty: arm {wanting!r} has {THRESHOLD}")


def _check_names(name: str, entries: Sequence[str], known: Sequence[str], place: str) -> None:
    for entry in entries:
        if entry not in known:
            raise InvalidRequest(
                f"{place}.{name}", entry, f"is not known; {did_you_mean(entry, list(known))}"
            )


def _cells_of(grid: Grid, section: Section, tasks: Mapping[str, StudyTask]) -> Iterator[Cell]:
    for task in section.tasks:
        available = tasks[task].num_prompts
        if available is not None and section.num_prompts > available:
            problem = f"is more than the {available:,} prompts of {task!r}"
            raise InvalidRequest("num_prompts", section.num_prompts, problem)
        canvas_len = tasks[task].canvas_len
        for setting in arm_settings(grid, section, canvas_len):
            fields = {**setting, "task": task, "num_prompts": section.num_prompts, "canvas_len": canvas_len}
            is_hot = setting["temperature"] > 0
            for rank in section.ranks if is_hot else ("proposal",):
                n = section.n if is_hot else 1  # others differ by their seeds alone
                first = Cell(**fields, rank=rank, seed=section.seeds[0], n=n)
                try:
                    draws = _draws(resolve(first.params(0)))
                except InvalidRequest as error:
                    raise error.at(f"arm {setting['arm']!r}") from None
                for seed in section.seeds if draws else section.seeds[:1]:
                    yield msgspec.structs.replace(first, seed=seed)


def arm_settings(grid: Grid, asked: Section | Posterior, canvas_len: int) -> Iterator[dict[str, Any]]:
    """The product of arms, temperatures and block lengths, with the thresholds of each arm filled in. A block
    length is None if it is the whole canvas."""
    for name, temperature, block_length in itertools.product(
        asked.arms, asked.temperatures, asked.block_lengths
    ):
        arm = grid.arms[name]
        whole = block_length == WHOLE or int(block_length) >= canvas_len
        for threshold in asked.thresholds if arm.has_threshold else (None,):
            own = arm.at(threshold)
            yield {
                "arm": name,
                "unmask": own.unmask,
                "remask": own.remask,
                "threshold": threshold,
                "block_length": None if whole else int(block_length),
                "temperature": temperature,
            }


def _draws(params: ResolvedParams) -> bool:
    """Whether samples differ by their seeds."""
    policies = [policy for policy in (params.unmask, params.remask) if policy is not None]
    return params.sampling.temperature > 0 or any(policy.random_streams() for policy in policies)
