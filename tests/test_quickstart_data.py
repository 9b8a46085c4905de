"""The first run's data: real photographs, honest labels, the same bytes for everyone."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from rcmae.data.index import ShardIndex
from rcmae.data.stream import labelled_batches
from rcmae.data.transforms import CentreTransform, Normalise
from rcmae.evaluation.features import features_of_both, pixels
from rcmae.evaluation.knn import knn_rows
from tools import quickstart_data
from tools.quickstart_data import SQUARE, TILE, TRAIN_TILES, VAL_TILES, corners


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    assert quickstart_data.main([str(folder)]) == 0
    return folder


@pytest.mark.parametrize("size", [(512, 512), (303, 384), (1411, 1411)])
def test_no_pixel_is_in_both_sets(size):
    seen = {}
    for val in (True, False):
        seen[val] = np.zeros(size, bool)
        for top, left in corners(*size, val=val):
            seen[val][top : top + TILE, left : left + TILE] = True
            assert top + TILE <= size[0]
            assert left + TILE <= size[1]
    assert not (seen[True] & seen[False]).any()
    whole = (size[0] // SQUARE) * (size[1] // SQUARE) * SQUARE**2
    assert seen[True].sum() + seen[False].sum() == whole
    assert 0.2 < seen[True].sum() / whole < 0.3


def test_each_photograph_is_a_class_with_about_as_many_tiles(made):
    classes = (made / "classes.txt").read_text().split()
    assert len(classes) == 16
    for name, most in (("train", TRAIN_TILES), ("val", VAL_TILES)):
        index = ShardIndex.open(str(made / f"{name}-*.tar"))
        counts = np.bincount(index.labels, minlength=16)
        assert counts.max() == most
        assert counts.min() >= 0.4 * most
        numbered = range(len(index))
        named = {
            classes[index.labels[number]] == index[number].id.split("/")[1].split("_")[0]
            for number in numbered
        }
        assert named == {True}


def contents(folder):
    """Name -> bytes of the files of a folder; of an index without the times of its shards."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    found["index.json"] = re.sub(rb'"stamp": "mtime \d+"', b"", found["index.json"])
    return found


def test_every_call_writes_the_same_bytes_over_the_last(made, capsys):
    before = contents(made)
    assert quickstart_data.main([str(made), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["classes"]) == 16
    assert contents(made) == before


def test_pixels_tell_some_of_the_photographs_apart(made):
    cpu = torch.device("cpu")
    features = features_of_both(
        {"pixels": pixels},
        *(
            labelled_batches(
                ShardIndex.open(str(made / f"{name}-*.tar")),
                CentreTransform((TILE, TILE)),
                batch=200,
            )
            for name in ("train", "val")
        ),
        device=cpu,
        normalise=Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).images,
    )
    rows = knn_rows(*features, k=[10], device=cpu)
    assert 20 < rows["pixels"][10] < 70  # chance is 6


def test_shards_of_someone_else_are_left_alone(tmp_path, capsys):
    (tmp_path / "val-000000.tar").write_text("precious")
    assert quickstart_data.main([str(tmp_path)]) == 2
    assert "shards of something else (val-000000.tar, 1 in all)" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_a_folder_that_is_a_file_is_said(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert quickstart_data.main([str(tmp_path / "file")]) == 2
    assert "error:" in capsys.readouterr().err
