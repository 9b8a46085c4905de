"""Objectives give the papers' losses and gradients, as sums that can be cut anywhere."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

import reference
from rcmae.data.batch import Batch
from rcmae.models.bootmae import BootstrappedAutoencoder
from rcmae.models.patches import patchify
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import Heads, MaskedAutoencoder
from rcmae.objectives import OBJECTIVES, TERMS, Context, Objective, new
from rcmae.objectives.bootmae import Features
from rcmae.objectives.supmae import Classification
from rcmae.plugins import find
from reference import Sizes

SIZES = Sizes()
KEPT = 6


def networks(dtype: torch.dtype = torch.float64) -> tuple[MaskedAutoencoder, MaskedAutoencoder]:
    pair = []
    for seed in (1, 2):
        model = MaskedAutoencoder(NetworkSizes(**SIZES.model()))
        model.load_state_dict(reference.weights(SIZES, seed))
        pair.append(model.to(dtype))
    return pair[0], pair[1].requires_grad_(False)


def batch_of(images: Tensor, noise: Tensor) -> Batch:
    nothing = torch.empty(0)
    return Batch(images, noise.argsort(dim=1), KEPT, None, (), nothing, nothing)


def total(objective: Objective, sums: dict[str, Tensor], counts: dict[str, int]) -> Tensor:
    return torch.stack([objective.weights[term] * sums[term] / counts[term] for term in sums]).sum()


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize(
    "weight",
    [None, 0.0, 1.0, 2.5],
    ids=lambda weight: "mae" if weight is None else f"rcmae {weight}",
)
def test_losses_and_gradients_are_the_papers(norm_pix: bool, weight: float | None) -> None:
    student, teacher = networks()
    images, noise = reference.inputs(SIZES, 4, seed=7)
    plain = reference.double(reference.weights(SIZES, 1), grad=True)
    theirs = reference.double(reference.weights(SIZES, 2))
    want = reference.losses(plain, theirs, SIZES, images.double(), noise, KEPT, norm_pix)
    grads = reference.gradients(plain, want[0] + (weight or 0.0) * want[1])

    objective: Objective = new("mae", norm_pix_loss=norm_pix)
    if weight is not None:
        objective = new("rcmae", norm_pix_loss=norm_pix, consistency_weight=weight)
    batch = batch_of(images.double(), noise)
    sums, counts = objective(student, teacher, batch, 0.5), objective.counts(batch)
    assert list(sums) == list(counts) == list(objective.weights)
    for term, value in zip(sums, want, strict=False):
        assert counts[term] == 4 * 18
        assert sums[term].item() / counts[term] == pytest.approx(value.item(), rel=1e-12)
    total(objective, sums, counts).backward()
    for name, param in student.named_parameters():
        torch.testing.assert_close(param.grad, grads[name], atol=1e-13, rtol=1e-9, msg=name)
    assert all(param.grad is None for param in teacher.parameters())


def test_training_path_and_full_prediction_give_the_same_loss_and_gradients() -> None:
    images, noise = reference.inputs(SIZES, 4, seed=7)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        student, teacher = networks(dtype)
        batch, objective = batch_of(images.to(dtype), noise), new("rcmae")
        short = total(objective, objective(student, teacher, batch, 0.0), objective.counts(batch))
        grads = torch.autograd.grad(short, list(student.parameters()))

        # [B, L], 1 = hidden
        mask = torch.ones(noise.shape, dtype=dtype).scatter(1, batch.ids_shuffle[:, :KEPT], 0.0)
        pred = student(batch.images, batch.ids_shuffle, KEPT, ("all_pixels",))["all_pixels"]
        with torch.no_grad():
            every = teacher(batch.images, batch.ids_shuffle, KEPT, ("all_pixels",))
            teacher_pred = every["all_pixels"]
        target = reference.normalised(patchify(batch.images, SIZES.patch))
        full = sum(
            reference.hidden_mean((pred - other).square(), mask) for other in (target, teacher_pred)
        )
        assert short.item() == pytest.approx(full.item(), rel=tolerance)
        for ours, theirs in zip(
            grads, torch.autograd.grad(full, list(student.parameters())), strict=True
        ):
            torch.testing.assert_close(ours, theirs, atol=tolerance * 10, rtol=1e-4)


def test_sums_do_not_depend_on_how_the_batch_is_cut() -> None:
    student, teacher = networks()
    images, noise = reference.inputs(SIZES, 6, seed=8)
    objective = new("rcmae")
    whole = objective(student, teacher, batch_of(images.double(), noise), 0.0)
    parts = [
        batch_of(images[cut].double(), noise[cut])
        for cut in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    sums = [objective(student, teacher, part, 0.0) for part in parts]
    for term in whole:
        assert sum(part[term].item() for part in sums) == pytest.approx(
            whole[term].item(), rel=1e-13
        )
    assert sum(objective.counts(part)["consistency"] for part in parts) == 6 * 18


def test_a_teacher_equal_to_the_student_agrees_exactly() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        student, _ = networks(dtype)
        batch = batch_of(*reference.inputs(SIZES, 2, seed=9))
        assert (
            new("rcmae")(student, copy.deepcopy(student), batch, 0.0)["consistency"].item() == 0.0
        )


def test_losses_of_a_bf16_model_are_computed_in_float32() -> None:
    student, teacher = networks(torch.bfloat16)
    batch = batch_of(*reference.inputs(SIZES, 4, seed=10))
    sums = new("rcmae")(student, teacher, batch, 0.0)
    assert {value.dtype for value in sums.values()} == {torch.float32}
    pred = student(batch.images, batch.ids_shuffle, KEPT)["pixels"].double()
    hidden = batch.ids_shuffle[:, KEPT:, None]
    target = reference.normalised(patchify(batch.images.double(), SIZES.patch)).take_along_dim(
        hidden, dim=1
    )
    want = (pred - target).square().mean(dim=2).sum().item()
    assert sums["reconstruction"].item() == pytest.approx(want, rel=1e-5)


def test_objectives_are_made_from_values_and_say_what_they_need() -> None:
    asked = {name: new(name).teacher_outputs for name in OBJECTIVES}
    assert asked == {
        "mae": (),
        "rcmae": ("pixels",),
        "supmae": (),
        "bootmae": ("tokens",),
        "pixio": (),
        "rcpixio": ("pixels",),
    }
    assert new("rcmae", norm_pix_loss=False, consistency_weight=0.5).weights == {
        "reconstruction": 1.0,
        "consistency": 0.5,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        new("mae").terms = {}  # type: ignore[misc]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_options_say_what_the_loss_reads_and_belong_to_what_makes_it(name: str) -> None:
    listed, objective = OBJECTIVES[name], new(name)
    assert find(listed.factory, key="objective.name").Options is listed.options
    reads = listed.options().reads
    assert objective.student_outputs == tuple(sorted(reads.student))
    assert objective.teacher_outputs == tuple(sorted(reads.teacher))


def test_terms_say_what_they_read() -> None:
    for listed in TERMS.values():
        term = find(listed.factory, key="objective.terms").make(1.0, listed.options(), Context())
        assert (term.student_output,) == listed.options.reads.student
        assert (term.teacher_output or None,) == (listed.options.reads.teacher or (None,))


def seen_forwards(network: torch.nn.Module) -> list[tuple[str, ...]]:
    """What each later forward of a network is asked for."""
    asked: list[tuple[str, ...]] = []
    network.register_forward_pre_hook(lambda _, args: asked.append(args[3]))
    return asked


def test_unlabelled_images_count_in_the_reconstruction_alone() -> None:
    model = MaskedAutoencoder(
        NetworkSizes(**SIZES.model()), heads=Heads(num_classes=5, class_hidden=8)
    ).double()
    images, noise = reference.inputs(SIZES, 4, seed=11)
    labels = torch.tensor([2, -100, 4, -100])
    batch = dataclasses.replace(batch_of(images.double(), noise), labels=labels)
    objective = new("supmae", class_temperature=3.0, class_smoothing=0.1)
    sums, counts = objective(model, None, batch, 0.0), objective.counts(batch)
    assert counts == {"reconstruction": 4 * 18, "class": 2}
    shares = (
        model(batch.images, batch.ids_shuffle, KEPT, ("classes",))["classes"] / 3
    ).log_softmax(dim=1)
    want = sum(-0.9 * shares[row, labels[row]] - 0.1 * shares[row].mean() for row in (0, 2))
    assert sums["class"].item() == pytest.approx(want.item(), rel=1e-12)
    assert sums["reconstruction"].item() == pytest.approx(
        new("mae")(model, None, batch, 0.0)["reconstruction"].item()
    )

    for none in (torch.full((4,), -100), None):
        bare = dataclasses.replace(batch, labels=none)
        assert objective.counts(bare)["class"] == 0
        assert objective(model, None, bare, 0.0)["class"].item() == 0.0


def test_terms_share_the_forward_passes() -> None:
    student = MaskedAutoencoder(
        NetworkSizes(**SIZES.model()),
        heads=Heads(num_classes=5, class_hidden=0, predicts_features=True),
    ).double()
    teacher = copy.deepcopy(student)
    images, noise = reference.inputs(SIZES, 3, seed=12)
    batch = dataclasses.replace(batch_of(images.double(), noise), labels=torch.tensor([0, 1, 2]))
    objective = new("rcmae").plus(
        {"class": Classification(weight=0.01), "features": Features(weight=2.0)}
    )
    teacher.keep(objective.teacher_outputs)
    assert not hasattr(teacher, "cls_head")
    asked, taught = seen_forwards(student), seen_forwards(teacher)
    sums = objective(student, teacher, batch, 0.0)
    assert (asked, taught) == ([("classes", "features", "pixels")], [("pixels", "tokens")])
    assert objective.weights == {
        "reconstruction": 1.0,
        "consistency": 1.0,
        "class": 0.01,
        "features": 2.0,
    }
    total(objective, sums, objective.counts(batch)).backward()
    assert all(param.grad is not None for param in student.parameters())
    alone = new("rcmae")(student, teacher, batch, 0.0)
    assert sums["consistency"].item() == pytest.approx(alone["consistency"].item())


def test_a_teacher_of_features_is_the_encoder_alone() -> None:
    student = BootstrappedAutoencoder(NetworkSizes(**SIZES.model()))
    teacher = copy.deepcopy(student)
    teacher.keep(new("bootmae").teacher_outputs)
    names = {name for name, _ in teacher.named_parameters()}
    assert {name.split(".")[0] for name in names} == {"cls_token", "patch_embed", "blocks", "norm"}
    assert [name for name, _ in teacher.named_buffers()] == ["pos_embed"]
    batch = batch_of(*reference.inputs(SIZES, 2, seed=13))
    assert new("bootmae")(student, teacher, batch, 1.0).keys() == {"reconstruction", "features"}
    nothing = new("bootmae", feature_weight=0.0)
    assert not nothing.needs_teacher
    bare = BootstrappedAutoencoder(NetworkSizes(**SIZES.model()), predicts_features=False)
    nothing(bare, None, batch, 0.0)["reconstruction"].backward()
    assert all(param.grad is not None for param in bare.parameters())


def test_the_weight_of_features_grows_over_the_first_quarter() -> None:
    features = new("bootmae", Context(epochs=40)).terms["features"]
    ramp = [features.ramp(step / 400) for step in range(400)]  # type: ignore[attr-defined]
    assert ramp[:11] == [0.1] * 10 + [0.2]
    assert ramp[89:91] == [0.9, 1.0]
    assert set(ramp[90:]) == {1.0}


def test_a_teacher_may_see_other_patches() -> None:
    student, teacher = networks()
    images, noise = reference.inputs(SIZES, 3, seed=14)
    same = batch_of(images.double(), noise)
    other = dataclasses.replace(same, teacher_ids=noise.flip(1).argsort(dim=1))
    every = teacher(same.images, other.teacher_ids, KEPT, ("all_pixels",))
    pred = every["all_pixels"].take_along_dim(same.ids_shuffle[:, KEPT:, None], dim=1)
    want = (
        (student(same.images, same.ids_shuffle, KEPT)["pixels"] - pred).square().mean(dim=2).sum()
    )
    found = new("rcmae")(student, teacher, other, 0.0)["consistency"].item()
    assert found == pytest.approx(want.item(), rel=1e-12)
    assert found != pytest.approx(new("rcmae")(student, teacher, same, 0.0)["consistency"].item())
