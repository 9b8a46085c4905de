"""Where a run would go, and what is assumed of it until somebody measures.

Importing it imports nothing heavy: these are the defaults of a command's arguments.
"""

from __future__ import annotations

from typing import NamedTuple

IMAGENET = 1_281_167  # samples of an epoch where the shards cannot be seen
UTILISATION = 0.35  # of the dense peak, by the model's own FLOPs, where none was measured
# images/s of a core, photographs of 500 x 375 to 224 px, where no sample can be tried
DECODE_PER_CORE = 700.0
WRITE_GBPS = 1.0  # GB/s of the file system for one checkpoint, all ranks together


class Site(NamedTuple):
    """Nodes, their GPUs, and what is known of their speed."""

    nodes: int
    gpus: int  # of a node
    gpu: str  # a key of hardware.GPUS
    cores: int | None = None  # of a node, for decoding; None: not told
    samples: int = IMAGENET
    utilisation: float | None = None  # None: measured, else UTILISATION
    decode_per_core: float | None = None  # images/s; None: tried, else DECODE_PER_CORE
    write_gbps: float = WRITE_GBPS
    measured: str | None = None  # a file of measured steps; None: those of the package

    @property
    def world(self) -> int:
        """Ranks."""
        return self.nodes * self.gpus
