#!/usr/bin/env python3
"""Where the time and the memory of one training step go, for several ways to compute the same step,
side by side.

    python tools/bench_step.py [--model NAME] [--batch N] [--variants V ...] [--json [FILE]]

A variant is OBJECTIVE-PATH-PRECISION-MODE: mae or rcmae; lean (this package's path: only visible
patches embedded, only hidden ones predicted) or plain (the same mathematics as the paper writes it:
every patch embedded and predicted, tokens put back in place, attention as matrix products and a
softmax); fp32 or bf16; eager or compiled (lean only).

Times: one process, one step of each variant in turn, round after round, so that whatever else the
machine does meets all of them; medians with quartiles, comparisons paired by round. Variants of one
precision share the weights, the optimizer and the teacher of one `LocalEngine`. Each round also
times a large matrix product of the same type: the fastest one is the ceiling that FLOP/s are held
against. Memory: a process for each variant, before the times.

Over 500 lines, since the plain path that it compares with is written out in it.

Exit status: 0 done; 2 unusable input.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from rcmae import __version__
from rcmae.data.batch import Batch
from rcmae.data.masking import visible_count
from rcmae.engines.local import LocalEngine
from rcmae.engines.protocol import DTYPES, EngineSettings
from rcmae.errors import Refused
from rcmae.models import kernels
from rcmae.models.blocks import Block
from rcmae.models.bootmae import BootstrappedAutoencoder
from rcmae.models.flops import flops_per_image
from rcmae.models.sizes import ARCHITECTURES, NetworkSizes
from rcmae.models.tuning import compiling
from rcmae.models.vit import MaskedAutoencoder
from rcmae.objectives import Objective, new
from rcmae.objectives.mae import pixel_targets
from rcmae.objectives.terms import widen
from rcmae.planning.hardware import commit, hardware
from rcmae.planning.live import MASK_RATIO, made_up_batch

PHASES = ("teacher_forward", "student_forward", "backward", "optimizer", "ema")
MOMENTUM = 0.996
LR = 1e-4
WEIGHT_DECAY = 0.05
MIB = 2**20
Clock = Literal["wall", "cpu"]


class Variant(NamedTuple):
    """One way to compute a step."""

    objective: str
    path: str
    precision: str
    mode: str

    def __str__(self) -> str:
        return "-".join(self)

    @classmethod
    def parse(cls, name: str) -> Variant:
        """The variant of a name.

        Raises:
            Refused: there is none of that name.
        """
        parts = name.split("-")
        known = (
            ("mae", "rcmae", "bootmae"),
            ("lean", "plain"),
            ("fp32", "bf16"),
            ("eager", "compiled"),
        )
        if len(parts) != 4 or any(
            part not in choices for part, choices in zip(parts, known, strict=True)
        ):
            ways = "-".join(f"{{{','.join(choices)}}}" for choices in known)
            raise Refused(f"unknown variant {name!r}: it is {ways}")
        variant = cls(*parts)
        if variant.path == "plain" and variant.mode == "compiled":
            raise Refused(
                f"variant {name!r}: the plain path is the eager reference and is not compiled"
            )
        if variant.path == "plain" and variant.objective == "bootmae":
            raise Refused(f"variant {name!r}: bootmae has no plain path; use bootmae-lean")
        return variant


DEFAULT_VARIANTS = (
    "mae-lean-bf16-eager",
    "rcmae-lean-bf16-eager",
    "rcmae-lean-bf16-compiled",
    "rcmae-lean-fp32-eager",
    "rcmae-plain-bf16-eager",
    "rcmae-plain-fp32-eager",
)


# ----------------------------------------------------------------------------------- the plain path


def plain_predictions(
    model: MaskedAutoencoder, images: Tensor, ids_shuffle: Tensor, num_visible: int
) -> Tensor:
    """Predictions [B, L, p*p*C] in raster order, computed as MAE describes it (section 3 and figure
    1), step by step.

    The weights are those of `model`. Every patch is embedded by a convolution, then the visible
    ones are picked; mask tokens fill up the sequence, which is put back in raster order for the
    decoder; every token goes through every block and is predicted.
    """
    projection = cast(nn.Conv2d, model.patch_embed.proj)
    dtype = projection.weight.dtype
    x = nn.functional.conv2d(
        images.to(dtype), projection.weight, projection.bias, stride=model.patch_size
    )
    x = (x.flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]).to(dtype)  # [B, L, D]
    x = x.gather(1, ids_shuffle[:, :num_visible, None].expand(-1, -1, x.shape[2]))
    cls_token = (model.cls_token + model.pos_embed[:, :1]).to(dtype)
    x = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)
    for block in model.blocks:
        x = Block.forward(cast(Block, block), x)
    x = model.decoder_embed(model.norm(x))
    num_hidden = ids_shuffle.shape[1] - num_visible
    tokens = torch.cat([x[:, 1:], model.mask_token.to(dtype).expand(len(x), num_hidden, -1)], dim=1)
    tokens = tokens.gather(
        1, ids_shuffle.argsort(dim=1)[:, :, None].expand(-1, -1, tokens.shape[2])
    )
    x = (torch.cat([x[:, :1], tokens], dim=1) + model.decoder_pos_embed).to(dtype)
    for block in model.decoder_blocks:
        x = Block.forward(cast(Block, block), x)
    return model.decoder_pred(model.decoder_norm(x))[:, 1:]


@dataclass(frozen=True)
class PlainObjective:
    """Errors of every patch, then a mean over the hidden ones by a mask.

    Networks are called as `plain_predictions`.
    """

    needs_teacher: bool
    teacher_outputs: tuple[str, ...] = field(default=(), init=False)

    @property
    def weights(self) -> dict[str, float]:
        """Each term's weight in the total loss."""
        return new("rcmae").weights if self.needs_teacher else new("mae").weights

    def counts(self, batch: Batch) -> dict[str, int]:
        """Hidden patches of the batch, for each term."""
        return new("rcmae").counts(batch) if self.needs_teacher else new("mae").counts(batch)

    def __call__(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, progress: float
    ) -> dict[str, Tensor]:
        """Sums over hidden patches."""
        num_patches = batch.ids_shuffle.shape[1]
        # [B, L], 1 = hidden from the encoder
        mask = torch.ones_like(batch.ids_shuffle, dtype=torch.float32)
        mask.scatter_(1, batch.ids_shuffle[:, : batch.num_visible], 0.0)
        teacher_pred = None
        if teacher is not None:
            with torch.no_grad():
                teacher_pred = teacher(batch.images, batch.ids_shuffle, batch.num_visible)
        pred = student(batch.images, batch.ids_shuffle, batch.num_visible)
        every = torch.arange(num_patches, device=mask.device).expand(len(mask), -1)
        target = pixel_targets(batch.images, every, num_patches, norm_pix=True)  # [B, L, p*p*C]
        terms = {"reconstruction": ((widen(pred) - target).square().mean(dim=2) * mask).sum()}
        if teacher_pred is not None:
            terms["consistency"] = (
                (widen(pred) - widen(teacher_pred)).square().mean(dim=2) * mask
            ).sum()
        return terms


# ----------------------------------------------------------------------------------------- one step


class Watch(Protocol):
    """Told where a step is."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Around a part of the step."""


class Bench:
    """The networks and the engine of one precision, and a step of any variant of that precision."""

    def __init__(
        self,
        sizes: dict[str, Any],
        precision: str,
        device: torch.device,
        *,
        batch: int,
        teacher: bool,
        bootmae: bool = False,
    ) -> None:
        self.student = (
            BootstrappedAutoencoder(NetworkSizes(**sizes))
            if bootmae
            else MaskedAutoencoder(NetworkSizes(**sizes))
        )
        self.teacher = copy.deepcopy(self.student) if teacher else None
        if bootmae and self.teacher is not None:
            self.teacher.keep(new("bootmae").teacher_outputs)
        self.engine = LocalEngine(
            self.student,
            self.teacher,
            EngineSettings(precision=precision, weight_decay=WEIGHT_DECAY, device=device),
        )
        self.batch = made_up_batch(self.student, batch, device)
        self._fused = kernels.attention_is_fused(device, precision)
        self._compiled: dict[nn.Module, Callable[..., Tensor]] = {}

    def step(self, variant: Variant, watch: Watch) -> None:
        """One whole step: losses, gradients, update, teacher."""
        with self._mode(variant):
            plain = variant.path == "plain"
            has_teacher = variant.objective != "mae"
            objective: Objective = new(variant.objective)
            if plain:
                objective = PlainObjective(has_teacher)
            sums = objective(
                watched(self.student, "student_forward", watch, plain=plain),
                watched(self.teacher, "teacher_forward", watch, plain=plain)
                if has_teacher and self.teacher
                else None,
                self.batch,
                0.0,
            )
            counts = objective.counts(self.batch)
            terms = [objective.weights[term] * total / counts[term] for term, total in sums.items()]
            loss = torch.stack(terms).sum()
            with watch.phase("backward"):
                self.engine.backward(loss, last=True)
            with watch.phase("optimizer"):
                self.engine.step(lr=LR, weight_decay=WEIGHT_DECAY)
            if has_teacher:
                with watch.phase("ema"):
                    self.engine.update_teacher(MOMENTUM)

    def encode(self, variant: Variant, watch: Watch) -> None:
        """The student's encoder on whole images, without gradients: what bootmae's teacher
        should cost.
        """
        with self._mode(variant), torch.no_grad(), watch.phase("encoder_forward"):
            self.student.whole(self.batch.images)

    @contextmanager
    def _mode(self, variant: Variant) -> Iterator[None]:
        """Blocks compiled, or with plain attention, for the time of a step."""
        networks = [network for network in (self.student, self.teacher) if network is not None]
        blocks: list[Any] = [block for network in networks for block in network.all_blocks()]
        if variant.mode == "compiled" and not self._compiled:
            compiling.compile_blocks(*networks)
            self._compiled = {block: vars(block).pop("forward") for block in blocks}
        for block in blocks:
            if variant.mode == "compiled":
                block.forward = self._compiled[block]
            for attn in filter(None, (block.attn, getattr(block, "c_attn", None))):
                attn.fused_attn = variant.path == "lean" and self._fused
        try:
            yield
        finally:
            for block in blocks:
                vars(block).pop("forward", None)


def watched(network: nn.Module, phase: str, watch: Watch, *, plain: bool) -> nn.Module:
    """The network as an objective calls it, its forward pass told to `watch`."""
    forward = partial(plain_predictions, cast(MaskedAutoencoder, network)) if plain else network

    def call(*args: Any) -> Tensor:
        with watch.phase(phase):
            return forward(*args)

    return cast(nn.Module, call)  # objectives only call it


# --------------------------------------------------------------------------------------------- time


class Stopwatch:
    """Seconds of each phase of a step: by events of the GPU on one, by `clock` without."""

    def __init__(self, device: torch.device, clock: Clock = "wall") -> None:
        self._cuda = device.type == "cuda"
        self._host = time.perf_counter if clock == "wall" else time.process_time
        self._spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return self._host()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of the step."""
        begin = self._now()
        yield
        self._spans.append((name, begin, self._now()))

    def read(self) -> dict[str, float]:
        """Phase -> seconds since the last reading; waits for the GPU."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for name, begin, end in self._spans:
            span = begin.elapsed_time(end) / 1000 if self._cuda else end - begin
            seconds[name] = seconds.get(name, 0.0) + span
        self._spans.clear()
        return seconds


def matrix_product_rate(precision: str, device: torch.device, size: int, watch: Stopwatch) -> float:
    """FLOP/s of one product of two square matrices of this side, after a warm one."""
    left, right = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
    torch.mm(left, right)
    with watch.phase("product"):
        torch.mm(left, right)
    return 2 * size**3 / watch.read()["product"]


def measure_times(
    variants: Sequence[Variant],
    sizes: dict[str, Any],
    device: torch.device,
    *,
    batch: int,
    steps: int,
    warmup: int,
    ceiling_size: int,
    clock: Clock,
) -> tuple[dict[Variant, list[dict[str, float]]], dict[str, list[float]]]:
    """Each variant's rounds (phase -> seconds, "step" the whole), and each precision's products
    in FLOP/s.
    """
    benches = {}
    precisions = sorted({variant.precision for variant in variants})
    for precision, bootmae in sorted({(v.precision, v.objective == "bootmae") for v in variants}):
        alike = [
            v
            for v in variants
            if v.precision == precision and (v.objective == "bootmae") == bootmae
        ]
        teacher = any(v.objective != "mae" for v in alike)
        benches[precision, bootmae] = Bench(
            sizes, precision, device, batch=batch, teacher=teacher, bootmae=bootmae
        )
    rounds: dict[Variant, list[dict[str, float]]] = {variant: [] for variant in variants}
    rates: dict[str, list[float]] = {precision: [] for precision in precisions}
    watch = Stopwatch(device, clock)
    for number in range(-warmup, steps):
        for precision in precisions:
            rates[precision].append(matrix_product_rate(precision, device, ceiling_size, watch))
        # no variant always comes after the same other one's end of a round
        first = number % len(variants)
        for variant in (*variants[first:], *variants[:first]):
            bench = benches[variant.precision, variant.objective == "bootmae"]
            with watch.phase("step"):
                bench.step(variant, watch)
            if variant.objective == "bootmae":
                bench.encode(variant, watch)
            seconds = watch.read()
            if number >= 0:
                rounds[variant].append(seconds)
        progress(
            f"round {number + 1} of {steps}"
            if number >= 0
            else f"warm-up {number + warmup + 1} of {warmup}"
        )
    return rounds, rates


# ------------------------------------------------------------------------------------------- memory


class PeakMemory:
    """Bytes of tensors at the height of each phase of a step.

    On a GPU what the allocator counts. On a CPU the tensors that outlive the step plus the growth
    of resident memory above its start, from Linux's own high-water mark: the interpreter, libraries
    and compilers are not in it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.peaks: dict[str, int] = {}
        gc.collect()
        self._offset = 0 if self._cuda else _held_bytes() - _status_bytes("VmRSS")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of the step."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        yield
        peak = torch.cuda.max_memory_allocated() if self._cuda else _status_bytes("VmHWM")
        self.peaks[name] = max(self.peaks.get(name, 0), peak + self._offset)


class NoWatch:
    """Nobody looks."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of the step."""
        yield


def _held_bytes() -> int:
    # not a compiler's stand-ins
    plain = (item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter))
    storages = [tensor.untyped_storage() for tensor in plain]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def peak_memory(
    variant: Variant,
    sizes: dict[str, Any],
    device: torch.device,
    *,
    batch: int,
    threads: int | None,
) -> dict[str, int]:
    """Phase -> bytes at its height, "step" the highest, in a process with nothing but this variant.

    Raises:
        OSError: on a CPU whose system has no resettable high-water mark.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    bench = Bench(
        sizes,
        variant.precision,
        device,
        batch=batch,
        teacher=variant.objective != "mae",
        bootmae=variant.objective == "bootmae",
    )
    bench.step(variant, NoWatch())  # moments are touched, blocks compiled
    memory = PeakMemory(device)
    bench.step(variant, memory)
    return {**memory.peaks, "step": max(memory.peaks.values())}


# ------------------------------------------------------------------------------------------- report


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else [values[0]] * 3
    )
    return {"median": middle, "q1": low, "q3": high, "min": min(values), "max": max(values)}


def comparisons(rounds: dict[Variant, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Ratios of whole steps of two variants that differ in one way, and plain fp32 to lean bf16.

    Paired by round.
    """
    rows = []
    for slow in rounds:
        for fast in rounds:
            differs = tuple(a for a, b in zip(slow, fast, strict=True) if a != b)
            one_way = differs in {("rcmae",), ("plain",), ("fp32",), ("eager",)}
            if one_way or (
                slow[1:] == ("plain", "fp32", "eager")
                and fast[:3] == (slow.objective, "lean", "bf16")
            ):
                ratios = [
                    a["step"] / b["step"] for a, b in zip(rounds[slow], rounds[fast], strict=True)
                ]
                rows.append(
                    {"step_of": str(slow), "over_step_of": str(fast), "ratio": spread(ratios)}
                )
    return rows


def describe(
    variant: Variant,
    rounds: Sequence[dict[str, float]],
    memory: dict[str, int] | None,
    *,
    sizes: dict[str, Any],
    batch: int,
    ceiling: float,
) -> dict[str, Any]:
    """One variant's figures."""
    patches = NetworkSizes(**sizes).num_patches
    visible = visible_count(patches, MASK_RATIO)
    forward = flops_per_image(
        NetworkSizes(**sizes), num_visible=visible, hidden_only=variant.path == "lean"
    )
    flops = forward * (4 if variant.objective == "rcmae" else 3)
    if variant.objective == "bootmae":
        with torch.device("meta"):
            network = BootstrappedAutoencoder(NetworkSizes(**sizes))
        flops = 3 * network.flops(visible) + network.encoder_flops(patches)
    phases = [name for name in PHASES if name in rounds[0]]
    parts = {name: [seconds[name] for seconds in rounds] for name in phases}
    wholes = [seconds["step"] for seconds in rounds]
    named = [sum(of_round) for of_round in zip(*parts.values(), strict=True)]
    # losses, targets
    parts["rest"] = [whole - of_phases for whole, of_phases in zip(wholes, named, strict=True)]
    step = spread(wholes)
    rate = flops * batch / step["median"]
    if "encoder_forward" in rounds[0]:  # beside the step, not in it
        parts["encoder_forward"] = [seconds["encoder_forward"] for seconds in rounds]
    shares = {}
    for name, values in parts.items():
        of_rounds = [value / whole for value, whole in zip(values, wholes, strict=True)]
        shares[name] = statistics.median(of_rounds)
    return {
        "variant": str(variant),
        "step_s": step,
        "phases_s": {name: spread(values) for name, values in parts.items()},
        "share_of_step": shares,
        "images_per_s": batch / step["median"],
        "model_flops_per_s": rate,
        "share_of_ceiling": rate / ceiling,
        "peak_bytes": memory,
    }


def print_report(report: dict[str, Any]) -> None:
    """The figures as tables."""
    settings = report["settings"]
    machine = report["hardware"]
    network = settings["model"]
    if settings["quick"]:
        network = f"two blocks of width {settings['embed_dim']} (--quick)"
    print(
        f"{network}, {settings['image_size']} px, batch {settings['batch']}, "
        f"medians of {settings['steps']} "
        f"rounds; {machine.get('gpu') or machine['cpu']}, {machine['threads']} threads, "
        f"torch {report['versions']['torch']}"
        + ", seconds of CPU time"
        * (settings["clock"] == "cpu")
    )
    for precision, ceiling in report["ceilings"].items():
        print(
            f"ceiling {precision}: {ceiling['best'] / 1e12:.3f} TFLOP/s in a product of side "
            f"{ceiling['side']}"
        )
    has_encoder = any("encoder_forward" in row["phases_s"] for row in report["variants"])
    # the last is beside the step
    names = [*PHASES, "rest", *(["encoder_forward"] if has_encoder else [])]
    titles = [name.replace("_", " ") for name in names]
    rows = [["variant", "step s", "q1..q3", *titles, "img/s", "TFLOP/s", "of ceiling"]]
    for row in report["variants"]:
        step = row["step_s"]
        parts = [
            f"{row['phases_s'][name]['median']:.4f} {100 * row['share_of_step'][name]:.1f}%"
            if name in row["phases_s"]
            else "-"
            for name in names
        ]
        rates = [f"{row['images_per_s']:.2f}", f"{row['model_flops_per_s'] / 1e12:.3f}"]
        spreads = [f"{step['median']:.4f}", f"{step['q1']:.4f}..{step['q3']:.4f}"]
        rows.append(
            [row["variant"], *spreads, *parts, *rates, f"{100 * row['share_of_ceiling']:.1f}%"]
        )
    _print_columns(rows)
    if any(row["peak_bytes"] for row in report["variants"]):
        rows = [["peak memory, MiB", "step", *titles[: len(PHASES)]]]
        for row in report["variants"]:
            peaks = row["peak_bytes"] or {}
            cells = [
                f"{peaks[name] / MIB:,.0f}" if name in peaks else "-" for name in ("step", *PHASES)
            ]
            rows.append([row["variant"], *cells])
        _print_columns(rows)
    else:
        print(f"\npeak memory: {report['memory_note']}")
    rows = [["comparison (paired by round)", "ratio", "q1..q3"]]
    for row in report["comparisons"]:
        ratio = row["ratio"]
        name = f"step of {row['step_of']} / step of {row['over_step_of']}"
        rows.append([name, f"{ratio['median']:.3f}", f"{ratio['q1']:.3f}..{ratio['q3']:.3f}"])
    if len(rows) > 1:
        _print_columns(rows)


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


# --------------------------------------------------------------------------------------------- main


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="vit_base_patch16", choices=ARCHITECTURES)
    parser.add_argument("--image-size", type=int, default=224, help="pixels, both sides (224)")
    parser.add_argument("--batch", type=int, default=32, help="images of a step (32)")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(DEFAULT_VARIANTS),
        metavar="V",
        help=f"OBJECTIVE-PATH-PRECISION-MODE, by default {' '.join(DEFAULT_VARIANTS)}",
    )
    parser.add_argument("--steps", type=int, default=10, help="rounds that are counted (10)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them (2)")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's choice by default")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: seconds that one thread computed (--threads 1), where others use the machine "
        "too",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--no-memory", action="store_true", help="leave it out: it takes a process a variant"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two tiny blocks, two rounds: does it run?"
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="to FILE, or instead of the tables"
    )
    asked = parser.parse_args(argv)
    try:
        asked.variants = [Variant.parse(name) for name in dict.fromkeys(asked.variants)]
    except Refused as error:
        parser.error(str(error))
    if asked.quick:
        asked.image_size = 32
        asked.batch = 2
        asked.steps = 2
        asked.warmup = 1
    for name in ("image_size", "batch", "steps", "warmup", "threads"):
        value = getattr(asked, name)
        if value is not None and value < (0 if name == "warmup" else 1):
            parser.error(
                f"--{name.replace('_', '-')}={value} must be at least "
                f"{0 if name == 'warmup' else 1}"
            )
    if asked.clock == "cpu" and (asked.device != "cpu" or asked.threads != 1):
        parser.error(
            "--clock cpu adds up the seconds of all threads: it goes with --device cpu --threads 1"
        )
    bf16 = any(variant.precision == "bf16" for variant in asked.variants)
    if asked.device == "cuda" and bf16 and not torch.cuda.is_bf16_supported(False):
        parser.error(f"{torch.cuda.get_device_name()} has no bf16; ask for fp32 variants")
    return asked


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    asked = arguments(argv)
    device = torch.device(asked.device)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    sizes = sizes_of(asked)
    memory, note = measure_memory(asked, sizes, device)
    side = 256 if asked.quick else 8192 if device.type == "cuda" else 2048
    rounds, rates = measure_times(
        asked.variants,
        sizes,
        device,
        batch=asked.batch,
        steps=asked.steps,
        warmup=asked.warmup,
        ceiling_size=side,
        clock=asked.clock,
    )
    ceilings = {
        name: {"best": max(values), **spread(values), "side": side}
        for name, values in rates.items()
    }
    rows = []
    for variant in asked.variants:
        row = describe(
            variant,
            rounds[variant],
            memory.get(variant),
            sizes=sizes,
            batch=asked.batch,
            ceiling=ceilings[variant.precision]["best"],
        )
        rows.append(row)
    report = {
        "tool": "bench_step",
        "command": "python tools/bench_step.py " + " ".join(sys.argv[1:] if argv is None else argv),
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(device),
        "settings": settings_of(asked, sizes),
        "ceilings": ceilings,
        "variants": rows,
        "comparisons": comparisons(rounds),
        "memory_note": note,
    }
    write(report, asked.json)
    return 0


def sizes_of(asked: argparse.Namespace) -> dict[str, Any]:
    """Sizes of the network that is measured."""
    sizes: dict[str, Any] = {
        **ARCHITECTURES[asked.model],
        "image_size": (asked.image_size,) * 2,
        "in_channels": 3,
    }
    if asked.quick:
        sizes |= {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
        sizes |= {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
    return sizes


def measure_memory(
    asked: argparse.Namespace, sizes: dict[str, Any], device: torch.device
) -> tuple[dict[Variant, dict[str, int]], str]:
    """Bytes at the height of each phase of each variant, and a note on how they were measured."""
    memory: dict[Variant, dict[str, int]] = {}
    if asked.no_memory:
        return memory, "not asked for"
    note = "not measured"
    # so that what the child frees leaves its resident memory
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    for variant in asked.variants:
        progress(f"memory of {variant}")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
            job = child.submit(
                peak_memory, variant, sizes, device, batch=asked.batch, threads=asked.threads
            )
            try:
                memory[variant] = job.result()
            except OSError as error:
                note = f"not measured: {error}"
    if memory:
        note = "tensors at the height of each phase, each variant in its own process"
    return memory, note


def progress(text: str) -> None:
    """Tell what is being done."""
    print(text, file=sys.stderr, flush=True)


def versions() -> dict[str, str]:
    """Of what a step is computed with."""
    return {
        "rcmae": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": importlib.metadata.version("timm"),
    }


def settings_of(asked: argparse.Namespace, sizes: dict[str, Any]) -> dict[str, Any]:
    """What was measured."""
    return {
        "model": asked.model,
        **sizes,
        "image_size": asked.image_size,
        "batch": asked.batch,
        "steps": asked.steps,
        "warmup": asked.warmup,
        "clock": asked.clock,
        "mask_ratio": MASK_RATIO,
        "quick": asked.quick,
    }


def write(report: dict[str, Any], file: str | None) -> None:
    """The report: tables, and the document to a file; for "-" the document alone."""
    document = json.dumps(report, indent=1)
    if file == "-":
        print(document)
        return
    if file:
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document + "\n")
    print_report(report)


if __name__ == "__main__":
    sys.exit(main())
