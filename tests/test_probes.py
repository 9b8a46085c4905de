"""Cheap probes: features once, then figures that say what they should of data of known
difficulty.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rcmae.commands.evaluation import probes as command
from rcmae.evaluation import probes
from rcmae.weights.encoder import load_encoder
from runs import Folder


def blobs(count: int, seed: int) -> Any:
    """Four classes along four axes, scales apart: logistic regression finds them from a handful
    of labels.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    vectors = 0.2 * torch.randn(count, 6, generator=generator)
    vectors[torch.arange(count), labels] += 2.0
    return probes.LabelledFeatures(
        vectors * torch.tensor([1.0, 100.0, 1.0, 1e-3, 1.0, 1.0]), labels
    )


def test_every_figure_is_there_and_rises_with_the_labels() -> None:
    found = probes.answers(blobs(200, 0), blobs(100, 1), k=[1, 10, 500], draws=2, strength=1.0)
    assert found["logistic"] > 98
    assert list(found["knn weighted"]) == [1, 10]
    assert found["10 per class"]["mean"] >= found["1 per class"]["mean"] > 40
    assert set(found) == {
        "knn weighted",
        "knn plain",
        "logistic",
        "1 per class",
        "5 per class",
        "10 per class",
        "1% of labels",
        "10% of labels",
    }
    assert "logistic" in probes.answers_table({"trained": found})


def test_few_labels_are_as_many_of_each_class_and_another_draw_others() -> None:
    train = blobs(203, 0)
    some = probes.few(train, per_class=5, share=None, draw=0)
    assert some.labels.bincount().tolist() == [5] * 4
    for share, count in ((0.1, 5), (0.001, 1)):
        drawn = probes.few(train, per_class=None, share=share, draw=0)
        assert drawn.labels.bincount().tolist() == [count] * 4
    again = probes.few(train, per_class=5, share=None, draw=0)
    other = probes.few(train, per_class=5, share=None, draw=1)
    assert torch.equal(some.vectors, again.vectors)
    assert not torch.equal(some.vectors, other.vectors)


def test_a_class_that_was_never_seen_is_named() -> None:
    test = blobs(20, 1)
    with pytest.raises(ValueError, match="classes 6, 7, 8, 9 that"):
        probes.answers(
            blobs(40, 0), test._replace(labels=test.labels + 6), k=[1], draws=1, strength=1.0
        )


def test_the_command_extracts_once(
    uninterrupted: Folder,
    photo_shards: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
) -> None:
    train, test = (
        photo_shards.replace("{000000..000005}", each)
        for each in ("{000000..000003}", "{000004..000005}")
    )
    words = [
        str(uninterrupted.path),
        "--train",
        train,
        "--test",
        test,
        "--k",
        "5",
        "--draws",
        "1",
        "--random",
        "--cache",
        str(tmp_path),
        "--json",
    ]
    assert command.main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert set(first) == {"trained", "random"}
    assert len(list(tmp_path.glob("features-*.safetensors"))) == 4
    monkeypatch.setattr(probes, "extract_features", None)  # a second time there is no forward
    assert command.main(words) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_features_that_were_kept_are_of_this_network_and_these_images(
    uninterrupted: Folder, photo_shards: str, tmp_path: Path
) -> None:
    shard = tmp_path / "photo-000000.tar"
    shutil.copy(photo_shards.replace("{000000..000005}", "000000"), shard)
    model = load_encoder(uninterrupted.path)
    kept = tmp_path / "features"

    def look() -> int:
        probes.FeatureCache(model, kept).features([str(shard)])
        return len(list(kept.iterdir()))

    assert (look(), look()) == (1, 1)
    os.utime(shard, ns=(1, 1))  # written anew, with the same sizes, offsets and labels
    assert look() == 2
    model.norm.eps = 1e-2
    assert look() == 3
    attention = model.blocks[0].attn
    attention.num_heads, attention.head_dim = 1, attention.num_heads * attention.head_dim
    assert look() == 4
    model.pretrained_cfg = model.pretrained_cfg | {"mean": (0.1, 0.1, 0.1)}
    assert (look(), look()) == (5, 5)


@pytest.fixture
def elsewhere(photo_shards: str) -> Iterator[str]:
    """The URL of the folder of the shards."""
    folder = str(Path(photo_shards).parent)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_shards_from_elsewhere_give_the_features_of_those_here(
    uninterrupted: Folder,
    photo_shards: str,
    elsewhere: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))  # where the node's cache is
    model, here = (
        load_encoder(uninterrupted.path),
        photo_shards.replace("{000000..000005}", "000001"),
    )
    away = f"{elsewhere}/{Path(here).name}"
    one, other = (probes.FeatureCache(model).features([shards]) for shards in (here, away))
    assert torch.equal(one.vectors, other.vectors)
    assert torch.equal(one.labels, other.labels)
    assert list(tmp_path.glob("rcmae-shards-*/*.tar"))
