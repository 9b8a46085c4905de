"""Which kernel computes attention on a GPU, for each shape by one measurement.

torch takes the first of its kernels that can compute a shape, in a fixed order. Which is fastest
depends on the length, the width of a head, the GPU and the release. So at the start of a run rank 0
times each of them, forward and backward, for the shapes that a training step has (`shapes_in`), and
all ranks take its choice. A kernel takes the place of torch's own only where it is faster by more
than MARGIN. What was measured is kept in a file, so that each start of a run computes alike.

cuDNN's is timed and not chosen: on Hopper its backward pass gives NaN gradients where all scores of
a query are far below 0 and the keys do not fill its last tile (cuDNN up to 9.26 at least; pytorch
#196678, cudnn-frontend #160 and #1072), and torch prefers it from 2.11 on.

Not on a CPU, which has one kernel (`kernels.choose_attention` has what there is to choose).
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rcmae import dist
from rcmae.files import write_aside

OWN = "torch"  # what torch takes by itself
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "plain": SDPBackend.MATH,
}
LEFT_OUT = "cudnn"
MARGIN = 0.03  # of torch's own time: what a change must bring
FILE = "attention.json"


class Shape(NamedTuple):
    """What kernels are chosen for."""

    queries: int
    keys: int
    heads: int
    head_dim: int
    dtype: str  # "bfloat16"

    def __str__(self) -> str:
        tokens = f"{self.keys}" if self.queries == self.keys else f"{self.queries} of {self.keys}"
        return f"{tokens} tokens x {self.heads} heads x {self.head_dim} {self.dtype}"

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> Shape:
        """Of queries [B, heads, M, d] and keys [B, heads, N, d]."""
        dtype = str(q.dtype).removeprefix("torch.")
        return cls(q.shape[2], k.shape[2], q.shape[1], q.shape[3], dtype)


class Timed(NamedTuple):
    """A shape's kernels."""

    backend: str  # the fastest: one of BACKENDS, or OWN
    ms: dict[str, float]  # of a forward and a backward pass by each that can


Timer = Callable[[Shape, str], float | None]  # milliseconds; None: it cannot compute this shape


class _Process:
    """What holds for the attention of this process."""

    chosen: dict[tuple[int, int, int, int, torch.dtype], SDPBackend] = {}  # noqa: RUF012
    told: dict[Shape, Timed] = {}  # noqa: RUF012
    noted: set[Shape] | None = None  # while `noting`


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, heads, M, d] by the kernel that was chosen for this shape, or torch's own."""
    if _Process.noted is not None:
        _Process.noted.add(Shape.of(q, k))
    backend = None
    if _Process.chosen:
        key = (q.shape[2], k.shape[2], q.shape[1], q.shape[3], q.dtype)
        backend = _Process.chosen.get(key)
    if backend is None:
        return scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v)


# ------------------------------------------------------------------------------------- measurement


def milliseconds(
    shape: Shape, backend: str, *, batch: int, device: torch.device, rounds: int = 5, each: int = 10
) -> float | None:
    """Of a forward and a backward pass: the median of `rounds`, each the mean of `each`.

    None: the kernel cannot compute this shape here. Waits for the device.
    """
    dtype = getattr(torch, shape.dtype)
    # where they are needed: a host takes a second for each hundred million numbers
    generator = torch.Generator(device).manual_seed(0)

    def drawn(tokens: int) -> Tensor:
        size = (batch, tokens, shape.heads, shape.head_dim)  # as the blocks' product lies
        values = torch.randn(size, generator=generator, device=device).to(dtype)
        return values.transpose(1, 2).requires_grad_()

    q, k, v = drawn(shape.queries), drawn(shape.keys), drawn(shape.keys)
    back = torch.ones_like(q)

    def once() -> None:
        torch.autograd.grad(scaled_dot_product_attention(q, k, v), (q, k, v), back)

    only = contextlib.nullcontext() if backend == OWN else sdpa_kernel(BACKENDS[backend])
    with only, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says at length why each kernel cannot
        try:
            once()
        except RuntimeError:  # no kernel, or no memory for the matrix
            return None
        return statistics.median(_timed(once, device, each) for _ in range(rounds))


def _timed(once: Callable[[], None], device: torch.device, each: int) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(each):
            once()
        return 1e3 * (time.perf_counter() - begin) / each
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(each):
        once()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / each


def leave_out_cudnn() -> None:
    """Torch does not take it by itself from here on."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def fastest(shape: Shape, timer: Timer) -> Timed:
    """The kernel for a shape, and what all of them took."""
    timed = {name: timer(shape, name) for name in (OWN, *BACKENDS)}
    ms = {name: value for name, value in timed.items() if value is not None}
    those = [name for name in ms if name != LEFT_OUT]
    if not those:
        return Timed(OWN, ms)
    best = min(those, key=lambda name: ms[name])
    own = ms.get(OWN)
    return Timed(OWN if own is not None and ms[best] >= (1 - MARGIN) * own else best, ms)


# ------------------------------------------------------------------------------------------ choice


@contextlib.contextmanager
def noting() -> Iterator[set[Shape]]:
    """The shapes of attention inside."""
    found: set[Shape] = set()
    _Process.noted = found
    try:
        yield found
    finally:
        _Process.noted = None


def choose(shapes: Iterable[Shape], timer: Timer, file: Path, gpu: str) -> dict[Shape, Timed]:
    """Choose for these shapes; what is kept in the file is not measured again. Collective: every
    rank calls; rank 0 measures, reads and writes.

    Args:
        shapes: of a training step; rank 0's count.
        timer: `milliseconds` of this GPU.
        file: JSON; one that cannot be read or written is done without.
        gpu: its name. Another one's measurements do not count, nor another torch's.
    """
    leave_out_cudnn()  # else it may be what is timed as torch's own
    found: dict[Shape, Timed] = {}
    if dist.rank() == 0:
        kept = _read(file)
        for shape in sorted(shapes):
            key = f"{gpu}, torch {torch.__version__}, {shape}"
            if key not in kept:
                kept[key] = fastest(shape, timer)
            found[shape] = kept[key]
        _write(file, kept)
    found = dist.from_first(found)
    use(found)
    return found


def use(found: Mapping[Shape, Timed]) -> None:
    """Compute by these from here on, and by torch's own choice where there is none."""
    _Process.told = dict(found)
    _Process.chosen = {
        (*shape[:4], getattr(torch, shape.dtype)): BACKENDS[timed.backend]
        for shape, timed in found.items()
        if timed.backend != OWN
    }


def told() -> str | None:
    """What was chosen, for people; None where nothing was measured."""
    if not _Process.told:
        return None
    ways = [f"{timed.backend} at {shape}" for shape, timed in sorted(_Process.told.items())]
    return "; ".join(ways)


def _read(file: Path) -> dict[str, Timed]:
    """What a file holds, as far as it is a choice."""
    try:
        tree = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    found = {}
    for key, value in tree.items() if isinstance(tree, dict) else ():
        known = isinstance(value, dict) and value.get("backend") in {OWN, *BACKENDS} - {LEFT_OUT}
        ms = value.get("ms") if known else None
        if isinstance(ms, dict) and all(isinstance(each, int | float) for each in ms.values()):
            found[key] = Timed(value["backend"], ms)
    return found


def _write(file: Path, kept: Mapping[str, Timed]) -> None:
    with contextlib.suppress(OSError):  # it is measured again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        tree = {key: timed._asdict() for key, timed in sorted(kept.items())}
        write_aside(file, json.dumps(tree, indent=1) + "\n")
