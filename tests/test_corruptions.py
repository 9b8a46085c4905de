"""Corruptions do what they are described to do: worse with severity, the same for a sample,
alike at every size.
"""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import sklearn
import torch
from PIL import Image
from torch import Tensor

from rcmae.data.index import ShardIndex
from rcmae.data.stream import Readers, labelled_batches
from rcmae.data.transforms import FORMATS, CentreTransform, resize
from rcmae.evaluation.corruptions import KINDS, Corruption, height_map
from rcmae.evaluation.warping import convolved, smoothed


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    """[3, 224, 224] uint8."""
    path = Path(sklearn.__file__).parent / "datasets" / "images" / "flower.jpg"
    return resize(np.array(Image.open(path, formats=FORMATS))[:400, 100:500], (224, 224))


def distance(one: Tensor, other: Tensor) -> float:
    return (one.float() - other.float()).abs().mean().item() / 255


@pytest.mark.parametrize("name", KINDS)
def test_it_is_worse_with_severity_and_the_same_for_a_sample(name: str, photograph: Tensor) -> None:
    image = resize(photograph.permute(1, 2, 0).numpy(), (96, 112))
    away = []
    for severity in (1, 2, 3, 4, 5):
        seen = [Corruption(name, severity)(image, number) for number in range(6)]
        assert all(each.shape == image.shape and each.dtype == torch.uint8 for each in seen)
        away.append(float(np.mean([distance(each, image) for each in seen])))
    assert all(0.01 < each < 0.5 for each in away)
    # stretched first, then torn: two kinds
    parts = [away[:2], away[2:]] if name == "elastic_transform" else [away]
    assert all(
        after > 0.94 * before for part in parts for before, after in itertools.pairwise(part)
    ), away
    assert all(part[-1] > part[0] for part in parts) or name == "elastic_transform", away
    assert torch.equal(seen[2], Corruption(name, 5)(image, 2))
    if name not in FIXED:
        assert not torch.equal(seen[2], seen[3])
        assert not torch.equal(seen[2], Corruption(name, 5, seed=1)(image, 2))


# nothing is drawn
FIXED = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
BY_LENGTH = (
    "defocus_blur",
    "motion_blur",
    "zoom_blur",
    "elastic_transform",
    "fog",
    "frost",
    "snow",
)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_a_severity_looks_the_same_at_another_size(name: str, photograph: Tensor) -> None:
    """Corrupted and then halved is halved and then corrupted, far nearer than corrupted is to
    the photograph.
    """
    half = resize(photograph.permute(1, 2, 0).numpy(), (112, 112))
    whole = Corruption(name, 4)(photograph, 3)
    same = distance(
        resize(whole.permute(1, 2, 0).numpy(), (112, 112)), Corruption(name, 4)(half, 3)
    )
    assert same < 0.25 * distance(Corruption(name, 4)(half, 3), half)


def test_noise_has_the_strength_that_is_described() -> None:
    plain = torch.full((3, 224, 224), 128, dtype=torch.uint8)
    level = 128 / 255
    noisy = Corruption("gaussian_noise", 1)(plain, 0).float() / 255 - level
    assert noisy.mean().item() == pytest.approx(0, abs=2e-3)
    assert noisy.std().item() == pytest.approx(0.08, rel=0.02)
    counted = Corruption("shot_noise", 1)(plain, 0).float() / 255 - level
    assert counted.std().item() == pytest.approx((level / 60) ** 0.5, rel=0.02)
    thrown = Corruption("impulse_noise", 4)(plain, 0)
    assert (thrown != 128).float().mean().item() == pytest.approx(0.17, rel=0.03)
    assert (thrown == 255).float().mean().item() == pytest.approx(0.085, rel=0.05)
    assert set(thrown.unique().tolist()) == {0, 128, 255}


def test_blurs_keep_the_light_and_spread_a_point_as_far_as_described() -> None:
    point = torch.zeros(3, 224, 224, dtype=torch.uint8)
    point[:, 110:114, 110:114] = 255
    for name, reach in (("defocus_blur", 4), ("motion_blur", 20), ("glass_blur", 12)):
        seen = Corruption(name, 1)(point, 0).float()
        at = seen[0].nonzero()
        assert 109 - reach <= at.min() <= at.max() <= 114 + reach, name
        assert at.min() < 110 or at.max() > 113, name
        assert seen.sum().item() == pytest.approx(16 * 3 * 255, rel=0.1), name


def test_pointwise_kinds_are_their_formulas(photograph: Tensor) -> None:
    pixels = photograph.double() / 255
    brighter = Corruption("brightness", 2)(photograph, 0).double() / 255
    value = pixels.amax(0)
    assert torch.allclose(brighter.amax(0), (value + 0.2).clamp(max=1), atol=3e-3)
    lit = value > 0.3
    # hue, saturation
    assert torch.allclose(
        (brighter / brighter.amax(0))[:, lit], (pixels / value)[:, lit], atol=2e-2
    )
    flat = Corruption("contrast", 4)(photograph, 0).double() / 255
    mean = pixels.mean((1, 2), keepdim=True)
    assert torch.allclose(flat, (pixels - mean) * 0.1 + mean, atol=3e-3)
    file = io.BytesIO()
    Image.fromarray(photograph.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=7)
    wanted = torch.from_numpy(np.array(Image.open(file, formats=FORMATS))).permute(2, 0, 1)
    assert torch.equal(Corruption("jpeg_compression", 5)(photograph, 0), wanted)
    blocks = Corruption("pixelate", 5)(photograph, 0)
    assert torch.equal(blocks, blocks[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2))


@pytest.mark.parametrize("name", KINDS)
def test_channels_other_than_three_and_small_images_are_taken(name: str) -> None:
    for shape in ((1, 32, 32), (5, 16, 24)):
        image = torch.randint(
            0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8
        )
        assert Corruption(name, 5)(image, 0).shape == shape


def test_photographs_of_frost_take_the_place_of_the_drawn_one(
    photograph: Tensor, tmp_path: Path
) -> None:
    for number in range(2):
        Image.new("RGB", (300, 100 + 200 * number), (200, 210, 220)).save(
            tmp_path / f"{number}.png"
        )
    files = tuple(sorted(tmp_path.iterdir()))
    seen = Corruption("frost", 3, files)(photograph, 0)
    ice = torch.tensor([200.0, 210.0, 220.0])[:, None, None]
    assert (seen - (0.7 * photograph + 0.7 * ice).clamp(0, 255)).abs().max() < 0.51  # rounded
    (tmp_path / "no.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"no\.png"):
        Corruption("frost", 3, (tmp_path / "no.png",))(photograph, 0)


@pytest.mark.parametrize(
    ("name", "severity", "message"), [("rain", 1, "no corruption 'rain'"), ("fog", 6, "1 to 5")]
)
def test_unknown_ones_are_refused(name: str, severity: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Corruption(name, severity)


def test_its_parts_agree_with_their_definitions() -> None:
    line = torch.zeros(1, 9, 9)
    line[0, 4, 4] = 1.0
    shifted = convolved(line, torch.tensor([[1.0, -2.5]]), torch.tensor([1.0]))
    assert shifted[0, 3, 6:8].tolist() == [0.5, 0.5]  # read one down and two and a half to the left
    # mirrored ends lose nothing
    assert smoothed(torch.ones(2, 7, 5), 3.0).sub(1).abs().max() < 1e-6
    land = height_map(np.random.RandomState(0), (40, 56), 3.0)
    assert (land.shape, land.min() >= 0, land.max() <= 1) == ((40, 56), True, True)
    rough = height_map(np.random.RandomState(0), (40, 56), 1.5)
    assert rough.diff().abs().mean() > 2 * land.diff().abs().mean()


def test_ranks_and_workers_see_the_same_corrupted_images(photo_shards: str) -> None:
    index, change = ShardIndex.open(photo_shards), Corruption("elastic_transform", 3)

    def seen(world: int, workers: int = 0) -> dict[int, Tensor]:
        return {
            number: image
            for rank in range(world)
            for batch in labelled_batches(
                index,
                CentreTransform((32, 32)),
                batch=40,
                rank=rank,
                world=world,
                readers=Readers(workers),
                change=change,
            )
            for number, image in zip(batch.positions.tolist(), batch.images, strict=True)
            if number >= 0
        }

    alone, three = seen(1), seen(3)
    assert alone.keys() == three.keys() == set(range(len(index)))
    assert all(torch.equal(alone[number], three[number]) for number in alone)
    plain = next(labelled_batches(index, CentreTransform((32, 32)), batch=40))
    assert not torch.equal(alone[0], plain.images[0])
