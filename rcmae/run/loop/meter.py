"""The speed of a training between two log steps, and its share of what the device could do.

By this rank's clock. Nothing here reads a tensor or waits for a device: on a GPU the clock is true
where the loop itself waits at log steps (it reads the loss there) before it asks.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

import torch

from rcmae.planning.hardware import peak_flops

GIB = 2**30


class Meter:
    """Speed between two log steps, by this rank's clock. Reads no tensor and waits for no device.

    On a GPU the clock is true where the loop itself waits at log steps (it reads the loss there)
    before it calls `read()`; in between, launches run ahead of the device.

    Args:
        device: where this rank computes.
        world: ranks that train, each on one device.
        step_flops_per_image: FLOPs of a whole training step for one image (forwards and backward,
            no recomputation).
        precision: "bf16" or "fp32", for the peak.
    """

    def __init__(
        self, *, device: torch.device, world: int, step_flops_per_image: float, precision: str
    ) -> None:
        self._device = device
        self._world = world
        self._flops = step_flops_per_image
        self.peak: float | None = None  # FLOP/s of one device
        if device.type == "cuda":
            tf32 = torch.get_float32_matmul_precision() != "highest"
            self.peak = peak_flops(torch.cuda.get_device_name(device), precision, tf32=tf32)
        self._reset()

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self.steps = 0  # since the last `read`
        self._images = 0
        self._waited = self._away = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in this block as waiting for data."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Leave the time in this block out: evaluation, pictures, the wait for a checkpoint's
        copy.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            self._away += time.perf_counter() - start

    def step(self, images: int) -> None:
        """Count one optimizer step of so many images over all ranks."""
        self._images += images
        self.steps += 1

    def read(self) -> dict[str, float]:
        """The figures since the last call; resets them.

        images_per_s over all ranks; step_s and data_wait_s are means over the steps, in seconds;
        memory_peak_gib is the peak since the start (the device's allocator, on CPU the process's
        resident memory); model_tflops per device counts the model's own FLOPs only; mfu is their
        share of the device's dense peak, left out where none is known."""
        figures = self.figures()
        self._reset()
        return figures

    def images_per_s(self) -> float:
        """Images over all ranks since the last `read`, so far."""
        return self._images / (time.perf_counter() - self._since - self._away)

    def figures(self) -> dict[str, float]:
        """What `read` gives, without a reset."""
        elapsed = time.perf_counter() - self._since - self._away
        steps = max(self.steps, 1)
        rate = self._images / elapsed
        flops = rate * self._flops / self._world  # FLOP/s of one device
        figures = {
            "images_per_s": rate,
            "step_s": elapsed / steps,
            "data_wait_s": self._waited / steps,
            "memory_peak_gib": self._peak_memory() / GIB,
            "model_tflops": flops / 1e12,
        }
        if self.peak:
            figures["mfu"] = flops / self.peak
        return figures

    def _peak_memory(self) -> float:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
