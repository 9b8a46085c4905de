"""Means and deviations of pixels in another unit, or of other images, are refused or told."""

import pytest

from rcmae import config
from rcmae.errors import Refused
from runs import Folder, start

BASE = ["data.shards=x.tar", "schedule.steps=2", "schedule.lr=1e-3"]
WHOLE_MEAN = "[123.675,116.28,103.53]"
WHOLE_STD = "[58.395,57.12,57.375]"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("{}\n")
    return path


def problems(recipe, *overrides):
    with pytest.raises(Refused) as caught:
        config.load(str(recipe), [*BASE, *overrides])
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_statistics_of_0_to_255_are_refused_with_the_division(recipe):
    lines = problems(recipe, f"data.mean={WHOLE_MEAN}", f"data.std={WHOLE_STD}")
    assert len(lines) == 2
    assert lines[0].endswith("divided by 255: data.mean=[0.485,0.456,0.406]")
    assert lines[1].endswith("divided by 255: data.std=[0.229,0.224,0.225]")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", WHOLE_MEAN),
        ("mean", "[48.5,45.6,40.6]"),
        ("mean", "[0.5,0.5,1.1]"),
        ("mean", "[-0.1,0.5,0.5]"),
        ("mean", "[.nan,0.5,0.5]"),
        ("mean", "[.inf,0.5,0.5]"),
        ("std", WHOLE_STD),
        ("std", "[0.2,0.2,1.01]"),
        ("std", "[0.2,0.2,0]"),
        ("std", "[0.2,0.2,-0.2]"),
        ("std", "[.nan,0.5,0.5]"),
        ("std", "[.inf,0.5,0.5]"),
    ],
)
def test_one_wrong_statistic_alone_is_refused(recipe, key, value):
    lines = problems(recipe, f"data.{key}={value}")
    assert len(lines) == 1
    assert lines[0].startswith(f"data.{key}: ")


def test_a_ratio_without_end_is_refused(recipe):
    assert problems(recipe, "data.crop_ratio=[0.75,.inf]")[0].startswith("data.crop_ratio: must be")


def test_statistics_on_purpose_are_taken_and_odd_ones_doubted(recipe):
    none = config.load(str(recipe), [*BASE, "data.mean=[0,0,0]", "data.std=[1,1,1]"])
    assert config.statistics_doubts(none) == []
    assert config.first_batch_doubts(none, [0.45] * 3, [0.2] * 3) == []
    half = config.load(str(recipe), [*BASE, "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"])
    assert config.statistics_doubts(half) == []
    assert config.first_batch_doubts(half, [-0.1] * 3, [0.5] * 3) == []
    odd = config.load(str(recipe), [*BASE, "data.std=[0.9,0.9,0.9]"])
    assert "never deviate by more than 0.5" in config.statistics_doubts(odd)[0]


@pytest.mark.parametrize(
    ("mean", "std"), [(-9.0, 1.0), (0.0, 0.005), (0.0, 250.0), (float("nan"), 1.0)]
)
def test_first_images_far_from_0_and_1_are_doubted(recipe, mean, std):
    usual = config.load(str(recipe), BASE)
    assert config.first_batch_doubts(usual, [0.1, -0.4, 0.3], [1.1, 0.7, 0.9]) == []
    told = config.first_batch_doubts(usual, [0.1, 0.1, mean], [1.0, 1.0, std])
    assert len(told) == 1
    assert "in channel 2" in told[0]


def test_a_run_says_and_keeps_what_is_odd_about_its_first_images(tiny, tmp_path, capsys):
    run = Folder(tmp_path / "run")
    odd = ["data.mean=[0.9,0.9,0.9]", "data.std=[0.05,0.6,0.05]", "schedule.steps=2"]
    assert start(tiny, run.path, *odd, "schedule.warmup_steps=0") == 0
    said = capsys.readouterr().out
    kept = [event["told"] for event in run.events("warning")]
    assert len(kept) == 2
    assert all(f"warning: {told}" in said for told in kept)
    assert "never deviate" in kept[0]
    assert "the first images, normalised, have mean" in kept[1]


def test_a_usual_run_is_not_warned_of(uninterrupted):
    assert uninterrupted.events("warning") == []
