"""The measure of shuffling tells good orders from bad ones, and ours is near the good one."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
bench = importlib.import_module("bench_shuffle")


def test_a_permutation_is_at_chance_and_reading_in_order_is_the_worst():
    epoch = bench.Epoch(shards=60, samples=100, classes=30, batch=200)
    mixed, rows = (
        bench.quality(bench.permutation(epoch, 0), epoch),
        bench.quality(np.arange(6000), epoch),
    )
    assert mixed["pairs_of_a_shard_over_chance"] == pytest.approx(1, abs=0.05)
    # of |x - y|
    assert mixed["neighbours_median_batches"] == pytest.approx(30 * (1 - 0.5**0.5), rel=0.05)
    assert rows["neighbours_median_batches"] == 1 / 200
    assert rows["pairs_of_a_shard_over_chance"] == pytest.approx(100 / 200 * 60, rel=0.01)
    assert rows["classes_when_sorted"] == pytest.approx(29 / 30)  # one class a batch
    assert mixed["classes_when_sorted"] == pytest.approx(mixed["classes_when_mixed"], abs=0.02)


def test_ours_is_nearer_to_a_permutation_than_a_buffer_is(capsys):
    small = [
        "--shards",
        "64",
        "--samples",
        "200",
        "--classes",
        "16",
        "--batch",
        "256",
        "--streams",
        "32",
    ]
    assert bench.main([*small, "--window", "400", "--buffer", "200", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["orders"]
    ours, theirs, best = (told[name] for name in ("this package", "webdataset", "permutation"))
    assert ours["neighbours_median_batches"] > best["neighbours_median_batches"] / 3
    assert ours["neighbours_median_batches"] > 10 * theirs["neighbours_median_batches"]
    assert ours["pairs_of_a_shard_over_chance"] < 3 < theirs["pairs_of_a_shard_over_chance"]
    assert (
        ours["classes_when_sorted"]
        < 2 * best["classes_when_sorted"]
        < theirs["classes_when_sorted"]
    )


def test_an_epoch_without_a_batch_is_refused(capsys):
    assert bench.main(["--shards", "1", "--samples", "10"]) == 2
    assert "hold no batch" in capsys.readouterr().err
