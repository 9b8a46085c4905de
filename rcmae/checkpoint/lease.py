"""One writer a run: a lease in the run's folder that a second training respects, and that is fenced
when it passes on.

`leases/00000003.json` says who holds generation 3 and, when it was a take-over, from which
committed step. A file is linked into place whole, so of two jobs that reach for a generation one
gets it. The holder beats: a thread counts up in `leases/00000003.beat`. Who finds a lease watches
the count on its own clock; clocks of two nodes are never compared. A count that stands still for
`timeout_s` means the holder is gone or cut off, and the next generation may be taken. A scheduler
that starts a job again has given its earlier start up, whatever still runs of it on a node it
cannot reach: the later start takes the run over at once.

A network's disk may not answer for a while. A file that cannot be read is read again; a holder
looks by names alone for a later generation, and stops when its own beat is as old as others wait.

A holder that was paused or cut off can wake up at any instant, so being careful is not enough:
every manifest carries its writer's generation, and readers ignore what an older generation wrote
beyond the step a take-over started from (`Fence`). Its last checkpoints are then as if they never
were.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rcmae.errors import Refused
from rcmae.process import launchers
from rcmae.process.alive import boot, died_here

# others may lie in the folder, a file system's or an editor's
_OURS = re.compile(r"(\d{8})\.json")
_READ_AGAIN_S = 3.0  # for so long a file that cannot be read is tried again


class LeaseLost(RuntimeError):
    """Another job took over the run; this one must not write any more."""


class LeaseHeld(Refused):
    """Another job is training in this folder."""


class LeaseUnreadable(LeaseHeld, OSError):
    """A lease file cannot be read, so it is unknown who trains in this folder."""


@dataclass(frozen=True)
class Holder:
    """Who took a generation, where it runs, and what it found committed."""

    generation: int
    # newest valid checkpoint at the take-over; what older generations wrote beyond it does not
    # count
    from_step: int
    token: str
    host: str
    boot: str  # distinguishes restarts of a host, and containers of the same name
    pid: int
    job: str  # the scheduler's job id, empty without one
    restart: int = 0  # how often the scheduler had started that job before


@dataclass(frozen=True)
class Fence:
    """Which checkpoints count, given who took over the run when."""

    from_steps: tuple[tuple[int, int], ...]  # (generation, from_step)

    def allows(self, generation: int, step: int) -> bool:
        """Whether a checkpoint that this generation wrote counts."""
        return all(step <= begin for later, begin in self.from_steps if later > generation)


def fence(run_dir: Path) -> Fence:
    """The fence of a run as it stands now. Raises LeaseUnreadable."""
    holders = _holders(run_dir / "leases")
    return Fence(tuple((holder.generation, holder.from_step) for holder in holders))


def newest_generation(run_dir: Path) -> int:
    """The number of the run's newest lease, by file names; 0 if there was none. Raises OSError."""
    return max(_generations(run_dir / "leases"), default=0)


def exit_status(run_dir: Path, status: int) -> int:
    """The status that a rank ends with: 0 where a later start of its own job has taken the run
    over.

    Whatever still runs of the earlier start on a node that was cut off, and comes back, must not be
    seen to fail: its srun would end the job's step of that number, and that is the later start's by
    now.
    """
    with contextlib.suppress(LeaseHeld, OSError):
        job, restart = _this_start()
        last = _newest(_holders(run_dir / "leases"))
        if last is not None and last.job == job != "" and last.restart > restart:
            print(
                f"rcmae: start {last.restart} of this job took over the run; start {restart} "
                "ends with 0",
                flush=True,
            )
            return 0
    return status


class Lease:
    """The right to write a run's folder. One process of a job holds it: rank 0.

    Args:
        run_dir: the run's folder; made if it is not there.
        timeout_s: a holder whose count stands still this long on the observer's clock is taken to
            be gone.
        wait_s: how long to wait for a holder that is alive to finish, before giving up.
        newest_step: called at a take-over: the newest valid committed step, 0 if there is none.
        say: told what is waited for.

    Raises:
        LeaseHeld: another job holds it and is alive, or that cannot be known.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        timeout_s: float,
        wait_s: float,
        newest_step: Callable[[], int],
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._folder = run_dir / "leases"
        self._timeout_s = timeout_s
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lost: str | None = None
        self.holder = self._acquire(wait_s, newest_step, say)
        self._beats = 0
        self._written = time.monotonic()
        self._done = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)
        self._thread.start()

    @property
    def generation(self) -> int:
        """This holder's generation, from 1."""
        return self.holder.generation

    def check(self) -> None:
        """Look whether the lease is still ours.

        Raises:
            LeaseLost: it is not, or the folder could not be written for so long that others may
                think us gone.
            OSError: the folder cannot be read now.
        """
        self._look()
        if self._lost:
            raise LeaseLost(self.why_lost)

    def holds(self) -> bool:
        """Whether no other job has taken over the run, by a look now; False if that cannot be
        seen.
        """
        try:
            return _generations(self._folder)[-1:] == [self.generation] and self._is_mine()
        except OSError:
            return False

    @property
    def lost(self) -> bool:
        """Whether the lease has passed on, or may have: this job's own beat is too old. Cheap."""
        if self._lost is None and self._silent_s() > self._timeout_s:
            # the thread is stuck, or this process was paused
            with contextlib.suppress(OSError):
                self._beat()
            with contextlib.suppress(OSError):
                self._look()
        return self._lost is not None

    @property
    def why_lost(self) -> str:
        """Who took over the run, for a message."""
        return f"{self._folder.parent}: {self._lost}; this job stops and writes nothing more"

    def release(self) -> None:
        """Say that this job is done with the folder, and stop beating.

        A second call does nothing.
        """
        if not self._done.is_set():
            self._done.set()
            self._thread.join(self._timeout_s)  # it may hang in a disk that does not answer
            if self.holds():
                with contextlib.suppress(OSError):  # others see that this process is gone
                    self._write_beat("released")

    # acquiring

    def _acquire(
        self, wait_s: float, newest_step: Callable[[], int], say: Callable[[str], None]
    ) -> Holder:
        job, restart = _this_start()
        give_up = time.monotonic() + wait_s
        told = False
        while True:
            last = _newest(_holders(self._folder))
            earlier_start = last is not None and last.job == job != "" and last.restart < restart
            if last is None or earlier_start or self._is_gone(last):
                mine = Holder(
                    generation=last.generation + 1 if last else 1,
                    from_step=newest_step(),
                    token=secrets.token_hex(8),
                    host=socket.gethostname(),
                    boot=boot(),
                    pid=os.getpid(),
                    job=job,
                    restart=restart,
                )
                if _link(self._folder, mine):
                    return mine
                continue  # another job was faster
            run = self._folder.parent
            if time.monotonic() > give_up:
                raise LeaseHeld(
                    f"{run} is being trained by {_who(last)}, which is alive; wait for it, stop "
                    "it, or use another run.dir"
                )
            if not told:
                say(f"waiting up to {wait_s:.0f} s for {_who(last)}, which holds {run}")
                told = True

    def _is_gone(self, holder: Holder) -> bool:
        """Whether a holder released the run, died on this host, or stood still for the time-out.

        Waits to see it.
        """
        file = self._beat_file(holder.generation)
        first = _read(file)
        begin = time.monotonic()
        while True:
            now = _read(file)
            if now == "released":
                return True
            if died_here(holder.host, holder.boot, holder.pid):
                return True
            if now != first:
                return False
            if time.monotonic() - begin > self._timeout_s:
                return True
            time.sleep(min(0.2, self._timeout_s / 20))

    # holding

    def _beat_file(self, generation: int) -> Path:
        return self._folder / f"{generation:08d}.beat"

    def _beat(self) -> None:
        self._beats += 1
        self._write_beat(f"{self._beats:08d}")
        self._written = time.monotonic()

    def _write_beat(self, text: str) -> None:
        # in place and of one length: a full disk takes that, and a network's disk shows it soon
        handle = os.open(self._beat_file(self.generation), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.write(handle, text.encode())
        finally:
            os.close(handle)

    def _silent_s(self) -> float:
        """Seconds since the last beat that was written."""
        return time.monotonic() - self._written

    def _look(self) -> None:
        """See whether the lease has passed on. Raises OSError."""
        there = _generations(self._folder)
        if there[-1:] > [self.generation]:
            self._lost = _taken_by(self._folder / f"{there[-1]:08d}.json")
        elif not there:  # somebody deleted the folder, and nobody trains there: it is ours still
            self._folder.mkdir(parents=True, exist_ok=True)
            _link(self._folder, self.holder)
            self._beat()
        elif self.generation not in there or not self._is_mine():
            self._lost = (
                f"its folder was deleted, {_taken_by(self._folder / f'{there[-1]:08d}.json')}"
            )
        elif self._silent_s() > self._timeout_s:
            self._lost = f"no beat could be written for {self._silent_s():.0f} s"

    def _is_mine(self) -> bool:
        """Whether the file of this generation is this job's; also where it cannot be read."""
        try:
            holder = _holder(self._folder / f"{self.generation:08d}.json")
        except (OSError, ValueError, TypeError, RecursionError):
            return True
        return holder.token == self.holder.token

    def _keep_beating(self) -> None:
        while self._lost is None and not self._done.wait(self._timeout_s / 6):
            # whatever comes of one beat or look, the next is tried: without this thread two jobs
            # would train
            for act in (self._beat, self._look):
                with contextlib.suppress(Exception):
                    act()


def _this_start() -> tuple[str, int]:
    """The scheduler's job, empty without one, and how often it had started that before."""
    return os.environ.get("SLURM_JOB_ID", ""), launchers.restarts()


def _who(holder: Holder) -> str:
    job = f"job {holder.job}, " if holder.job else ""
    return f"{job}process {holder.pid} on {holder.host} (start {holder.generation} of the run)"


def _newest(holders: Sequence[Holder]) -> Holder | None:
    return max(holders, key=lambda holder: holder.generation, default=None)


def _generations(folder: Path) -> list[int]:
    """Those whose files are there, from the first, can they be read or not. Raises OSError."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(found[1]) for found in map(_OURS.fullmatch, names) if found)


def _holders(folder: Path) -> list[Holder]:
    """Who held the lease so far, by generation. Waits a little for what cannot be read.

    Raises:
        LeaseUnreadable: a holder's file cannot be read.
    """
    give_up = time.monotonic() + _READ_AGAIN_S
    found = []
    try:
        generations = _generations(folder)
    except OSError as error:
        raise LeaseUnreadable(f"{folder} cannot be read: {error}") from error
    for generation in generations:
        path = folder / f"{generation:08d}.json"
        while True:
            try:
                found.append(_holder(path))
                break
            except (OSError, ValueError, TypeError, RecursionError) as error:
                if time.monotonic() > give_up:
                    raise LeaseUnreadable(
                        f"{path} cannot be read ({error}); if no job trains here, delete it"
                    ) from error
            time.sleep(0.1)
    return found


def _holder(path: Path) -> Holder:
    """Who took a generation. Raises OSError, ValueError, TypeError or RecursionError."""
    holder = Holder(**json.loads(path.read_text()))
    least = {"generation": 1, "from_step": 0, "pid": 1, "restart": 0}
    for key, value in asdict(holder).items():
        if type(value) is not (int if key in least else str):
            raise TypeError(f"its {key} is {value!r:.80}")
        if isinstance(value, int) and not least[key] <= value < 2**31:
            raise ValueError(f"its {key} is {value!r:.80}")
    if holder.generation != int(path.stem):
        raise ValueError(f"it is of generation {holder.generation}")
    return holder


def _taken_by(path: Path) -> str:
    """Who took over the run, for a message, whether its file can be read or not."""
    try:
        holder = _holder(path)
    except (OSError, ValueError, TypeError, RecursionError):
        return f"another job (start {int(path.stem)} of the run) took over this run"
    return f"{_who(holder)} took over this run from step {holder.from_step}"


def _link(folder: Path, holder: Holder) -> bool:
    """Put the holder's file in place whole; False where another job has done so."""
    aside = folder / f".{holder.token}"
    with aside.open("w") as file:
        json.dump(asdict(holder), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    try:
        # fails if it is there, on network file systems too
        os.link(aside, folder / f"{holder.generation:08d}.json")
    except FileExistsError:
        return False
    finally:
        aside.unlink()
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
