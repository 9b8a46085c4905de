"""Features as a table: whatever the images lie in, on any number of ranks, over a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import rcmae
from rcmae.commands.evaluation import embed as command
from rcmae.data.index import ShardIndex
from rcmae.data.transforms import CentreTransform
from rcmae.evaluation import embedding
from rcmae.weights.encoder import pixels_of
from runs import Folder
from tests.conftest import Ranks


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of five pictures, as large as the tiny networks see; one that is none."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir()
        for number in range(5):
            pixels = draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    (folder / "dogs" / "broken.jpg").write_bytes(b"\xff\xd8 this is not a picture")
    return folder


def test_a_folder_gives_keys_labels_and_the_vectors_of_the_encoder(
    photos: Path, uninterrupted: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "features.npz"
    assert command.main([str(uninterrupted.path), str(photos), "--out", str(out)]) == 0
    assert "10 images" in capsys.readouterr().out
    table = np.load(out)
    assert table["keys"].tolist() == [f"{c}/{n}.png" for c in ("cats", "dogs") for n in range(5)]
    assert table["labels"].tolist() == [0] * 5 + [1] * 5
    model = rcmae.load_encoder(uninterrupted.path)
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    encoded = (photos / "dogs" / "3.png").read_bytes()
    pixels = CentreTransform(pixels_of(model), 3)(encoded, 0, 0).image / 255
    with torch.no_grad():
        vector = model(((pixels - mean) / std)[None])[0]
    torch.testing.assert_close(torch.from_numpy(table["vectors"][8]), vector, rtol=1e-4, atol=1e-5)
    assert list(tmp_path.iterdir()) == [out], "parts are gone"


def test_shards_on_two_ranks_give_the_table_of_one(
    photo_shards: str,
    uninterrupted: Folder,
    tmp_path: Path,
    ranks: Callable[..., Ranks],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone, both = tmp_path / "alone.safetensors", tmp_path / "both.safetensors"
    program = tmp_path / "embed.py"
    program.write_text(
        "import sys\n"
        "from rcmae.evaluation import embedding\n"
        "from rcmae.commands.evaluation import embed\n"
        "embedding.PART = 64\n"
        "raise SystemExit(embed.main(sys.argv[1:]))\n"
    )
    words = [str(uninterrupted.path), photo_shards, "--out"]
    said = ranks(str(program), *words, str(both), world=2).succeed()
    assert "128 of 240" not in said, "the second part is the other rank's"
    monkeypatch.setattr(embedding, "PART", 64)
    assert command.main([*words, str(alone)]) == 0
    assert alone.read_bytes() == both.read_bytes()
    table = load_file(alone)
    index = ShardIndex.open(photo_shards)
    keys = bytes(table["keys"].numpy()).decode().split("\n")
    assert keys == [index[number].id for number in range(len(index))]
    assert table["labels"].tolist() == index.labels.tolist()


def test_a_stopped_job_continues_and_what_was_done_is_not_done_again(
    photos: Path, uninterrupted: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "PART", 4)
    out = tmp_path / "features.npz"
    words = [str(uninterrupted.path), str(photos), "--out", str(out)]
    assert command.main([*words, "--json"]) == 0
    whole = dict(np.load(out))
    real, done = embedding.part_of, []

    def stopped(*args: object, **named: object) -> object:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(args[2])
        return real(*args, **named)

    monkeypatch.setattr(embedding, "part_of", stopped)
    out.unlink()
    with pytest.raises(KeyboardInterrupt):
        command.main(words)
    monkeypatch.setattr(embedding, "part_of", lambda *args, **named: real(*args, **named))
    begun = [path.stem for path in tmp_path.glob(".features.npz-*.parts/*")]
    assert sorted(begun) == ["000000", "000001"]
    assert command.main(words) == 0
    for name, values in np.load(out).items():
        assert np.array_equal(values, whole[name]), name


def test_parquet_has_columns(photos: Path, uninterrupted: Folder, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "features.parquet"
    assert command.main([str(uninterrupted.path), str(photos), "--out", str(out)]) == 0
    table = parquet.read_table(out)
    assert table.column_names == ["key", "vector", "label"]
    assert table["label"].to_pylist() == [0] * 5 + [1] * 5


def test_what_cannot_be_is_refused(
    photos: Path, uninterrupted: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(uninterrupted.path)
    assert command.main([run, str(photos), "--out", str(tmp_path / "x.csv")]) == 2
    assert "should end in .parquet, .npz or .safetensors" in capsys.readouterr().err
    assert command.main([run, "/nowhere/*.tar", "--out", str(tmp_path / "x.npz")]) == 2
    assert "/nowhere" in capsys.readouterr().err
    out = tmp_path / "x.npz"
    assert command.main([run, str(photos), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bad"] == ["dogs/broken.jpg"]
