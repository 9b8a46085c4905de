"""Sums beside the training: as few hops as can be, the same on every rank; and what the ranks ask
for in a step ends the run within a step and a half.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rcmae.exchange import Doubling, distances
from runs import Folder
from tests.conftest import Ranks
from tools import bench_agreement

PROGRAM = Path(__file__).parent / "programs" / "asked_in_a_step.py"


def simulated(values: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """What each of as many ranks as `values` has rows gets, and after how many hops."""
    world = len(values)
    ranks = [Doubling(each, world) for each in values]
    hops = 0
    for distance in distances(world):
        sent = [each.message() for each in ranks]  # all at once: each rank sends one and gets one
        for rank, each in enumerate(ranks):
            each.take(distance, sent[rank - distance])
        hops += 1
    return [each.total() for each in ranks], hops


@pytest.mark.parametrize(
    ("world", "hops"),
    [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (7, 3), (12, 4), (255, 8), (256, 8), (257, 9)],
)
def test_a_sum_over_ranks_takes_as_many_hops_as_doublings(world: int, hops: int) -> None:
    draws = torch.Generator().manual_seed(world)
    values = torch.randint(0, 1 << 40, (world, 9), generator=draws).double()
    found, took = simulated(values)
    assert took == hops
    wanted = values.long().sum(0).double()
    assert all(torch.equal(each, wanted) for each in found)


def test_each_ranks_numbers_count_once() -> None:
    for world in range(1, 70):
        found, _ = simulated(torch.eye(world, dtype=torch.float64))
        assert all(each.tolist() == [1.0] * world for each in found), world


def test_a_message_goes_to_another_rank_at_each_hop() -> None:
    for world in range(2, 300):
        steps = [distance % world for distance in distances(world)]
        assert 0 not in steps
        assert len(set(steps)) == len(steps)  # a tag and a peer are one message


@pytest.mark.slow
def test_a_request_ends_all_ranks_at_one_step_within_a_step_and_a_half(
    tiny: Path, tmp_path: Path, ranks: Callable[..., Ranks]
) -> None:
    """Rank 1 of three is asked in the seventh step: before its middle, and after it."""
    words = ["engine.name=ddp", "batch.images=24", "data.canonical_streams=6"]
    words.append("checkpoint.every_steps=100")
    jobs = []
    for half in ("first", "second"):
        jobs.append([half, str(tiny), f"run.dir={tmp_path / half}", *words])
    said = ranks(PROGRAM, json.dumps(jobs), world=3).succeed()
    assert "STATUS [75, 75]" in said
    assert "SUMS [[6.0, 3.0], [6.0, 3.0], [6.0, 3.0]]" in said
    for half, step in (("first", 7), ("second", 8)):
        folder = Folder(tmp_path / half)
        assert folder.outcome()["step"] == step, half
        assert folder.committed() == [step]
        assert folder.steps() == list(range(1, step + 1))
        assert folder.events("signal")[0]["asked"] == {"1": "SIGUSR1"}


def test_what_an_agreement_costs_is_measured_in_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--ranks", "2", "--rounds", "1", "--steps", "4", "--warmup", "1", "--step-ms", "1"]
    assert bench_agreement.main([*few, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["kind"] for row in report["cases"]] == ["ring", "beside"]
    assert all(row["waits_us"]["median"] > 0 for row in report["cases"])
    assert report["hops"]["ring"]["256"] == 510
    assert report["hops"]["beside"]["256"] == 8
