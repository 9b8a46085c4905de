"""What fine-tuning does to images hangs on positions alone, and leaves the global generators as
they were.
"""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from test_classifier import batch_of

from rcmae.data.augment import AugmentTransform, Mix, Mixing, erase, mates_of, mixed, mixed_targets
from rcmae.data.transforms import TrainTransform


def jpeg() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def test_rand_augment_is_keyed_by_position_and_every_magnitude_works() -> None:
    transform = AugmentTransform(TrainTransform((32, 32)), "rand-m9-mstd0.5-inc1", (0.5, 0.5, 0.5))
    data, before = (
        jpeg(),
        (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()),
    )
    views = [transform(data, 0, position).image for position in range(60)]
    assert all(view.shape == (3, 32, 32) and view.dtype == torch.uint8 for view in views)
    assert torch.equal(views[7], transform(data, 0, 7).image)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    strong = AugmentTransform(TrainTransform((32, 32)), "rand-m10-n8-inc1", (0.5, 0.5, 0.5))
    for position in range(40):
        strong(data, 0, position)


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(ValueError, match="not a policy that timm knows"):
        AugmentTransform(TrainTransform((32, 32)), "augmix-m3", (0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="works on 3 channels"):
        AugmentTransform(TrainTransform((32, 32), in_channels=1), "rand-m9", (0.5,))


def test_erasing_is_keyed_by_position_and_as_frequent_as_asked() -> None:
    clean = torch.zeros(400, 3, 16, 16)
    batch = erase(
        batch_of(clean.clone(), torch.zeros(400, dtype=torch.int64)), probability=0.25, seed=1
    )
    hit = batch.images.flatten(1).abs().sum(1) > 0
    assert hit.double().mean().item() == pytest.approx(0.25, abs=0.07)
    share = (batch.images[hit] != 0).double().mean().item()
    assert 0.02 < share < 1 / 3
    part = erase(batch_of(clean[:9].clone(), torch.zeros(9), first=200), probability=0.25, seed=1)
    assert torch.equal(part.images, batch.images[200:209])


@pytest.mark.parametrize(("world", "micros"), [(1, 1), (1, 3), (2, 1), (2, 2), (4, 3)])
def test_partners_are_the_same_on_any_number_of_ranks_and_micro_batches(
    world: int, micros: int
) -> None:
    images = torch.arange(24.0).view(24, 1, 1, 1)
    found = {}
    for rank in range(world):
        mine = torch.arange(rank, 24, world)
        parts = [batch_of(images[part], part) for part in mine.chunk(micros)]
        for batch in mates_of(parts):
            assert batch.mate is not None
            pairs = zip(batch.labels.tolist(), batch.mate.labels.tolist(), strict=True)  # type: ignore[union-attr]
            found |= dict(pairs)
            assert batch.mate.images.flatten().tolist() == [found[i] for i in batch.labels.tolist()]  # type: ignore[union-attr]
    assert found == {position: (position + 12) % 24 for position in range(24)}


def test_shares_are_those_of_the_pixels_and_of_the_targets() -> None:
    images, mates = torch.ones(4, 3, 20, 20), torch.zeros(4, 3, 20, 20)
    labels, others = torch.tensor([0, 1, 2, 0]), torch.tensor([3, 3, 3, 3])
    mixing, kinds = Mixing(mixup=0.8, cutmix=1.0, probability=0.9), set()
    for step in range(60):
        mix = mixing.draw(7, step, (20, 20))
        assert mix == mixing.draw(7, step, (20, 20))
        out = mixed(images, mates, mix)
        assert out.mean().item() == pytest.approx(mix.share, abs=1e-5)
        target = mixed_targets(labels, others, mix, num_classes=4, smoothing=0.0)
        assert target[:, 3].tolist() == pytest.approx([1 - mix.share] * 4, abs=1e-6)
        kinds.add(
            "none"
            if mix.share == 1.0 and mix.box is None
            else "mixup"
            if mix.box is None
            else "cutmix"
        )
    assert kinds == {"none", "mixup", "cutmix"}
    assert torch.equal(mixed(images, mates, Mix(1.0, None)), images)
