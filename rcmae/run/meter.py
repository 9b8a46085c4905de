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

GIB = 2**30

# Dense peaks in TFLOP/s from the makers' data sheets: (bf16 with fp32 sums, TF32, fp32). A name is
# matched by the first entry that it contains, so the special case stands before the general one. 0
# = the device has no such unit.
_PEAKS: tuple[tuple[str, tuple[float, float, float]], ...] = (
    ("GB200", (2500.0, 1250.0, 80.0)),
    ("B200", (2250.0, 1125.0, 75.0)),
    ("H200 NVL", (835.5, 417.5, 60.0)),
    ("H200", (989.4, 494.7, 66.9)),
    ("GH200", (989.4, 494.7, 66.9)),
    ("H100 NVL", (835.5, 417.5, 60.0)),
    ("H100 PCIe", (756.0, 378.0, 51.2)),
    ("H100", (989.4, 494.7, 66.9)),
    ("H800", (989.4, 494.7, 66.9)),
    ("H20", (148.0, 74.0, 44.0)),
    ("A100", (312.0, 156.0, 19.5)),
    ("A800", (312.0, 156.0, 19.5)),
    ("A6000", (154.8, 77.4, 38.7)),
    ("A40", (149.7, 74.8, 37.4)),
    ("A30", (165.0, 82.0, 10.3)),
    ("A10G", (70.0, 35.0, 31.5)),
    ("A10", (125.0, 62.5, 31.2)),
    ("L40S", (362.1, 183.0, 91.6)),
    ("L40", (181.1, 90.5, 90.5)),
    ("L4", (121.0, 60.0, 30.3)),
    ("RTX 6000 Ada", (364.2, 182.1, 91.1)),
    ("RTX 5090", (209.5, 104.8, 104.8)),
    ("RTX 4090", (165.2, 82.6, 82.6)),
    ("RTX 3090", (71.2, 35.6, 35.6)),
    ("V100-PCIE", (0.0, 0.0, 14.0)),
    ("V100", (0.0, 0.0, 15.7)),
    ("T4", (0.0, 0.0, 8.1)),
    ("MI300X", (1307.4, 653.7, 163.4)),
)


def peak_flops(device_name: str, precision: str, *, tf32: bool = False) -> float | None:
    """The device's dense peak in FLOP/s, None where it is not known (a CPU, a device that is not in
    the table).

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        precision: "bf16" or "fp32".
        tf32: whether fp32 matrix products may use TF32 (`torch.get_float32_matmul_precision() !=
            "highest"`).
    """
    column = 0 if precision == "bf16" else 1 if tf32 else 2
    for name, peaks in _PEAKS:
        if name in device_name:
            return max(peaks[column], peaks[2] if column == 1 else 0.0) * 1e12 or None
    return None


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
        self._images = self._steps = 0
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
        self._steps += 1

    def read(self) -> dict[str, float]:
        """The figures since the last call, and start anew.

        images_per_s over all ranks; step_s and data_wait_s are means over the steps, in seconds;
        memory_peak_gib is the peak since the start (the device's allocator, on CPU the process's
        resident memory); model_tflops per device counts the model's own FLOPs only; mfu is their
        share of the device's dense peak, left out where none is known."""
        elapsed = time.perf_counter() - self._since - self._away
        steps = max(self._steps, 1)
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
        self._reset()
        return figures

    def _peak_memory(self) -> float:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
