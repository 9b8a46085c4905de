"""TensorBoard's files: all is in the run's own files too, so trouble with them ends no run."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

AGAIN_S = 60.0  # after which they are tried again


class Board:
    """What TensorBoard shows of a run.

    Args:
        folder: of its files.
        step: where the run stands; what the files have beyond it is forgotten.
        told: hears once of each trouble: what cannot be written and why.
    """

    def __init__(self, folder: Path, *, step: int, told: Callable[[str], None]) -> None:
        self._folder = folder
        self._told = told
        self._writer: SummaryWriter | None = None
        self._retry_at = 0.0
        threading.excepthook = _quiet_about_disks
        self._try(lambda: self._open(step))

    def scalar(self, name: str, value: float, step: int) -> None:
        """A number."""
        self._with(step, lambda writer: writer.add_scalar(name, value, step))

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """A picture: uint8 [height, width, 3]."""
        self._with(step, lambda writer: writer.add_image(name, pixels, step, dataformats="HWC"))

    def rewind(self, step: int) -> None:
        """Forget what lies beyond a step."""
        self.close()
        self._try(lambda: self._open(step))

    def close(self) -> None:
        """Finish the files. A second call does nothing."""
        if self._writer is not None:
            self._try(self._writer.close)
            self._writer = None

    def _with(self, step: int, write: Callable[[SummaryWriter], None]) -> None:
        if self._writer is None and time.monotonic() >= self._retry_at:
            self._try(lambda: self._open(step - 1))
        writer = self._writer
        if writer is not None:
            self._try(lambda: write(writer))

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            self._retry_at = time.monotonic() + AGAIN_S
            if self._writer is not None:
                writer = self._writer
                self._writer = None
                with contextlib.suppress(OSError):
                    writer.close()
            self._told(f"{self._folder}: {error.strerror or error}")


def _quiet_about_disks(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread hands its error over with the next number, and need not print it."""
    if isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread":
        return
    threading.__excepthook__(args)
