"""How many cores this process may use: not how many the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")


def usable() -> int:
    """Cores that were given to this process: by its mask, and by its group's quota of time."""
    allowed = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min(allowed, _quota())))


def of_a_rank(ranks_of_node: int, *, bound: bool = False) -> int:
    """Its part of them.

    Args:
        ranks_of_node: how many share the node.
        bound: the launcher gives each its own, where it gives less than all.
    """
    if bound and usable() < (os.sysconf("SC_NPROCESSORS_ONLN") or 1):
        return usable()
    return max(1, usable() // ranks_of_node)


def _quota() -> float:
    """Cores of time that the tightest of this process's groups allows; inf without a limit."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    found = [math.inf]
    for line in lines:
        if line.count(":") < 2:
            continue
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            found += _limits(_GROUPS, place, _of_version_2)
        elif "cpu" in controllers.split(","):
            for root in (_GROUPS / controllers, _GROUPS / "cpu"):
                found += _limits(root, place, _of_version_1)
    return min(found)


def _limits(root: Path, place: str, read: Callable[[Path], float | None]) -> list[float]:
    """Of a group and those above it; of a container's root where the path is the host's."""
    parts = Path(place.lstrip("/"))
    folders = [root, *(root / each for each in (parts, *parts.parents))]
    return [limit for folder in folders if (limit := read(folder)) is not None]


def _of_version_2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _of_version_1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
        return None if quota <= 0 else quota / period
    except (OSError, ValueError, ZeroDivisionError):
        return None
