"""What an earlier version wrote stays good: its runs resume, its index and checkpoints are read.

And what a later version will write is refused by name, not misread.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import rcmae
from rcmae import checkpoint, config
from rcmae.data.index import ShardIndex
from rcmae.errors import Refused
from rcmae.weights.conversion import convert
from rcmae.weights.layouts import LAYOUTS, TARGETS
from rcmae.weights.reading import load_weights, read_network
from rcmae.weights.writing import export
from runs import Folder, start
from tests.conftest import Ranks

KEPT = Path(__file__).parent / "data" / "version_0.1.0"
WHOLE: dict[str, list[float]] = json.loads((KEPT / "losses.json").read_text())
TRAIN_MANY = Path(__file__).parent / "programs" / "train_many.py"
SHARDS = "shards/tiles-*.tar"  # in the kept recipes


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A copy of what is kept."""
    return Path(shutil.copytree(KEPT, tmp_path / "kept"))


def again(kept: Path, name: str) -> list[str]:
    """The command line that resumes a run of it, to the end."""
    return [
        str(kept / name / "recipe.yaml"),
        f"run.dir={kept / name}",
        f"data.shards={kept / SHARDS}",
        "run.stop_after_steps=null",
    ]


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a checkpoint's manifest as a version that writes it so would have."""
    file = folder / "manifest.json"
    document = json.loads(file.read_text())
    del document["sha256"]
    change(document)
    file.write_text(checkpoint.sealed(document))


# ------------------------------------------------------------------------------------------- before


def test_a_run_on_one_process_resumes_as_if_nothing_had_happened(kept: Path) -> None:
    recipe, _, *overrides = again(kept, "local")
    assert start(recipe, kept / "local", *overrides) == 0
    run = Folder(kept / "local")
    assert run.events("resume")[-1]["step"] == 4
    assert run.steps() == list(range(1, 9))
    assert run.losses() == pytest.approx(WHOLE["local"], rel=1e-6)
    assert run.committed() == [4, 8]


@pytest.mark.slow
def test_sharded_runs_resume_on_two_ranks(kept: Path, tmp_path: Path) -> None:
    names = ["zero2", "fsdp2"]
    jobs = [again(kept, name) for name in names]
    ranks = Ranks([sys.executable, str(TRAIN_MANY), json.dumps(jobs)], 2, tmp_path)
    assert "STATUS [0, 0]" in ranks.succeed()
    for name in names:
        run = Folder(kept / name)
        assert run.events("resume")[-1]["step"] == 4
        assert run.steps() == list(range(1, 9))
        assert run.losses() == pytest.approx(WHOLE[name], rel=2e-5)


@pytest.mark.parametrize("name", WHOLE)
def test_checkpoints_are_read(kept: Path, name: str) -> None:
    found, passed_over = checkpoint.newest(kept / name / "checkpoints")
    assert found is not None
    assert (found.step, found.images, passed_over) == (4, 32, [])
    assert checkpoint.tensor_of(found, "teacher/norm.weight").shape == (16,)


@pytest.mark.parametrize("name", WHOLE)
def test_weights_of_a_run_are_loaded(kept: Path, name: str) -> None:
    encoder = rcmae.load_encoder(kept / name)
    features = encoder(torch.zeros(2, 3, 16, 16))
    assert torch.isfinite(features).all()


def test_an_export_is_the_run_that_it_was_made_of(kept: Path) -> None:
    exported = rcmae.load_encoder(kept / "encoder.safetensors").state_dict()
    wanted = rcmae.load_encoder(kept / "local").state_dict()
    assert exported.keys() == wanted.keys()
    assert all(torch.equal(exported[key], wanted[key]) for key in wanted)


def test_a_run_is_exported_as_that_version_did(kept: Path, tmp_path: Path) -> None:
    manifest, _ = checkpoint.find_checkpoint(kept / "local")
    out = tmp_path / "encoder.safetensors"
    export(manifest, out, layout="safetensors")
    ours = load_weights(out)
    theirs = load_weights(kept / "encoder.safetensors")
    described = json.loads(ours.about["recipe"])  # what describes the network alone
    before = json.loads(theirs.about["recipe"])
    assert {"model", "objective"} <= described.keys()
    for section, values in described.items():
        assert values.items() <= before[section].items(), section
    assert ours.about.keys() == theirs.about.keys()
    [state] = ours.networks.values()
    [wanted] = theirs.networks.values()
    assert list(state) == list(wanted)
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_exported_in_every_layout(
    kept: Path, name: str, layout: str, tmp_path: Path
) -> None:
    manifest, _ = checkpoint.find_checkpoint(kept / name)
    out = tmp_path / f"weights{LAYOUTS[layout].suffixes[0]}"
    export(manifest, out, layout=layout)
    _assert_same_encoder(out, kept / name)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("target", [each for each in TARGETS if each != "onnx"])
def test_a_run_is_converted_to_every_family(
    kept: Path, name: str, target: str, tmp_path: Path
) -> None:
    endings = {"safetensors": ".safetensors", "huggingface": ""}
    out = tmp_path / f"weights{endings.get(target, '.pth')}"
    convert(read_network(kept / name), target, out)
    _assert_same_encoder(out, kept / name)


def _assert_same_encoder(file: Path, run: Path) -> None:
    wanted = rcmae.load_encoder(run, network="teacher").state_dict()
    found = rcmae.load_encoder(file, num_heads=2)  # the teacher is what it takes by itself
    assert all(torch.equal(value, wanted[key]) for key, value in found.state_dict().items())


def test_a_resolved_recipe_is_read(kept: Path) -> None:
    recipe = config.load(str(kept / "local" / "recipe.yaml"), [])
    assert recipe.model.embed_dim == 16
    assert recipe.data.canonical_streams == 8
    assert recipe.run.stop_after_steps == 4


def test_an_index_is_read(kept: Path) -> None:
    index = ShardIndex.open(str(kept / SHARDS))
    assert len(index) == 32
    found = checkpoint.read_manifest(kept / "local" / "checkpoints" / "step-00000004")
    assert index.fingerprint == found.meta["data_fingerprint"]


# -------------------------------------------------------------------------------------------- later


def test_a_checkpoint_of_a_later_format_is_refused_by_name(kept: Path) -> None:
    folder = kept / "local" / "checkpoints" / "step-00000004"
    later = checkpoint.FORMAT + 1
    reseal(folder, lambda document: document.update(format=later))
    with pytest.raises(checkpoint.CheckpointError, match=f"is of format {later}.*update rcmae"):
        checkpoint.open_verified(folder)


def test_an_index_of_a_later_format_is_refused_by_name(kept: Path) -> None:
    file = kept / "shards" / "index.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "version": 99}))
    with pytest.raises(Refused, match=r"index\.json.* 99"):
        ShardIndex.open(str(kept / SHARDS))


def test_a_recipe_of_a_later_version_is_refused_by_the_name_of_what_is_new(kept: Path) -> None:
    file = kept / "local" / "recipe.yaml"
    tree = yaml.safe_load(file.read_text())
    tree["objective"]["colour_weight"] = 1.0
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(Refused, match="colour_weight"):
        config.load(str(file), [])
