"""The processes that read for a rank, and what becomes of them when the system kills one.

A worker keeps no state, so one that is gone (out of memory, or its fork server was killed) takes
nothing with it: all of a rank's workers are restarted from the read that is next. torch's loader
cannot replace one of several. How often is counted, and limited: what kills them every time is not
mended by more of them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from rcmae.config import Recipe
from rcmae.data.workers import ReadersContext, end_with_owner, fork_server
from rcmae.errors import counted

# torch's, of more workers than cores: rcmae plan and doctor say what is needed
warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)

LOSSES_IN_A_ROW = 3  # without a read in between; then there is no use in another
LOSSES = 50  # of a job
_SHARED = Path("/dev/shm")
_BATCHES = 3  # of a worker at a time: two ready, one in the making
_LARGEST_BOXES = 25.0  # times a view's pixels, where decode_margin is without bound
_LONGEST_SOCKET = 107  # bytes of its path
_SOCKET = "/pymp-xxxxxxxx/listener-xxxxxxxx"  # as multiprocessing makes it, in its folder
_SEEN_WITHIN_S = 1.0  # a process that was killed shows it by then


class WorkersLost(RuntimeError):
    """Workers were killed too often; says how, and what to look at."""


class Workers:
    """Who reads the items of an order, one after the other.

    Args:
        make: a loader of that order, whose processes start when it is iterated over.
    """

    def __init__(self, make: Callable[[], DataLoader[Any]]) -> None:
        self._make = make
        self._loader: DataLoader[Any] | None = make()  # its server imports torch from now on
        self._iterator: Iterator[Any] = iter(())
        self._told: list[str] = []
        self._count = 0

    def reads(self, start_at: Callable[[int], None]) -> Generator[Any, None, None]:
        """What they read, from the first item on; whoever was killed is replaced.

        Args:
            start_at: told at which item the order is to begin, before its processes start.

        Raises:
            WorkersLost: they are killed again and again.
        """
        done = in_a_row = 0
        started = False
        while True:
            assert self._loader is not None, "the workers are closed"
            try:
                if not started:
                    start_at(done)
                    self._iterator = iter(self._loader)
                    started = True
                read = next(self._iterator)
            except StopIteration:
                return
            except Exception as error:
                in_a_row += 1
                self._replace(error, in_a_row)
                started = False
                continue
            yield read
            done += 1
            in_a_row = 0

    def missing(self) -> WorkersLost | None:
        """What to raise where a rank waits for a read: one of them is dead. Any thread may ask."""
        lost = _lost(self._iterator)
        return WorkersLost("; ".join(lost)) if lost else None

    def drain(self) -> list[str]:
        """Losses since the last call, in words."""
        told = self._told
        self._told = []
        return told

    def close(self) -> None:
        """End them now."""
        _stop(self._iterator)
        self._loader = None
        self._iterator = iter(())

    def _replace(self, error: Exception, in_a_row: int) -> None:
        """Make another loader. Raises the error where no worker was lost, or WorkersLost."""
        lost = _lost(self._iterator, wait_s=_SEEN_WITHIN_S)
        starting = isinstance(error, OSError) and self._iterator_is_new()
        if not lost and not starting:
            raise error
        told = "; ".join(lost) or f"data workers could not be started ({error})"
        self._count += 1
        if in_a_row > LOSSES_IN_A_ROW or self._count > LOSSES:
            raise WorkersLost(
                f"{told}; lost {self._count} times in this job, {in_a_row} in a row: see the "
                "memory of the node (dmesg), and lower data.workers or batch.per_device"
            ) from error
        self._told.append(f"{told}; restarted ({self._count} of {LOSSES} times)")
        _stop(self._iterator)
        self._iterator = iter(())
        self._loader = self._make()

    def _iterator_is_new(self) -> bool:
        """Whether the loader has workers and none of them has started."""
        wants = self._loader is not None and self._loader.num_workers > 0
        return wants and not isinstance(self._iterator, _MultiProcessingDataLoaderIter)


def _lost(reads: Iterator[Any], wait_s: float = 0.0) -> list[str]:
    """How each worker that should be alive came to its end, in words."""
    if not isinstance(reads, _MultiProcessingDataLoaderIter):
        return []
    end = time.monotonic() + wait_s
    while True:
        dead = [worker for worker in reads._workers if not worker.is_alive()]
        gone = [worker for worker in dead if worker.exitcode != 0]  # 0: its work was done
        if gone or time.monotonic() >= end:
            return [_fate(worker.pid, worker.exitcode) for worker in gone]
        time.sleep(0.05)


def _fate(pid: int | None, exitcode: int | None) -> str:
    how = f"ended with status {exitcode}"
    if exitcode is not None and exitcode < 0:
        with contextlib.suppress(ValueError):
            how = f"was killed by {signal.Signals(-exitcode).name}"
    elif exitcode == 255:  # nobody is left to tell
        how = "was lost with its fork server"
    return f"data worker {pid} {how}"


def batch_bytes(recipe: Recipe, world: int) -> int:
    """Of a micro-batch on its way from a worker: uint8 views, or decoded boxes where a device
    resizes them. These have up to (2 x data.decode_margin)^2 times a view's pixels, and a quarter
    of that on the whole.
    """
    height, width = recipe.model.image_hw
    images = recipe.batch.per_device or max(1, recipe.batch.images // max(world, 1))
    boxes = recipe.data.decode_margin**2 if recipe.data.resize == "device" else 1.0
    return int(images * recipe.model.in_channels * height * width * min(boxes, _LARGEST_BOXES))


def shared_bytes(recipe: Recipe, world: int, *, pins: bool) -> int:
    """Of shared memory that a rank's micro-batches take: those of its workers, and those of the
    step under way and of the next, which it has read.

    `pins`: the rank copies what it has read into page-locked memory, as for a GPU.
    """
    if not recipe.data.workers:
        return 0
    of_rank = max(1, recipe.batch.images // max(world, 1))
    micros = max(1, of_rank // (recipe.batch.per_device or of_rank))
    read = 0 if pins else 2 * micros
    return (recipe.data.workers * _BATCHES + read) * batch_bytes(recipe, world)


def pins_memory() -> bool:
    """Whether a rank of this node copies batches into page-locked memory."""
    return torch.cuda.is_available()


def workers_amiss(workers: int, ranks: int, shared: int) -> str | None:
    """Why this node cannot have the workers of its ranks, with the way out; None if it can.

    Args:
        workers: of each rank.
        ranks: of this node.
        shared: bytes of shared memory of a rank.
    """
    if not workers:
        return None
    try:
        place = tempfile.gettempdir()
    except OSError as error:
        return f"no temporary folder can be written for the data workers' sockets ({error})"
    if len(os.fsencode(place)) + len(_SOCKET) > _LONGEST_SOCKET:
        return (
            f"TMPDIR={place} has {len(os.fsencode(place))} characters, and the data workers' "
            f"sockets allow {_LONGEST_SOCKET - len(_SOCKET)}: export a shorter TMPDIR, such as "
            "/tmp, or set data.workers=0"
        )
    needed = ranks * shared
    free = shutil.disk_usage(_SHARED).free if _SHARED.is_dir() else needed
    if free < needed:
        return (
            f"{_SHARED} has {free / 1e6:.3g} MB of shared memory free, data.workers={workers} need "
            f"{needed / 1e6:.3g}: start the container with more (--shm-size, --ipc=host), lower "
            "data.workers or batch.per_device, or set data.workers=0"
        )
    return None


def workers_crowded(workers: int, cores: int) -> str | None:
    """What stands against so many workers on a rank's cores, with the way out; None if nothing."""
    if workers <= cores:
        return None
    return (
        f"data.workers={workers} share {counted(cores, 'core')} of each rank with the training: "
        f"give a rank more cores (--cpus-per-gpu), or set data.workers={max(1, cores - 1)}"
    )


def loader(
    reading: Dataset[Any],
    order: Sampler[Any],
    workers: int,
    prefetch: int,
    *,
    persistent: bool,
    preload: str,
) -> DataLoader[Any]:
    """A loader of the items of an order, with so many worker processes; 0: none.

    Args:
        reading: item -> read.
        order: the items.
        workers: processes.
        prefetch: reads that each keeps ready.
        persistent: whether they outlive an iteration.
        preload: the module that their server imports once for all of them.
    """
    processes: dict[str, Any] = {}
    if workers:
        fork_server("torch", preload)
        processes = {
            "num_workers": workers,
            "prefetch_factor": prefetch,
            "multiprocessing_context": ReadersContext(),
            "persistent_workers": persistent,
            "worker_init_fn": _start_worker,
        }
    return DataLoader(
        reading,
        sampler=order,
        batch_size=None,  # an item of the order is a whole batch
        collate_fn=_as_is,
        pin_memory=pins_memory(),
        # it draws a seed for workers that we do not use: not from the run's generator
        generator=torch.Generator(),
        **processes,
    )


def _stop(reads: Iterator[Any]) -> None:
    """End the workers now, whatever they wait for. torch offers no public way: it waits for the
    iterator to be collected, and where that is left to the collector of cycles (after an
    exception), the queues go first and it waits 5 s for each worker."""
    if not isinstance(reads, _MultiProcessingDataLoaderIter):
        return
    for worker in reads._workers:
        if worker.pid is not None and worker.is_alive():
            with contextlib.suppress(OSError):
                os.kill(worker.pid, signal.SIGTERM)  # from its owner: it ends at once
    reads._shutdown_workers()


def _as_is(read: Any) -> Any:
    return read


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    end_with_owner()
