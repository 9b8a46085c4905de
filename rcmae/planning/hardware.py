"""What is known of hardware: kinds of GPU that a run can be planned for, peaks by the makers' data
sheets, and a description of this machine for whoever measures something on it.

Importing it imports nothing heavy: a command offers the kinds among its arguments.
"""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rcmae.process import cores

if TYPE_CHECKING:
    import torch

GIB = 2**30

# ------------------------------------------------------------------------------------------- kinds


class Gpu(NamedTuple):
    """A kind of GPU."""

    device_name: str  # as torch tells it
    memory: float  # bytes that CUDA can give out
    bf16: bool = True


GPUS = {
    "h100-80g": Gpu("NVIDIA H100 80GB HBM3", 79.1 * GIB),
    "h100-94g": Gpu("NVIDIA H100 NVL", 93.1 * GIB),
    "h200": Gpu("NVIDIA H200", 139.8 * GIB),
    "b200": Gpu("NVIDIA B200", 178.3 * GIB),
    "b300": Gpu("NVIDIA B300 SXM6 AC", 267.7 * GIB),
    "gb300": Gpu("NVIDIA GB300", 267.7 * GIB),
    "gh200": Gpu("NVIDIA GH200 480GB", 94.5 * GIB),
    "a100-40g": Gpu("NVIDIA A100-SXM4-40GB", 39.4 * GIB),
    "a100-80g": Gpu("NVIDIA A100-SXM4-80GB", 79.3 * GIB),
    "l40s": Gpu("NVIDIA L40S", 44.4 * GIB),
    "a10g": Gpu("NVIDIA A10G", 22.1 * GIB),
    "rtxpro6000": Gpu("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 95.0 * GIB),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 23.5 * GIB),
    "v100-32g": Gpu("Tesla V100-SXM2-32GB", 31.7 * GIB, bf16=False),
    "mi300x": Gpu("AMD Instinct MI300X", 191.9 * GIB),
    "mi325x": Gpu("AMD Instinct MI325X", 255.9 * GIB),
    "mi355x": Gpu("AMD Instinct MI355X", 287.9 * GIB),
}


class Peaks(NamedTuple):
    """Dense TFLOP/s of a device by its maker's data sheet; 0: it has no such unit."""

    bf16: float  # with fp32 sums
    tf32: float
    fp32: float


# A device is the first of these whose words stand in its name, one after the other: the special
# case is before the general one.
PEAKS: tuple[tuple[str, Peaks], ...] = (
    ("GB300", Peaks(2500.0, 1250.0, 80.0)),
    ("B300", Peaks(2250.0, 1125.0, 75.0)),
    ("GB200", Peaks(2500.0, 1250.0, 80.0)),
    ("B200", Peaks(2250.0, 1125.0, 75.0)),
    ("H200 NVL", Peaks(835.5, 417.5, 60.0)),
    ("H200", Peaks(989.4, 494.7, 66.9)),
    ("GH200", Peaks(989.4, 494.7, 66.9)),
    ("H100 NVL", Peaks(835.5, 417.5, 60.0)),
    ("H100 PCIe", Peaks(756.0, 378.0, 51.2)),
    ("H100", Peaks(989.4, 494.7, 66.9)),
    ("H800", Peaks(989.4, 494.7, 66.9)),
    ("H20", Peaks(148.0, 74.0, 44.0)),
    ("A100", Peaks(312.0, 156.0, 19.5)),
    ("A800", Peaks(312.0, 156.0, 19.5)),
    ("A6000", Peaks(154.8, 77.4, 38.7)),
    ("A40", Peaks(149.7, 74.8, 37.4)),
    ("A30", Peaks(165.0, 82.0, 10.3)),
    ("A10G", Peaks(70.0, 35.0, 31.5)),
    ("A10", Peaks(125.0, 62.5, 31.2)),
    ("L40S", Peaks(362.1, 183.0, 91.6)),
    ("L40", Peaks(181.1, 90.5, 90.5)),
    ("L4", Peaks(121.0, 60.0, 30.3)),
    ("RTX PRO 6000", Peaks(503.8, 251.9, 126.0)),
    ("RTX 6000 Ada", Peaks(364.2, 182.1, 91.1)),
    ("RTX 5090", Peaks(209.5, 104.8, 104.8)),
    ("RTX 4090", Peaks(165.2, 82.6, 82.6)),
    ("RTX 3090", Peaks(71.2, 35.6, 35.6)),
    ("V100 PCIE", Peaks(0.0, 0.0, 14.0)),
    ("V100", Peaks(0.0, 0.0, 15.7)),
    ("T4", Peaks(0.0, 0.0, 8.1)),
    ("MI300X", Peaks(1307.4, 653.7, 163.4)),
    ("MI325X", Peaks(1307.4, 653.7, 163.4)),
    ("MI350X", Peaks(2306.9, 0.0, 144.2)),
    ("MI355X", Peaks(2516.6, 0.0, 157.3)),
)
# Another chip, or a part of one, under a name that is in the table.
_ANOTHER = ("Laptop", "Mobile", "Max Q", "MIG", "GRID", "Ti", "D")


def peak_flops(device_name: str, precision: str, *, tf32: bool = False) -> float | None:
    """The device's dense peak in FLOP/s; None where it is not known: a CPU, a device that is not in
    the table, a part of one.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        precision: "bf16" or "fp32".
        tf32: whether fp32 matrix products may use TF32 (`torch.get_float32_matmul_precision() !=
            "highest"`).
    """
    if any(_names(another, device_name) for another in _ANOTHER):
        return None
    peaks = next((peaks for name, peaks in PEAKS if _names(name, device_name)), None)
    if peaks is None:
        return None
    if precision == "bf16":
        best = peaks.bf16
    else:
        best = max(peaks.tf32, peaks.fp32) if tf32 else peaks.fp32
    return best * 1e12 or None


def _names(name: str, device_name: str) -> bool:
    """Whether a device's name has these words: an "RTX A1000" is no "A100"."""
    words = "-".join(device_name.split())
    wanted = "-".join(name.split())
    return f"-{wanted}-" in f"-{words}-"


# ------------------------------------------------------------------------------------ this machine


def hardware(device: torch.device) -> dict[str, Any]:
    """What something was measured on, without the machine's name."""
    import torch

    found: dict[str, Any] = {
        "device": device.type,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores.usable(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "fp32_products": torch.get_float32_matmul_precision(),
        }
    return found


def cpu_name() -> str:
    """The CPU's model, as far as the system reports it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if "model name" in line:
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of the repository that a folder is in, with a + where the tree differs from it.

    None where there is no repository, as in an installed package.
    """
    git = ["git", "-C", str(folder)]
    try:
        name = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")
