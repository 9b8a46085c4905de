"""Worker processes that live exactly as long as the process that started them.

A killed process does not end the others: a fork server is its workers' parent, and theirs are pipes
that stay open. So each worker watches its owner. And a signal that asks an owner to stop often
goes to all its processes: workers leave it to the owner, which may want a last result of them. We
do not use PR_SET_PDEATHSIG, which knows parents alone."""

from __future__ import annotations

import ast
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker, sharedctypes
from multiprocessing.context import BaseContext, ForkServerContext
from pathlib import Path
from types import FrameType
from typing import TypeVar

from rcmae.errors import Refused

READING = "rcmae.data.stream"  # the module of which a reader needs all
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
_In = TypeVar("_In")
_Out = TypeVar("_Out")


def fork_server(*preload: str) -> BaseContext:
    """A context whose processes come from a server that has imported these modules once for all of
    them.

    The first call decides what is imported: one server serves the whole process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with _blocked():
        forkserver.ensure_running()
    return context


class Flag:
    """An event for whoever only sets and looks, as a DataLoader does: it has no lock. That of
    multiprocessing's stays held for good where a process is killed while it looks.
    """

    def __init__(self) -> None:
        self._is_set = sharedctypes.RawValue(ctypes.c_bool, False)

    def set(self) -> None:
        """Set it, for all processes."""
        self._is_set.value = True

    def is_set(self) -> bool:
        """Whether somebody has set it."""
        return bool(self._is_set.value)


class ReadersContext(ForkServerContext):
    """A fork server's, whose processes may be killed at any moment."""

    def Event(self) -> Flag:  # type: ignore[override]
        """What tells a DataLoader's workers to end."""
        return Flag()


def serve_readers() -> None:
    """Let the server that a training's readers are forked from import what they need, from now on,
    beside what this process does. Without this the first loader does so.

    Where no server can be had, the checks of the start say why, and the way out.
    """
    with suppress(OSError):
        fork_server("torch", READING)


def refuse_again(what: str) -> None:
    """Raise Refused in a worker process that imports the program that started it: there the call
    would start a second training.
    """
    # set by multiprocessing while it imports the main module again
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise _second_training(what)


def refuse_unguarded(what: str) -> None:
    """Raise Refused where a program calls this outside of `if __name__ == "__main__":`; its workers
    would import the program, and start a second training each.
    """
    if _is_unguarded(sys._getframe()):
        raise _second_training(what)


def _second_training(what: str) -> Refused:
    return Refused(
        f"{what}: worker processes import your program again, and would start a second training; "
        'put the call under if __name__ == "__main__":'
    )


def _is_unguarded(frame: FrameType | None) -> bool:
    """Whether the main module's own level, below a frame, is at a statement that every import of
    its file runs.
    """
    while frame is not None:
        code = frame.f_code
        if code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            break
        frame = frame.f_back
    main = sys.modules["__main__"]
    if frame is None or getattr(main, "__file__", None) != frame.f_code.co_filename:
        return False  # typed in, or a notebook's cell: there is no file to import
    try:
        statements = ast.parse(Path(frame.f_code.co_filename).read_text()).body
    except (OSError, ValueError, SyntaxError):
        return False
    for statement in statements:
        if statement.lineno <= frame.f_lineno <= (statement.end_lineno or 0):
            return not (isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test))
    return False


@contextmanager
def _blocked() -> Iterator[None]:
    """Block the signals that ask to stop, for the processes that are born here and, by birth,
    for theirs.
    """
    # else it is started with them, and unblocks signals in doing so
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_owner() -> None:
    """Outlive the signals that ask the owner to stop, but not the owner. Every worker calls it
    first.

    They are blocked in the main thread and taken by another, which sees who sent one: left to kill
    the worker, a signal to the process group would break the batch that a trainer waits for before
    it can commit its checkpoint."""
    owner = multiprocessing.parent_process()
    assert owner is not None
    # also where another library started the server
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)

    def watch() -> None:
        while owner.is_alive():
            sent = signal.sigtimedwait(_STOP_SIGNALS, 1.0)
            if sent is not None and sent.si_pid == owner.pid:
                break
        os._exit(0)

    threading.Thread(target=watch, daemon=True, name="watch the owner").start()


def mapped(
    one: Callable[[_In], _Out],
    items: Iterable[_In],
    jobs: int,
    context: BaseContext,
    begin: Callable[[], object] | None = None,
) -> Iterator[_Out]:
    """The results of `one` of each item, in their order, by so many workers, each of which may
    `begin` with a call.

    An exception here ends the workers in what they do, Ctrl-C and the end of this iterator
    included."""
    others = {*multiprocessing.active_children()}
    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_begin, initargs=(begin,)
    ) as workers:
        try:
            with _blocked():
                futures = [workers.submit(one, item) for item in items]
            for future in futures:
                yield future.result()
        except BaseException:
            # no future is cancelled: Python 3.11 reports those of a pool that ends as errors
            for process in {*multiprocessing.active_children()} - others:
                process.terminate()
            raise


def _begin(then: Callable[[], object] | None) -> None:
    end_with_owner()
    if then is not None:
        then()
