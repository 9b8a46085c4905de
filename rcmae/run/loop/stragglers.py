"""Which rank holds all others up, and by what.

A rank is late if it takes longer than the median rank for its samples, its forward passes or its
saves, by more than a twentieth of a step, in each part of the last hundred steps. A mean over all
of them would name a rank for one hiccup, and each single step for nothing at all. Seconds for
samples and saves count only as far as the rank comes late to where the ranks of a step first wait
for each other: who leaves a step before the others waits longer for its samples and delays nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rcmae import dist
from rcmae.run.loop.stopwatch import Own, Stopwatch
from rcmae.run.records.metrics import MetricsLog

STEPS = 100  # that a rank must be late for
PART = STEPS // 4  # steps, in each of which it must be late; more where fewer are logged
SHARE = 0.05  # of a step
# less is not worth a name: what a host does beside the training takes as long
LEAST_S = 0.005

Seconds = NDArray[np.float64]  # of each rank, a step

# cause -> what the rank does, and where to look
CAUSES = {
    "data": (
        "waits for its samples",
        "look at that host's cores, disk and network, and at data.workers",
    ),
    "compute": (
        "computes its forward passes",
        "look at that host's device: its clock, its temperature, other programs (rcmae doctor)",
    ),
    "save": (
        "copies and writes its part of checkpoints",
        "look at that host's memory and its link to the checkpoints' disk",
    ),
}


class Part(NamedTuple):
    """Some steps on end, as means."""

    steps: int
    step_s: float  # of a step
    late: Seconds  # [causes, ranks]

    def plus(self, other: Part) -> Part:
        """These steps and the following ones."""
        steps = self.steps + other.steps
        share = other.steps / steps
        step_s = self.step_s + share * (other.step_s - self.step_s)
        return Part(steps, step_s, self.late + share * (other.late - self.late))

    def is_late(self) -> NDArray[np.bool_]:
        """Each rank, by cause: [causes, ranks]."""
        return self.late > max(SHARE * self.step_s, LEAST_S)


class Late(NamedTuple):
    """A rank that is late, over some steps."""

    rank: int
    seconds: float  # a step
    share: float  # of a step
    steps: int


def arrivals(met: Seconds) -> Seconds:
    """Seconds that each rank comes after the earliest to where a step's ranks wait for each other.

    No clock of one host is compared with another's: all go on together, so who waits least comes
    last.

    Args:
        met: each rank's wait in it.
    """
    return met.max() - met


def lateness(ranks: Sequence[Own]) -> Seconds:
    """By how much each rank holds the median one up, of two the faster: [causes, ranks]."""
    data, compute, save, met = np.array(ranks).T
    late = _beyond_median(arrivals(met))
    return np.stack(
        [
            np.minimum(_beyond_median(data), late),
            _beyond_median(compute),  # the others wait in later collectives of the step
            np.minimum(_beyond_median(save), late),
        ]
    )


class Lately:
    """The last hundred steps, or a few more."""

    def __init__(self) -> None:
        self._parts: deque[Part] = deque()
        self._coming: Part | None = None

    def add(self, some: Part) -> bool:
        """Add steps; whether a part is whole with them, and there are enough to judge by."""
        self._coming = self._coming.plus(some) if self._coming else some
        if self._coming.steps < PART:
            return False
        self._parts.append(self._coming)
        self._coming = None
        while len(self._parts) > 2 and self._steps() - self._parts[0].steps >= STEPS:
            self._parts.popleft()
        return len(self._parts) > 1 and self._steps() >= STEPS

    def late(self) -> dict[str, Late]:
        """The rank that is late in each part, by cause; where several are, the latest."""
        whole = self._parts[0]
        for part in list(self._parts)[1:]:
            whole = whole.plus(part)
        always = np.all([part.is_late() for part in self._parts], axis=0)
        found = {}
        for row, cause in enumerate(CAUSES):
            if always[row].any():
                rank = int(np.where(always[row], whole.late[row], -np.inf).argmax())
                seconds = float(whole.late[row, rank])
                found[cause] = Late(rank, seconds, seconds / whole.step_s, whole.steps)
        return found

    def is_over(self, cause: str, rank: int) -> bool:
        """Whether a rank is late in no part."""
        row = list(CAUSES).index(cause)
        return not any(part.is_late()[row, rank] for part in self._parts)

    def _steps(self) -> int:
        return sum(part.steps for part in self._parts)


class Stragglers:
    """Compares the ranks at logged steps, and names the late one.

    Args:
        stopwatch: of this rank.
        hosts: of each rank.
        log: where it is told.
    """

    def __init__(self, stopwatch: Stopwatch, hosts: Sequence[str], log: MetricsLog) -> None:
        self._stopwatch = stopwatch
        self._hosts = hosts
        self._log = log
        self._lately = Lately()
        self._named: dict[str, int] = {}  # cause -> rank

    def compare(self, step: int, *, steps: int, step_s: float, data_s: float) -> dict[str, float]:
        """What metrics.jsonl gets of the slowest and the median rank. Collective: every rank calls.

        Args:
            step: that is logged.
            steps: since the last call.
            step_s, data_s: means over these, of this rank: of a step, of its wait for samples.

        Returns:
            nothing where there is one rank alone.
        """
        if not self._stopwatch.is_needed:
            return {}
        own = self._stopwatch.read(data_s)
        ranks = [Own(*numbers) for numbers in dist.gather_numbers(own)]
        if self._lately.add(Part(max(steps, 1), step_s, lateness(ranks))):
            self._judge(step)
        data, compute, _, met = np.array(ranks).T
        return {
            **_slowest("data_wait", data),
            **_slowest("compute", compute),
            **_slowest("arrival", arrivals(met)),
        }

    def _judge(self, step: int) -> None:
        late = self._lately.late()
        for cause, found in late.items():
            if self._named.get(cause) != found.rank:
                self._end(step, cause)
                self._begin(step, cause, found)
        for cause, rank in list(self._named.items()):
            if self._lately.is_over(cause, rank):
                self._end(step, cause)

    def _begin(self, step: int, cause: str, found: Late) -> None:
        self._named[cause] = found.rank
        who = self._who(found.rank, cause)
        about = {"seconds_a_step": found.seconds, "share": found.share, "steps": found.steps}
        self._log.event("late_rank", step=step, **who, **about)
        what, look = CAUSES[cause]
        self._log.say(
            f"rank {found.rank} on {who['host']} is late: the other ranks wait for it "
            f"{found.seconds:.3f} s a step ({found.share:.0%} of one) over the last {found.steps} "
            f"steps, while it {what}; {look}"
        )

    def _end(self, step: int, cause: str) -> None:
        rank = self._named.pop(cause, None)
        if rank is not None:
            self._log.event("late_rank_over", step=step, **self._who(rank, cause))

    def _who(self, rank: int, cause: str) -> dict[str, Any]:
        return {"rank": rank, "host": self._hosts[rank], "cause": cause}


def _beyond_median(seconds: Seconds) -> Seconds:
    return seconds - _median(seconds)


def _median(seconds: Seconds) -> float:
    """The lower one, where two are in the middle."""
    return float(np.sort(seconds)[(len(seconds) - 1) // 2])


def _slowest(name: str, seconds: Seconds) -> dict[str, float]:
    rank = int(seconds.argmax())
    return {
        f"{name}_slowest_s": float(seconds[rank]),
        f"{name}_median_s": _median(seconds),
        f"{name}_slowest_rank": rank,
    }
