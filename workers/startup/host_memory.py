"""The memory of the machine that a process may still use."""

from __future__ import annotations

from pathlib import Path

from remask.scheduler.errors import InvalidRequest

MEMINFO = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")  # of a container


def available_bytes(meminfo: Path = MEMINFO, group: Path = GROUP) -> int | None:
    """Bytes of memory that are free, or hold nothing but copies of files; None: this system does not say.

    A container has the rest of its own limit if that is less.
    """
    try:
        lines = meminfo.read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            files = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
            free = min(free, max(0, int(limit) - int(used) + files))
    except (OSError, ValueError):  # no container, or one of an older kind
        pass
    return free


def check_room(num_bytes: int, available: int | None, weights: object, where: str = "this machine") -> None:
    """Raises InvalidRequest if new weights do not fit into host memory beside what is there.

    Args:
        num_bytes: of the weights.
        available: see `available_bytes`.
        weights: for the error.
        where: for the error.
    """
    if available is not None and num_bytes > available:
        sizes = f"take {num_bytes / 1e9:.2f} GB of host memory, and {where} has {available / 1e9:.2f} GB free"
        given = str(weights) if isinstance(weights, Path) else weights
        raise InvalidRequest("weights", given, f"{sizes}; free memory, or make a new engine")
