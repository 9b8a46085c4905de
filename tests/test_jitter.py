"""An image and its objects on a canvas: pixels, boxes and masks move alike."""

from __future__ import annotations

import io
import json
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from rcmae.data.dense.annotated import Canvas, Jittered
from rcmae.data.dense.jitter import Style, fitted, jitter_of, on_canvas, seen, seen_pixels
from rcmae.data.dense.objects import decoded, encoded, objects_on
from rcmae.data.transforms import BadImage, decode
from rcmae.models.detection.losses import unpack

H, W = 60, 80


def coordinates() -> np.ndarray:
    """[H, W, 3] an image whose red and green say where a pixel is."""
    y, x = np.mgrid[:H, :W]
    return np.stack([3 * x, 4 * y, np.full_like(x, 77)], axis=2).astype(np.uint8)


def rectangle(x0: int, y0: int, x1: int, y1: int) -> dict[str, object]:
    polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
    return {"bbox": [x0, y0, x1 - x0, y1 - y0], "category_id": 5, "segmentation": [polygon]}


def as_runs(one: dict[str, object]) -> dict[str, object]:
    mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(one["segmentation"], H, W)))
    return {**one, "segmentation": encoded(mask.astype(bool))}


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0.3, 2.0), st.floats(0, 1), st.booleans(), st.sampled_from(["vitdet", "benchmark"])
)
def test_pixels_boxes_and_masks_move_alike(
    scale: float, offset: float, flipped: bool, style: Style
) -> None:
    jitter = jitter_of((H, W), (64, 96), scale=scale, offset=offset, flipped=flipped, style=style)
    canvas = on_canvas(seen_pixels(coordinates(), jitter), jitter)
    plain = rectangle(20, 15, 60, 45)
    objects = objects_on([plain, as_runs(plain)], jitter, {5: 1})
    masks = unpack(torch.from_numpy(objects.masks), 96).numpy()
    for box, mask in zip(objects.boxes, masks, strict=True):
        x0, y0, x1, y1 = box.astype(int)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == (x0, y0, x1, y1)
        # what the mask covers shows source pixels of the object, to the width of resampling
        slack = 2 + 2 / min(jitter.factors)
        x, y = canvas[0][mask] / 3, canvas[1][mask] / 4
        assert x.min() >= 20 - slack
        assert x.max() <= 60 + slack
        assert y.min() >= 15 - slack
        assert y.max() <= 45 + slack
    left, top, right, bottom = jitter.extent
    outside = np.ones((64, 96), bool)
    outside[top:bottom, left:right] = False
    assert (canvas[:, outside] == (128 if style == "benchmark" else 0)).all()
    assert not masks[:, outside].any()


def test_only_the_part_that_is_seen_is_decoded_to_the_same_pixels() -> None:
    large = np.asarray(Image.fromarray(coordinates()).resize((800, 600)))
    file = io.BytesIO()
    Image.fromarray(large).save(file, "JPEG", quality=95)
    data = file.getvalue()
    for scale in (0.1, 0.5, 1.0, 1.9):
        for flipped in (False, True):
            jitter = jitter_of(
                (600, 800), (128, 128), scale=scale, offset=0.7, flipped=flipped, style="vitdet"
            )
            found = seen(data, jitter, 3, 2.5).astype(int)
            whole = seen_pixels(
                np.asarray(Image.open(file, formats=["JPEG", "PNG"])), jitter
            ).astype(int)
            assert abs(found - whole).max() <= 6
            assert abs(found - whole).mean() < 1


def test_evaluation_sees_the_whole_image() -> None:
    jitter = fitted((H, W), (64, 96))
    assert jitter.resized == jitter.size == (64, 85)
    assert jitter.extent == (0, 0, 85, 64)


def test_runs_are_read_as_they_were_written() -> None:
    mask = np.random.default_rng(0).random((7, 5)) > 0.5
    code = encoded(mask)
    assert np.array_equal(decoded(code), mask)
    counts = coco_mask.decode(coco_mask.frPyObjects({"size": [2, 2], "counts": [1, 2, 1]}, 2, 2))
    assert np.array_equal(decoded({"size": [2, 2], "counts": [1, 2, 1]}), counts)


def test_crowds_and_what_is_cut_away_are_no_objects() -> None:
    jitter = jitter_of((H, W), (40, 40), scale=2.0, offset=0.0, flipped=False, style="vitdet")
    crowd = {**rectangle(0, 0, 20, 20), "iscrowd": 1}
    flat = {**rectangle(3, 3, 9, 9), "bbox": [3, 3, 0, 6]}
    objects = objects_on(
        [crowd, rectangle(1, 1, 15, 15), rectangle(70, 50, 79, 59), flat], jitter, {5: 0}
    )
    assert objects.numbers.tolist() == [1]


def sample_of(objects: list[dict[str, object]]) -> tuple[bytes, bytes]:
    file = io.BytesIO()
    Image.fromarray(coordinates()).save(file, "PNG")
    document = {"image_id": 3, "height": H, "width": W, "annotations": objects}
    return file.getvalue(), json.dumps(document).encode()


def test_a_view_is_a_function_of_seed_and_position() -> None:
    members = Jittered(Canvas((64, 64)), categories=(9, 5), scale=(0.5, 1.5))
    image, annotation = sample_of([{**rectangle(20, 15, 60, 45), "id": 1}])
    first, second = members.views(image, {"annotation": annotation}, 7, [4, 5])
    again = members.views(image, {"annotation": annotation}, 7, [5])[0]
    assert torch.equal(second.view.image, again.view.image)
    assert not torch.equal(first.view.image, second.view.image)
    for name, value in second.extra.items():
        assert torch.equal(value, again.extra[name])
    assert second.extra["classes"].tolist() in ([1], [])
    extra = members.collate([first.extra, second.extra])
    assert len(extra["boxes"]) == 2
    assert extra["extents"].shape == (2, 4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"category_id": 8}, "category"),
        ({"segmentation": [[1, 1, 2, 2]]}, "no polygon of it has three points"),
        ({"bbox": [0, 0, 200, 10]}, "outside the image"),
    ],
)
def test_an_annotation_that_does_not_fit_is_a_bad_sample(
    change: dict[str, object], told: str
) -> None:
    members = Jittered(Canvas((64, 64)), categories=(5,))
    image, annotation = sample_of([{**rectangle(20, 15, 60, 45), "id": 1, **change}])
    with pytest.raises(BadImage, match=told):
        members.views(image, {"annotation": annotation}, 0, [0])


def test_the_limit_of_pixels_is_that_of_the_recipe() -> None:
    image, annotation = sample_of([])
    small = Jittered(Canvas((64, 64), max_pixels=H * W - 1), categories=(5,))
    with pytest.raises(BadImage, match=f"more than data.max_pixels={H * W - 1}"):
        small.views(image, {"annotation": annotation}, 0, [0])
    with pytest.MonkeyPatch.context() as patch:  # a limit above the default counts, too
        patch.setattr("rcmae.data.dense.jitter.decode", partial(decode, max_pixels=H * W - 1))
        enough = Jittered(Canvas((64, 64), max_pixels=H * W), categories=(5,))
        assert len(enough.views(image, {"annotation": annotation}, 0, [0])) == 1
