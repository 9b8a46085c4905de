"""Learning rate and momentum, number by number. The recorded ones come from the released code."""

import json
import math
from pathlib import Path

import pytest

import reference
from rcmae.engines.schedules import (
    Shape,
    Warmup,
    learning_rate,
    teacher_momentum,
    warmup_half_cosine,
)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        # (lr, min_lr, warm-up epochs, epochs, steps per epoch), (epoch, step, lr)
        (
            (0.0024, 0.0, 40, 800, 5),
            [(0, 0, 0.0), (0, 1, 1.1999999999999999e-05), (1, 0, 5.9999999999999995e-05)],
        ),
        ((0.001, 1e-06, 5, 100, 3), [(0, 1, 6.666666666666667e-05), (4, 2, 0.0009333333333333334)]),
        (
            (0.1, 0.0, 0, 90, 4),
            [
                (0, 0, 0.1),
                (0, 3, 0.09998286624877786),
                (45, 2, 0.049127379678135824),
                (89, 3, 1.903846791434516e-06),
            ],
        ),
    ],
)
def test_learning_rate_is_the_recorded_one(settings: tuple, rows: list[tuple]) -> None:
    lr, min_lr, warmup, epochs, per_epoch = settings
    for epoch, step, want in rows:
        got = warmup_half_cosine(
            epoch * per_epoch + step,
            warmup_steps=warmup * per_epoch,
            total_steps=epochs * per_epoch,
            lr=lr,
            min_lr=min_lr,
        )
        assert got == pytest.approx(want, rel=1e-12)


def test_learning_rate_by_steps_is_that_by_epochs() -> None:
    for step in range(90):
        got = warmup_half_cosine(step, warmup_steps=12.5, total_steps=90, lr=0.3, min_lr=0.01)
        want = reference.lr_at(step / 5, warmup=2.5, epochs=18, lr=0.3, min_lr=0.01)
        assert got == pytest.approx(want, rel=1e-12)
    assert warmup_half_cosine(
        90, warmup_steps=12.5, total_steps=90, lr=0.3, min_lr=0.01
    ) == pytest.approx(0.01)


# momentum 0.9, 4 epochs of 3 updates; then how the released code indexes it
RECORDED = [
    0.9,
    0.9017037086855466,
    0.906698729810778,
    0.9146446609406726,
    0.925,
    0.9370590477448739,
]


def momentum(update: int, kind: str, end: float = 1.0) -> float:
    return teacher_momentum(
        update, kind=kind, base=0.9, end=end, total_updates=12, updates_per_epoch=3
    )


def test_cosine_momentum_runs_over_the_whole_training() -> None:
    assert [momentum(update, "cosine") for update in range(6)] == pytest.approx(RECORDED, rel=1e-14)
    assert [momentum(k, "cosine") for k in range(12)] == pytest.approx(
        [reference.momentum_at(k, 12, 0.9) for k in range(12)], rel=1e-14
    )
    assert momentum(12, "cosine", end=0.99) == pytest.approx(0.99, rel=1e-14)


def test_published_momentum_starts_again_each_epoch() -> None:
    assert [momentum(update, "published") for update in range(7)] == pytest.approx(
        [*RECORDED[:3], *RECORDED[:3], 0.9], rel=1e-14
    )


def test_constant_momentum_is_constant() -> None:
    assert {momentum(update, "constant") for update in range(12)} == {0.9}


@pytest.mark.parametrize(
    ("epoch", "dynamic", "momentum"),
    [
        (0, True, 0.999),
        (50, True, 0.99945),
        (100, False, 0.9999),
        (250, True, 0.999945),
        (900, True, 0.99999),
    ],
)
def test_the_momentum_by_epochs_is_bootmaes(epoch: int, dynamic: bool, momentum: float) -> None:
    found = {
        teacher_momentum(
            update,
            kind="by_epoch",
            base=0.999,
            end=1.0,
            total_updates=9999,
            updates_per_epoch=7,
            dynamic=dynamic,
        )
        for update in range(7 * epoch, 7 * (epoch + 1))
    }
    assert len(found) == 1
    assert found.pop() == pytest.approx(momentum, abs=1e-12)


@pytest.mark.parametrize("step", [0, 1, 3, 4, 7, 11, 12])
def test_mae_rate_is_the_cosine_whose_shape_begins_after_the_warmup(step: int) -> None:
    lr, low = 3e-4, 1e-6
    half = 0.5 * (1.0 + math.cos(math.pi * (step - 4) / (12 - 4)))
    expected = lr * step / 4 if step < 4 else low + (lr - low) * half
    named = {"total_steps": 12, "lr": lr, "min_lr": low}
    assert learning_rate(step, shape=Shape(), warmup=Warmup(4), **named) == expected


def test_poly_with_a_warmup_that_multiplies_is_mmcv_s() -> None:
    """PolyLrUpdaterHook's formula: min_lr + (lr - min_lr) (1 - i/total)^power, and in the warm-up
    times 1 - (1 - i/warmup) (1 - ratio).
    """
    total, warmup, ratio, lr, power = 12, 5, 1e-6, 4e-4, 0.9
    for step in range(total):
        expected = lr * (1 - step / total) ** power
        if step < warmup:
            expected *= 1 - (1 - step / warmup) * (1 - ratio)
        rate = learning_rate(
            step,
            total_steps=total,
            lr=lr,
            min_lr=0.0,
            shape=Shape("poly", power=power),
            warmup=Warmup(warmup, ratio, "multiply"),
        )
        assert rate == pytest.approx(expected, rel=1e-12)


def test_steps_with_a_warmup_to_the_schedule_are_detectron2_s() -> None:
    shape = Shape("steps", milestones=(0.5, 0.9))
    rates = [
        learning_rate(
            step,
            total_steps=20,
            lr=1.0,
            min_lr=0.0,
            shape=shape,
            warmup=Warmup(4, 0.001, "to_schedule"),
        )
        for step in (0, 2, 4, 9, 10, 17, 18, 19)
    ]
    assert rates == pytest.approx([0.001, 0.5005, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01])


def test_wsd_stays_and_then_falls_linearly() -> None:
    shape = Shape("wsd", cooldown=0.2)
    assert [shape.at(done) for done in (0.0, 0.5, 0.8)] == [1.0, 1.0, pytest.approx(1.0)]
    assert shape.at(0.9) == pytest.approx(0.5)
    assert shape.at(1.0) == pytest.approx(0.0)


GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="recorded numbers lie beside the project alone")
def test_recorded_rates_of_segmentation_and_detection_are_ours() -> None:
    recorded = json.loads((GOLDEN / "seg-schedule" / "fixture.json").read_text())["values"]
    for case in recorded["schedules"]["value"]:
        for step, expected in case["rows"]:
            rate = learning_rate(
                step,
                total_steps=case["total"],
                lr=case["lr"],
                min_lr=case["min_lr"],
                shape=Shape("poly", power=case["power"]),
                warmup=Warmup(case["warmup"], case["warmup_ratio"], "multiply"),
            )
            assert rate == pytest.approx(expected, rel=1e-9, abs=1e-18)
    recorded = json.loads((GOLDEN / "detect-inputs" / "fixture.json").read_text())["values"]
    for case in recorded["schedules"]["value"].values():
        milestones = tuple(step / case["steps"] for step in case.get("milestones") or ())
        for step, expected in case["factor_at"].items():
            rate = learning_rate(
                int(step),
                total_steps=case["steps"],
                lr=1.0,
                min_lr=0.0,
                shape=Shape(case["kind"], milestones=milestones),
                warmup=Warmup(case["warmup_steps"], 0.001, "to_schedule"),
            )
            assert rate == pytest.approx(expected, rel=1e-9, abs=1e-12)
