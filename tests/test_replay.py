"""A step that went bad: stop, skip and rewind end as said, and the bundle brings it back on one
process.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rcmae.commands.again import replay
from runs import Folder, distance
from tests.conftest import Ranks

RARELY = "log.every_steps=20"
PROGRAM = Path(__file__).parent / "programs" / "train_many.py"
POISONED = 32 * 12 + 5  # a sample of the thirteenth step; checkpoints are of steps 10 and 20


def rows(run: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / file).read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    zero2 = ["engine.name=deepspeed", "engine.config=zero2.json"]
    ddp = ["engine.name=ddp", "engine.shard_ranks=2"]

    def job(name: str, *overrides: str) -> list[str]:
        return [
            str(tiny),
            f"run.dir={root / name}",
            f"guard.drill_nan_position={POISONED}",
            *overrides,
        ]

    jobs = [
        job("stop", *zero2),
        job("skip", *zero2, "guard.action=skip"),
        job("rewind", *zero2, "guard.action=rewind"),
        job("rewind-fsdp2", "engine.name=fsdp2", "guard.action=rewind"),
        job("rewind-ddp", *ddp, "guard.action=rewind"),
        # nobody waits for the thirteenth step: what it was is learnt in the fourteenth
        job("late-ddp", *ddp, "guard.action=rewind", RARELY),
        job("late-fsdp2", "engine.name=fsdp2", "guard.action=rewind", RARELY),
        job("skip-ddp", *ddp, "guard.action=skip"),
        job("late-skip-ddp", *ddp, "guard.action=skip", RARELY),
        job("too-often", *zero2, "guard.action=skip", "guard.max_skips=0"),
        [
            str(tiny),
            f"run.dir={root / 'jump'}",
            *zero2,
            "guard.spike_factor=4.0",
            "guard.action=skip",
            "guard.max_skips=100",
            "schedule.steps=40",
            "schedule.lr=3",
            "schedule.warmup_steps=30",
        ],
    ]
    ranks = Ranks([sys.executable, str(PROGRAM), json.dumps(jobs)], 2, root)
    assert "STATUS [1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]" in ranks.succeed()
    (root / "said").write_text(ranks.said())
    return root


@pytest.mark.slow
def test_stop_names_the_sample_and_the_last_checkpoint(runs: Path) -> None:
    said = (runs / "said").read_text()
    line = next(line for line in said.splitlines() if line.startswith("rcmae: step 12: the loss "))
    assert "all ranks stopped before the update" in line
    assert "step-00000010" in line
    assert "rcmae replay " in line
    (event,) = (row for row in rows(runs / "stop", "events.jsonl") if row["event"] == "not_finite")
    assert event["action"] == "stop"
    assert len(event["samples"]) == 1  # one rank's
    assert json.loads((runs / "stop" / "outcome.json").read_text())["exit_status"] == 1
    assert [row["step"] for row in rows(runs / "stop")] == list(range(1, 13))
    assert [row["step"] for row in rows(runs / "too-often")] == list(range(1, 13))


@pytest.mark.slow
def test_skip_leaves_out_one_update(runs: Path) -> None:
    steps = rows(runs / "skip")
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert [row["step"] for row in steps if row.get("skipped")] == [13]
    assert rows(runs / "skip")[-1]["images_seen"] == 20 * 32
    manifest = json.loads(
        (runs / "skip" / "checkpoints" / "step-00000020" / "manifest.json").read_text()
    )
    assert manifest["optimizer_step"] == 19
    assert manifest["meta"]["guard"]["skips"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rewind", "rewind-fsdp2", "rewind-ddp"])
def test_rewind_passes_over_exactly_the_samples_since_the_checkpoint(runs: Path, name: str) -> None:
    steps = rows(runs / name)
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert steps[9]["images_seen"] == 10 * 32
    # steps 10, 11 and 12 of the stream are not used again
    assert steps[10]["images_seen"] == 14 * 32
    manifest = json.loads(
        (runs / name / "checkpoints" / "step-00000020" / "manifest.json").read_text()
    )
    assert manifest["images"] == 23 * 32
    assert [row["loss"] for row in steps[:10]] == [row["loss"] for row in rows(runs / "stop")[:10]]
    assert steps[10]["loss"] == pytest.approx(rows(runs / "rewind")[10]["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("late", "waited"),
    [
        ("late-ddp", "rewind-ddp"),
        ("late-fsdp2", "rewind-fsdp2"),
        ("late-skip-ddp", "skip-ddp"),
    ],
)
def test_what_is_learnt_a_step_late_comes_out_as_what_was_waited_for(
    runs: Path, late: str, waited: str
) -> None:
    found, wanted = Folder(runs / late), Folder(runs / waited)
    (event,), (other,) = found.events("not_finite"), wanted.events("not_finite")
    for name in ("step", "data_step", "action", "samples"):
        assert event[name] == other[name], name
    assert event["step"] == 12
    assert found.committed() == wanted.committed()
    assert found.rows()[-1]["images_seen"] == wanted.rows()[-1]["images_seen"]
    for kind in ("weight", "teacher", "exp_avg"):
        assert distance(found.state(), wanted.state(), kind) < 1e-5, kind
    manifests = []
    for name in (late, waited):
        path = runs / name / "checkpoints" / "step-00000020" / "manifest.json"
        manifests.append(json.loads(path.read_text()))
    for key in ("optimizer_step", "teacher_updates", "images"):
        assert manifests[0][key] == manifests[1][key], key


@pytest.mark.slow
def test_a_bundle_brings_the_step_back_on_one_process(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the handlers of this process stay pytest's
    monkeypatch.setattr("rcmae.run.preempt.SIGNALS", ())
    bundle = runs / "stop" / "replay" / "step-00000012.json"
    assert replay.main([str(bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["from_step"], found["step"], found["reproduced"], found["same_masks"]) == (
        10,
        12,
        True,
        True,
    )
    assert found["samples"][0]["position"] == POISONED
    assert all(row["loss"] == row["loss"] for row in found["samples"][1:])  # the others are finite

    document = json.loads(bundle.read_text())
    document["recipe"]["guard"]["drill_nan_position"] = None
    cured = bundle.with_name("cured.json")
    cured.write_text(json.dumps(document))
    assert replay.main([str(cured)]) == 1
    assert replay.main([str(bundle), "--checkpoint", str(runs / "nowhere")]) == 2


@pytest.mark.slow
def test_a_jump_of_the_loss_is_left_out(runs: Path) -> None:
    """A learning rate that is far too high: some step's loss leaves what is usual, and that
    update is not made.
    """
    jumps = [row for row in rows(runs / "jump", "events.jsonl") if row["event"] == "spike"]
    assert jumps
    assert all(row["action"] == "skip" for row in jumps)
    skipped = {row["step"] for row in rows(runs / "jump") if row.get("skipped")}
    assert skipped == {row["step"] + 1 for row in jumps}
