"""Masks are a function of (seed, position), with one count for all, and uniform."""

import numpy as np
import pytest

from rcmae.data import draws
from rcmae.data.draws import Purpose
from rcmae.data.masking import BlockMask, RandomMask, SharedMask, random_ids, visible_count


def test_the_number_of_visible_patches_is_the_truncated_product():
    assert [visible_count(196, ratio) for ratio in (0.5, 0.6, 0.75, 0.9)] == [98, 78, 49, 19]
    assert visible_count(256, 0.75) == 64
    assert visible_count(64, 0.75) == 16
    assert visible_count(10, 0.9) == 0  # the float product is just under 1


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5])
def test_a_mask_ratio_outside_0_and_1_is_refused(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        visible_count(196, ratio)


@pytest.mark.parametrize("visible", [0, 16, 17])
def test_a_mask_that_hides_all_or_nothing_is_refused(visible):
    with pytest.raises(ValueError, match="mask_ratio"):
        RandomMask(16, visible)


def test_ids_are_permutations_keyed_by_seed_position_and_draw():
    ids = RandomMask(196, 49).ids(3, 17)
    assert ids.dtype == np.int64
    assert sorted(ids) == list(range(196))
    np.testing.assert_array_equal(ids, random_ids(3, 17, 196))
    for other in (random_ids(4, 17, 196), random_ids(3, 18, 196), random_ids(3, 17, 196, draw=1)):
        assert not np.array_equal(ids, other)


def test_every_patch_is_hidden_equally_often():
    hidden = np.zeros(64)
    draws_made = 4000
    for position in range(draws_made):
        hidden[random_ids(0, position, 64)[16:]] += 1
    expected, sigma = 0.75 * draws_made, np.sqrt(draws_made * 0.75 * 0.25)
    assert np.abs(hidden - expected).max() < 5 * sigma


def test_draws_stay_what_they_were():
    """Changing these numbers changes every run that was started before: crops, masks and order."""
    assert draws.raw(0, Purpose.MASK, 0, 0, count=2).tolist() == [
        9534690535958307366,
        14082240658975047012,
    ]
    last = draws.raw(2**64 - 1, Purpose.BLOCK, 1, 2, 2**40, count=2)
    assert last.tolist() == [2690961045422422474, 6064301550301159175]
    assert random_ids(7, 123_456_789_012, 8).tolist() == [5, 0, 4, 6, 1, 3, 2, 7]


def test_uniform_draws_lie_in_the_half_open_unit_interval_and_do_not_overlap():
    first = draws.uniform(1, Purpose.CROP, 0, 5, count=1000)
    assert first.min() >= 0
    assert first.max() < 1
    assert abs(first.mean() - 0.5) < 0.05
    assert not np.intersect1d(first, draws.uniform(1, Purpose.CROP, 0, 6, count=1000)).size
    assert not np.intersect1d(first, draws.uniform(1, Purpose.FLIP, 0, 5, count=1000)).size


def test_boxes_hide_their_count_and_single_patches_the_rest():
    mask = BlockMask((14, 14), num_visible=49, num_boxed=120)
    for position in range(50):
        ids, boxes = mask.ids(3, position), mask.boxes(3, position)
        assert sorted(ids) == list(range(196))
        assert boxes.sum() == 120
        assert not boxes.ravel()[ids[:49]].any()  # nothing is seen that a box hides
        assert boxes.ravel()[ids[-120:]].all()
    np.testing.assert_array_equal(mask.ids(3, 7), mask.ids(3, 7))
    for other in (mask.ids(4, 7), mask.ids(3, 8), mask.ids(3, 7, draw=1)):
        assert not np.array_equal(mask.ids(3, 7), other)


def test_boxes_hang_together_more_than_chance():
    boxed = np.stack([BlockMask((14, 14), 49, 120).boxes(0, position) for position in range(100)])
    single = np.stack(
        [np.isin(np.arange(196), random_ids(0, p, 196)[76:]).reshape(14, 14) for p in range(100)]
    )

    def together(hidden):  # pairs of adjacent patches
        return (hidden[:, 1:] & hidden[:, :-1]).sum() + (hidden[:, :, 1:] & hidden[:, :, :-1]).sum()

    assert together(boxed) > 1.2 * together(single)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"num_boxed": 60}, "box_ratio"),
        ({"num_visible": 64}, "mask_ratio"),
        ({"smallest": 9, "largest": 8}, "box_smallest"),
        ({"smallest": 50, "largest": 60}, "do not fit"),
    ],
)
def test_boxes_that_cannot_be_are_refused(given, named):
    with pytest.raises(ValueError, match=named):
        BlockMask(
            **{"grid": (8, 8), "num_visible": 16, "num_boxed": 30, "smallest": 4, "largest": 20}
            | given
        )


def test_a_shared_mask_is_one_for_each_step():
    mask = SharedMask(RandomMask(64, 16), images=32)
    assert (mask.num_patches, mask.num_visible) == (64, 16)
    np.testing.assert_array_equal(mask.ids(1, 32), mask.ids(1, 63))
    assert not np.array_equal(mask.ids(1, 31), mask.ids(1, 32))
