"""Runs a grid into a directory; an interrupted run continues where it was.

The directory holds `study.json` (grid, model and environment), `costs.json`, and `parts/` with the
rows of finished requests. At the end the parts become `samples.parquet`, in an order that does not depend on
when requests finished. `agreement.json` and `posterior.json` are the other two stages.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import pyarrow
import pyarrow.csv
import pyarrow.parquet

from remask import LLM, InvalidRequest, RequestOutput
from remask.benchmarks.environment import environment_stamp
from remask.benchmarks.study import agreement, posterior
from remask.benchmarks.study.costs import Cost, key_of, measure, seconds_of
from remask.benchmarks.study.files import read_json, write_json, write_table
from remask.benchmarks.study.grid import Cell, cells, read_grid, tasks_of
from remask.benchmarks.study.measures import cell_row
from remask.benchmarks.study.samples import SCHEMA, rows_of, setting_of
from remask.benchmarks.study.task_files import FileTask
from remask.embedded import model_directory
from remask.workers.models.denoiser import load_denoiser

MAX_LIVE = 4096  # samples in the engine at a time
FLUSH_SECONDS = 10.0  # what an interrupt may cost
MAX_PART_ROWS = 4096

Progress: TypeAlias = Callable[[int, int], None]


class Study:
    """A grid and its directory.

    Args:
        path: TOML file of the grid.
        directory: where the run is; None: `runs/` and the name of the file.
        allow_code: whether checkers of the user's may run.

    Attributes:
        grid, cells: what is run.
        directory: where.

    Raises:
        InvalidRequest: the grid is invalid, or the directory holds a run of another grid or model.
    """

    def __init__(self, path: Path, directory: Path | None = None, *, allow_code: bool = False) -> None:
        self.grid = read_grid(path)
        self.tasks = tasks_of(self.grid, path, allow_code=allow_code)
        self.cells = cells(self.grid, self.tasks, path)
        posterior.settings(self.grid)
        self.directory = directory or Path("runs") / path.stem
        content = msgspec.json.decode(msgspec.json.encode(self.grid))  # as the file will give it
        self._identity = {"grid": content, "model": fingerprint(self.grid.model)}
        if files := {name: task.digest for name, task in self.tasks.items() if isinstance(task, FileTask)}:
            self._identity["task file"] = files
        about = self._read("study.json")
        for name, own in self._identity.items():
            if about is not None and about.get(name) != own:
                problem = f"holds a run of another {name}; give another --output, or remove it"
                raise InvalidRequest("output", str(self.directory), problem)

    @property
    def num_samples(self) -> int:
        return sum(cell.num_prompts * cell.n for cell in self.cells)

    def time(self, llm: LLM, progress: Progress) -> None:
        """Measures what a forward costs in each setting, if it was not measured before.

        Args:
            llm: an engine for the grid's model.
            progress: called with the batches done and all of them.
        """
        if not (self.directory / "study.json").exists():
            self._write("study.json", {**self._identity, "environment": environment_stamp()})
        measure(
            llm,
            self.cells,
            self.tasks,
            self.grid.seed,
            self.grid.timing_repetitions,
            self.costs,
            lambda costs: self._write("costs.json", msgspec.to_builtins(costs)),
            progress,
        )

    def run(self, llm: LLM, progress: Progress) -> None:
        """Runs all samples that have not run yet; `progress` is called with the samples done and all."""
        if not self.samples_path.exists():
            self._run_samples(llm, progress)
            self._merge()
        if not self.cells_path.exists():
            self._write_cells()

    def verify(self, llm: LLM, progress: Progress) -> None:
        """Compares shadow rows with the exact verifier, if the grid has cells of it.

        Args:
            llm: an engine for the grid's model.
            progress: called with the cells done and all.
        """
        wanted = agreement.exact_cells(self.cells)
        done = self._read("agreement.json") or []
        if not wanted or {row["cell"] for row in done} == {cell.name for cell in wanted}:
            return
        texts, check = self._texts(), llm.engine.intake.check

        def prompts_of(cell: Cell) -> list[list[int]]:
            own = self.tasks[cell.task].prompts(llm, texts[cell.task][: cell.num_prompts])
            return [check(prompt, cell.params(0)).ids for prompt in own]

        with model_directory(self.grid.model) as directory:
            model = load_denoiser(directory, dtype="float32", device="cpu")
        save = partial(self._write, "agreement.json")
        agreement.measure(model, wanted, prompts_of, done, save, progress)

    def decode_posterior(self, progress: Progress) -> None:
        """Runs the second stage, if the grid has one; `progress` is called with the settings done and all."""
        wanted = posterior.settings(self.grid)
        done = self._read("posterior.json") or []
        if len(done) < len(wanted):
            posterior.measure(wanted, done, partial(self._write, "posterior.json"), progress)

    @property
    def costs(self) -> list[Cost]:
        """The costs that have been measured."""
        return msgspec.convert(self._read("costs.json") or [], list[Cost])

    @property
    def samples_path(self) -> Path:
        return self.directory / "samples.parquet"

    @property
    def cells_path(self) -> Path:
        return self.directory / "cells.parquet"

    def seconds_left(self) -> float:
        """An estimate of what is left to run, from the measured costs."""
        done = Counter(name for name, _ in self._done())
        left = [
            msgspec.structs.replace(cell, num_prompts=cell.num_prompts - done[cell.name])
            for cell in self.cells
        ]
        return seconds_of(left, self.costs)

    def _run_samples(self, llm: LLM, progress: Progress) -> None:
        done = self._done()
        num_done = sum(
            cell.n for cell in self.cells for i in range(cell.num_prompts) if (cell.name, i) in done
        )
        texts = self._texts()
        waiting: dict[str, tuple[Cell, int]] = {}
        rows: list[dict[str, Any]] = []
        flushed = time.monotonic()
        served = llm.engine.serve(self._requests(llm, texts, done, waiting), max_live=MAX_LIVE)
        try:
            for output in served:
                rows += self._rows(llm, texts, *waiting.pop(output.request_id), output)
                num_done += len(output.outputs)
                progress(num_done, self.num_samples)
                if len(rows) >= MAX_PART_ROWS or time.monotonic() - flushed > FLUSH_SECONDS:
                    self._write_part(rows)
                    flushed = time.monotonic()
        finally:
            served.close()
            self._write_part(rows)

    def _requests(
        self,
        llm: LLM,
        texts: dict[str, list[str]],
        done: set[tuple[str, int]],
        waiting: dict[str, tuple[Cell, int]],
    ) -> Iterator[Any]:
        """Requests of all cells, prompt by prompt, so that many cells share a batch."""
        intake = llm.engine.intake
        prompts = {task: self.tasks[task].prompts(llm, own) for task, own in texts.items()}
        for index in range(max(cell.num_prompts for cell in self.cells)):
            for cell in self.cells:
                if index < cell.num_prompts and (cell.name, index) not in done:
                    canvas_len = self.tasks[cell.task].canvas_of(texts[cell.task][index])
                    checked = intake.check(prompts[cell.task][index], cell.params(index, canvas_len))
                    request = intake.request(checked)
                    waiting[request.request_id] = cell, index
                    yield request

    def _rows(
        self, llm: LLM, texts: dict[str, list[str]], cell: Cell, index: int, output: RequestOutput
    ) -> list[dict[str, Any]]:
        task, text, tokenizer = self.tasks[cell.task], texts[cell.task][index], llm.tokenizer
        assert tokenizer is not None, "tasks are text"
        answers = [tokenizer.encode(answer, add_special_tokens=False) for answer in task.valid_answers(text)]
        return rows_of(cell, task, index, text, output, answers)

    def _texts(self) -> dict[str, list[str]]:
        """The prompts of each task."""
        most: dict[str, int] = {}
        for cell in self.cells:
            most[cell.task] = max(most.get(cell.task, 0), cell.num_prompts)
        return {task: self.tasks[task].texts(self.grid.seed, count) for task, count in most.items()}

    def _parts(self) -> list[Path]:
        return sorted((self.directory / "parts").glob("*.parquet"))

    def _done(self) -> set[tuple[str, int]]:
        """Cells and prompts whose samples are in a part, or in the merged file."""
        paths = [self.samples_path] if self.samples_path.exists() else self._parts()
        done: set[tuple[str, int]] = set()
        for path in paths:
            table = pyarrow.parquet.read_table(path, columns=["cell", "prompt"])
            done.update(zip(table["cell"].to_pylist(), table["prompt"].to_pylist(), strict=True))
        return done

    def _write_part(self, rows: list[dict[str, Any]]) -> None:
        """Writes rows as one more part and forgets them. They are forgotten first, so that an interrupt
        writes none twice; those that it loses run again."""
        if not rows:
            return
        taken = list(rows)
        rows.clear()
        parts = self._parts()
        number = int(parts[-1].stem) + 1 if parts else 0
        write_table(
            pyarrow.Table.from_pylist(taken, schema=SCHEMA), self.directory / "parts" / f"{number:06}.parquet"
        )

    def _merge(self) -> None:
        """Joins the parts, by cell, prompt and sample."""
        table = pyarrow.concat_tables([pyarrow.parquet.read_table(path) for path in self._parts()])
        place = {cell.name: number for number, cell in enumerate(self.cells)}
        order = pyarrow.array([place[name] for name in table["cell"].to_pylist()])
        keys = [("order", "ascending"), ("prompt", "ascending"), ("sample", "ascending")]
        table = table.append_column("order", order).sort_by(keys).drop_columns("order")
        write_table(table, self.samples_path)
        shutil.rmtree(self.directory / "parts")

    def _write_cells(self) -> None:
        """Writes a row for each cell, and both tables as CSV, which has no lists."""
        table = pyarrow.parquet.read_table(self.samples_path)
        by_key = {cost.key: cost.microseconds for cost in self.costs}
        every = itertools.groupby(table.to_pylist(), key=lambda sample: sample["cell"])
        texts = self._texts()
        rows = [
            setting_of(cell)
            | cell_row(cell, self.tasks[cell.task], texts[cell.task], list(samples), by_key[key_of(cell)])
            for cell, (_, samples) in zip(self.cells, every, strict=True)
        ]
        names = dict.fromkeys(name for row in rows for name in row)  # some cells have no pass@16
        found = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
        pyarrow.csv.write_csv(table.drop_columns("commit_steps"), self.directory / "samples.csv")
        pyarrow.csv.write_csv(found, self.directory / "cells.csv")
        write_table(found, self.cells_path)

    def _read(self, name: str) -> Any:
        return read_json(self.directory / name)

    def _write(self, name: str, content: Any) -> None:
        write_json(content, self.directory / name)


def fingerprint(model: str) -> str:
    """Identifies a checkpoint by its configuration and its weights.

    Raises:
        InvalidRequest: there is no such checkpoint.
    """
    digest = hashlib.sha256()
    with model_directory(model) as directory:
        files = sorted(directory.glob("*.safetensors"))
        if not files or not (directory / "config.json").exists():
            raise InvalidRequest(
                "model", model, "has no weights or no config.json; give a checkpoint directory, or 'tiny'"
            )
        digest.update((directory / "config.json").read_bytes())
        for path in files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
