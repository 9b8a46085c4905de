"""What the tool says of a teacher is what calculus says, by another way of computing it."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from rcmae.commands.evaluation import analyze_teacher as command
from rcmae.data.batch import Batch
from rcmae.evaluation.teacher_analysis.gradients import (
    OTHER,
    REMASKED,
    SAME,
    Networks,
    Step,
    by_layer,
    gradients,
    layers,
    taken_back,
)
from rcmae.evaluation.teacher_analysis.linear import Descent, linear_model
from rcmae.evaluation.teacher_analysis.run import OTHERS_EACH
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import MaskedAutoencoder
from rcmae.objectives import new
from rcmae.objectives.terms import Sum
from rcmae.planning.live import made_up_batch
from runs import Folder

OBJECTIVE = new("rcmae")


@pytest.fixture
def networks() -> Networks:
    student = MaskedAutoencoder(
        NetworkSizes(
            image_size=(16, 16),
            patch_size=4,
            in_channels=3,
            embed_dim=16,
            depth=2,
            num_heads=2,
            decoder_dim=8,
            decoder_depth=2,
            decoder_heads=2,
        )
    ).double()
    generator = torch.Generator().manual_seed(1)
    for param in student.parameters():
        param.data.add_(
            torch.randn(param.shape, generator=generator, dtype=torch.float64), alpha=0.05
        )
    return Networks(student, copy.deepcopy(student))


@pytest.fixture
def batch(networks: Networks) -> Batch:
    found = made_up_batch(networks.student, 3, torch.device("cpu"))
    return Batch(
        found.images.double(),
        found.ids_shuffle,
        found.num_visible,
        None,
        ("a", "b", "c"),
        found.positions,
        found.crops,
    )


def weights(model: MaskedAutoencoder) -> Tensor:
    return parameters_to_vector(model.parameters()).detach()


def test_a_teacher_that_is_the_student_pulls_at_nothing(networks: Networks, batch: Batch) -> None:
    found = gradients(OBJECTIVE, networks, batch)
    assert not found["consistency"].any()
    rows = by_layer(found, 1.0, layers(networks.student))
    assert list(rows) == [
        "all",
        "embedding",
        "block 0",
        "block 1",
        "bridge",
        "decoder block 0",
        "decoder block 1",
        "head",
    ]
    assert all(row == {"cosine": 0.0, "ratio": 0.0} for row in rows.values())


def test_the_terms_gradients_add_up_to_the_trainings(networks: Networks, batch: Batch) -> None:
    with torch.no_grad():
        for param in networks.teacher.parameters():
            param.mul_(1.01)
    found = gradients(OBJECTIVE, networks, batch)
    pred = networks.student(batch.images, batch.ids_shuffle, batch.num_visible)["pixels"]
    teacher_pred = networks.teacher(batch.images, batch.ids_shuffle, batch.num_visible)[
        "pixels"
    ].detach()
    (pred - teacher_pred).square().mean().backward()
    wanted = torch.cat(
        [param.grad.flatten() for param in networks.student.parameters() if param.grad is not None]
    )
    torch.testing.assert_close(found["consistency"], wanted)
    parts = layers(networks.student)
    assert torch.stack(list(parts.values())).sum(0).eq(1).all(), "each parameter is of one layer"
    rows = by_layer(found, 2.0, parts)
    squares = sum(float(found["consistency"][mask].square().sum()) for mask in parts.values())
    assert rows["all"]["ratio"] == pytest.approx(
        2 * squares**0.5 / float(found["reconstruction"].norm())
    )
    assert -1 < rows["all"]["cosine"] < 1


def test_what_a_step_is_taken_back_by_is_the_curvature_along_it(
    networks: Networks, batch: Batch
) -> None:
    """A small step's consistency gradient is the Gauss-Newton matrix times the step: here by how
    predictions move.
    """
    reconstruction, consistency = (
        Sum({name: OBJECTIVE.terms[name]}) for name in ("reconstruction", "consistency")
    )
    at, student = weights(networks.student), copy.deepcopy(networks.student)
    one, other = batch.part(slice(0, 1)), batch.part(slice(1, 2))
    gradient = gradients(reconstruction, networks, one)["reconstruction"]

    @torch.no_grad()
    def predicted(params: Tensor, each: Batch) -> Tensor:
        vector_to_parameters(params, student.parameters())
        return student(each.images, each.ids_shuffle, each.num_visible)["pixels"]

    shares = {}
    for name, each in (("one", one), ("other", other)):
        change = (
            predicted(at + 1e-4 * gradient, each) - predicted(at - 1e-4 * gradient, each)
        ) / 2e-4
        wanted = 2 * float(change.square().mean() / gradient.square().sum())
        share, against = taken_back(consistency, networks, Step(at, gradient, 1e-5), each)
        assert share == pytest.approx(wanted, rel=1e-3)
        assert 0 < against <= 1
        shares[name] = share
    assert shares["one"] > shares["other"]


def test_the_linear_models_gradients_are_those_of_autograd_and_of_the_algebra() -> None:
    draw = torch.Generator().manual_seed(3)
    images = torch.randn(5, 8, generator=draw, dtype=torch.float64)
    images /= images.norm(dim=1, keepdim=True)
    ids, other_ids = (
        torch.stack([torch.randperm(8, generator=draw) for _ in images]) for _ in range(2)
    )
    steps, rate, momentum = 12, 0.4, 0.9
    found = linear_model(images, ids, other_ids, 3, Descent(steps, rate, momentum, seed=7))
    order = torch.randint(5, (steps + 1,), generator=torch.Generator().manual_seed(7)).tolist()
    student, teacher = (
        torch.zeros(8, 8, dtype=torch.float64, requires_grad=each) for each in (True, False)
    )
    inputs = [torch.zeros(8, dtype=torch.float64) for _ in images]
    remasked = [torch.zeros(8, dtype=torch.float64) for _ in images]
    for each, masks in ((inputs, ids), (remasked, other_ids)):
        for image, place, mask in zip(images, each, masks, strict=True):
            place[mask[:3]] = image[mask[:3]]
    points = iter(found["points"])
    past: list[Tensor] = []
    for now, after in pairwise(order):
        a = inputs[now]
        loss = (student @ a - images[now]).square().sum() / 2 + (
            student @ a - teacher @ a
        ).square().sum() / 2
        (gradient,) = torch.autograd.grad(loss, student)
        past.append(gradient)
        with torch.no_grad():
            student -= rate * gradient
            teacher = momentum * teacher + (1 - momentum) * student
        kinds = [(SAME, a), (REMASKED, remasked[now])] + [(OTHER, inputs[after])] * (now != after)
        for kind, b in kinds:
            point = next(points)
            consistency = (student @ b - teacher @ b).square().sum() / 2
            (pull,) = torch.autograd.grad(consistency, student)
            ages = range(len(past), 0, -1)
            told = (
                -rate
                * sum(momentum**age * each for age, each in zip(ages, past, strict=True))
                @ torch.outer(b, b)
            )
            torch.testing.assert_close(pull, told)
            unit = rate * momentum * b @ b * gradient.square().sum()
            assert point["kind"] == kind
            assert point["share"] == pytest.approx(float(-(pull * gradient).sum() / unit))
            assert point["share_of_last"] == pytest.approx(point["similarity"] ** 2)
            assert point["similarity"] == pytest.approx(float(a @ b / (a.norm() * b.norm())))
    assert next(points, None) is None
    assert found["points"][0]["share"] == pytest.approx(1), "one step is all its memory"
    assert found["error"] < 1e-12


def test_the_page_of_a_run(
    uninterrupted: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(uninterrupted.path.rglob("*"))
    given = ["--images", "8", "--pairs", "3", "--out", str(tmp_path)]
    assert command.main([str(uninterrupted.path), *given]) == 0
    said = capsys.readouterr().out
    told = json.loads((tmp_path / "teacher.json").read_text())
    assert [each["step"] for each in told["checkpoints"]] == [10, 20]
    for each in told["checkpoints"]:
        assert each["taken_back"][SAME] == {"q1": 1.0, "median": 1.0, "q3": 1.0}
        assert each["layers"]["all"]["ratio"] > 0
        assert each["own_teacher"][SAME]["with_way_gone"] > 0, (
            "a teacher behind its student pulls it back"
        )
        assert f"{each['layers']['all']['cosine']:.3f}" in said
    assert len(told["pairs"]) == 3 * (2 + OTHERS_EACH)
    assert told["linear_model"]["error"] < 1e-9
    assert np.asarray(Image.open(tmp_path / "teacher.png", formats=["PNG"])).std() > 10, (
        "something is drawn"
    )
    assert sorted(uninterrupted.path.rglob("*")) == before


def test_what_cannot_be_analysed_is_refused(
    uninterrupted: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = yaml.safe_load((uninterrupted.path / "recipe.yaml").read_text())
    recipe["objective"]["name"] = "mae"
    (tmp_path / "mae").mkdir()
    (tmp_path / "mae" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for arguments, why in (
        ([str(tmp_path / "nothing")], "is not a run's folder"),
        ([str(tmp_path / "mae")], "has no consistency term on a teacher's pixels"),
        ([str(uninterrupted.path), "--pairs", "1"], "--pairs must be at least 2"),
        ([str(uninterrupted.path), "--shards", str(tmp_path / "gone.tar")], "gone.tar"),
    ):
        assert command.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        assert why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
