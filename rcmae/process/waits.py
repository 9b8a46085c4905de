"""Waits that say what they wait for, and that a request to stop ends.

A process waits for other ranks, for the run to be free, for stores and for samples: in a lock, in a
request or in a collective, where Python runs no handler. So a thread hears the signals by their
wake-up pipe, watches the launcher and the clock, and speaks for the main thread: it says what is
waited for, and once a stop is asked for it breaks the wait (`StopAsked` is raised there), or ends
the process where that does not help and there is nothing to save. Ranks tell each other of a
request by the store that they met at. A second Ctrl-C ends any wait in which no checkpoint is being
written, a third the process.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn, Protocol

from rcmae.process import early
from rcmae.process.launchers import watched_launcher

STOPPED = 75  # the exit status of "run me again"
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_BREAK = signal.SIGURG  # to the main thread, from here; who has no handler ignores it
SPEAKS_AFTER_S = 5.0
SPEAKS_EACH_S = 60.0
_TICK_S = 0.2
_PATIENCE_S = 1.0  # of a wait, once a stop is asked for: most end by themselves
_HARD_S = 1.5  # more, until a wait that could not be broken ends its process
_LAST_WORDS_S = 1.0  # for what is told to peers and given back


class StopAsked(BaseException):
    """A wait was broken: somebody asks for a stop. The message is the reason."""


class Link(Protocol):
    """How ranks tell each other that a stop is asked for. Threads call; may raise anything."""

    def tell(self, reason: str) -> None:
        """Tell the others."""

    def heard(self) -> str | None:
        """What another told."""


@dataclass
class Wait:
    """What the main thread waits for."""

    what: str | Callable[[], str]
    breaks: bool  # by an exception: it is not a collective
    saved: bool  # nothing is lost where the process ends in it
    check: Callable[[], Exception | None] | None
    answer: Callable[[str], str] | None  # to a request to stop that this wait does not end
    began: float = field(default_factory=time.monotonic)
    spoken: float = 0.0  # when it was last said

    def text(self) -> str:
        """What is waited for."""
        return self.what if isinstance(self.what, str) else self.what()


class Listener:
    """Hears requests to stop, for one process. Made in the main thread, before anything is slow."""

    def __init__(self) -> None:
        self.reason: str | None = None  # why this rank was asked to stop
        self.is_relayed = False  # the reason is a peer's, who was asked
        self._asked_at = 0.0
        self._presses = 0
        self._wait: Wait | None = None
        self._break: tuple[Wait, BaseException] | None = None
        self._link: Link | None = None
        self._told = False
        self._answered = False
        self._is_saving: Callable[[], bool] = lambda: False
        self._last_words: list[Callable[[], object]] = []
        self._done = threading.Event()
        self._launcher_lost = watched_launcher()
        self._looked = 0.0
        for number in SIGNALS:
            signal.signal(number, self._handle)
        signal.signal(_BREAK, self._broken)
        for name in early.asked:
            self.ask(name)
        early.asked.clear()
        self._threads: list[threading.Thread] = []
        self._pipe, self._signals = os.pipe()
        for end in (self._pipe, self._signals):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._signals, warn_on_full_buffer=False)
        self._start(self._listen, name="stop requests")

    def ask(self, reason: str) -> None:
        """Ask for a stop; the first reason stands."""
        if self.reason is None:
            self._asked_at = time.monotonic()
            self.reason = reason

    def close(self) -> None:
        """Hear no more: signals are still noted in `reason`."""
        self._done.set()
        if _listener is self:
            signal.set_wakeup_fd(-1)
        for thread in self._threads:  # they must not outlive the interpreter
            thread.join(1.0)

    def leave(self, where: str) -> NoReturn:
        """End this process with 75: nothing is lost by it. The other ranks get the request, too."""
        told = f" while it waited for {where}" if where else ""
        _say(f"rcmae: stopped by {self.reason}{told}; start the same command again")
        words = threading.Thread(target=self._give_back, daemon=True)
        words.start()
        words.join(_LAST_WORDS_S)
        self._done.set()
        sys.stdout.flush()
        os._exit(STOPPED)

    def _start(self, target: Callable[..., None], *args: object, name: str) -> None:
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    # in the main thread

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)

    def _broken(self, number: int, frame: FrameType | None) -> None:
        pending = self._break
        self._break = None
        if pending is not None and pending[0] is self._wait:
            raise pending[1]

    # in the threads

    def _listen(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while not self._done.is_set():
            ready, _, _ = select.select([self._pipe], [], [], _TICK_S)
            if ready:
                self._note(os.read(self._pipe, 64))
            with contextlib.suppress(Exception):  # a wait's text or check is anybody's
                self._look(main)
        os.close(self._pipe)

    def _note(self, numbers: bytes) -> None:
        for number in numbers:
            if number in SIGNALS:
                # Ctrl-C is somebody at a terminal; schedulers repeat the others as they like
                self._presses += number == signal.SIGINT or self._presses == 0
                self.ask(signal.Signals(number).name)

    def _look(self, main: int) -> None:
        now = time.monotonic()
        if self.reason is None and now - self._looked > 1.0:
            self._looked = now
            if lost := self._launcher_lost():
                self.ask(lost)
        if self._presses > 2:
            self.leave("")
        wait = self._wait
        if wait is None:
            return
        self._speak(wait, now)
        if self.reason is not None:
            since = now - max(self._asked_at, wait.began)
            urgent = self._presses > 1 and not self._is_saving()
            if wait.answer is not None and not self._answered and since > _PATIENCE_S:
                self._answered = True
                _say(f"rcmae: {wait.answer(self.reason)}")
            if wait.breaks and (urgent or since > _PATIENCE_S):
                self._break_off(wait, StopAsked(self.reason), main)
            if (wait.saved or urgent) and since > _PATIENCE_S + _HARD_S:
                self.leave(wait.text())
        elif wait.check is not None and now - wait.began > _PATIENCE_S:
            error = wait.check()
            if error is not None:
                self._break_off(wait, error, main)

    def _break_off(self, wait: Wait, error: BaseException, main: int) -> None:
        self._break = (wait, error)
        signal.pthread_kill(main, _BREAK)

    def _speak(self, wait: Wait, now: float) -> None:
        if not wait.what:
            return
        due = wait.began + SPEAKS_AFTER_S if not wait.spoken else wait.spoken + SPEAKS_EACH_S
        if now > due:
            wait.spoken = now
            _say(f"rcmae: waiting for {wait.text()} ({now - wait.began:.0f} s)")

    def _give_back(self) -> None:
        for word in reversed(self._last_words):
            with contextlib.suppress(Exception):
                word()
        if self._link is not None:  # the others hear it before their peer is gone
            time.sleep(_LAST_WORDS_S / 2)

    def _exchange(self, link: Link, every_s: float) -> None:
        """Hand a request on to the other ranks, and hear theirs."""
        try:
            while not self._done.wait(every_s):
                if self.reason is None:
                    heard = link.heard()
                    if heard is not None:
                        self._told = True
                        self.is_relayed = self.reason is None
                        self.ask(heard)
                elif not self._told:
                    self._told = True
                    link.tell(self.reason)
        except Exception:  # the store ended with its rank; collectives tell who is lost
            return


_listener: Listener | None = None


def _hear_for_nobody_else() -> None:
    """A process that is forked off has the pipe, too: its signals are its own."""
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_hear_for_nobody_else)


def listen() -> Listener:
    """Hear requests to stop from now on. The main thread calls, once a process."""
    global _listener
    if _listener is not None:
        _listener.close()
    _listener = Listener()
    return _listener


def asked() -> str | None:
    """Why this process was asked to stop, if it was."""
    return _listener.reason if _listener is not None else None


def connect(link: Link, every_s: float) -> None:
    """Ranks are joined: a request to one is passed to all, polled at this interval."""
    listener = _listener
    if listener is not None:
        listener._link = link
        listener._start(listener._exchange, link, every_s, name="stops of peers")


def last_word(word: Callable[[], object]) -> None:
    """What to do before the process is ended in a wait: a second at most for all."""
    if _listener is not None:
        _listener._last_words.append(word)


def at_once(reason: str, what: str) -> str:
    """How somebody at a terminal ends this now, for an answer; empty where it was another."""
    return f" Ctrl-C again ends it now, {what}" if reason == signal.SIGINT.name else ""


def spare_saves(is_saving: Callable[[], bool]) -> None:
    """While this says that a checkpoint is being written, a second Ctrl-C ends nothing."""
    if _listener is not None:
        _listener._is_saving = is_saving


@contextlib.contextmanager
def waiting(
    what: str | Callable[[], str],
    *,
    breaks: bool = True,
    saved: bool = False,
    check: Callable[[], Exception | None] | None = None,
    answer: Callable[[str], str] | None = None,
) -> Iterator[None]:
    """The main thread waits in this block, which a request to stop may break.

    Args:
        what: is waited for: "waiting for ..."; called in another thread. Empty: this is work, of
            which nothing is said until a stop is asked for.
        breaks: an exception may be raised here; not in a collective, which has to be left together.
        saved: nothing is lost where the process ends here: before the first step.
        check: what to raise here, if anything; asked now and then, in another thread.
        answer: what to say, once a process, where a stop is asked for and this block does not end
            within a second; called with the reason, in another thread.

    Raises:
        StopAsked: somebody asks for a stop, and this took longer than a second.
    """
    listener = _listener
    if listener is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    outer = listener._wait
    listener._wait = Wait(what, breaks, saved, check, answer)
    try:
        yield
    finally:
        listener._wait = outer


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        print(text, file=sys.stderr, flush=True)
