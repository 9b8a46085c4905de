"""Where every rank is, so that those who lose one can say which, on what host, and what it was
doing.

Each rank has a thread that beats: it writes host, process, step and phase to
`run.dir/ranks/00000003/00007.json` (the lease's generation, the rank). A collective that a peer
never joins only says that it waited too long, and under NCCL not even that reaches Python; the
beats distinguish a lost rank from a late one. Files, because they need no other rank to be
alive, rank 0 not either, and can still be read when all is over. Clocks of two hosts are never
compared: a rank is silent if its beat stands still while somebody watches it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from rcmae.checkpoint.lease import exit_status, newest_generation
from rcmae.process import waits
from rcmae.run.preempt import FAILED, write_outcome

_OURS = re.compile(r"\d{8}")  # a generation's folder
# of a failure of this rank's own: as it is it may well fail again
MENDED = (
    "Once it is mended, the same command resumes from the newest complete checkpoint, or begins "
    "where there is none"
)
NAMED = 8  # ranks that a message names at most
STOPS_WITHOUT_S = 30.0  # a peer that is silent, once a stop is asked for
# phases before a step is counted: a rank in one of them is in the step after those that are done
_IN_A_STEP = ("reading samples", "agreeing on the step", "computing the step")
WAY_OUT = "Start the same command again: it resumes from the newest complete checkpoint"


@dataclass(frozen=True)
class Place:
    """What a rank last said of itself."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    beat: int
    ended: str = ""  # why it left, where it could say so

    def __str__(self) -> str:
        how = f"ended with {self.ended}, " if self.ended else "silent, last seen "
        return (
            f"rank {self.rank} on {self.host} (process {self.pid}) {how}at step {self.step}, "
            f"{self.phase}"
        )


class Loss(NamedTuple):
    """What `Presence.explain` found out."""

    message: str
    of_a_peer: bool  # else the error is this rank's own
    speaks: bool  # this rank is the lowest that is left: it writes down what happened


class Presence:
    """This rank's beat, and what it knows of the others'. Every rank makes one; nothing in it is
    collective.

    Args:
        run_dir: the run's folder.
        generation: of the lease: beats of an earlier job are not mixed up with this one's.
        rank: this process among all.
        world: how many there are; one alone writes no beats.
        timeout_s: of collectives. A rank that stands still and sees a peer silent, each for half of
            it, ends itself; for STOPS_WITHOUT_S, where it was asked to stop.
        interval_s: between two beats; by default such that the file system sees at most 32 small
            writes a second.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        generation: int,
        rank: int,
        world: int,
        timeout_s: float,
        interval_s: float | None = None,
    ) -> None:
        self.generation = generation
        self.interval_s = interval_s or min(max(1.0, world / 32), timeout_s / 10)
        self._run_dir = run_dir
        self._folder = run_dir / "ranks" / f"{generation:08d}"
        self._rank = rank
        self._world = world
        self._timeout_s = timeout_s
        self._host = socket.gethostname()
        self._beats = 0
        self._ended = ""  # why this rank ends, once it does
        self._at = (0, "starting")  # step, phase
        self._since = time.monotonic()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        if world == 1:
            return
        if rank == 0:
            self._clear_away_earlier_jobs()
        with contextlib.suppress(OSError):  # as in _beat
            self._folder.mkdir(parents=True, exist_ok=True)
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, name="presence", daemon=True)
        self._thread.start()

    def at(self, step: int, phase: str) -> None:
        """Say what this rank does from now on. Costs nothing: the thread writes it."""
        self._at = (step, phase)
        self._since = time.monotonic()

    def doing(self) -> str:
        """What this rank said last that it does, with the step that is under way."""
        step, phase = self._at
        if phase in _IN_A_STEP:
            step += 1
        return f"step {step} ({phase}, for {time.monotonic() - self._since:.0f} s)"

    def awaited(self) -> str:
        """Which other ranks are not where this one waits, by what they last said."""
        mine = self._at[1]
        others = [place for place in self._peers().values() if place is None or place.phase != mine]
        shown = [str(place) if place else "a silent rank" for place in others[:NAMED]]
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        return f"{'; '.join(shown) or 'the other ranks'}{more}"

    def leave(self) -> None:
        """Stop beating, at a good end. A second call does nothing."""
        self._stop()
        self._file(self._rank).unlink(missing_ok=True)

    def explain(self, error: BaseException) -> Loss:
        """Say that this rank ends with an error, and look who was gone before. Takes four beats.

        A peer that died this moment shows only by not beating again.
        """
        self._stop()
        if self._world == 1:
            return Loss(MENDED, False, True)
        self._ended = type(error).__name__
        if text := str(error).strip():
            self._ended += f": {text.splitlines()[0][:200]}"
        quiet = _Quiet(self)
        ended = quiet.ended()  # before us, so not because of us
        self._beat()
        for _ in range(4):
            time.sleep(self.interval_s)
            quiet.look()
        silent = quiet.longer_than(2.5 * self.interval_s)
        if silent or ended:
            lowest = min(set(range(self._world)) - set(silent))
            return Loss(f"{self._told(silent, ended)}. {WAY_OUT}", True, self._rank == lowest)
        return Loss(
            f"the other ranks were alive: the failure is on this rank. {MENDED}",
            False,
            self._rank == 0,
        )

    # beating

    def _clear_away_earlier_jobs(self) -> None:
        for old in self._folder.parent.glob("*"):
            if old != self._folder and _OURS.fullmatch(old.name):
                shutil.rmtree(old, ignore_errors=True)

    def _keep_beating(self) -> None:
        quiet: _Quiet | None = None
        while not self._done.wait(self.interval_s):
            written = self._beat()
            patience_s = self._patience_s()
            if not written or time.monotonic() - self._since < patience_s:
                # what cannot be written by one cannot by others: their silence means nothing then
                quiet = None
                continue
            quiet = quiet or _Quiet(self)
            quiet.look()
            silent = quiet.longer_than(patience_s - 2 * self.interval_s)
            ended = quiet.ended()
            if (silent or ended) and not self._done.is_set():
                self._give_up(silent, ended)

    def _patience_s(self) -> float:
        """How long to stand still for a peer that is silent: no save is to be had without it."""
        if waits.asked() is None:
            return self._timeout_s / 2
        return min(self._timeout_s / 2, max(STOPS_WITHOUT_S, 4 * self.interval_s))

    def _give_up(self, silent: Sequence[int], ended: Sequence[Place]) -> NoReturn:
        """End this process: its main thread is in a collective that cannot complete."""
        step, phase = self._at
        waited = f"waited {time.monotonic() - self._since:.0f} s at step {step}, {phase}"
        lost = silent[0] if silent else ended[0].rank
        told = f"{self._told(silent, ended)}. {WAY_OUT}"
        self._ended = f"rank {lost} lost: {waited}"
        try:
            self._beat()
            self.write_outcome(told, again=True)
            print(f"rcmae: rank {self._rank} {waited}; {told}", file=sys.stderr, flush=True)
        finally:
            os._exit(exit_status(self._run_dir, FAILED))

    def write_outcome(self, reason: str, *, again: bool) -> None:
        """Say in outcome.json that the run ended so, unless a rank of this job has said how, or
        another job has the run.

        Any rank may call, whoever comes first.
        """
        with contextlib.suppress(OSError):  # a full disk: the exit status has to do
            path = self._run_dir / "outcome.json"  # an earlier job's is deleted at every start
            if not path.exists() and newest_generation(self._run_dir) == self.generation:
                step, _ = self._at
                write_outcome(self._run_dir, status=FAILED, step=step, reason=reason, again=again)

    def _beat(self) -> bool:
        """Write where this rank is; whether that could be done."""
        self._beats += 1
        step, phase = self._at
        place = Place(self._rank, self._host, os.getpid(), step, phase, self._beats, self._ended)
        text = json.dumps(asdict(place)).ljust(1024)
        for _ in range(2):
            try:
                # in place and of one length: NFS shows who opens a file its last bytes, but a
                # renamed one minutes late
                handle = os.open(self._file(self._rank), os.O_WRONLY | os.O_CREAT, 0o644)
                with open(handle, "w") as file:
                    file.write(text)
                return True
            except OSError:  # somebody deleted the folder, or the disk refuses
                with contextlib.suppress(OSError):
                    self._folder.mkdir(parents=True, exist_ok=True)
        return False

    def _stop(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    # watching

    def _file(self, rank: int) -> Path:
        return self._folder / f"{rank:05d}.json"

    def _peers(self) -> dict[int, Place | None]:
        """What each other rank last said; None of one that nothing can be read of."""
        return {rank: self._read(rank) for rank in range(self._world) if rank != self._rank}

    def _read(self, rank: int) -> Place | None:
        try:
            return Place(**json.loads(self._file(rank).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _told(self, silent: Sequence[int], ended: Sequence[Place]) -> str:
        """Who is lost, for a message."""
        lines = [str(self._read(rank) or f"rank {rank} silent since its launch") for rank in silent]
        if not silent:
            # who lost a peer ended with its collective's error: others come first
            lines = [str(place) for place in sorted(ended, key=_is_of_a_collective)]
        more = f"; and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
        return f"lost {'; '.join(lines[:NAMED])}{more}"


def _is_of_a_collective(place: Place) -> bool:
    """Whether a rank ended because it had lost another."""
    return any(word in place.ended.lower() for word in ("gloo", "nccl", " lost"))


class _Quiet:
    """For how long each peer's beat has stood still while this process was looking, and ran."""

    def __init__(self, presence: Presence) -> None:
        self._presence = presence
        self._looked = time.monotonic()
        self._last = presence._peers()
        self._quiet_s = dict.fromkeys(self._last, 0.0)

    def look(self) -> None:
        # of a time in which this process was paused itself only two beats count: its peers may have
        # been as well
        elapsed = min(time.monotonic() - self._looked, 2 * self._presence.interval_s)
        self._looked = time.monotonic()
        now = self._presence._peers()
        for rank, place in now.items():
            alive = place is not None and (place.ended != "" or place != self._last[rank])
            self._quiet_s[rank] = 0.0 if alive else self._quiet_s[rank] + elapsed
        self._last = now

    def ended(self) -> list[Place]:
        return [place for place in self._last.values() if place is not None and place.ended]

    def longer_than(self, seconds: float) -> list[int]:
        return [rank for rank, quiet_s in self._quiet_s.items() if quiet_s > seconds]
