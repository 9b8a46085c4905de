"""Effective ranks and the loss on a held set: right, the same on any number of ranks, and an alarm
where features collapse.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluate import MEAN, STD, a_batch, a_model, photographs

from rcmae import config, dist
from rcmae.data.batch import Batch
from rcmae.data.masking import RandomMask
from rcmae.data.transforms import Normalise
from rcmae.evaluation.features import pooled
from rcmae.evaluation.unlabelled.held import Held, Looking, Losing, look_at_held
from rcmae.evaluation.unlabelled.spectra import (
    effective_rank,
    is_collapsed,
    lidar,
    rankme,
    singular_values,
)
from rcmae.objectives.mae import Reconstruction
from rcmae.objectives.rcmae import Consistency
from rcmae.objectives.terms import Sum
from rcmae.tasks import judging, pretrain
from runs import Folder, python_path, start
from tests.conftest import Ranks

# ------------------------------------------------------------------------------------------ spectra


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rankme_counts_directions() -> None:
    assert effective_rank(torch.ones(7, dtype=torch.float64)) == pytest.approx(7, rel=1e-4)
    orthogonal, _ = torch.linalg.qr(draws(64, 16))
    assert rankme(orthogonal) == pytest.approx(16, rel=1e-4)
    assert rankme(draws(64, 1) @ draws(1, 16)) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.ones(64, 16)) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.zeros(64, 16)) == pytest.approx(1, abs=1e-3)


def test_rankme_is_the_formula_of_the_paper() -> None:
    features = draws(40, 12, seed=1) * torch.arange(1.0, 13.0)
    sigma = np.linalg.svd(features.numpy(), compute_uv=False)
    share = sigma / np.abs(sigma).sum() + 1e-7
    assert rankme(features) == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-9)
    torch.testing.assert_close(singular_values(features), torch.from_numpy(sigma))


def test_lidar_counts_the_directions_that_tell_images_apart() -> None:
    """Images differ in four directions; their views in others, however strongly."""
    images = torch.zeros(500, 1, 12, dtype=torch.float64)
    images[:, 0, :4] = draws(500, 4)
    noise = torch.zeros(500, 8, 12, dtype=torch.float64)
    noise[..., 4:] = 10 * draws(500, 8, 8, seed=1)
    noise[..., :4] = 0.01 * draws(500, 8, 4, seed=2)
    found = lidar(images + noise)
    assert found == pytest.approx(4, abs=0.1)
    assert rankme((images + noise).flatten(0, 1)) > 7, "which looks at all directions alike"
    # written out: eigenvalues of within^-1 between
    views = (images + noise).numpy()
    means = views.mean(1)
    between = np.cov(means.T, bias=True)
    within = np.cov((views - means[:, None]).reshape(-1, 12).T, bias=True) + 1e-4 * np.eye(12)
    values = np.linalg.eigvals(np.linalg.solve(within, between)).real.clip(0)
    share = values / values.sum() + 1e-7
    assert found == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-6)


def test_features_that_are_all_alike_have_collapsed() -> None:
    assert is_collapsed(1.0, 5.0)
    assert is_collapsed(10.0, 200.0)
    assert not is_collapsed(22.0, 200.0)
    assert not is_collapsed(1.0, 1.5), "there was nowhere to fall from"
    assert not is_collapsed(5.0, 5.0)


# ------------------------------------------------------------------------------------ the held set


def share(count: int) -> Iterator[Batch]:
    """This rank's part of some images, four a batch, padded to the longest rank's."""
    images = photographs(count, seed=5)
    mine = list(range(dist.rank(), count, dist.world()))
    mine += [-1] * (-(-count // (dist.world() * 4)) * 4 - len(mine))
    for at in range(0, len(mine), 4):
        part = mine[at : at + 4]
        yield a_batch(images[part], None, part)


def held_here() -> dict[str, Any]:
    """What is found on this rank."""
    student, teacher = a_model(seed=1).eval(), a_model(seed=2).eval()
    looking = Looking(
        {"student": pooled(student, "mean"), "teacher": pooled(teacher, "mean")},
        Normalise(MEAN, STD).images,
        torch.device("cpu"),
        mask=RandomMask(16, 4),
        teacher_masks=False,
    )
    objective = Sum({"reconstruction": Reconstruction(), "consistency": Consistency(0.5)})
    found = look_at_held(share(21), looking, Losing(student, teacher, objective))
    return json.loads(json.dumps(found.__dict__))


RANK = """
import json, torch
torch.set_num_threads(1)
from rcmae import dist
import test_unlabelled
dist.start(required=False)
print(json.dumps(test_unlabelled.held_here()))
dist.finish()
"""


def test_a_held_set_is_judged_alike_on_any_number_of_ranks(ranks: Callable[..., Ranks]) -> None:
    here = Path(__file__).parent
    two = ranks("-c", RANK, world=2, PYTHONPATH=python_path(here))
    said = two.succeed(120)
    alone = held_here()
    together = json.loads(said.splitlines()[-1])
    assert json.loads(two.said(1).splitlines()[-1]) == together
    assert alone["images"] == together["images"] == 21
    for key in ("rankme", "lidar", "losses"):
        assert together[key] == pytest.approx(alone[key], rel=1e-6)
    assert set(alone["losses"]) == {"loss", "loss_reconstruction", "loss_consistency"}
    terms = alone["losses"]
    assert terms["loss"] == pytest.approx(
        terms["loss_reconstruction"] + 0.5 * terms["loss_consistency"]
    )
    assert 1 < alone["rankme"]["student"] < 16
    assert len(alone["spectra"]["student"]) == 16


def test_the_table_has_a_line_a_network_and_the_loss() -> None:
    held = Held(9, {"student": 3.0}, {"student": 2.5}, {"loss": 0.5}, {})
    assert held.table().splitlines() == [
        "           RankMe     LiDAR   of 9 held images",
        "student      3.00      2.50",
        "loss 0.5000",
    ]


# ----------------------------------------------------------------------------------------- the run


def test_a_run_is_judged_without_labels_and_alarms_where_features_collapse(
    tiny: Path,
    photo_shards: str,
    tmp_path: Path,
    uninterrupted: Folder,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    held = photo_shards.replace("{000000..000005}", "000005")
    looked = judging.look_at_held
    seen: list[int] = []

    def dulled(*args: Any) -> Held:
        found = looked(*args)
        seen.append(found.images)
        if len(seen) == 3:  # the student's alone
            found.rankme["student"] = 1.01
        return found

    monkeypatch.setattr(judging, "look_at_held", dulled)
    folder = Folder(tmp_path / "run")
    options = ["evaluate.every_steps=5", f"evaluate.held_shards={held}", "evaluate.held_images=30"]
    assert start(tiny, folder.path, *options) == 0
    assert seen == [30] * 4
    assert folder.losses() == uninterrupted.losses(), "judging moves nothing"
    events = folder.events("evaluate")
    assert [event["step"] for event in events] == [5, 10, 15, 20]
    for event in events:
        about = event["held"]
        assert about["rankme"].keys() == about["lidar"].keys() == {"student", "teacher"}
        assert event["scalars"]["held"]["loss"] == about["loss"]
        assert "knn" not in event
    assert events[-1]["held"]["loss_reconstruction"] < events[0]["held"]["loss_reconstruction"]
    document = json.loads((folder.path / "evaluation" / "step-00000020.json").read_text())
    assert len(document["held"]["singular_values"]["teacher"]) == 30
    (alarm,) = folder.events("collapse")
    assert (alarm["step"], alarm["network"], alarm["effective_rank"]) == (15, "student", 1.01)
    assert alarm["highest"] == max(event["effective_rank"]["student"] for event in events[:2])
    said = capfd.readouterr().out
    assert "the student's features collapse: their effective rank was" in said
    assert "held images" in said


def test_sets_of_which_one_is_missing_are_refused(tiny: Path) -> None:
    more = ["evaluate.every_steps=5", "run.dir=x"]
    with pytest.raises(ValueError, match=r"or evaluate\.held_shards"):
        config.load(str(tiny), [*more, "evaluate.train_shards=a.tar", "evaluate.held_shards=b.tar"])
    with pytest.raises(ValueError, match=r"or evaluate\.held_shards"):
        config.load(str(tiny), [*more, "evaluate.held_shards=b.tar", "evaluate.held_images=0"])
    recipe = config.load(str(tiny), [*more, "evaluate.held_shards=b.tar"])
    (held,) = pretrain.Pretraining().evaluation_sets(recipe)
    assert (held.key, held.labelled) == ("evaluate.held_shards", False)
