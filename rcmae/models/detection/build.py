"""A recipe's detector: sizes, what does not fit together, weights that it starts from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rcmae.config import DetectOptions, ModelOptions
from rcmae.errors import Refused
from rcmae.models.build import student_sizes
from rcmae.models.detection.detector import Detector
from rcmae.models.detection.sizes import (
    BackboneSizes,
    DetectorSizes,
    HeadSizes,
    ProposalSizes,
    RegionSizes,
    windowed_blocks,
)
from rcmae.models.detection.vitdet import positions_for
from rcmae.models.fitting import Fit
from rcmae.models.sizes import NetworkSizes

USUAL_CLASSES = 80  # for a plan made before the categories are seen
PATCH = 16  # whose strides the pyramid has
COARSEST = 32  # pixels of the coarsest level that regions are read from
HEADS = ("proposal_generator.", "roi_heads.")
OWN = {"vitdet": "backbone.net.", "benchmark": "backbone.bottom_up."}  # of a backbone's ViT
OF_CLASSES = ("box_predictor.", "mask_head.predictor.")  # parameters whose shape has the classes


def detector_sizes(model: ModelOptions, detect: DetectOptions) -> DetectorSizes:
    """The sizes of a recipe.

    Raises:
        Refused: they do not fit together; all problems, with the way out.
    """
    whole = student_sizes(model, stride=COARSEST)
    vit = replace(whole, decoder_dim=0, decoder_depth=0, decoder_heads=0)
    window = detect.window or (14 if detect.backbone == "vitdet" else 16)
    problems = size_problems(vit, detect, window)
    if problems:
        raise Refused("\n".join(problems))
    table = detect.pretrain_size // vit.patch_size
    return DetectorSizes(
        BackboneSizes(
            vit=vit,
            window=window,
            windowed=windowed_blocks(vit.depth),
            channels=detect.channels,
            table=(table, table),
            drop_path=detect.drop_path,
            positions="row_first" if detect.positions == "published" else "column_first",
        ),
        ProposalSizes(
            anchors=tuple((size,) for size in detect.anchors),
            sampled=detect.anchors_sampled,
            per_level=detect.proposals_per_level,
            kept=detect.proposals,
        ),
        RegionSizes(
            num_classes=detect.num_classes or USUAL_CLASSES,
            sampled=detect.regions_sampled,
            canonical=(detect.canonical_size, 4),
            score=detect.score,
            detections=detect.detections,
            heads=HeadSizes(box_width=detect.box_width),
        ),
        kind=detect.backbone,
        decayed_norms=detect.decay_norms,
    )


def size_problems(vit: NetworkSizes, detect: DetectOptions, window: int) -> list[str]:
    """What stands against a canvas and its windows, one line a problem."""
    problems = []
    if vit.patch_size != PATCH:
        problems.append(
            f"model.patch_size={vit.patch_size}: the pyramid's strides are those of patches of "
            f"{PATCH} pixels; set model.patch_size={PATCH} (weights of other patches are resized)"
        )
        return problems
    for name, side in zip(("height", "width"), vit.image_size, strict=True):
        if side % COARSEST:
            near = sorted({max(COARSEST, side // COARSEST * COARSEST), -(-side // 32) * COARSEST})
            problems.append(
                f"model.image_size: the stride of {COARSEST} does not divide the canvas's {name} "
                f"of {side}; use {' or '.join(map(str, near))}"
            )
    rows, columns = vit.grid
    if window > min(rows, columns):
        problems.append(
            f"detect.window={window} is larger than the canvas of {rows}x{columns} patches; set "
            f"one of {min(rows, columns)} or less, or a larger model.image_size"
        )
    elif detect.backbone == "benchmark" and (rows % window or columns % window):
        problems.append(
            f"detect.window={window} does not divide the canvas of {rows}x{columns} patches; set "
            "one that does"
        )
    if detect.backbone == "benchmark" and vit.depth < 8:
        problems.append(
            f"model.depth={vit.depth}: each of four sections has windowed blocks and a global one; "
            "use 8 or more"
        )
    if vit.depth % 4:
        problems.append(
            f"model.depth={vit.depth}: blocks come in four sections; use a multiple of 4"
        )
    if detect.backbone == "benchmark" and vit.embed_dim % 32:
        problems.append(
            f"model.embed_dim={vit.embed_dim} must be a multiple of 32 for the adapters' group norm"
        )
    if detect.pretrain_size % vit.patch_size:
        problems.append(
            f"detect.pretrain_size={detect.pretrain_size} is not a multiple of {vit.patch_size}"
        )
    return problems


def new_detector(model: ModelOptions, detect: DetectOptions, seed: int) -> Detector:
    """A recipe's detector with the weights of a seed. Raises Refused."""
    network = Detector(detector_sizes(model, detect))
    network.draw_weights(torch.Generator().manual_seed(seed))
    return network


@torch.no_grad()
def fit_detector(
    model: Detector, weights: Mapping[str, Tensor], grid: tuple[int, int] | None = None
) -> Fit:
    """Put weights into a detector: another's, or a pretrained encoder's of published names.

    Args:
        model: whose backbone has the architecture of the weights.
        weights: of a detector of the same backbone, its heads of any number of classes; or of an
            encoder, of any grid: positions are interpolated, the class token and the last norm left
            out, relative positions fresh.
        grid: rows and columns of an encoder's position table; None for a square one.

    Raises:
        Refused: what does not fit, all of it. The model is untouched.
    """
    of_detector = any(name.startswith(HEADS) for name in weights)
    wanted = model.state_dict()
    if of_detector:
        found, resampled = dict(weights), None
        for name in [name for name in found if name.endswith("relative_position_index")]:
            del found[name]  # known from the grid
        if not any(name.startswith(OWN[model.sizes.kind]) for name in found):
            raise Refused(_of_another(found, model.sizes.kind))
        for name in _of_other_classes(found, wanted):
            del found[name]
    else:
        found, resampled = _encoder(model, weights, grid)
    problems = _problems(found, wanted, of_detector)
    if problems:
        raise Refused("; ".join(problems))
    model.load_state_dict({**wanted, **found})
    return Fit(
        matched=tuple(sorted(found)),
        fresh=tuple(name for name in wanted if name not in found),
        unused=tuple(sorted(_unused(weights, found, model))),
        resampled=resampled,
    )


def _unused(
    weights: Mapping[str, Tensor], found: Mapping[str, Tensor], model: Detector
) -> list[str]:
    prefix = "backbone.net." if model.sizes.kind == "vitdet" else "backbone.bottom_up."
    return [name for name in weights if name not in found and prefix + name not in found]


def _of_other_classes(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Last layers of another number of classes: they are newly initialised."""
    last = [name for name in found if any(part in name for part in OF_CLASSES)]
    if all(name in wanted and found[name].shape == wanted[name].shape for name in last):
        return []
    return last


def _encoder(
    model: Detector, weights: Mapping[str, Tensor], grid: tuple[int, int] | None
) -> tuple[dict[str, Tensor], tuple[tuple[int, int], tuple[int, int]] | None]:
    """An encoder's weights as the backbone names them, and from which grid to which positions were
    interpolated.
    """
    vitdet = model.sizes.kind == "vitdet"
    prefix = "backbone.net." if vitdet else "backbone.bottom_up."
    found = {}
    resampled = None
    for name, value in weights.items():
        if name.startswith(("patch_embed.", "blocks.")):
            found[prefix + name] = value
    patches = f"{prefix}patch_embed.proj.weight"
    if patches in found:
        found[patches] = _patches_of(found[patches], model.sizes.backbone.vit.patch_size)
    table = weights.get("pos_embed")
    if vitdet and table is not None and table.ndim == 3:
        new = model.sizes.backbone.table
        old = grid or _square(table.shape[1])
        found[f"{prefix}pos_embed"] = positions_for(table, old, new)
        resampled = None if old == new else (old, new)
    return found, resampled


def _of_another(found: Iterable[str], kind: str) -> str:
    """What a detector is whose backbone is not of this kind, with the way out."""
    named = [name for name in found if name.startswith("backbone.")]
    for other, begin in OWN.items():
        if other != kind and any(name.startswith(f"{begin}blocks.") for name in named):
            return (
                f"is a detector of another backbone than detect.backbone={kind}; set "
                f"detect.backbone={other}, or start from an encoder"
            )
    such = f", its backbone has {named[0]}" if named else ""
    return (
        f"is a detector on no plain ViT{such}; start from an encoder, or from a detector of rcmae "
        "or ViTDet's"
    )


def _square(rows: int) -> tuple[int, int]:
    """The grid of a table with or without a row for a class token."""
    side = int(rows**0.5)
    return side, side


def _patches_of(weight: Tensor, patch: int) -> Tensor:
    """A patch embedding [D, C, p, p] for patches of another side: interpolated, as the published
    detectors of ViT-H, whose pretraining has patches of 14, begin.
    """
    if weight.ndim != 4 or weight.shape[2] == patch:
        return weight
    return F.interpolate(weight, size=(patch, patch), mode="bicubic", align_corners=False)


def _problems(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], of_detector: bool
) -> list[str]:
    problems = []
    unknown = [name for name in found if name not in wanted]
    if unknown:
        problems.append(f"has unknown {_some(unknown)}")
    fresh = ("rel_pos", "pos_embed")
    lacking = [
        name
        for name in wanted
        if name not in found
        and (of_detector or ".blocks." in name or ".patch_embed." in name)
        and not any(part in name for part in (*fresh, *OF_CLASSES))
    ]
    if lacking:
        problems.append(f"lacks {_some(lacking)}")
    differing = [
        name for name in found if name in wanted and found[name].shape != wanted[name].shape
    ]
    if differing:
        told = [
            f"{name} {list(found[name].shape)} instead of {list(wanted[name].shape)}"
            for name in differing
        ]
        keys = ["model.name (or embed_dim, depth, num_heads)"]
        if any("rel_pos" in each or "relative_position" in each for each in _longer(found, wanted)):
            keys.append("model.image_size and detect.window")
        if any(each.endswith("pos_embed") for each in _longer(found, wanted)):
            keys.append("detect.pretrain_size")
        problems.append(f"has {_some(told)}: set {', '.join(keys)} to those of the weights")
    return problems


def _longer(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Names of tables of positions that have another number of rows: those of another canvas."""
    tables = [name for name in found if name in wanted and "pos" in name]
    return [name for name in tables if found[name].shape[:-1] != wanted[name].shape[:-1]]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
