"""Numbers gone bad: judged before the update, counted, within limits."""

import math

import torch

from rcmae.run.guard import Guard


def seen(loss: float) -> list[dict[str, torch.Tensor]]:
    """A step of two micro-batches whose shares make up the loss."""
    return [
        {"reconstruction": torch.tensor(loss * part), "consistency": torch.tensor(0.0)}
        for part in (0.25, 0.75)
    ]


def guard(**settings: object) -> Guard:
    weights = {"reconstruction": 1.0, "consistency": 1.0}
    values = {"action": "skip", "max_skips": 2, "max_rewinds": 1, "weights": weights}
    return Guard(**{**values, **settings})  # type: ignore[arg-type]


def test_a_jump_is_judged_by_what_is_usual() -> None:
    judge = guard(spike_factor=8.0)
    noisy = [1.0 + 0.05 * math.sin(7.0 * step) for step in range(40)]
    assert all(judge.jumped(seen(loss)) is None for loss in noisy)
    assert judge.jumped(seen(1.2)) is None
    told = judge.jumped(seen(3.0))
    assert told is not None
    assert "jumped to 3" in told
    assert judge.jumped(seen(3.0)) is not None  # a jump does not become usual by being seen
    assert judge.jumped(seen(1.0)) is None


def test_scale_does_not_matter_and_a_flat_loss_has_room() -> None:
    for scale in (1e-4, 1.0, 1e4):
        judge = guard(spike_factor=8.0)
        assert all(judge.jumped(seen(scale)) is None for _ in range(30))
        # within 8 hundredths of a median that never moved
        assert judge.jumped(seen(1.05 * scale)) is None
        assert judge.jumped(seen(1.2 * scale)) is not None


def test_nothing_is_judged_before_there_is_a_usual() -> None:
    judge = guard(spike_factor=3.0)
    assert all(judge.jumped(seen(loss)) is None for loss in (1.0, 50.0, 1.0, 2.0))
    assert guard().jumped(seen(math.nan)) is None  # off


def test_a_loss_that_is_not_finite_is_left_to_the_gradient_check_and_kept_out() -> None:
    judge = guard(spike_factor=8.0)
    assert judge.jumped(seen(math.nan)) is None
    assert judge.history == []


def test_limits_end_in_stop() -> None:
    skipping, rewinding = guard(), guard(action="rewind")
    assert [skipping.decide(can_rewind=True) for _ in range(4)] == ["skip", "skip", "stop", "stop"]
    assert [rewinding.decide(can_rewind=True) for _ in range(2)] == ["rewind", "stop"]
    assert guard(action="rewind").decide(can_rewind=False) == "stop"
    assert guard(action="stop").decide(can_rewind=True) == "stop"


def test_counts_and_history_survive_a_resume() -> None:
    judge = guard(spike_factor=8.0)
    for step in range(20):
        judge.jumped(seen(1.0 + 0.01 * step))
    judge.decide(can_rewind=True)
    again = guard(spike_factor=8.0)
    again.restore(judge.state())
    assert again.state() == judge.state()
    assert again.jumped(seen(9.0)) == judge.jumped(seen(9.0))
