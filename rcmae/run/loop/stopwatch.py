"""This rank's own seconds of a step: what it read, computed and saved itself, without its waits for
other ranks.

Ranks that train together take equally long for a step, whoever is slow: the others wait for it in a
collective. So what a rank does is timed where it meets nobody. For computing that is the forward
pass of student and teacher; where an engine gathers weights in it (FSDP2, ZeRO-3), a module's
gathering is taken off. The backward pass is not timed: gradients are reduced in it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn


class Own(NamedTuple):
    """Seconds of one rank, means over steps."""

    data: float  # waited for its samples, or read them itself
    compute: float  # forward passes of student and teacher
    save: float  # copied for checkpoints, and wrote where a save was waited for
    # waited for the others in what gathers weights, and until all had come to the step's agreement:
    # the late rank the least
    met: float


class Stopwatch:
    """Times one rank. Not collective; no tensor is read and no device waited for.

    On a GPU forward passes are timed by its own events, on logged steps alone: these cost more than
    a clock, and what they say can be read only when the device is waited for anyway.

    Args:
        device: where this rank computes.
        is_needed: False where there is no other rank to compare with: then nothing is timed.
    """

    def __init__(self, device: torch.device, *, is_needed: bool) -> None:
        self.is_needed = is_needed
        self._is_host = device.type == "cpu"
        self._is_computing = False
        self._began: Any = None  # of a gather under way
        self._reset()

    def _reset(self) -> None:
        self._steps = 0  # since the last read
        self._timed = 0  # of these, whose forward passes were
        self._is_fresh = False  # none of the step under way was yet
        self._met = self._saved = self._computed = self._waited = 0.0
        # began and ended, of forward passes and of what was waited for in them
        self._passes: list[tuple[Any, Any]] = []
        self._gathered: list[tuple[Any, Any]] = []

    def met(self, seconds: float) -> None:
        """Count, once a step, the time from this rank's coming to the step's agreement to when all
        had come; it may have computed meanwhile.
        """
        self._met += seconds
        self._steps += 1
        self._is_fresh = True

    @contextlib.contextmanager
    def computing(self, *, logs: bool) -> Iterator[None]:
        """Count the time in this block, once a micro-batch, as computing.

        Args:
            logs: whether the step is logged.
        """
        if not self.is_needed or not (logs or self._is_host):
            yield
            return
        began = self._mark()
        self._is_computing = True
        try:
            yield
        finally:
            self._is_computing = False
        self._passes.append((began, self._mark()))
        self._timed += self._is_fresh
        self._is_fresh = False
        if self._is_host:  # else what a window has may be millions of marks
            self._add_up()

    def saving(self, seconds: float) -> None:
        """Count seconds of a save."""
        self._saved += seconds

    def leave_out_gathers(self, *networks: nn.Module | None) -> None:
        """Take what these networks wait for, before a module computes, off its time.

        Engines gather weights in hooks before a module's forward. To be called once, when they are
        in place.
        """
        if not self.is_needed:
            return
        for network in filter(None, networks):
            for module in network.modules():
                if module._forward_pre_hooks:
                    module.register_forward_pre_hook(self._before_gather, prepend=True)
                    module.register_forward_pre_hook(self._after_gather)

    def read(self, data_s: float) -> Own:
        """Means over the steps since the last call; resets them.

        Args:
            data_s: mean wait for samples over these steps.
        """
        self._add_up()
        steps, timed = max(self._steps, 1), max(self._timed, 1)
        met = self._met / steps + self._waited / timed
        own = Own(data_s, self._computed / timed, self._saved / steps, met)
        self._reset()
        return own

    def _mark(self) -> Any:
        """This moment: of the host, or in the device's queue."""
        if self._is_host:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _before_gather(self, module: nn.Module, args: Any) -> None:
        if self._is_computing:
            self._began = self._mark()

    def _after_gather(self, module: nn.Module, args: Any) -> None:
        if self._is_computing:
            self._gathered.append((self._began, self._mark()))

    def _add_up(self) -> None:
        gathered = self._seconds(self._gathered)
        self._computed += self._seconds(self._passes) - gathered
        self._waited += gathered
        self._passes, self._gathered = [], []

    def _seconds(self, spans: list[tuple[Any, Any]]) -> float:
        if self._is_host:
            return sum(ended - began for began, ended in spans)
        return sum(began.elapsed_time(ended) for began, ended in spans) / 1000
