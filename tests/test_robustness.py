"""Robustness: subsets of classes, corrupted sets and the mean corruption error are what
they should be.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rcmae.commands.evaluation import robustness as command
from rcmae.data.index import ShardIndex
from rcmae.evaluation.labelled_sets import LabelledSet
from rcmae.evaluation.robustness import Baselines, Loading, corruption_errors, judged
from rcmae.models.classifier import Classifier
from rcmae.models.sizes import NetworkSizes
from rcmae.weights.classifiers import load_classifier


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a classifier of 8 classes whose head is random."""
    path = tmp_path_factory.mktemp("classifier") / "w.safetensors"
    model = Classifier(
        NetworkSizes(
            image_size=(32, 32), patch_size=8, in_channels=3, embed_dim=192, depth=1, num_heads=3
        ),
        num_classes=8,
    )
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    save_file(model.state_dict(), path)
    about = {"architecture": "vit_tiny_patch16_224"}  # says the number of heads
    path.with_name("config.json").write_text(json.dumps(about))
    return path


def test_a_report_has_every_set_and_severity(
    classifier: Path, photo_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = photo_shards.replace("{000000..000005}", "000000")
    (tmp_path / "names").write_text("\n".join("abcdefgh"))
    (tmp_path / "some").write_text("a\nc\nd\ne\nf\ng\nh\nb\n")
    (tmp_path / "sets.yaml").write_text(
        f"listed: {{shards: '{shard}', classes: some, labels: listed}}\n"
    )
    (tmp_path / "base.json").write_text(
        json.dumps(
            {
                "clean": 10,
                "corruptions": {
                    "contrast": [50, 60, 70, 80, 90],
                    "brightness": [20, 20, 20, 20, 40],
                },
            }
        )
    )
    words = [
        str(classifier),
        "--sets",
        f"val={shard}",
        str(tmp_path / "sets.yaml"),
        "--class-names",
        str(tmp_path / "names"),
        "--corruptions",
        "contrast,brightness",
        "--severities",
        "1,5",
        "--baselines",
        str(tmp_path / "base.json"),
        "--json",
        str(tmp_path / "report.json"),
    ]
    assert command.main(words) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["sets"]["val"]["images"] == found["sets"]["listed"]["images"] == 40
    # other labels of the same images
    assert found["sets"]["val"]["top1"] != found["sets"]["listed"]["top1"]
    about = found["corrupted"]
    assert about["clean"] == 100 - found["sets"]["val"]["top1"]
    contrast, brightness = (
        sum(about["corruptions"][name]) / 2 for name in ("contrast", "brightness")
    )
    assert about["mce"] == pytest.approx(100 * (contrast / 70 + brightness / 30) / 2)
    clean = about["clean"]
    assert about["relative_mce"] == pytest.approx(
        100 * ((contrast - clean) / 60 + (brightness - clean) / 20) / 2
    )
    assert about["mean_error"] == pytest.approx((contrast + brightness) / 2)
    said = capsys.readouterr().out
    assert "normalised by" in said
    assert "severity 5" in said

    assert command.main([*words[:3], "--corruptions", "contrast"]) == 0
    said = capsys.readouterr().out
    assert "not normalised" in said
    assert "mCE" not in said


def test_a_subset_alone_competes(classifier: Path, photo_shards: str) -> None:
    """Of two classes no image is taken for a third.

    Of a report one's own errors are 100 % of themselves.
    """
    model, index = load_classifier(classifier), ShardIndex.open(photo_shards)
    whole = judged(model, index, LabelledSet("val", []), Loading())
    listed = judged(
        model,
        index,
        LabelledSet("val", [], [7, 6, 5, 4, 3, 2, 1, 0], True),
        Loading(),
    )
    assert whole.confusion.flip(0).equal(listed.confusion)
    with pytest.raises(ValueError, match="are none of the 2 classes"):
        judged(model, index, LabelledSet("val", [], [0, 1]), Loading())
    errors = {"fog": [30.0, 50.0]}
    same = corruption_errors(errors, 20.0, Baselines(errors, 20.0))
    assert (same["mce"], same["relative_mce"], same["mean_error"]) == (100.0, 100.0, 40.0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--corruptions", "rain"], "unknown rain; known: all, noise"),
        (["--corruptions", "all", "--severities", "0-3"], "use some of 1 to 5"),
        (["--corrupt", "b"], "no set has that name"),
        (["--corruptions", "fog,snow", "--baselines", "one.yaml"], "fog: None; expected an error"),
        (
            ["--corruptions", "snow", "--severities", "2", "--baselines", "one.yaml"],
            "1 numbers; one severity",
        ),
        (["--corruptions", "frost", "--frost", "."], "one.yaml"),
        (["--sets", "x"], "'x' is not a set"),
        (["--sets", "a=x.tar", "a=y.tar"], "two sets are called a"),
        (["--sets", "sets.yaml"], "classes shark are not numbers, and there are no class names"),
    ],
)
def test_what_does_not_go_together_is_refused(
    more: list[str],
    message: str,
    classifier: Path,
    photo_shards: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text("corruptions: {snow: 86.7}")
    (tmp_path / "sets.yaml").write_text("a: {shards: x.tar, classes: [shark]}\nb: {shard: x.tar}\n")
    assert command.main([str(classifier), "--sets", f"val={photo_shards}", *more]) == 2
    assert message in capsys.readouterr().err
