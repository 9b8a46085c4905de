"""Where each tensor's elements lie: as they were written, whatever the ranks, in few numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rcmae.checkpoint.layout import Layout, Written, assembled, described, understood, written

SHAPES = {"a.weight": (37, 11), "a.bias": (37,), "scalar": (), "empty": (0, 5), "small": (3,)}
KINDS = {"weight": "F32", "exp_avg": "F32", "teacher": "BF16"}


def cut(numel: int, rank: int, world: int, how: str) -> tuple[int, int]:
    """The elements of a tensor that a rank holds."""
    if how == "rows":  # as FSDP2: the last ranks may have none
        each = -(-numel // world)
        return min(rank * each, numel), min((rank + 1) * each, numel)
    if how == "shares":  # as DDP: their lengths alternate
        return numel * rank // world, numel * (rank + 1) // world
    return (0, numel) if rank == numel % world else (0, 0)  # as ZeRO: whole, somewhere


def reports(world: int, how: str) -> list[Written]:
    found = []
    for rank in range(world):
        runs = []
        for name, shape in SHAPES.items():
            low, high = cut(math.prod(shape), rank, world, how)
            if high > low:
                runs += [(f"{kind}/{name}", low, high - low, KINDS[kind]) for kind in KINDS]
        if rank == 0:
            runs.append(("buffer/empty", 0, 0, "F32"))
        found.append(written(runs))
    return found


@pytest.mark.parametrize("how", ["rows", "shares", "whole"])
@pytest.mark.parametrize("world", [1, 2, 3, 8, 50])
def test_every_element_is_found_where_its_rank_wrote_it(world: int, how: str) -> None:
    names = [f"rank-{rank:05d}" for rank in range(world)]
    tensors = assembled(SHAPES, reports(world, how))
    document = {"format": 2, **json.loads(json.dumps(described(tensors)))}
    read = understood(document, names)
    assert len(document["layouts"]) <= len(SHAPES)  # kinds share theirs
    assert read.keys() == tensors.keys() >= {"weight/a.weight", "teacher/small", "buffer/empty"}
    for key, stored in read.items():
        name = key.partition("/")[2]
        assert stored.shape == list(SHAPES[name])
        numel = math.prod(SHAPES[name])
        wanted = []
        for rank in range(world):
            low, high = cut(numel, rank, world, how)
            if high > low:
                wanted.append((rank, low, high))
        if numel:
            assert list(stored.layout.within(0, numel)) == wanted
            mid = numel // 2
            some = [run for run in wanted if run[1] < mid + 1 and run[2] > mid]
            assert list(stored.layout.within(mid, mid + 1)) == some


def test_runs_that_leave_a_gap_are_a_mistake_of_ours() -> None:
    gap = [written([("weight/small", 0, 1, "F32")]), written([("weight/small", 2, 1, "F32")])]
    with pytest.raises(AssertionError, match="gaps or overlap"):
        assembled(SHAPES, gap)
    short = [written([("weight/small", 0, 2, "F32")])]
    with pytest.raises(AssertionError, match="2 of"):
        assembled(SHAPES, short)


def test_triples_stand_for_runs_in_files_that_follow_each_other() -> None:
    layout = Layout(np.array([0, 1, 2, 5, 6]), np.array([4, 4, 3, 3, 3]))
    assert layout.triples() == [0, 2, 4, 2, 1, 3, 5, 2, 3]
    assert list(layout.within(3, 9)) == [(0, 0, 4), (1, 4, 8), (2, 8, 11)]
    assert list(layout.within(4, 4)) == []
