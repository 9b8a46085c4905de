"""The benchmark measures what it says: the plain path is the same mathematics, and the parts add
up to the step.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import MaskedAutoencoder
from rcmae.objectives import new
from rcmae.planning.live import made_up_batch
from tools import bench_step
from tools.bench_step import Bench, NoWatch, PlainObjective, Variant, watched

ROOT = Path(__file__).parent.parent
SIZES = {
    "image_size": (24, 32),
    "patch_size": 8,
    "in_channels": 3,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "decoder_dim": 12,
    "decoder_depth": 2,
    "decoder_heads": 3,
}


@pytest.mark.parametrize("objective", ["mae", "rcmae"])
def test_plain_path_gives_the_losses_and_gradients_of_the_lean_one(objective):
    student = MaskedAutoencoder(NetworkSizes(**SIZES)).double()
    teacher = copy.deepcopy(student)
    generator = torch.Generator().manual_seed(1)
    for param in teacher.parameters():
        param.data += 0.1 * torch.randn(param.shape, generator=generator, dtype=torch.float64)
    batch = made_up_batch(student, 3, torch.device("cpu"))
    has_teacher = objective == "rcmae"
    results = {}
    for plain in (False, True):
        task = PlainObjective(has_teacher) if plain else new("rcmae") if has_teacher else new("mae")
        networks = [watched(net, "x", NoWatch(), plain=plain) for net in (student, teacher)]
        sums = task(networks[0], networks[1] if has_teacher else None, batch, 0.0)
        assert task.counts(batch) == (new("rcmae") if has_teacher else new("mae")).counts(batch)
        student.zero_grad()
        sum(sums.values()).backward()
        results[plain] = sums, [param.grad.clone() for param in student.parameters()]
    for term, value in results[False][0].items():
        # the mask is float32
        torch.testing.assert_close(results[True][0][term], value, rtol=1e-6, atol=0)
    for plain, lean in zip(results[True][1], results[False][1], strict=True):
        torch.testing.assert_close(plain, lean, rtol=1e-6, atol=1e-9)


def test_variants_take_turns_on_the_same_networks_and_leave_no_trace():
    bench = Bench(SIZES, "fp32", torch.device("cpu"), batch=2, teacher=True)
    before = [copy.deepcopy(vars(block).get("forward")) for block in bench.student.blocks]
    for name in ("mae-lean-fp32-eager", "rcmae-plain-fp32-eager", "rcmae-lean-fp32-eager"):
        bench.step(Variant.parse(name), NoWatch())
    assert [vars(block).get("forward") for block in bench.student.blocks] == before
    assert bench.engine.state().optimizer_step == 3
    assert bench.engine.state().teacher_updates == 2


@pytest.mark.parametrize("name", ["rcmae", "rcmae-lean-fp64-eager", "rcmae-plain-fp32-compiled"])
def test_unknown_variants_are_refused(name, capsys):
    with pytest.raises(SystemExit) as stop:
        bench_step.main(["--variants", name])
    assert stop.value.code == 2
    assert "variant" in capsys.readouterr().err


def test_quick_run_reports_parts_that_add_up(tmp_path):
    names = ["mae-lean-fp32-eager", "rcmae-plain-fp32-eager"]
    command = [
        sys.executable,
        "tools/bench_step.py",
        "--quick",
        "--threads",
        "1",
        "--variants",
        *names,
        "--json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [row["variant"] for row in report["variants"]] == names
    for row in report["variants"]:
        expected = set(bench_step.PHASES) - (
            set() if "rcmae" in row["variant"] else {"teacher_forward", "ema"}
        )
        assert set(row["phases_s"]) == expected | {"rest"}
        assert all(part["min"] >= 0 for part in row["phases_s"].values())
        # medians of two rounds
        assert sum(row["share_of_step"].values()) == pytest.approx(1.0, abs=0.2)
        assert row["peak_bytes"] is None or set(row["peak_bytes"]) == expected | {"step"}
        assert row["images_per_s"] == pytest.approx(
            report["settings"]["batch"] / row["step_s"]["median"]
        )
        assert 0 < row["share_of_ceiling"] < 1
    assert report["ceilings"]["fp32"]["best"] > 0
    assert report["hardware"]["threads"] == 1
    assert report["comparisons"] == []  # they differ in two ways
