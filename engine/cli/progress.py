"""Progress of a long run, with rate and time left: a bar on a terminal, else a log line every ten seconds.

The rate is that of the last minute, so that the time left follows what the machine does now.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

logger = logging.getLogger(__name__)

WINDOW_SECONDS = 60.0
LINE_SECONDS = 10.0


def log_to_stderr() -> None:
    """Shows the engine's log as lines of the command."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="remask: %(message)s")


class ProgressDisplay:
    """Called with the name of the work, the number of lines done and the number of all; a context manager."""

    def __init__(self, unit: str = "lines") -> None:
        self._unit = unit
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._pause = 0.2 if console.is_terminal else LINE_SECONDS
        self._phase = ""
        self._task = None
        self._shown = time.monotonic()
        self._samples: deque[tuple[float, int]] = deque()  # of the last minute: time and how many were done

    def __enter__(self) -> ProgressDisplay:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)  # type: ignore[arg-type]

    def __call__(self, phase: str, num_done: int, total: int | None) -> None:
        now = time.monotonic()
        if phase != self._phase:
            self._start(phase, num_done, total, now)
        elif now - self._shown >= self._pause:
            self._show(num_done, total, now)

    def _start(self, phase: str, num_done: int, total: int | None, now: float) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(phase, total=total, completed=num_done, pace="")
        self._phase, self._shown = phase, now
        self._samples = deque([(now, num_done)])

    def _show(self, num_done: int, total: int | None, now: float) -> None:
        self._shown = now
        while len(self._samples) > 1 and now - self._samples[0][0] > WINDOW_SECONDS:
            self._samples.popleft()
        then, num_then = self._samples[0]
        self._samples.append((now, num_done))
        pace = pace_text(num_done - num_then, now - then, None if total is None else total - num_done)
        assert self._task is not None, "a phase starts before it is shown"
        self._bar.update(self._task, completed=num_done, pace=pace)
        if self._bar.disable:
            of = "" if total is None else f" of {total:,}"
            logger.info("%s: %s%s %s, %s", self._phase, f"{num_done:,}", of, self._unit, pace)


def pace_text(num: int, seconds: float, num_left: int | None) -> str:
    """`"12.3 a second, 4m10s left"`."""
    rate = num / seconds
    if num_left is None or rate == 0:
        return f"{rate:,.1f} a second"
    return f"{rate:,.1f} a second, {duration_text(num_left / rate)} left"


def duration_text(seconds: float) -> str:
    """`"3h05m"`, `"4m10s"` or `"7s"`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
