"""What a rank needs of its device's memory, by arithmetic alone: model states, activations, and
what engines add.

A step is walked through: the teacher's forward pass, the student's, its backward pass part by part
(activations go while gradients come), the update, the teacher's update. `footprint` gives the bytes
of each of these moments, by what they are. Everything here follows from sizes and from how the
engines work (torch 2.13, DeepSpeed 0.19); nothing is allocated. tests/test_plan.py holds it to live
tensors of real ranks.

Not in it: what the device's driver, its communication library and a fragmented allocator take on
top, and kernels that `torch.compile` fuses (which keep less).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rcmae.engines.optim import param_groups
from rcmae.engines.teacher import TeacherBytes, teacher_bytes
from rcmae.models.bootmae import BootstrappedAutoencoder, Network
from rcmae.models.vit import MaskedAutoencoder

PLACEMENTS = ("local", "zero0", "zero1", "zero2", "zero3", "fsdp2")
_FLUSH = 500_000_000  # elements of DeepSpeed's all-reduce at stage 0, and of its default buckets
_LIVE = 1_000_000_000  # parameters that its stage 3 keeps gathered by default: all of a ViT


# -------------------------------------------------------------------------------------- activations


@dataclass(frozen=True)
class Part:
    """A stretch of the student; bytes of one image."""

    name: str
    params: int
    saved: float  # from the forward to the backward pass
    passing: float  # more than that, while the backward pass is in it


def activations(
    model: Network,
    *,
    num_visible: int,
    precision: str,
    teacher: bool,
    checkpointing: str = "none",
    fused_attention: bool = True,
) -> list[Part]:
    """The student's parts in the order of the forward pass, the loss last.

    Args:
        model: any, also on the meta device: only its sizes are read.
        num_visible: patches that the encoder sees.
        precision: "fp32" or "bf16".
        teacher: whether the loss has a term to a teacher's pixels.
        checkpointing: as in `kernels.checkpoint_blocks`.
        fused_attention: as in `kernels.attention`; what is not keeps the attention of each pair of
            tokens.
    """
    sizes, width = model.sizes, _width(precision)
    seen = model.num_prefix + num_visible
    dim, pixels = sizes["embed_dim"], sizes["patch_size"] ** 2 * sizes["in_channels"]
    ways = _Ways(width, sizes["mlp_ratio"], checkpointing, fused_attention)
    first = _numel(model.patch_embed) + (model.cls_token.numel() if model.num_prefix else 0)
    embedding = Part(
        "embedding", first, num_visible * pixels * width, (seen + num_visible) * dim * width
    )
    encoder = [
        ways.block(f"block {i}", part, dim, sizes["num_heads"], seen, seen)
        for i, part in enumerate(model.blocks)
    ]
    rest = _regressors if isinstance(model, BootstrappedAutoencoder) else _decoder
    return [embedding, *encoder, *rest(model, num_visible, ways, teacher)]


@dataclass(frozen=True)
class _Ways:
    """How blocks are computed with."""

    width: int  # bytes of a number
    mlp_ratio: float
    checkpointing: str
    fused_attention: bool

    def block(
        self,
        name: str,
        part: nn.Module,
        dim: int,
        heads: int,
        keys: int,
        queries: int,
        looks_at: tuple[int, int] = (0, 0),
    ) -> Part:
        """A block of `keys` tokens that answers for `queries`.

        `looks_at`: other tokens and their width, if any.
        """
        # keys: input, its norm, q, k and v; queries: attention, sum, its norm, the MLP before and
        # after GELU
        width, mlp = self.width, self.mlp_ratio
        kept = (5 * keys + (3 + 2 * mlp) * queries) * dim * width + 4 * (
            heads * queries + 2 * keys + 2 * queries
        )
        grads = (1 + mlp) * queries * dim * width
        others, other_dim = looks_at
        if others:  # queries: a norm, q, attention, sum; others: their norm, k and v
            kept += (4 * queries * dim + others * (other_dim + 2 * dim)) * width
            kept += 4 * (heads * queries + 2 * queries + 2 * others)
        if not self.fused_attention:  # the matrix of attention, in place of its log-sums
            matrix = heads * queries * (keys + others) * width
            kept += matrix - 4 * heads * queries * (2 if others else 1)
            grads = max(grads, 2 * heads * queries * keys * width + queries * dim * width)
        if self.checkpointing == "none":
            return Part(name, _numel(part), kept, grads)
        held = 0 if self.checkpointing == "fairscale_offload" else keys * dim * width
        return Part(name, _numel(part), held, kept - held + grads)


def _decoder(model: Network, num_visible: int, ways: _Ways, teacher: bool) -> list[Part]:
    """MAE's decoder and the loss."""
    assert isinstance(model, MaskedAutoencoder)
    sizes, width = model.sizes, ways.width
    seen, hidden = model.num_prefix + num_visible, model.num_patches - num_visible
    tokens = model.decoder_prefix + model.num_patches
    dim, pixels = sizes["decoder_dim"], sizes["patch_size"] ** 2 * sizes["in_channels"]
    bridge = Part(
        "bridge",
        _numel(model.norm) + _numel(model.decoder_embed) + model.mask_token.numel(),
        2 * seen * sizes["embed_dim"] * width,
        2 * tokens * dim * width,
    )
    last = len(model.decoder_blocks) - 1
    decoder = [
        ways.block(
            f"decoder block {i}",
            part,
            dim,
            sizes["decoder_heads"],
            tokens,
            hidden if i == last else tokens,
        )
        for i, part in enumerate(model.decoder_blocks)
    ]
    # what the last two keep is small
    heads = ("decoder_norm", "decoder_pred", "cls_head", "feature_head")
    head = Part(
        "head",
        sum(_numel(getattr(model, name)) for name in heads if hasattr(model, name)),
        2 * hidden * dim * width,
        hidden * (pixels + dim) * width,
    )
    # in fp32: the target and the predictions, which in bf16 each term widens for itself; passing:
    # those in bf16, and a term's temporaries
    widened = (1 if width == 4 else 2) + 1 if teacher else 1
    narrow = 0 if width == 4 else 2 if teacher else 1
    loss = Part(
        "loss", 0, hidden * pixels * 4 * (1 + widened), hidden * pixels * (8 + narrow * width)
    )
    return [bridge, *decoder, head, loss]


def _regressors(model: Network, num_visible: int, ways: _Ways, teacher: bool) -> list[Part]:
    """BootMAE's two regressors and the loss, patches weighted as published."""
    assert isinstance(model, BootstrappedAutoencoder)
    sizes, width = model.sizes, ways.width
    seen, tokens, hidden = 1 + num_visible, 1 + model.num_patches, model.num_patches - num_visible
    dim, pixels = sizes["embed_dim"], sizes["patch_size"] ** 2 * sizes["in_channels"]
    named = dict(model.named_children())
    parts = [Part("bridge", _numel(model.norm), 2 * seen * dim * width, seen * dim * width)]
    for suffix, inner, outputs in (("", sizes["decoder_dim"], pixels), ("_1", dim, dim)):
        if f"decode_blocks{suffix}" not in named:
            continue
        name, blocks = (
            "features" if suffix else "pixels",
            list(named[f"decode_blocks{suffix}"].children()),
        )
        mask_token = getattr(model, f"mask_token{suffix}")
        start = _numel(named[f"down{suffix}"]) + mask_token.numel()
        parts.append(Part(f"start of {name}", start, 0.0, 2 * tokens * inner * width))
        for i, block in enumerate(blocks):
            queries = hidden if i == len(blocks) - 1 else tokens
            title = f"{name} block {i}"
            parts.append(
                ways.block(
                    title, block, inner, sizes["decoder_heads"], tokens, queries, (seen, dim)
                )
            )
        ends = _numel(named[f"decode_norm{suffix}"]) + _numel(named[f"lm_head{suffix}"])
        parts.append(
            Part(
                f"head of {name}",
                ends,
                2 * hidden * inner * width,
                hidden * (outputs + inner) * width,
            )
        )
    # in fp32: differences, and of features also what their norm was given; passing: predictions,
    # targets, temporaries
    narrow = 0 if width == 4 else width
    kept, most = hidden * pixels * 4, hidden * pixels * (8 + narrow)
    if "lm_head_1" in named:
        kept, most = kept + 2 * hidden * dim * 4, max(most, hidden * dim * (12 + narrow))
    return [*parts, Part("loss", 0, kept, most)]


def inference_bytes(
    model: Network, *, num_visible: int, precision: str, decodes: bool = True
) -> float:
    """Bytes of one image at the height of a forward pass without gradients: inside an MLP."""
    sizes = model.sizes
    widest = (1 + num_visible) * sizes["embed_dim"]
    if decodes:
        widest = max(widest, (1 + model.num_patches) * sizes["decoder_dim"])
    return (2 + 2 * sizes["mlp_ratio"]) * widest * _width(precision)


def _width(precision: str) -> int:
    return 2 if precision == "bf16" else 4


def _numel(module: torch.nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


# ------------------------------------------------------------------------------------------ engines


@dataclass(frozen=True)
class Settings:
    """What decides a rank's memory beside the model."""

    placement: str  # one of PLACEMENTS
    precision: str = "bf16"
    world: int = 1
    per_device: int = 1  # images of a micro-batch
    accumulation: int = 1  # micro-batches of a step
    num_visible: int = 1
    # parts of the student that it has; none: there is no teacher
    teacher: tuple[str, ...] = ("encoder", "decoder")
    accumulate: str = "fp32_shard"  # the teacher's, as in `teacher.Teacher`
    checkpointing: str = "none"
    fused_attention: bool = True
    deepspeed: Mapping[str, Any] = field(default_factory=dict)  # its JSON


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank, by moment of a step and by what they are.

    Every moment has all that is resident.
    """

    resident: dict[str, float]
    moments: dict[str, dict[str, float]]
    host: float  # bytes of host memory that hold model states

    @property
    def peak(self) -> float:
        """Bytes at the highest moment."""
        return max(sum(parts.values()) for parts in self.moments.values())

    @property
    def when(self) -> str:
        """The highest moment."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def at_peak(self) -> dict[str, float]:
        """Bytes at the highest moment by what they are."""
        return self.moments[self.when]


@dataclass(frozen=True)
class _Engine:
    """Bytes that an engine takes, apart from activations."""

    resident: dict[str, float]
    # the student's whole parameters, from its forward to the end of its backward pass
    gathered: float = 0.0
    teacher_gathered: float = 0.0  # the teacher's, in its forward pass
    # for each parameter of the part that computes, and of the next, whose shards arrive
    part_gathered: float = 0.0
    part_grads: float = 0.0  # for each parameter of the part that a backward pass is in
    # for each parameter of the part that it has just been in: gradients on their way
    part_leaving: float = 0.0
    grown: float = 0.0  # gradients that a backward pass builds up
    # gradients that lie there from the first micro-batch on, where there are several
    carried: float = 0.0
    regrown: float = 0.0  # and that the later ones add to them
    buckets: float = 0.0  # while a backward pass runs
    flushed: float = 0.0  # copies of a full bucket, for each element
    bucket: int = 0  # elements
    reducing: float = 0.0  # copies at the end of a backward pass, beside all gradients
    updating: float = 0.0  # gradients and copies in the optimizer's step
    publishing: float = 0.0  # in the teacher's update
    host: float = 0.0


def states(model: Network, settings: Settings) -> dict[str, int]:
    """Elements: `whole` of the model, `shard` of this rank, `group` the largest optimizer
    group's part of that.
    """
    groups = [
        [tuple(param.shape) for param in group["params"]] for group in param_groups(model, 0.0)
    ]

    def held(of: Sequence[Sequence[Sequence[int]]]) -> int:
        return _bytes_of_teacher(settings, of, "bf16", "fp32_shard").accumulator // 4

    return {
        "whole": sum(math.prod(shape) for group in groups for shape in group),
        "shard": held(groups),
        "group": max(held([group]) for group in groups),
    }


def teacher_groups(model: nn.Module, parts: Sequence[str]) -> list[list[tuple[int, ...]]]:
    """Shapes of the optimizer groups that a teacher of these parts has, for
    `teacher.teacher_bytes`.
    """
    groups = [
        group for group in param_groups(model, 0.0) if group["name"].partition("_")[0] in parts
    ]
    return [[tuple(param.shape) for param in group["params"]] for group in groups]


def _bytes_of_teacher(
    settings: Settings, groups: Sequence[Sequence[Sequence[int]]], precision: str, accumulate: str
) -> TeacherBytes:
    return teacher_bytes(
        settings.placement,
        groups,
        rank=0,
        world=settings.world,
        precision=precision,
        accumulate=accumulate,
    )


def _engine(model: Network, settings: Settings) -> _Engine:
    width, bf16 = _width(settings.precision), settings.precision == "bf16"
    count = states(model, settings)
    whole, shard, group = count["whole"], count["shard"], count["group"]
    taught = teacher_groups(model, settings.teacher)
    teacher = _bytes_of_teacher(settings, taught, settings.precision, settings.accumulate)
    copy, accumulator = (teacher.copy, teacher.accumulator) if settings.teacher else (0, 0)
    largest = max(param.numel() for param in model.parameters())
    # a logged step keeps the old copy
    publishing = float(
        width * _bytes_of_teacher(settings, taught, "bf16", "fp32_shard").accumulator // 4
    )

    zero = settings.deepspeed.get("zero_optimization", {})
    bucket = int(zero.get("reduce_bucket_size", _FLUSH))
    overlap = bool(zero.get("overlap_comm", settings.placement == "zero3"))
    summed = (
        4 if settings.deepspeed.get("data_types", {}).get("grad_accum_dtype") == "fp32" else width
    )
    offload = (zero.get("offload_optimizer") or {}).get("device", "none") == "cpu"
    master = 4.0 * shard
    on_device, on_host = (0.0, 1.0) if offload else (1.0, 0.0)

    def parts(
        weights: float, gradients: float, moments: float, buffers: float = 0.0
    ) -> dict[str, float]:
        return {
            "weights": weights,
            "gradients": gradients,
            "moments": moments,
            "teacher": copy + accumulator * on_device,
            "communication": buffers,
        }

    if settings.placement == "local":
        both = (2 + 4 if bf16 else 4) * whole
        return _Engine(parts(both, both, 8 * whole), buckets=width * largest, publishing=publishing)
    if settings.placement == "zero0":
        flush = width * min(whole, _FLUSH)
        return _Engine(
            parts((2 + 4 if bf16 else 4) * whole, 0.0, 8 * whole),
            grown=width * whole,
            carried=width * whole,
            reducing=flush,
            updating=(2 + 4 if bf16 else 4) * whole,
            publishing=publishing,
        )
    if settings.placement == "fsdp2":
        # a block's shards arrive in one buffer, from which they are copied out; its gradients leave
        # as the fp32 input of a reduce-scatter, which lies there until the next one's. In all
        # micro-batches but the last, without a reduce-scatter, they stay whole.
        return _Engine(
            parts(4 * shard, 0.0, 8 * shard),
            part_gathered=width,
            part_grads=width,
            part_leaving=4,
            grown=4 * shard,
            carried=4 * whole,
            updating=4 * shard,
            publishing=publishing,
        )
    moments = 8 * shard * on_device
    host = (master + 8 * shard + 4 * shard + accumulator) * on_host
    if settings.placement == "zero3":
        # these stay whole on every rank
        small = int(zero.get("stage3_param_persistence_threshold", 100_000))
        persistent = sum(param.numel() for param in model.parameters() if param.numel() <= small)
        gathered = width * min(whole, int(zero.get("stage3_max_live_parameters", _LIVE)))
        contiguous = zero.get("contiguous_gradients", True)
        return _Engine(
            parts(
                width * (shard + persistent) + master * on_device,
                summed * shard * on_device,
                moments,
                width * bucket if contiguous else 0.0,
            ),
            gathered=gathered - width * persistent,
            teacher_gathered=min(
                gathered, float(width * sum(math.prod(shape) for each in taught for shape in each))
            ),
            flushed=width if contiguous else 2 * width,
            bucket=bucket,
            updating=4 * group,
            publishing=publishing,
            host=host,
        )
    buckets = width * bucket * (2 if overlap else 1)
    published = publishing * 2  # the shard on its way, too
    if settings.placement == "zero1" and bf16 and summed == 4:
        # DeepSpeed's BF16_Optimizer: whole fp32 gradients
        flush = min(whole, _FLUSH)
        return _Engine(
            parts(2 * whole + master, 4 * whole, moments),
            grown=2 * whole,
            carried=2 * whole,
            reducing=(4 + 2) * flush,
            updating=2 * whole,
            publishing=published,
            host=host,
        )
    weights = width * whole + master * on_device
    if settings.placement == "zero1":
        return _Engine(
            parts(weights, 0.0, moments),
            grown=width * whole,
            carried=width * whole,
            buckets=buckets,
            reducing=summed * shard,
            updating=summed * shard + 4 * group,
            publishing=published,
            host=host,
        )
    # apart: straight into the fp32 partition
    kept, apart = float(summed * shard * on_device), summed != width
    return _Engine(
        parts(weights, 0.0, moments),
        grown=kept,
        carried=kept,
        regrown=0.0 if apart else kept,
        buckets=buckets + width * largest,
        flushed=4,
        bucket=bucket,
        updating=kept + (8 * largest if apart else 4 * group),
        publishing=published,
        host=host,
    )


def footprint(model: Network, settings: Settings) -> Footprint:
    """The memory of one rank.

    Args:
        model: the student, also on the meta device: only its sizes are read.
        settings: how it is trained.
    """
    engine = _engine(model, settings)
    each, images = settings.precision, settings.per_device
    parts = activations(
        model,
        num_visible=settings.num_visible,
        precision=each,
        teacher="decoder" in settings.teacher,
        checkpointing=settings.checkpointing,
        fused_attention=settings.fused_attention,
    )
    tables = sum(table.numel() * table.element_size() for table in model.buffers())
    resident = {**engine.resident, "activations": 0.0}
    resident["weights"] += tables * (2 if settings.teacher else 1)
    pixels = math.prod(model.image_size) * model.in_channels
    batch = images * (4 * pixels + 8 * model.num_patches)
    taught = 0  # tokens of the whole image, which wait for the student's
    if settings.teacher and "decoder" not in settings.teacher:
        taught = images * model.num_patches * model.sizes["embed_dim"] * _width(each)
    carried = engine.carried if settings.accumulation > 1 else 0.0
    moments: dict[str, dict[str, float]] = {}

    def moment(name: str, **more: float) -> None:
        moments[name] = {kind: size + more.get(kind, 0.0) for kind, size in resident.items()}

    if settings.teacher:
        seen = settings.num_visible if "decoder" in settings.teacher else model.num_patches
        passing = inference_bytes(
            model, num_visible=seen, precision=each, decodes="decoder" in settings.teacher
        )
        moment(
            "teacher's forward",
            gradients=carried,
            communication=engine.teacher_gathered,
            activations=batch + images * passing,
        )
    sizes = [part.params for part in parts]
    saved, done = 0.0, 0
    for part, behind in zip(parts, [0, *sizes[:-1]], strict=True):
        saved += part.saved
        # its parameters are copied out of a buffer while the last part's buffer still lies there
        moment(
            f"forward, {part.name}",
            gradients=carried,
            communication=engine.gathered + engine.part_gathered * (2 * part.params + behind),
            activations=batch + taught + images * (saved + part.passing * (part.name == "loss")),
        )
    grown = engine.regrown if settings.accumulation > 1 else engine.grown
    for part, ahead, behind in reversed(
        list(zip(parts, [0, *sizes[:-1]], [*sizes[1:], 0], strict=True))
    ):
        before, done = done, done + part.params
        buckets = engine.buckets if done else 0.0  # they come with the first gradient
        reduced, flushed = done, 0  # elements
        if engine.bucket:  # gradients arrive with each full bucket; a flush holds copies of one
            full = done // engine.bucket
            flushed = engine.bucket if full > before // engine.bucket else 0
            reduced = full * engine.bucket - flushed
        within = before if engine.part_grads else reduced
        moment(
            f"backward, {part.name}",
            gradients=carried + grown * within / sum(sizes),
            communication=engine.gathered
            + buckets
            + engine.flushed * flushed
            + engine.part_gathered * (part.params + ahead)
            + engine.part_grads * part.params
            + engine.part_leaving * behind,
            activations=batch + images * (saved + part.passing),
        )
        saved -= part.saved
        if engine.part_leaving:
            # else `carried` has them
            whole = engine.part_grads if settings.accumulation == 1 else 0.0
            moment(
                f"reduction, {part.name}",
                gradients=carried + grown * before / sum(sizes),
                communication=engine.part_gathered * ahead
                + (whole + engine.part_leaving) * part.params,
                activations=batch + images * saved,
            )
    if engine.bucket:
        last = sum(sizes) % engine.bucket
        moment(
            "last bucket",
            gradients=carried + grown * (1 - last / sum(sizes)),
            communication=engine.gathered + engine.buckets + engine.flushed * last,
            activations=batch,
        )
    moment("reduction", gradients=carried + grown, communication=engine.reducing, activations=batch)
    moment("update", gradients=engine.updating)
    moment("teacher's update", teacher=engine.publishing)
    return Footprint(resident, moments, engine.host)


def checkpoint_bytes(model: nn.Module, *, teacher: Sequence[str]) -> int:
    """Bytes of a checkpoint's tensors: weight, two moments and teacher of each parameter in fp32,
    and the tables.

    `teacher`: the parts that it has.
    """
    taught = sum(math.prod(shape) for group in teacher_groups(model, teacher) for shape in group)
    params = 3 * sum(param.numel() for param in model.parameters()) + taught
    return 4 * params + sum(table.numel() * table.element_size() for table in model.buffers())
