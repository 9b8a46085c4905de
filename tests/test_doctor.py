"""Faults are planted; doctor finds each of them and says the way out. A sound node is green."""

import contextlib
import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rcmae import config
from rcmae.commands import doctor
from rcmae.planning import cluster, node
from rcmae.process import extensions
from tests.conftest import ROOT, Ranks, free_port

PROGRAM = Path(__file__).parent / "programs" / "doctor_apart.py"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_STEP_NUM_TASKS", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(key, raising=False)


@pytest.fixture
def examined(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[dict[str, Any]]]]:
    """doctor in this process: (exit status, findings)."""

    def examine(*arguments: object) -> tuple[int, list[dict[str, Any]]]:
        capsys.readouterr()
        status = doctor.main([*map(str, arguments), "--json"])
        return status, json.loads(capsys.readouterr().out)["findings"]

    return examine


def of(findings: list[dict[str, Any]], colour: str, check: str = "") -> str:
    """Findings of a colour as one text, each with its way out."""
    chosen = [each for each in findings if each["colour"] == colour and check in each["check"]]
    assert all(each["way_out"] for each in chosen) or colour == "green"
    return "\n".join(f"{each['check']}: {each['found']} -> {each['way_out']}" for each in chosen)


def gpu(folder: Path, *rows: str, status: int = 0) -> str:
    """A PATH on which nvidia-smi says these lines."""
    script = folder / "nvidia-smi"
    lines = "\n".join(rows)
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\nexit {status}\n")
    script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


# -------------------------------------------------------------------------------------- sound nodes


def test_a_sound_node_is_green_and_keeps_no_trace(
    tiny: Path, tmp_path: Path, examined: Callable[..., tuple[int, list[dict[str, Any]]]]
) -> None:
    status, findings = examined(tiny, f"run.dir={tmp_path}/runs/one")
    assert status == 0, of(findings, "red")
    assert of(findings, "red") == ""
    green = of(findings, "green")
    for text in (
        "torch ",
        "none here and none asked for",
        "6 with 240 samples",
        "layer norm",
        "writes, renames, links",
    ):
        assert text in green
    assert list(tmp_path.iterdir()) == []


def test_it_runs_without_a_recipe_and_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    assert "green" in capsys.readouterr().out
    assert doctor.main(["no-such-recipe"]) == 2


def test_two_sound_ranks_are_compared_and_their_links_measured(
    tiny: Path, tmp_path: Path, ranks: Callable[..., Ranks]
) -> None:
    out = ranks(
        str(ROOT / "tools" / "doctor.py"),
        str(tiny),
        f"run.dir={tmp_path}/run",
        "engine.name=fsdp2",
        "--json",
        world=2,
    ).succeed()
    report = json.loads(out[out.index("{\n") : out.rindex("}") + 1])
    findings = report["findings"]
    assert (report["world"], of(findings, "red")) == (2, "")
    for text in (
        "between the clocks of 1 hosts",
        "is one folder on all ranks",
        "all-reduce of 2 ranks",
        "all-gather of 2",
    ):
        assert text in of(findings, "green")
    assert all(each["ranks"] == [0, 1] for each in findings), "ranks of one node find the same"
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- faults


def test_the_wrong_apex(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path, examined: Callable[..., Any]
) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("def start_web_site(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    status, findings = examined(tiny, f"run.dir={tmp_path}/run")
    assert status == 0
    assert "is not NVIDIA's" in of(findings, "yellow", "apex")
    status, findings = examined(tiny, f"run.dir={tmp_path}/run", "engine.layer_norm=apex")
    assert status == 1
    assert "engine.layer_norm=apex: the apex in" in of(findings, "red", "kernels")


def test_torch_for_cpu_beside_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examined: Callable[..., Any]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)  # as in the CPU build
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    status, findings = examined()
    assert status == 1
    assert "is a CPU build beside 8 GPUs -> install the CUDA build" in of(findings, "red")
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    monkeypatch.setenv(
        "PATH",
        gpu(tmp_path, "NVIDIA H100 80GB HBM3, 570.1, 81559, 4, 0, Not Active, 31, 9.0, Default"),
    )
    assert "is a CPU build beside 1 GPUs" in of(examined()[1], "red")


def test_packages_that_do_not_belong_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examined: Callable[..., Any]
) -> None:
    info = tmp_path / "torchvision-0.20.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.20.0\nRequires-Dist: torch==2.5.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(extensions, "guard_torchvision", lambda: False)  # its own part loads
    status, findings = examined()
    assert status == 0
    told = of(findings, "yellow", "torchvision")
    assert "torchvision 0.20.0 belongs to torch 2.5.0, this is torch 2." in told
    assert "its compiled part loads, and rcmae works" in told
    assert "install the torchvision that belongs to torch 2." in told
    monkeypatch.setattr(extensions, "guard_torchvision", lambda: True)  # as of another build
    status, findings = examined()
    assert status == 0
    told = of(findings, "yellow", "torchvision")
    assert "rcmae works, but `import timm` and `import torchvision` alone fail, and det" in told
    monkeypatch.setitem(sys.modules, "torchvision", None)
    status, findings = examined()
    assert status == 1
    assert "torchvision 0.20.0 belongs to torch 2.5.0" in of(findings, "red", "torchvision")


def test_a_package_that_does_not_import(
    monkeypatch: pytest.MonkeyPatch, examined: Callable[..., Any]
) -> None:
    # how Python marks what cannot be imported
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    status, findings = examined()
    assert status == 1
    assert "simplejpeg cannot be imported" in of(findings, "red")


GPU_FAULTS = {
    "no bf16": (
        "Tesla V100-SXM2-32GB, 570.1, 32768, 4, 0, Not Active, 31, 7.0, Default",
        "red",
        "has no bf16",
    ),
    "taken": (
        "NVIDIA H200, 570.1, 143771, 60000, 0, Not Active, 40, 9.0, Default",
        "red",
        "58.6 of 140 GiB are taken",
    ),
    "shared": (
        "NVIDIA H200, 570.1, 143771, 6000, 0, Not Active, 40, 9.0, Default",
        "yellow",
        "5.9 of 140 GiB are taken",
    ),
    "ill": (
        "NVIDIA H200, 570.1, 143771, 4, 3, Not Active, 40, 9.0, Default",
        "red",
        "3 uncorrected memory errors",
    ),
    "slowed": (
        "NVIDIA H200, 570.1, 143771, 4, [N/A], Active, 91, 9.0, Default",
        "yellow",
        "slows it down, at 91 C",
    ),
    "hot": ("NVIDIA H200, 570.1, 143771, 4, 0, Not Active, 91, 9.0, Default", "yellow", "91 C"),
    "closed": (
        "NVIDIA H200, 570.1, 143771, 4, 0, Not Active, 40, 9.0, Prohibited",
        "red",
        "is Prohibited",
    ),
}


@pytest.mark.parametrize("fault", GPU_FAULTS)
def test_gpus_that_are_not_well(
    fault: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny: Path,
    examined: Callable[..., Any],
) -> None:
    row, colour, text = GPU_FAULTS[fault]
    sound = "NVIDIA H200, 570.1, 143771, 4, 0, Not Active, 40, 9.0, Default"
    monkeypatch.setenv("PATH", gpu(tmp_path, sound, row))
    _, findings = examined(tiny, f"run.dir={tmp_path}/run", "engine.precision=bf16")
    assert text in of(findings, colour, "GPU 1")
    assert "GPU 0: NVIDIA H200" in of(findings, "green")
    assert of(findings, "red", "GPU 0") == of(findings, "yellow", "GPU 0") == ""


def test_a_driver_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examined: Callable[..., Any]
) -> None:
    monkeypatch.setenv(
        "PATH",
        gpu(tmp_path, "Failed to initialize NVML: Driver/library version mismatch", status=18),
    )
    status, findings = examined()
    assert status == 1
    assert "Driver/library version mismatch" in of(findings, "red", "driver")


@pytest.mark.parametrize("folder", ["/proc/runs/one", "{}/file/one"])
def test_a_run_folder_that_cannot_be_written(
    folder: str, tmp_path: Path, tiny: Path, examined: Callable[..., Any]
) -> None:
    (tmp_path / "file").write_text("in the way")
    status, findings = examined(tiny, f"run.dir={folder.format(tmp_path)}")
    assert status == 1
    assert folder.format(tmp_path) in of(findings, "red", "run folder")


@contextlib.contextmanager
def small_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder on a disk of 16 MiB; where none can be mounted, one of which the system says so."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True
    )
    if mounted.returncode:
        real, usage = shutil.disk_usage, type(shutil.disk_usage(folder))

        def told(path: Any) -> Any:
            return usage(2**24, 0, 2**24) if folder in (path, *Path(path).parents) else real(path)

        monkeypatch.setattr(shutil, "disk_usage", told)
    try:
        yield
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", folder], check=True)


def test_a_full_disk_for_the_run_and_for_caches(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, examined: Callable[..., Any]
) -> None:
    model = ["model.embed_dim=512", "model.depth=8", "checkpoint.keep=4"]
    with small_disk(tmp_path / "disk", monkeypatch):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "disk" / "extensions"))
        engine = ["engine.name=deepspeed", "engine.config=zero1.json"]
        status, findings = examined(tiny, f"run.dir={tmp_path}/disk/run", *model, *engine)
    assert status == 1
    assert "are needed for checkpoints -> free some, lower checkpoint.keep" in of(
        findings, "red", "run folder"
    )
    assert f"{tmp_path}/disk/extensions: 0.0" in of(findings, "red", "caches")
    assert "export TORCH_EXTENSIONS_DIR elsewhere" in of(findings, "red", "caches")


def test_shards_that_are_missing_compressed_or_cut(
    tmp_path: Path, tiny: Path, photo_shards: str, examined: Callable[..., Any]
) -> None:
    source = Path(photo_shards).parent
    for number in range(3):
        shutil.copy(source / f"photo-{number:06d}.tar", tmp_path)
    (tmp_path / "photo-000003.tar").write_bytes(
        gzip.compress((source / "photo-000003.tar").read_bytes())
    )
    (tmp_path / "photo-000004.tar").write_bytes((source / "photo-000004.tar").read_bytes()[:50_000])
    shards = f"data.shards={tmp_path}/photo-{{000000..000005}}.tar"
    status, findings = examined(tiny, f"run.dir={tmp_path}/run", shards)
    assert status == 1
    red = of(findings, "red", "shards")
    assert "photo-000003.tar: is compressed" in red
    assert "photo-000005.tar: No such file" in red
    (tmp_path / "photo-000003.tar").unlink()
    shards = f"data.shards=[{tmp_path}/photo-000000.tar,{tmp_path}/photo-000004.tar]"
    assert "photo-000004.tar: is not a complete tar" in of(
        examined(tiny, f"run.dir={tmp_path}/run", shards)[1], "red"
    )


def test_shards_of_an_evaluation_ranks_and_workers_that_do_not_fit(
    tmp_path: Path,
    tiny: Path,
    photo_shards: str,
    monkeypatch: pytest.MonkeyPatch,
    examined: Callable[..., Any],
) -> None:
    sets = ["evaluate.every_steps=5", f"evaluate.train_shards={photo_shards}"]
    sets.append(f"evaluate.test_shards={tmp_path}/val.tar")
    monkeypatch.setattr("rcmae.process.cores.usable", lambda: 1)
    status, findings = examined(tiny, f"run.dir={tmp_path}/run", "data.workers=4", *sets)
    assert status == 1
    assert "evaluate.train_shards: 6 with 240 samples" in of(findings, "green", "shards")
    assert f"evaluate.test_shards: shards that cannot be used:\n{tmp_path}/val.tar" in of(
        findings, "red", "shards"
    )
    told = of(findings, "yellow", "data workers")
    assert "data.workers=4 share 1 core of each rank" in told
    assert "set data.workers=1" in told
    recipe = config.load(str(tiny), ["engine.name=local", "data.canonical_streams=8"])
    found = "; ".join(f"{each.found} -> {each.way_out}" for each in node.check_ranks(recipe, 3))
    assert "engine.name=local is one process, 3 were launched -> engine.name=fsdp2" in found
    assert "is not divisible by 3 ranks -> use" in found
    assert not list(node.check_ranks(recipe, 1))


def test_samples_that_do_not_decode(
    tmp_path: Path, tiny: Path, photo_shards: str, examined: Callable[..., Any]
) -> None:
    data = bytearray((Path(photo_shards).parent / "photo-000000.tar").read_bytes())
    at = data.index(b"\xff\xd8")
    data[at : at + 64] = bytes(64)
    (tmp_path / "a.tar").write_bytes(data)
    status, findings = examined(tiny, f"run.dir={tmp_path}/run", f"data.shards={tmp_path}/a.tar")
    assert status == 0
    assert "of 40 tried: a/0_00 (" in of(findings, "yellow", "shards")


def test_a_port_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, examined: Callable[..., Any]
) -> None:
    with socket.socket() as holder:
        holder.bind(("", free_port()))
        holder.listen()
        monkeypatch.setenv("MASTER_PORT", str(holder.getsockname()[1]))
        status, findings = examined()
    assert status == 1
    assert "Address already in use -> export another MASTER_PORT" in of(findings, "red", "port")


def test_ranks_that_are_not_alike(tmp_path: Path, tiny: Path, ranks: Callable[..., Ranks]) -> None:
    """Another clock, another version of a package and another folder on the second of two ranks."""
    info = tmp_path / "standins" / "timm-0.0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.0.1\n")
    started = ranks(
        str(PROGRAM),
        "-40",
        str(info.parent),
        str(tmp_path / "theirs"),
        str(tiny),
        f"run.dir={tmp_path}/ours",
        world=2,
    )
    assert started.wait() == [1, 1], started.said() + started.said(1)
    out = started.said()
    findings = json.loads(out[out.index("{\n") : out.rindex("}") + 1])["findings"]
    red = of(findings, "red")
    assert "40.0" in of(findings, "red", "clocks")
    assert "is -40.0 s from rank 0 -> start chrony" in red
    assert "timm: " in of(findings, "red", "nodes differ")
    assert "0.0.1 on" in red
    assert f"{tmp_path}/ours of rank 0 is not that of ranks 1" in red


def test_links_are_held_to_what_they_should_give(tmp_path: Path) -> None:
    def colours(rate: float, hosts: list[str], name: str, network: float) -> list[str]:
        return [
            each.colour for each in cluster.check_links({"all-reduce": rate}, hosts, name, network)
        ]

    one, two = ["a"] * 8, ["a"] * 8 + ["b"] * 8
    assert colours(300, one, "NVIDIA H100 80GB HBM3", 0) == ["green"]
    assert colours(200, one, "NVIDIA H100 80GB HBM3", 0) == ["yellow"]
    assert colours(30, one, "NVIDIA H100 80GB HBM3", 0) == ["red"]
    # 8 x 400 Gb/s: 50 GB/s a GPU
    assert colours(40, two, "NVIDIA H100 80GB HBM3", 400) == ["green"]
    assert colours(4, two, "NVIDIA H100 80GB HBM3", 400) == ["red"]
    assert colours(1, two, "", 0) == ["green"]  # CPUs: nothing is promised
    ports = tmp_path / "mlx5_0" / "ports" / "1"
    ports.mkdir(parents=True)
    (ports / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert cluster.network_gbps(tmp_path) == 50.0
