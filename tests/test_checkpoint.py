"""A checkpoint is committed or never was: whatever is broken, the run resumes from the newest
complete one.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rcmae import checkpoint
from rcmae.checkpoint import retention
from rcmae.checkpoint.lease import LeaseLost
from rcmae.engines.local import LocalEngine
from rcmae.engines.protocol import EngineSettings
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import MaskedAutoencoder
from runs import Folder, distance, equal, python_path, start
from tests.conftest import ROOT, Ranks

PROGRAMS = Path(__file__).parent / "programs"
SMALL = 200_000  # bytes: more than any other file of a run, less than the tensors of a checkpoint


@pytest.fixture(scope="module")
def with_four(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A finished run with checkpoints of steps 5, 10, 15 and 20; do not write to it."""
    folder = Folder(tmp_path_factory.mktemp("four") / "run")
    assert start(tiny, folder.path, "checkpoint.every_steps=5", "checkpoint.keep=4") == 0
    assert folder.committed() == [5, 10, 15, 20]
    return folder


@pytest.fixture
def folder(with_four: Folder, tmp_path: Path) -> Folder:
    """A copy of it to be damaged."""
    return Folder(shutil.copytree(with_four.path, tmp_path / "run"))


def files(root: Path) -> dict[Path, bytes]:
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------- damage


def flip(at: float) -> Callable[[Path], None]:
    """Flip a bit of the byte at this share of a file."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[min(int(at * len(data)), len(data) - 1)] ^= 1
        path.write_bytes(data)

    return damage


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(share * path.stat().st_size))


def extend(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change a manifest's content and leave its checksum as it was."""

    def damage(path: Path) -> None:
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return damage


# what a run says of itself in its manifests, at least
META: dict[str, Any] = {
    "recipe": {
        "engine": {"name": "local", "precision": "fp32"},
        "objective": {"name": "rcmae"},
        "model": {"name": "vit_tiny_patch16", "image_size": 16, "patch_size": 8},
        "checkpoint": {},
        "data": {},
    },
    "sizes": {"world": 1},
    "data_fingerprint": "0123456789abcdef",
    "guard": {},
    "versions": {},
}
RANK, MANIFEST = "rank-00000.safetensors", "manifest.json"
NEWER = checkpoint.FORMAT + 1
# the file, what happens to it, what is said
DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a flipped length of the header": (
        RANK,
        flip(0),
        "20/rank-00000.safetensors differs from its checksum",
    ),
    "a flipped byte of the header": (
        RANK,
        flip(0.001),
        "20/rank-00000.safetensors differs from its checksum",
    ),
    "a flipped byte of a tensor": (
        RANK,
        flip(0.5),
        "20/rank-00000.safetensors differs from its checksum",
    ),
    "a flipped last byte": (RANK, flip(1), "20/rank-00000.safetensors differs from its checksum"),
    "half a file": (RANK, cut(0.5), "20/rank-00000.safetensors has "),
    "an empty file": (RANK, cut(0), "20/rank-00000.safetensors has 0 bytes"),
    "a byte too many": (RANK, extend, "20/rank-00000.safetensors has "),
    "no file": (RANK, Path.unlink, "20/rank-00000.safetensors: No such file"),
    "half a manifest": (MANIFEST, cut(0.5), "20/manifest.json cannot be read"),
    "an empty manifest": (MANIFEST, cut(0), "20/manifest.json cannot be read"),
    "no manifest": (MANIFEST, Path.unlink, "20 has no manifest.json: it was never committed"),
    "a list for a manifest": (
        MANIFEST,
        lambda path: path.write_text("[1]"),
        "20/manifest.json cannot be read",
    ),
    "a flipped first byte of the manifest": (MANIFEST, flip(0), "20/manifest.json cannot be read"),
    "another place in the data in the manifest": (
        MANIFEST,
        rewrite(lambda d: d.update(images=32)),
        "20/manifest.json differs from its own checksum",
    ),
    "other runs in the manifest": (
        MANIFEST,
        rewrite(lambda d: d["layouts"][0].__setitem__(1, 2)),
        "20/manifest.json differs from its own checksum",
    ),
    "a manifest of the future": (
        MANIFEST,
        rewrite(lambda d: d.update(format=NEWER)),
        f"20/manifest.json is of format {NEWER}, this rcmae reads up to {NEWER - 1}: update rcmae",
    ),
}


def lie(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change a manifest's content and seal it anew."""

    def damage(path: Path) -> None:
        document = json.loads(path.read_text())
        del document["sha256"]
        change(document)
        path.write_text(checkpoint.sealed(document))

    return damage


def old_lie(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """The same of a manifest as format 1 has it."""

    def damage(path: Path) -> None:
        rewritten = in_format_1(path.parent)
        change(rewritten)
        path.write_text(checkpoint.sealed(rewritten))

    return damage


def in_format_1(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest, with an object a run, without its checksum."""
    manifest = checkpoint.read_manifest(folder)
    document = json.loads((folder / MANIFEST).read_text())
    del document["sha256"]
    del document["layouts"]
    tensors = {
        key: {"shape": row.shape, "dtype": row.dtype, "runs": manifest.runs(key)}
        for key, row in manifest.tensors.items()
    }
    return json.loads(json.dumps({**document, "format": 1, "tensors": tensors}))


def layout(document: dict[str, Any]) -> list[int]:
    """Of a tensor."""
    return document["layouts"][document["tensors"][NORM][2]]


NORM = "weight/norm.weight"
LIES: dict[str, Callable[[Path], object]] = {
    "nested too deeply": lambda path: path.write_text("[" * 200_000),
    "a text": lambda path: path.write_text('"x"'),
    "a number for a format": lie(lambda d: d.update(format="1")),
    "a step below 0": lie(lambda d: d.update(step=-20)),
    "another step than its folder's": lie(lambda d: d.update(step=d["step"] + 1)),
    "meta that is a list": lie(lambda d: d.update(meta=[])),
    "no files": lie(lambda d: d.update(files={})),
    "a list of files": lie(lambda d: d.update(files=[RANK])),
    "a file elsewhere": lie(lambda d: d["files"].update({f"../{RANK}": d["files"][RANK]})),
    "a list of tensors": lie(lambda d: d.update(tensors=list(d["tensors"]))),
    "no recipe": lie(lambda d: d["meta"].pop("recipe")),
    "no fingerprint": lie(lambda d: d["meta"].update(data_fingerprint=None)),
    "no engine": lie(lambda d: d["meta"]["recipe"].pop("engine")),
    "a model without a name": lie(lambda d: d["meta"]["recipe"]["model"].pop("name")),
    "an engine that is a text": lie(lambda d: d["meta"]["recipe"].update(engine="local")),
    "no ranks": lie(lambda d: d["meta"]["sizes"].update(world=0)),
    "no layouts": lie(lambda d: d.pop("layouts")),
    "a layout of one number": lie(lambda d: layout(d).clear() or layout(d).append(1)),
    "a run too many": lie(lambda d: layout(d).extend([0, 1, 1])),
    "no runs": lie(lambda d: layout(d).clear()),
    "half a number": lie(lambda d: layout(d).__setitem__(2, 1.5)),
    "a length below 0": lie(lambda d: layout(d).__setitem__(2, -1)),
    "more files than there are": lie(lambda d: layout(d).__setitem__(1, 10**12)),
    "a number beyond all": lie(lambda d: layout(d).__setitem__(2, 10**30)),
    "a layout that is not there": lie(lambda d: d["tensors"][NORM].__setitem__(2, 10**6)),
    "a layout from the end": lie(lambda d: d["tensors"][NORM].__setitem__(2, -1)),
    "another shape": lie(lambda d: d["tensors"][NORM][1].append(2)),
    "an unknown type": lie(lambda d: d["tensors"][NORM].__setitem__(0, "F8")),
    "a tensor that is a number": lie(lambda d: d["tensors"].update({NORM: 1})),
    "format 1: another's rows": lie(lambda d: d.update(format=1)),
    "format 1: overlap": old_lie(lambda d: d["tensors"][NORM]["runs"].append([RANK, 0, 1])),
    "format 1: no runs": old_lie(lambda d: d["tensors"][NORM]["runs"].clear()),
    "format 1: another shape": old_lie(lambda d: d["tensors"][NORM]["shape"].append(2)),
    "format 1: unknown type": old_lie(lambda d: d["tensors"][NORM].update(dtype="F8")),
    "format 1: no file": old_lie(lambda d: d["tensors"][NORM]["runs"][0].__setitem__(0, "x")),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_manifest_that_says_what_no_save_writes_is_named_and_passed_over(
    folder: Folder, kind: str
) -> None:
    LIES[kind](folder.checkpoints / "step-00000020" / MANIFEST)
    found, passed_over = checkpoint.newest(folder.checkpoints)
    assert found is not None
    assert found.step == 15
    (told,) = passed_over
    assert told.startswith(f"{folder.checkpoints}/step-00000020/{MANIFEST} cannot be read")
    last = checkpoint.newest_unverified(folder.checkpoints)
    assert last is not None
    assert last.step == 15


def test_a_whole_checkpoint_of_a_newer_rcmae_is_refused_by_name_and_not_passed_over(
    tiny: Path, folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder.checkpoints / "step-00000020"
    lie(lambda d: d.update(format=NEWER))(path / MANIFEST)
    told = f"20/manifest.json is of format {NEWER}, this rcmae reads up to {NEWER - 1}: update"
    for look in (checkpoint.newest, checkpoint.newest_unverified, checkpoint.newest_together):
        with pytest.raises(checkpoint.NewerFormat, match=re.escape(told)):
            look(folder.checkpoints)
    assert start(tiny, folder.path) == 2
    assert told in capsys.readouterr().err
    assert path.is_dir()
    assert folder.committed()[-1] == 15  # the rest is as it was


def test_the_format_of_before_is_read_and_pruned(tiny: Path, folder: Folder) -> None:
    state = folder.state()
    for path in checkpoint.step_folders(folder.checkpoints):
        (path / MANIFEST).write_text(checkpoint.sealed(in_format_1(path)))
    assert folder.committed() == [5, 10, 15, 20]
    assert equal(folder.state(), state)
    assert start(tiny, folder.path, "schedule.steps=22", "checkpoint.allow=[schedule]") == 0
    assert folder.events("resume")[-1]["step"] == 20
    assert folder.committed()[-1] == 22


def test_what_only_looks_like_a_checkpoint_is_left_alone(tiny: Path, folder: Folder) -> None:
    theirs = ["step-00000015.bak", "step-00000020-best", "step-20", "step-000000020", "step-x"]
    for name in theirs:
        shutil.copytree(folder.checkpoints / "step-00000015", folder.checkpoints / name)
    (folder.checkpoints / "step-00000019").write_text("a file")
    (folder.checkpoints / "step-00000018").symlink_to(folder.path / "nowhere")
    (folder.checkpoints / ".writing-notes").mkdir()
    shutil.rmtree(folder.checkpoints / "step-00000020")
    before = {name: files(folder.checkpoints / name) for name in theirs}

    pruning = ["checkpoint.every_steps=1", "checkpoint.keep=2", "checkpoint.keep_every=5"]
    assert start(tiny, folder.path, *pruning) == 0
    assert folder.events("resume")[-1]["step"] == 15
    assert folder.committed() == [5, 10, 15, 19, 20]
    assert {name: files(folder.checkpoints / name) for name in theirs} == before
    assert (folder.checkpoints / ".writing-notes").is_dir()


def test_what_a_run_is_held_to_is_the_checkpoint_that_it_goes_on_from(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, faster = (
        Folder(tmp_path / "run"),
        ["schedule.lr=5.0e-3", "checkpoint.allow=[schedule.lr]"],
    )
    assert start(tiny, folder.path, "run.stop_after_steps=2") == 75
    assert start(tiny, folder.path, "run.stop_after_steps=2", *faster) == 75
    flip(0.5)(folder.checkpoints / "step-00000004" / RANK)
    capsys.readouterr()
    assert start(tiny, folder.path, faster[0]) == 2  # the one that had it is damaged
    assert (
        "step-00000002 was written with schedule.lr=0.001, but this recipe has 0.005"
        in capsys.readouterr().err
    )
    assert folder.events("stop")[-1]["step"] == 4, "nothing was done"
    # and the damaged one stands in nobody's way
    assert start(tiny, folder.path, "run.stop_after_steps=1") == 75
    assert folder.events("resume")[-1]["step"] == 2


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_named(
    tiny: Path, folder: Folder, uninterrupted: Folder, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    name, damage, named = DAMAGES[kind]
    damage(folder.checkpoints / "step-00000020" / name)
    assert start(tiny, folder.path, "checkpoint.every_steps=5", "checkpoint.keep=4") == 0
    assert f"{folder.checkpoints}/step-000000{named}" in capsys.readouterr().err
    resumed = folder.events("resume")[-1]
    assert resumed["step"] == 15
    assert any(
        f"{folder.checkpoints}/step-000000{named}" in text for text in resumed["passed_over"]
    )
    # nothing valid was deleted, and the last step committed anew
    assert folder.committed() == [5, 10, 15, 20]
    assert folder.steps() == list(range(1, 21))
    assert equal(folder.state(), uninterrupted.state())


def test_no_flipped_byte_of_a_manifest_goes_unseen(folder: Folder) -> None:
    path = folder.checkpoints / "step-00000020"
    file, right = path / "manifest.json", checkpoint.read_manifest(path)
    whole = file.read_bytes()
    seen = 0
    for at in range(0, len(whole), 211):
        for bit in (1, 4, 16):
            changed = bytearray(whole)
            changed[at] ^= bit
            file.write_bytes(changed)
            try:
                # white space became other such
                assert checkpoint.read_manifest(path) == right, f"byte {at}, bit {bit}"
            except checkpoint.CheckpointError:
                seen += 1
    assert seen > len(whole) / 211


def test_several_damaged_checkpoints_are_all_named_and_without_a_whole_one_nothing_is_touched(
    tiny: Path, folder: Folder, uninterrupted: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (10, 15, 20):
        flip(0.5)(folder.checkpoints / f"step-{step:08d}" / "rank-00000.safetensors")
    assert start(tiny, folder.path, "run.stop_after_steps=1") == 75
    said = capsys.readouterr().err
    assert all(f"step-{step:08d}" in said for step in (10, 15, 20))
    assert folder.events("resume")[-1]["step"] == 5
    assert folder.committed() == [5, 6]

    for step in (5, 6):
        flip(0.5)(folder.checkpoints / f"step-{step:08d}" / "rank-00000.safetensors")
    before, steps = files(folder.checkpoints), folder.steps()
    assert start(tiny, folder.path) == 1
    said = capsys.readouterr().err
    assert "none is valid" in said
    assert "step-00000005" in said
    assert "checkpoint.resume=never" in said  # the way out
    assert files(folder.checkpoints) == before
    assert folder.steps() == steps


@pytest.mark.parametrize("text", ["", "step-00000099\n", None])
def test_latest_is_for_people_and_a_wrong_one_misleads_no_run(
    tiny: Path, folder: Folder, text: str | None
) -> None:
    latest = folder.checkpoints / "LATEST"
    latest.unlink()
    if text is not None:
        latest.write_text(text)
    shutil.rmtree(folder.checkpoints / "step-00000020")
    assert start(tiny, folder.path, "run.stop_after_steps=2") == 75
    assert folder.events("resume")[-1]["step"] == 15
    assert latest.read_text() == "step-00000017\n"


# ---------------------------------------------------------------------------------------- retention


def test_retention_keeps_the_newest_and_those_for_good(tiny: Path, tmp_path: Path) -> None:
    run = Folder(tmp_path / "run")
    often = [
        "checkpoint.every_steps=1",
        "checkpoint.keep=3",
        "checkpoint.keep_every=5",
        "run.stop_after_steps=12",
    ]
    assert start(tiny, run.path, *often) == 75
    assert run.committed() == [5, 10, 11, 12]
    assert run.leftovers() == []
    assert [event["step"] for event in run.events("checkpoint")] == list(range(1, 13))


def test_retention_counts_valid_checkpoints_alone(folder: Folder) -> None:
    cut(0.5)(folder.checkpoints / "step-00000015" / "rank-00000.safetensors")
    (folder.checkpoints / "step-00000020" / "manifest.json").unlink()
    checkpoint.prune(folder.checkpoints, keep=1)
    assert folder.committed() == [10]
    manifest, passed_over = checkpoint.newest(folder.checkpoints)
    assert manifest is not None
    assert (manifest.step, len(passed_over)) == (10, 2)


def test_pruning_a_long_run_reads_few_manifests(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(21, 60):
        lie(lambda d, step=step: d.update(step=step))(
            Path(
                shutil.copytree(
                    folder.checkpoints / "step-00000020", folder.checkpoints / f"step-{step:08d}"
                )
            )
            / MANIFEST
        )
    read: list[Path] = []
    counts = retention.counts
    monkeypatch.setattr(
        retention, "counts", lambda path, held: read.append(path) or counts(path, held)
    )
    kept = retention.Retention(folder.checkpoints, keep=40, keep_every=10)
    assert [path.name for path in kept.prune()] == ["step-00000015", "step-00000005"]
    assert len(read) == 42  # not the one that stays for good, beyond the newest
    read.clear()
    # the newest are looked at again, so that a damaged one does not take the place of a valid one
    cut(0.5)(folder.checkpoints / "step-00000059" / RANK)
    assert kept.prune() == []
    assert len(read) == 5  # and the one that is among the newest 40 now


def test_one_checkpoint_to_keep_still_means_that_the_one_before_stays(
    tiny: Path, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    assert start(tiny, run.path, "checkpoint.every_steps=3", "checkpoint.keep=1") == 0
    # a writer that lost the run must not delete what its follower goes on from
    assert run.committed() == [18, 20]


# --------------------------------------------------------------------------------- writes that fail


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int | None], None]]:
    """Set the size from which on writes to a file fail, here and now; None lifts it.

    The system does the failing.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)


def test_a_disk_that_stays_full_ends_the_run_with_what_was_committed_before(
    tiny: Path,
    tmp_path: Path,
    uninterrupted: Folder,
    capsys: pytest.CaptureFixture[str],
    file_size_limit: Callable[[int | None], None],
) -> None:
    run = Folder(tmp_path / "run")
    often = "checkpoint.every_steps=3"
    assert start(tiny, run.path, often, "run.stop_after_steps=4") == 75
    before = {
        path: data
        for path, data in files(run.checkpoints).items()
        if path.parts[0].startswith("step-")
    }
    file_size_limit(SMALL)
    assert start(tiny, run.path, often) == 1
    file_size_limit(None)
    said = capsys.readouterr().err
    for text in (
        "was not written",
        "rank-00000.safetensors",
        "File too large",
        "Free space",
        "start the same command",
    ):
        assert text in said
    assert run.outcome()["status"] == "failed"
    assert len(run.events("checkpoint_failed")) == 3
    after = files(run.checkpoints)
    assert {path: after[path] for path in before} == before
    assert run.committed() == [3, 4]
    assert run.leftovers() == []
    assert start(tiny, run.path, often) == 0
    assert run.steps() == list(range(1, 21))
    assert equal(run.state(), uninterrupted.state())


@pytest.mark.parametrize("every_steps", ["5", "null"])  # null: of the last step alone
def test_a_disk_that_is_full_for_a_while_costs_no_step(
    tiny: Path,
    tmp_path: Path,
    uninterrupted: Folder,
    file_size_limit: Callable[[int | None], None],
    monkeypatch: pytest.MonkeyPatch,
    every_steps: str,
) -> None:
    run, mkdir, tries = Folder(tmp_path / "run"), os.mkdir, []

    def full_for_two_tries(path: Any, *args: Any, **named: Any) -> None:
        if ".writing-" in str(path):
            tries.append(path)
            file_size_limit(SMALL if len(tries) <= 2 else None)
        mkdir(path, *args, **named)

    monkeypatch.setattr(os, "mkdir", full_for_two_tries)
    assert start(tiny, run.path, f"checkpoint.every_steps={every_steps}") == 0
    failed = run.events("checkpoint_failed")
    assert len(failed) == 2
    assert all("File too large" in event["reason"] for event in failed)
    assert run.events("resume") == []
    assert run.committed()[-1] == 20
    assert equal(run.state(), uninterrupted.state())


def test_a_commit_whose_pointer_could_not_be_moved_is_none_the_less_one(
    tiny: Path, tmp_path: Path, uninterrupted: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step's: its next try finds the folder in place, and must neither fail for it nor
    write it anew.
    """
    run, replace, refused = Folder(tmp_path / "run"), os.replace, []

    def refuse_once(source: Any, target: Any) -> None:
        if (
            Path(target).name == "LATEST"
            and (run.checkpoints / "step-00000020").exists()
            and not refused
        ):
            refused.append(os.stat(run.checkpoints / "step-00000020").st_ino)
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_once)
    assert start(tiny, run.path) == 0
    assert refused == [os.stat(run.checkpoints / "step-00000020").st_ino]
    assert "LATEST: No space left on device" in run.events("checkpoint_failed")[0]["reason"]
    assert (run.checkpoints / "LATEST").read_text() == "step-00000020\n"
    assert run.leftovers() == []
    assert equal(run.state(), uninterrupted.state())


CAP_DAC_OVERRIDE = 1


@pytest.fixture
def permissions_count() -> Iterator[None]:
    """Have root bound by the permissions of files, in this thread and those it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~(1 << CAP_DAC_OVERRIDE)
    assert libc.capset(header, sets) == 0
    yield
    sets[0] = before
    assert libc.capset(header, sets) == 0


@pytest.mark.usefixtures("permissions_count")
def test_a_folder_that_turns_read_only_loses_nothing_and_is_named(
    tiny: Path,
    tmp_path: Path,
    uninterrupted: Folder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, replace = Folder(tmp_path / "run"), os.replace
    often = "checkpoint.every_steps=3"

    def then_read_only(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).name == "LATEST" and Path(target).read_text() == "step-00000006\n":
            run.checkpoints.chmod(0o555)

    monkeypatch.setattr(os, "replace", then_read_only)
    assert start(tiny, run.path, often) == 1
    monkeypatch.undo()
    said = capsys.readouterr().err
    for text in (
        f"{run.checkpoints}/.writing-step-",
        "Permission denied",
        "fix the folder",
        "start the same command",
    ):
        assert text in said
    assert len(run.events("checkpoint_failed")) == 3
    assert run.committed() == [3, 6]

    before = files(run.checkpoints)
    for locked, named in ((run.checkpoints, "checkpoints"), (run.path / "leases", "leases")):
        locked.chmod(0o555)
        assert start(tiny, run.path, often) == 2  # and no rank trains
        said = capsys.readouterr().err
        assert (
            f"run.dir={run.path} cannot be written: [Errno 13] Permission denied: "
            f"'{run.path}/{named}/"
        ) in said
        assert "make it writable, or use another run.dir" in said
        locked.chmod(0o755)
    assert files(run.checkpoints) == before
    assert start(tiny, run.path, often) == 0
    assert equal(run.state(), uninterrupted.state())


@pytest.mark.slow
def test_a_rank_that_cannot_write_or_a_damaged_part_of_one_rank_is_every_ranks_news(
    tiny: Path, tmp_path: Path, uninterrupted: Folder, ranks: Callable[..., Ranks]
) -> None:
    run = Folder(tmp_path / "run")
    zero2 = ["engine.name=deepspeed", "engine.config=zero2.json", "checkpoint.every_steps=4"]
    job = ["train", str(tiny), f"run.dir={run.path}", *zero2]
    steps = [
        [*job, "run.stop_after_steps=5"],
        ["limit", 1, SMALL],
        job,
        ["limit", 1, None],
        [*job, "run.stop_after_steps=4"],
        ["flip", f"{run.checkpoints}/step-*/rank-00001.safetensors"],
        job,
    ]
    started = ranks(str(PROGRAMS / "mishaps.py"), json.dumps(steps))
    assert "STATUS [75, 1, 75, 0]" in started.succeed()
    said = started.said()
    assert "rank 1: " in said
    assert "File too large" in said
    assert "step-00000009/rank-00001.safetensors differs from its checksum" in said
    assert [event["step"] for event in run.events("resume")] == [5, 5, 8]
    assert run.steps() == list(range(1, 21))
    assert run.losses() == pytest.approx(uninterrupted.losses(), rel=1e-5)
    assert distance(run.state(), uninterrupted.state(), "teacher") < 1e-5
    names = sorted(path.name for path in (run.checkpoints / "step-00000020").iterdir())
    assert names == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    assert equal(library_view(run.checkpoints / "step-00000020"), run.state())


def test_one_rank_may_read_alone_and_what_one_does_not_see_divides_nobody(
    with_four: Folder, ranks: Callable[..., Ranks]
) -> None:
    started = ranks(str(PROGRAMS / "one_sees_less.py"), str(with_four.path))
    said = started.succeed(timeout_s=120)
    line = next(line for line in said.splitlines() if line.startswith("RESULT "))
    found = json.loads(line.removeprefix("RESULT "))
    assert found["alone"] == [20, 20]
    assert found["both"] == found["one sees none"] == [20, 20]
    one, other = found["one cannot read"]
    assert one == other
    assert len(one) == 4
    assert one[0] == "step-00000020 is not there on this node"


@pytest.mark.slow
def test_a_kill_at_any_call_of_a_save_leaves_the_run_as_it_was_or_one_save_further(
    tiny: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "short.yaml"
    recipe.write_text(
        tiny.read_text().replace("steps: 20", "steps: 12").replace("images: 32", "images: 8")
    )
    ended = subprocess.run(
        [sys.executable, str(PROGRAMS / "killed_saves.py"), str(recipe), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": python_path(ROOT / "tests"), "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(
        next(line for line in ended.stdout.splitlines() if line.startswith("RESULT ")).partition(
            " "
        )[2]
    )
    assert len(found) >= 12
    for kill in found:
        assert kill["committed"] in ([4], [4, 8], [8, 12], [4, 8, 12]), kill
        assert (kill["again"], kill["as if nothing"], kill["tidy"]) == (0, True, True), kill
    assert [4] in [kill["committed"] for kill in found]
    assert [4, 8] in [kill["committed"] for kill in found]


def test_what_killed_writers_left_is_removed(tiny: Path, folder: Folder) -> None:
    for name in (".writing-step-00000016-00000001-0badf00d", ".dropped-step-00000005-0badf00d"):
        shutil.copytree(folder.checkpoints / "step-00000005", folder.checkpoints / name)
    shutil.rmtree(folder.checkpoints / "step-00000020")
    assert start(tiny, folder.path, "run.stop_after_steps=1") == 75
    assert folder.leftovers() == []


# ---------------------------------------------------------------------------------- what is written


def library_view(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together from what the safetensors library reads."""
    document = json.loads((path / "manifest.json").read_text())
    held = {name: load_file(path / name) for name in document["files"]}
    names = sorted(held)
    found = {}
    for key, (_, shape, number) in document["tensors"].items():
        parts, begin = [], 0
        triples = iter(document["layouts"][number])
        for first, count, length in zip(triples, triples, triples, strict=True):
            for file in names[first : first + count]:
                parts.append(held[file][f"{key}@{begin}"])
                begin += length
        found[key] = torch.cat(parts).view(shape)
    return found


@pytest.fixture
def engine() -> LocalEngine:
    student, teacher = (
        MaskedAutoencoder(
            NetworkSizes(
                image_size=(16, 16),
                patch_size=8,
                in_channels=3,
                embed_dim=24,
                depth=2,
                num_heads=2,
                decoder_dim=20,
                decoder_depth=1,
                decoder_heads=2,
            )
        )
        for _ in range(2)
    )
    return LocalEngine(student, teacher, EngineSettings())


def live(engine: LocalEngine) -> dict[str, torch.Tensor]:
    """A copy of everything that moves, by kind/parameter, and the frozen tables."""
    state = engine.state()
    found = {f"buffer/{name}": table.clone() for name, table in state.buffers.items()}
    for piece in state.pieces:
        for kind, tensor in piece.tensors.items():
            found[f"{kind}/{piece.name}"] = tensor.clone().view(state.shapes[piece.name])
    return found


def disturb(engine: LocalEngine) -> None:
    generator = torch.Generator().manual_seed(3)
    for piece in engine.state().pieces:
        for tensor in piece.tensors.values():
            tensor.add_(torch.rand(tensor.shape, generator=generator))


def test_the_files_open_with_the_library_and_are_the_state(
    tmp_path: Path, engine: LocalEngine
) -> None:
    disturb(engine)
    saver = checkpoint.Saver(tmp_path / "checkpoints", keep=2, background=False)
    saved = saver.save(engine, step=7, images=224, meta=META)
    assert saved is not None
    assert equal(library_view(saved.path), live(engine))
    manifest = checkpoint.open_verified(saved.path)
    assert (manifest.step, manifest.images) == (7, 224)
    assert equal(
        {key: checkpoint.tensor_of(manifest, key) for key in manifest.tensors}, live(engine)
    )
    assert saved.bytes == sum(path.stat().st_size for path in saved.path.glob("*.safetensors"))


def test_a_save_in_the_background_is_of_the_moment_it_was_asked_for(
    tmp_path: Path, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    disturb(engine)
    wanted, mkdir, go_on = live(engine), os.mkdir, threading.Event()
    monkeypatch.setattr(os, "mkdir", lambda *args: (go_on.wait(60), mkdir(*args))[1])
    saver = checkpoint.Saver(tmp_path / "checkpoints", keep=2)
    assert saver.save(engine, step=7, images=224, meta=META) is None
    assert not saver.is_done()
    disturb(engine)  # the training goes on while nothing has been written
    go_on.set()
    saved = saver.wait()
    assert saved is not None
    assert equal(library_view(saved.path), wanted)
    assert not equal(wanted, live(engine))


def test_a_writer_that_was_passed_over_takes_nothing_from_the_one_that_came_after(
    tmp_path: Path, engine: LocalEngine
) -> None:
    """It wakes before its save, and with a folder of its step in place: by an earlier look, that
    one was damaged.
    """
    root = tmp_path / "checkpoints"
    later = checkpoint.Saver(root, keep=2, generation=2, background=False)
    saved = later.save(engine, step=7, images=224, meta=META)
    assert saved is not None
    under_way = root / ".writing-step-00000009-00000002-0badf00d"
    under_way.mkdir()
    before = files(root)

    def passed_over() -> None:
        raise LeaseLost("job 18 took over this run from step 6")

    disturb(engine)
    for asked in (passed_over, lambda: None):  # lost for good, or paused right after it asked
        earlier = checkpoint.Saver(root, keep=2, generation=1, background=False, check_lease=asked)
        with pytest.raises(
            (LeaseLost, checkpoint.CheckpointError), match=r"took over this run|another valid"
        ):
            earlier.save(engine, step=7, images=224, meta=META)
        assert files(root) == before
        assert under_way.is_dir()


def test_what_damage_left_in_a_steps_place_is_replaced(tmp_path: Path, engine: LocalEngine) -> None:
    saver = checkpoint.Saver(tmp_path / "checkpoints", keep=2, background=False)
    saved = saver.save(engine, step=7, images=224, meta=META)
    assert saved is not None
    cut(0.5)(saved.path / RANK)
    again = saver.save(engine, step=7, images=224, meta=META)
    assert again is not None
    assert equal(library_view(again.path), live(engine))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "LATEST",
        "step-00000007",
    ]


def test_a_save_that_finds_another_under_way_waits_for_it_and_says_for_how_long(
    tmp_path: Path, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = os.mkdir
    monkeypatch.setattr(os, "mkdir", lambda *args: (time.sleep(0.5), mkdir(*args))[1])
    saver = checkpoint.Saver(tmp_path / "checkpoints", keep=2)
    assert saver.save(engine, step=1, images=32, meta=META) is None
    first = saver.save(engine, step=2, images=64, meta=META)
    second = saver.wait()
    assert first is not None
    assert second is not None
    assert (first.step, second.step) == (1, 2)
    assert first.waited_s == pytest.approx(0.0, abs=0.1)
    assert 0.3 < second.waited_s <= second.stall_s
    assert second.seconds < 2 * first.seconds + 0.5  # the wait is not its own


def test_a_checkpoint_of_another_model_is_refused_by_name(
    tmp_path: Path, engine: LocalEngine
) -> None:
    saver = checkpoint.Saver(tmp_path / "checkpoints", keep=2, background=False)
    saved = saver.save(engine, step=1, images=32, meta=META)
    assert saved is not None
    deeper = MaskedAutoencoder(
        NetworkSizes(
            image_size=(16, 16),
            patch_size=8,
            in_channels=3,
            embed_dim=24,
            depth=3,
            num_heads=2,
            decoder_dim=20,
            decoder_depth=1,
            decoder_heads=2,
        )
    )
    other = LocalEngine(deeper, None, EngineSettings())
    with pytest.raises(
        checkpoint.CheckpointError, match=r"does not fit the model: weight/blocks\.2"
    ):
        checkpoint.load(checkpoint.open_verified(saved.path), other)
