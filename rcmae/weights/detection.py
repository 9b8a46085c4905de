"""Trained detectors for other code: in one call a module that finds objects in images, and files
that detectron2's tools read.

    model = rcmae.load_detector("runs/detect_rcmae_vit_b_16")   # or a published .pth or .pkl
    [found] = model([image])                                     # PIL images, or tensors [C, h, w]
    found.boxes, found.classes, found.scores, found.masks        # masks: [D, h, w] bool
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from rcmae.checkpoint import Manifest
from rcmae.config import stored
from rcmae.data.dense.jitter import fitted, on_canvas, seen_pixels
from rcmae.errors import Refused, counted
from rcmae.models.detection.build import detector_sizes, fit_detector
from rcmae.models.detection.detector import Detector
from rcmae.models.detection.inference import Detections, paste, rescaled
from rcmae.models.detection.sizes import (
    BackboneSizes,
    DetectorSizes,
    HeadSizes,
    ProposalSizes,
    RegionSizes,
    windowed_blocks,
)
from rcmae.models.sizes import NetworkSizes
from rcmae.weights.detectors import MEAN, NUMBERS, STD, THINGS, read_start
from rcmae.weights.encoder import statistics
from rcmae.weights.formats import PATH, WeightsFormat, Wrote
from rcmae.weights.layouts import TORCH, Which
from rcmae.weights.reading import NetworkWeights, read_network

_COLOURS = {1: "L", 3: "RGB"}  # channels -> the order of colours, as detectron2 calls it
Picture = Image.Image | Tensor | NDArray[np.uint8]


class LoadedDetector(nn.Module):
    """Images to what is in them.

    Args:
        network: the detector.
        mean, std: of each channel, pixels from 0 to 1.
        class_names: of each class.
        category_ids: COCO's id of each class.
    """

    def __init__(
        self,
        network: Detector,
        mean: Sequence[float],
        std: Sequence[float],
        class_names: Sequence[str],
        category_ids: Sequence[int],
    ) -> None:
        super().__init__()
        self.network = network
        self.class_names = tuple(class_names)
        self.category_ids = tuple(category_ids)
        self._mean = tuple(mean)
        self._std = tuple(std)

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return len(self._mean)

    @torch.no_grad()
    def forward(self, images: Sequence[Picture]) -> list[Detections]:
        """Of each image, best first: boxes [D, 4] (x0, y0, x1, y1) and masks [D, h, w] bool at the
        image's own size, scores [D], classes [D] from 0.

        Args:
            images: PIL images, arrays [h, w, 3] uint8, or tensors [3, h, w] of uint8 or of floats
                from 0 to 1. Each is looked at by itself.

        Raises:
            Refused: an image is none of these.
        """
        if isinstance(images, Image.Image):
            raise Refused("this is one image: give a list of images, [image]")
        return [self._one(pixels_of(image, self.in_channels)) for image in images]

    def _one(self, pixels: NDArray[np.uint8]) -> Detections:
        size = (pixels.shape[0], pixels.shape[1])
        device = next(self.network.parameters()).device
        jitter = fitted(size, self.network.sizes.backbone.vit.image_size)
        canvas = torch.from_numpy(on_canvas(seen_pixels(pixels, jitter), jitter)).to(device)
        mean, std = (
            torch.tensor(each, device=device)[:, None, None] for each in (self._mean, self._std)
        )
        image = (canvas.float() / 255 - mean) / std
        _, _, right, bottom = jitter.extent
        image[:, bottom:] = 0
        image[:, :, right:] = 0
        extents = torch.tensor([jitter.extent], dtype=torch.float32, device=device)
        [found] = self.network(image[None], extents)
        whole = rescaled(found, extents[0], size)
        there = (whole.boxes[:, 2:] > whole.boxes[:, :2]).all(dim=1)
        boxes = whole.boxes[there]
        masks = paste(whole.masks[there], boxes, size)
        return Detections(boxes, whole.scores[there], whole.classes[there], masks)


def load_detector(source: str | Path, *, network: Which | None = None) -> LoadedDetector:
    """A detector in evaluation mode. Local: one process of many may call alone.

    Args:
        source: a run of `rcmae detect`, a checkpoint of one, or a published detector's `.pth` or
            `.pkl`, whose sizes its shapes tell.
        network: whose weights of a run; None: the average's where there is one.

    Raises:
        Refused: there is no such thing, or its weights are no detector's.
        CheckpointError: the checkpoint is damaged.
    """
    found = read_start(Path(source), network)
    recipe = json.loads(found.metadata["recipe"]) if "recipe" in found.metadata else None
    if recipe is not None and recipe.get("task", {}).get("name") != "detect":
        raise Refused(
            f"{found.about} is no detector: it is of a run of another task; give a run of rcmae "
            "detect, or a checkpoint"
        )
    names: Sequence[str] = ()
    ids: Sequence[int] = ()
    if recipe is None:
        sizes = sizes_of(found)
        told, channels = found.beside, sizes.backbone.vit.in_channels
        for key, values in ((MEAN, told.mean), (STD, told.std)):
            if values is not None and len(values) != channels:
                raise Refused(
                    f"{found.about}: its {key} has {counted(len(values), 'number')}, the weights "
                    f"have {counted(channels, 'channel')}"
                )
        mean, std = statistics(told.mean, told.std, channels)
        names, ids = (json.loads(found.metadata.get(key, "[]")) for key in (THINGS, NUMBERS))
        if len(names) != sizes.regions.num_classes:
            names, ids = (), ()
    else:
        kept = stored(recipe, imports=False)
        sizes = detector_sizes(kept.model, kept.detect)
        names, ids = kept.detect.category_names or (), kept.detect.category_ids or ()
        mean, std = statistics(kept.data.mean, kept.data.std, kept.model.in_channels)
    model = Detector(sizes)
    try:
        fit = fit_detector(model, found.weights)
    except Refused as error:
        raise Refused(f"{found.about}: {error}") from error
    if fit.fresh:
        raise Refused(f"{found.about} lacks {', '.join(fit.fresh[:5])}")
    count = sizes.regions.num_classes
    numbers = ids or range(count)
    return LoadedDetector(
        model.eval(), mean, std, names or [str(each) for each in range(count)], numbers
    )


def sizes_of(found: NetworkWeights) -> DetectorSizes:
    """The sizes that a detector's shapes tell, with the published anchors and thresholds.

    Raises:
        Refused: they are not those of a detector.
    """
    shapes = {name: tuple(value.shape) for name, value in found.weights.items()}
    kind = "vitdet" if any(name.startswith("backbone.net.") for name in shapes) else "benchmark"
    place = "backbone.net." if kind == "vitdet" else "backbone.bottom_up."
    try:
        width, channels, patch, _ = shapes[f"{place}patch_embed.proj.weight"]
        depth = 1 + max(
            int(name.removeprefix(f"{place}blocks.").partition(".")[0])
            for name in shapes
            if name.startswith(f"{place}blocks.")
        )
        if kind == "vitdet":
            rows = [shapes[f"{place}blocks.{n}.attn.rel_pos_h"] for n in range(depth)]
            heads = width // rows[0][1]
            grid = (max(each[0] for each in rows) + 1) // 2
            windowed = tuple(n for n, each in enumerate(rows) if (each[0] + 1) // 2 < grid)
            window = min((each[0] + 1) // 2 for each in rows)
            table = math.isqrt(shapes[f"{place}pos_embed"][1] - 1)
            level = shapes["backbone.simfp_4.0.weight"][0]
        else:
            name = f"{place}%s_rel_pos_bias.relative_position_bias_table"
            heads = shapes[name % "global"][1]
            grid = (math.isqrt(shapes[name % "global"][0]) + 1) // 2
            window = (math.isqrt(shapes[name % "windowed"][0]) + 1) // 2
            windowed, table = windowed_blocks(depth), grid
            level = shapes["backbone.fpn_output2.weight"][0]
        classes = shapes["roi_heads.box_predictor.cls_score.weight"][0] - 1
        box_width = shapes["roi_heads.box_head.fc1.weight"][0]
        hidden = shapes[f"{place}blocks.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise Refused(f"{found.about} has no detector that is known here: lacks {error}") from error
    side = grid * patch
    vit = NetworkSizes((side, side), patch, channels, width, depth, heads, mlp_ratio=hidden / width)
    return DetectorSizes(
        BackboneSizes(vit, window, windowed, level, (table, table)),
        ProposalSizes(),
        RegionSizes(classes, heads=HeadSizes(box_width=box_width)),
        kind="vitdet" if kind == "vitdet" else "benchmark",
    )


def pixels_of(image: Any, channels: int) -> NDArray[np.uint8]:
    """[h, w, C] of an image. Raises Refused."""
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        image = image[:, :, None] if channels == 1 else image
    if isinstance(image, Tensor):
        if image.is_floating_point():
            image = (image * 255).round().clamp(0, 255)
        image = image.to(torch.uint8).permute(1, 2, 0).cpu().numpy() if image.ndim == 3 else image
    shape = getattr(image, "shape", ())
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != channels:
        raise Refused(
            f"a {type(image).__name__} of shape {list(shape)} is no image of {channels} channels: "
            "give a PIL image, an array [h, w, C] or a tensor [C, h, w]"
        )
    return np.ascontiguousarray(image.astype(np.uint8))


def _write_detectron2(manifest: Manifest, network: Which | None, out: Path) -> Wrote:
    found = read_network(manifest.path, network)
    weights: Mapping[str, Tensor] = found.weights
    recipe = stored(manifest.meta["recipe"], imports=False)
    mean, std = statistics(recipe.data.mean, recipe.data.std, recipe.model.in_channels)
    metadata: dict[str, Any] = {MEAN: [255 * each for each in mean]}
    metadata[STD] = [255 * each for each in std]
    if recipe.model.in_channels in _COLOURS:
        metadata["input_format"] = _COLOURS[recipe.model.in_channels]
    if recipe.detect.category_names and recipe.detect.category_ids:
        numbers = {each: place for place, each in enumerate(recipe.detect.category_ids)}
        metadata |= {THINGS: list(recipe.detect.category_names), NUMBERS: numbers}
    document = {"model": dict(weights), "__author__": "rcmae", "matching_heuristics": False}
    torch.save({**document, "metadata": metadata}, out)
    use = (
        f"rcmae.load_detector({PATH}); detectron2: DetectionCheckpointer(model).load({PATH}), the "
        f"model with the {MEAN}, {STD} and input_format in its 'metadata'"
    )
    return Wrote(found.metadata["network"], len(weights), use)


FORMATS = {
    "detectron2": WeightsFormat(
        "the whole detector by the names of detectron2's model zoo, under 'model'",
        TORCH,
        _write_detectron2,
    )
}
