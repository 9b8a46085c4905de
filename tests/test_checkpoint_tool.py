"""`rcmae checkpoint` tells what lies in a run, finds every damage, compares, and keeps the last
valid checkpoint.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rcmae import checkpoint
from rcmae.commands import checkpoint as tool
from tests.checkpoints import network, state_of, write_checkpoint
from tests.runs import Folder

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return state_of(network(1), network(2))


@pytest.fixture
def run(state: dict[str, Tensor], tmp_path: Path) -> Path:
    """A run with the checkpoints of steps 10, 20, 30 and 40."""
    for step in (10, 20, 30, 40):
        write_checkpoint(tmp_path / "run", step, state, ranks=2)
    return tmp_path / "run"


def steps(run: Path) -> list[int]:
    return [int(path.name[-8:]) for path in sorted((run / "checkpoints").glob("step-*"))]


def at(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


class Told:
    """What the tool said in this process, and how it ended."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *args: object) -> None:
        self.status = tool.main(list(map(str, args)))
        said = capsys.readouterr()
        self.out, self.err = said.out, said.err

    @property
    def json(self) -> Any:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Any:
    return lambda *args: Told(capsys, *args)


# ------------------------------------------------------------------------------------ list and show


def test_list_tells_steps_world_and_state(run, tell):
    (at(run, 20) / "rank-00001.safetensors").write_bytes(b"short")
    (at(run, 30) / "manifest.json").unlink()
    (run / "checkpoints" / ".writing-step-00000050-0badcafe").mkdir()
    told = tell("list", run, "--json")
    assert told.status == 1
    assert told.json["latest"] == "step-00000040"
    assert told.json["others"] == [".writing-step-00000050-0badcafe"]
    rows = told.json["checkpoints"]
    assert [row["valid"] for row in rows] == [True, False, False, True]
    assert (rows[0]["step"], rows[0]["images"], rows[0]["world"], rows[0]["engine"]) == (
        10,
        320,
        2,
        "local",
    )
    assert rows[0]["bytes"] == sum(
        path.stat().st_size for path in at(run, 10).glob("*.safetensors")
    )
    assert "rank-00001.safetensors has 5 bytes" in rows[1]["problems"][0]
    assert "never committed" in rows[2]["problems"][0]
    table = tell("list", run)
    assert table.status == 1
    for text in (
        "1,280",
        "whole, LATEST",
        "has 5 bytes",
        "no checkpoints: .writing-step-00000050-0badcafe",
    ):
        assert text in table.out
    assert tell("list", at(run, 40)).status == 0
    for step in (10, 20, 30):
        shutil.rmtree(at(run, step))
    # also beside a single one
    assert tell("list", run, "--json").json["others"] == [".writing-step-00000050-0badcafe"]


def test_what_a_lost_writer_committed_is_told(run, tell):
    """A take-over from step 20 makes what generation 1 wrote beyond it no checkpoint of the run."""
    (run / "leases").mkdir()
    holder = {
        "generation": 2,
        "from_step": 20,
        "token": "t",
        "host": "h",
        "boot": "b",
        "pid": 1,
        "job": "",
    }
    (run / "leases" / "00000002.json").write_text(json.dumps(holder))
    rows = tell("list", run, "--json").json["checkpoints"]
    assert [row["valid"] for row in rows] == [True, True, False, False]
    assert "had lost the run" in rows[3]["problems"][0]
    assert tell("show", run, "--json").json["step"] == 20


def test_show_tells_what_is_in_it(run, state, tell):
    told = tell("show", run, "--json")
    assert told.status == 0
    shown = told.json
    assert (shown["step"], shown["optimizer_step"], shown["generation"]) == (40, 40, 1)
    elements = sum(value.numel() for key, value in state.items() if key.startswith("weight/"))
    for kind in ("weight", "teacher", "exp_avg", "exp_avg_sq"):
        assert shown["kinds"][kind]["elements"] == elements
        assert shown["kinds"][kind]["bytes"] == 4 * elements
    assert shown["kinds"]["buffer"]["tensors"] == 2
    assert shown["tensors"].keys() == state.keys()
    assert shown["meta"]["recipe"]["model"]["embed_dim"] == 48
    table = tell("show", at(run, 10), "--tensors")
    for text in (
        "320",
        "local auto, 2 ranks",
        "rank-00001.safetensors",
        "teacher/blocks.0.attn.qkv.weight",
        "144x48",
    ):
        assert text in table.out
    assert "teacher/blocks.0.attn.qkv.weight" not in tell("show", at(run, 10)).out


def test_show_passes_over_the_damaged_and_shows_it_when_named(run, tell):
    (at(run, 40) / "rank-00000.safetensors").unlink()
    assert tell("show", run, "--json").json["step"] == 30
    told = tell("show", at(run, 40))
    assert told.status == 1
    assert "No such file" in told.out
    (at(run, 40) / "manifest.json").write_text('{"format": 99}')
    told = tell("show", at(run, 40))
    assert told.status == 1
    assert "update rcmae" in told.err


# ------------------------------------------------------------------------------------------- verify


def test_verify_finds_every_damage_of_every_file(run, tell):
    assert tell("verify", run).status == 0
    flip(at(run, 20) / "rank-00000.safetensors")
    flip(at(run, 20) / "rank-00001.safetensors")
    told = tell("verify", run, "--json")
    assert told.status == 1
    assert not told.json["valid"]
    rows = told.json["checkpoints"]
    assert [row["valid"] for row in rows] == [True, False, True, True]
    assert len(rows[1]["problems"]) == 2
    assert all("differs from its checksum" in problem for problem in rows[1]["problems"])
    assert "differs from its checksum" in tell("verify", run).out
    assert tell("verify", at(run, 10)).status == 0
    assert tell("verify", at(run, 20)).status == 1


# --------------------------------------------------------------------------------------------- diff


def test_equal_checkpoints_are_equal_whatever_their_cut(run, state, tell):
    other = write_checkpoint(run.parent / "other", 40, state, ranks=5)
    told = tell("diff", run, other, "--json")
    assert told.status == 0
    assert told.json["equal"]
    assert told.json["tensors"] == []
    assert told.json["kinds"]["teacher"]["relative_l2"] == 0
    assert tell("diff", run, other).out.endswith("they are equal\n")


def test_differences_are_measured_and_the_worst_come_first(run, state, tell):
    changed = {key: value.clone() for key, value in state.items()}
    changed["weight/blocks.1.mlp.fc1.weight"] *= 1.5
    changed["weight/norm.bias"] += torch.linspace(0, 1e-3, 48)
    changed["teacher/norm.weight"][3] = math.nan
    changed["exp_avg/cls_token"] = torch.zeros(1, 1, 47)
    del changed["exp_avg/mask_token"]
    other = write_checkpoint(
        run.parent / "other", 41, changed, model={"name": "vit_tiny_patch16", "embed_dim": 48}
    )
    told = tell("diff", at(run, 40), other, "--json")
    assert told.status == 1
    found = told.json
    assert found["counters"]["step"] == [40, 41]
    assert found["recipe"]["model.depth"] == [3, None]
    assert found["only_in_a"] == ["exp_avg/mask_token"]
    assert found["shapes"] == {"exp_avg/cls_token": [[1, 1, 48], [1, 1, 47]]}
    names = [row["name"] for row in found["tensors"]]
    assert names == ["teacher/norm.weight", "weight/blocks.1.mlp.fc1.weight", "weight/norm.bias"]
    nan, scaled, shifted = found["tensors"]
    assert nan["relative_l2"] is None
    assert scaled["relative_l2"] == pytest.approx(0.5)
    assert scaled["max_abs"] == pytest.approx(
        float(state["weight/blocks.1.mlp.fc1.weight"].abs().max()) / 2
    )
    bias = state["weight/norm.bias"].double()
    gap = changed["weight/norm.bias"].double() - bias
    assert shifted["relative_l2"] == pytest.approx(float(gap.norm() / bias.norm()))
    assert shifted["max_abs"] == pytest.approx(float(gap.abs().max()))
    weights = found["kinds"]["weight"]
    assert (weights["differing"], weights["tensors"]) == (
        2,
        sum(key.startswith("weight/") for key in state),
    )
    whole, part = (
        torch.cat([each[key].double().flatten() for key in state if key.startswith("weight/")])
        for each in (changed, state)
    )
    assert weights["relative_l2"] == pytest.approx(float((whole - part).norm() / part.norm()))

    table = tell("diff", at(run, 40), other, "--top", 2).out
    assert "worst 2 of 3 tensors that differ" in table
    assert "weight/norm.bias" not in table
    assert "nan" in table
    assert table.endswith("they differ\n")
    told = tell("diff", at(run, 40), other, "--kind", "buffer", "--json")
    assert list(told.json["kinds"]) == ["buffer"]
    told = tell("diff", run, other, "--kind", "momentum")
    assert told.status == 2
    assert "there are buffer, exp_avg, exp_avg_sq, teacher, weight" in told.err


def test_tolerance_forgives_rounding_and_nothing_more(run, state, tell):
    near = {key: value * (1 + 1e-6) for key, value in state.items()}
    other = write_checkpoint(run.parent / "near", 40, near)
    assert tell("diff", run, other).status == 1
    told = tell("diff", run, other, "--tolerance", 1e-5)
    assert told.status == 0
    assert "equal within the tolerance" in told.out
    near["weight/norm.bias"] = torch.full_like(near["weight/norm.bias"], math.nan)
    other = write_checkpoint(run.parent / "nan", 40, near)
    assert tell("diff", run, other, "--tolerance", 1e9).status == 1


def test_what_grew_from_zeros_is_infinitely_far(run, state, tell):
    zeros = {
        key: torch.zeros_like(value) if key == "exp_avg/norm.bias" else value
        for key, value in state.items()
    }
    zero = write_checkpoint(run.parent / "zero", 40, zeros)
    [row] = tell("diff", zero, run, "--json").json["tensors"]
    assert row["relative_l2"] is None
    assert row["max_abs"] > 0
    assert tell("diff", run, zero, "--json").json["tensors"][0]["relative_l2"] == 1


def test_damaged_checkpoints_are_not_compared(run, tell):
    flip(at(run, 40) / "rank-00001.safetensors")
    told = tell("diff", run, at(run, 30))  # the newest valid one is that of step 30
    assert told.status == 0
    assert "skipped: " in told.err
    told = tell("diff", at(run, 40), at(run, 30))
    assert told.status == 1
    assert "differs from its checksum" in told.err


# -------------------------------------------------------------------------------------------- prune


def test_prune_keeps_the_newest(run, tell):
    told = tell("prune", run, "--keep", 2, "--dry-run", "--json")
    assert told.status == 0
    assert told.json["deleted"] == ["step-00000020", "step-00000010"]
    freed = sum(
        path.stat().st_size for step in (10, 20) for path in at(run, step).glob("*.safetensors")
    )
    assert told.json["bytes"] == freed
    assert steps(run) == [10, 20, 30, 40]
    told = tell("prune", run, "--keep", 2)
    assert told.status == 0
    assert told.out.count("deleted") == 2
    assert steps(run) == [30, 40]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "LATEST",
        "step-00000030",
        "step-00000040",
    ]
    tell("prune", run, "--keep", 7)
    assert steps(run) == [30, 40]


def test_prune_never_deletes_the_only_valid_one(run, tell):
    for step in (20, 30, 40):
        flip(at(run, step) / "rank-00000.safetensors")  # sizes and manifests are as they were
    assert tell("prune", run, "--keep", 1).status == 0
    # damaged ones newer than what stays are left to be looked at
    assert steps(run) == [10, 20, 30, 40]
    flip(at(run, 10) / "rank-00000.safetensors")
    told = tell("prune", run, "--keep", 1)
    assert told.status == 1
    assert "nothing is deleted" in told.err
    assert steps(run) == [10, 20, 30, 40]


def test_prune_counts_valid_ones_and_clears_damaged_ones_before_them(run, tell):
    (at(run, 40) / "manifest.json").unlink()
    flip(at(run, 10) / "rank-00000.safetensors")
    assert tell("prune", run, "--keep", 2).status == 0
    assert steps(run) == [20, 30, 40]


def test_prune_leaves_what_stays_for_good(run, state, tell):
    assert tell("prune", run, "--keep", 1, "--keep-every", 20).status == 0
    assert steps(run) == [20, 40]
    write_checkpoint(run, 50, state, checkpoint={"keep_every": 20})
    assert tell("prune", run, "--keep", 1).status == 0  # as the run itself does
    assert steps(run) == [20, 40, 50]


def test_prune_wants_a_run_and_a_number(run, tell, capsys):
    told = tell("prune", at(run, 40), "--keep", 1)
    assert told.status == 2
    assert "give the run's folder" in told.err
    for args in (["prune", str(run)], ["prune", str(run), "--keep", "0"]):
        with pytest.raises(SystemExit) as ended:
            tool.main(args)
        assert ended.value.code == 2
    capsys.readouterr()
    assert steps(run) == [10, 20, 30, 40]


# ------------------------------------------------------------------------------------------ command


@pytest.mark.parametrize("command", [("list",), ("show",), ("verify",), ("prune", "--keep", "1")])
def test_a_folder_without_checkpoints_is_a_mistake(command, tell, tmp_path):
    told = tell(*command, tmp_path)
    assert told.status == 2
    assert "no checkpoint in this folder; give a run's" in told.err
    assert tell(*command, tmp_path / "nowhere").status == 2


def test_command_on_a_real_run(uninterrupted: Folder):
    def ran(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "tools/checkpoint.py", *map(str, args)]
        return subprocess.run(
            command, cwd=ROOT, text=True, capture_output=True, env={**os.environ, "COLUMNS": "200"}
        )

    newest = max(uninterrupted.checkpoints.glob("step-*"))
    shown = ran("show", newest, "--json")
    assert shown.returncode == 0, shown.stderr
    assert (
        json.loads(shown.stdout)["tensors"].keys()
        == checkpoint.read_manifest(newest).tensors.keys()
    )


def test_every_command_reads_a_real_run(uninterrupted: Folder, tell):
    steps = [row["step"] for row in tell("list", uninterrupted.path, "--json").json["checkpoints"]]
    assert steps == [10, 20]
    assert tell("verify", uninterrupted.path).status == 0
    assert "local fp32, 1 ranks" in tell("show", uninterrupted.path).out
    told = tell("diff", uninterrupted.checkpoints / "step-00000010", uninterrupted.path, "--json")
    assert told.status == 1
    assert (
        told.json["kinds"]["weight"]["relative_l2"]
        > told.json["kinds"]["teacher"]["relative_l2"]
        > 0
    )
    assert told.json["kinds"]["buffer"]["relative_l2"] == 0
    assert tell("prune", uninterrupted.path, "--keep", 1, "--dry-run").status == 0
