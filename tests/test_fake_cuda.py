"""Everything that a GPU computes, on one that is not there: no tensor of the host meets one of the
device, numpy reads none there, and the numbers are those of the CPU."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pretend_cuda import GPU, DevicesMix, pretended, waited_for
from test_detection import detector, targets_of
from test_golden_losses import GOLDEN, OBJECTIVES
from torch import Tensor, nn

from rcmae import config, dist
from rcmae.data.batch import Batch
from rcmae.data.dense.crops import MAPS
from rcmae.data.device_decode import DeviceDecoder, DeviceResizer, pack, pack_boxes, resized
from rcmae.data.transforms import Normalise
from rcmae.engines.build import make_engine
from rcmae.engines.local import LocalEngine
from rcmae.engines.protocol import EngineSettings
from rcmae.evaluation.attention import attention_maps, class_attention, rollout
from rcmae.evaluation.dense.neighbours import vote
from rcmae.evaluation.dense.windows import Canvas, predicted
from rcmae.evaluation.features import Features
from rcmae.evaluation.knn import knn_rows
from rcmae.evaluation.logistic import logistic_rows
from rcmae.evaluation.pictures import reconstruction_picture
from rcmae.evaluation.scores import classify
from rcmae.evaluation.unlabelled.spectra import lidar, rankme
from rcmae.models import kernels
from rcmae.models.batchnorm import GlobalBatchNorm
from rcmae.models.build import new_student, new_teacher
from rcmae.models.classifier import Classifier
from rcmae.models.detection.inference import paste, rescaled
from rcmae.models.segmentation.backbone import Form
from rcmae.models.segmentation.segmenter import Heads, Segmenter
from rcmae.models.sizes import NetworkSizes
from rcmae.objectives import make_objective
from rcmae.objectives.classification import ClassifierLoss
from rcmae.objectives.detection import DetectionLoss
from rcmae.objectives.segmentation import SegmentationLoss
from rcmae.planning import planner
from rcmae.planning.live import made_up_batch
from runs import Folder, start

SMALL = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SIZES = NetworkSizes(**{**SMALL, "image_size": (32, 32), "depth": 4}, in_channels=3)
WORDS = [f"model.{key}={value}" for key, value in SMALL.items()]
WORDS += ["model.decoder_dim=16", "model.decoder_depth=3", "model.decoder_heads=2"]
WORDS += ["data.shards=none.tar", "batch.images=4", "engine.compile=false", "schedule.clip_grad=1"]


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    with pretended() as device:
        yield device


def draw(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def batch_of(count: int = 4, **more: Any) -> Batch:
    """Images of 32 pixels as a stream gives them."""
    return Batch(
        images=(draw(count, 3, 32, 32) * 255).to(torch.uint8),
        ids_shuffle=torch.stack([torch.arange(16) for _ in range(count)]),
        num_visible=4,
        labels=torch.arange(count) % 2,
        keys=tuple(map(str, range(count))),
        positions=torch.arange(count),
        crops=torch.zeros(count, 5, dtype=torch.int64),
        **more,
    )


def on_both(compute: Any) -> None:
    """What a function of a device computes is the same on both."""
    expected = compute(torch.device("cpu"))
    with pretended() as device:
        found = compute(device)
    for one, other in zip(found, expected, strict=True):
        value = one.detach().cpu() if isinstance(one, Tensor) else torch.as_tensor(one)
        torch.testing.assert_close(value, torch.as_tensor(other).detach(), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------- the device itself


def test_what_a_gpu_refuses_is_refused(gpu: torch.device) -> None:
    there, here = torch.ones(3, 4, device=gpu), torch.zeros(3, 4)
    index = torch.zeros(3, 1, dtype=torch.int64)
    refused = (
        lambda: there + here,
        lambda: here * there.sum(),
        lambda: torch.cat([there, here]),
        lambda: torch.stack([there.sum(), torch.zeros(())]),
        lambda: there.gather(1, index),
        lambda: here[there > 0],
        lambda: there.masked_fill(here > 0, 1.0),
        lambda: torch.where(here > 0, there, there),
        lambda: here.add_(there),
        lambda: torch.randn(3, generator=torch.Generator(), device=gpu),
        lambda: torch.randn(3, generator=torch.Generator(gpu)),
    )
    for each in refused:
        with pytest.raises(DevicesMix):
            each()
    for read in (there.numpy, lambda: np.asarray(there)):
        with pytest.raises(TypeError, match="to numpy"):
            read()
    assert (there * torch.tensor(2.0)).sum().item() == 24  # a number of the host may come along
    assert there[torch.tensor([0])].device == there.device == GPU  # and an index
    assert here.to(gpu).cpu().numpy().shape == (3, 4)
    weight = nn.Parameter(there.clone())
    (weight * there).sum().backward()
    assert weight.grad is not None
    assert weight.grad.device == gpu


# ------------------------------------------------------------------------------------- pretraining


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_steps_of_every_objective(
    objective: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*WORDS, f"engine.precision={precision}", *OBJECTIVES[objective]]
    recipe = planner.load("rcmae_vit_b_16", [*words, "batch.per_device=4", "engine.name=local"])
    sizes = config.resolve(recipe, world=1, samples_per_epoch=4)
    asked = make_objective(recipe, sizes)

    def steps(device: torch.device) -> list[Any]:
        assert dist.device() == device
        student = new_student(recipe)
        teacher = new_teacher(student, asked.teacher_outputs)
        batch = made_up_batch(student, 4, torch.device("cpu"))
        others = batch.ids_shuffle.flip(1) if "other masks" in objective else None
        labels = torch.tensor([0, 1, -100, 2])
        batch = Batch(**{**vars(batch), "labels": labels, "teacher_ids": others}).to(device)
        engine = make_engine(recipe, sizes, student, teacher, {})
        found: list[Any] = []
        for measure in (False, True):
            counts = asked.counts(batch)
            sums = asked(engine.student, engine.teacher, batch, 0.5)
            shares = {term: total / max(1, counts[term]) for term, total in sums.items()}
            engine.backward(torch.stack(list(shares.values())).sum(), last=True)
            stats = engine.step(lr=1e-3, weight_decay=0.05)
            told = engine.update_teacher(0.9, measure=measure)
            found += [*shares.values(), stats.grad_norm, told.get("teacher_distance", 0.0)]
        assert next(engine.student.parameters()).device == device
        assert device.type == "cpu" or not torch.backends.cuda.cudnn_sdp_enabled()
        return found

    # a CPU may compute attention in bf16 otherwise
    monkeypatch.setattr(kernels, "attention_is_fused", lambda *_: True)
    on_both(steps)


def test_a_gradient_that_is_not_finite_moves_nothing(gpu: torch.device) -> None:
    model = Classifier(SIZES, num_classes=2)
    settings = EngineSettings(precision="bf16", clip_grad=1.0, device=gpu)
    engine = LocalEngine(model, None, settings)
    assert engine.decides_on_device
    before = [piece.tensors["weight"].cpu() for piece in engine.state().pieces]
    engine.backward(next(engine.student.parameters()).sum() * float("nan"), last=True)
    assert not engine.step(lr=1.0, weight_decay=0.1).finite
    after = [piece.tensors["weight"].cpu() for piece in engine.state().pieces]
    assert all(map(torch.equal, before, after))
    assert engine.state().optimizer_step == 0


@pytest.mark.parametrize("engine", ["local", "ddp"])
def test_a_run_from_its_shards_to_its_checkpoints(
    engine: str, tiny: Path, photo_shards: str, tmp_path: Path, gpu: torch.device
) -> None:
    """Resized on the device, in a thread; judged by k-NN and drawn; saved and resumed."""
    words = ["engine.compile=false", "schedule.warmup_steps=2", f"engine.name={engine}"]
    if engine == "local":
        for name, shard in (("train", 0), ("test", 1), ("held", 2)):
            only = photo_shards.replace("{000000..000005}", f"{shard:06d}")
            words.append(f"evaluate.{name}_shards={only}")
        words += ["evaluate.every_steps=4", "evaluate.picture_every_steps=4"]
        words += ["evaluate.logistic=false", "data.resize=device", "checkpoint.every_steps=2"]
    for steps in (2, 4):
        stop = [] if steps == 4 else ["run.stop_after_steps=2"]
        assert start(tiny, tmp_path / "run", "schedule.steps=4", *words, *stop) in (0, 75)
    folder = Folder(tmp_path / "run")
    # resized on the device they are rounded once
    assert folder.losses()[:2] == pytest.approx(GOLDEN["rcmae"][:2], rel=1e-3)
    assert folder.committed()[-1] == 4
    assert bool(folder.events("evaluate")) == (engine == "local")


# ------------------------------------------------------------------------------------------- images


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray((draw(3, 40, 56)[0] * 200 + number).byte().numpy()).convert("RGB").save(
        file, "JPEG"
    )
    return file.getvalue()


def decoded(data: Tensor) -> Tensor:
    image = Image.open(io.BytesIO(data.numpy().tobytes()), formats=["JPEG"])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_images_are_made_on_the_device() -> None:
    crops = torch.tensor([[2, 3, 30, 40, 1], [0, 0, 40, 56, 0], [1, 1, 8, 8, 0]])
    boxes = [(draw(3, side, 50) * 255).to(torch.uint8) for side in (20, 41, 1500)]

    def make(device: torch.device) -> list[Tensor]:
        decode = DeviceDecoder(lambda files: [decoded(file).to(device) for file in files], device)
        encoded = pack([(jpeg(0), [0]), (jpeg(1), [1, 2])])
        assert encoded is not None
        images, bad = decode.images(torch.zeros(3, 3, 16, 24, dtype=torch.uint8), crops, encoded)
        assert bad == []
        packed = pack_boxes([box.contiguous(memory_format=torch.preserve_format) for box in boxes])
        of_boxes = DeviceResizer(device, (16, 24), 3).images(crops, packed)
        normalise = Normalise((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), device)
        assert images.device == of_boxes.device == device
        return [images, of_boxes, normalise.images(images), normalise(batch_of().to(device)).images]

    on_both(make)


def test_a_box_beyond_what_a_cuda_kernel_holds_is_resized_on_the_host(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    interpolate = nn.functional.interpolate

    def looked(values: Tensor, *args: Any, **named: Any) -> Tensor:
        seen.append(values.device.type)
        return interpolate(values, *args, **named)

    monkeypatch.setattr("rcmae.data.device_decode.interpolate", looked)
    for side in (8 * 40, 8 * 40 + 1):
        assert resized(torch.ones(1, 3, 8, side, device=gpu), (8, 8)).device == gpu
    assert seen == ["cuda", "cpu"]


# -------------------------------------------------------------------------------------------- tasks


def test_a_classifier_with_drop_path_and_mixed_targets() -> None:
    def losses(device: torch.device) -> list[Tensor]:
        model = Classifier(SIZES, num_classes=3, drop_path=0.5).to(device)
        plain, mixed = batch_of(), batch_of(targets=draw(4, 3))
        found = []
        for batch in (plain, mixed):
            ready = Normalise((0.5,) * 3, (0.2,) * 3, device)(batch.to(device))
            total = ClassifierLoss(smoothing=0.1)(model, None, ready, 0.0)["classification"]
            total.backward()
            found.append(total)
        return [*found, model.head.weight.grad]

    on_both(losses)


def test_a_segmenter_learns_and_judges_by_windows() -> None:
    form = Form((0, 1, 2, 3), True, True, "all", 0.3)

    def outputs(device: torch.device) -> list[Tensor]:
        model = Segmenter(SIZES, form, Heads(5, kind="upernet", width=8, dropout=0.2))
        model.draw_weights(torch.Generator().manual_seed(0))
        model = model.to(device).train()
        maps = (draw(4, 32, 32) * 6).to(torch.uint8)
        maps[maps == 5] = 255
        ready = Normalise((0.5,) * 3, (0.2,) * 3, device)(batch_of(extra={MAPS: maps}).to(device))
        sums = SegmentationLoss()(model, None, ready, 0.0)
        torch.stack(list(sums.values())).sum().backward()
        with torch.no_grad():
            logits = model.eval()(ready.images)[0]
        canvas = Canvas((40, 48), (32, 32), (21, 21), flipped=True)
        for window in canvas.windows:
            canvas.add(window, nn.functional.interpolate(logits, (32, 32))[0])
        found = canvas.logits()
        labels = [predicted(each, (50, 60)) for each in ([found], [found, found.flip(-1)])]
        return [*sums.values(), model.decode_head.conv_seg.weight.grad, *labels]

    on_both(outputs)


def test_a_detector_learns_and_finds() -> None:
    objects = targets_of([(0, [4, 4, 30, 40]), (2, [20, 10, 60, 60])], [])

    def outputs(device: torch.device) -> list[Tensor]:
        model = detector(drop_path=0.3).to(device).train()
        extra = {
            name: tuple(getattr(each, name) for each in objects) for name in objects[0]._fields
        }
        extents = torch.tensor([[0, 0, 64, 64], [0, 0, 50, 64]])
        batch = batch_of(2, extra={**extra, "extents": extents})
        images = draw(2, 3, 64, 64) - 0.5
        ready = Batch(**{**vars(batch), "images": images}).to(device)
        sums = DetectionLoss()(model, None, ready, 0.0)
        torch.stack(list(sums.values())).sum().backward()
        found = model.eval()(ready.images, extents.to(device))[0]
        whole = rescaled(found, extents[0].to(device), (100, 80))
        boxes = torch.tensor([[1.0, 2, 40, 50]], device=device)
        masks = paste(draw(1, 28, 28).to(device), boxes, (60, 50))
        grads = model.roi_heads.box_predictor.cls_score.weight.grad
        return [*sums.values(), grads, whole.boxes, whole.scores, whole.classes, masks]

    on_both(outputs)


def test_statistics_of_a_batch_norm() -> None:
    def outputs(device: torch.device) -> list[Tensor]:
        norm = GlobalBatchNorm(3).to(device)
        maps = draw(4, 3, 5, 5).to(device).requires_grad_()
        norm(maps).square().sum().backward()
        rows = norm(draw(6, 3).to(device)) if norm.weight is not None else norm.running_mean
        return [maps.grad, norm.running_mean, norm.running_var, rows]

    on_both(outputs)


def test_what_is_drawn_for_a_step_is_sent_without_a_wait(gpu: torch.device) -> None:
    """From page-locked memory; so is a count that a batch norm makes."""
    classifier = Classifier(SIZES, num_classes=3, drop_path=0.5).to(gpu)
    segmenter = Segmenter(
        SIZES, Form((0, 1, 2, 3), True, True, "all", 0.3), Heads(5, width=8, dropout=0.2)
    )
    segmenter = segmenter.to(gpu).train()
    maps = torch.zeros(4, 32, 32, dtype=torch.uint8)
    ready = Normalise((0.5,) * 3, (0.2,) * 3, gpu)(batch_of(extra={MAPS: maps}).to(gpu))
    waited_for.clear()
    ClassifierLoss()(classifier, None, ready, 0.0)
    SegmentationLoss()(segmenter, None, ready, 0.0)
    GlobalBatchNorm(3).to(gpu)(ready.images)
    assert [each for each in waited_for if "bool" in each or "float64" in each] == []
    torch.zeros(3, dtype=torch.bool).to(gpu)
    assert waited_for[-1] == "[3] torch.bool"


# -------------------------------------------------------------------------------------- evaluations


def test_what_features_are_worth() -> None:
    vectors, labels = draw(40, 6) + 2 * torch.eye(6)[torch.arange(40) % 3], torch.arange(40) % 3
    half = [
        Features({"student": vectors[part]}, labels[part], torch.arange(40)[part])
        for part in (slice(0, 28), slice(28, 40))
    ]

    def figures(device: torch.device) -> list[Any]:
        rows = knn_rows(*half, k=[1, 5], device=device)["student"]
        linear = logistic_rows(*half, device=device)["student"]
        there = vectors.to(device)
        shares = nn.functional.one_hot(labels).float().to(device)
        dense = vote(there[:4], nn.functional.normalize(there), shares, k=3, temperature=0.1)
        views = there.view(10, 4, 6)
        return [*rows.values(), linear, dense, rankme(there), lidar(views)]

    on_both(figures)


def test_scores_and_attention_of_a_classifier() -> None:
    def figures(device: torch.device) -> list[Any]:
        model = Classifier(SIZES, num_classes=2).to(device).eval()
        normalise = Normalise((0.5,) * 3, (0.2,) * 3, device)
        scores = classify(
            model, [batch_of()], num_classes=2, device=device, normalise=normalise.images
        )
        images = normalise.images(batch_of().images.to(device))
        maps = attention_maps(model, images)
        helped = class_attention(model, images, torch.zeros(4, dtype=torch.int64, device=device))
        seen = rollout(maps[:, 0], discard=0.3, class_tokens=1)
        return [scores.loss, scores.top1, scores.confusion, maps, helped, seen]

    on_both(figures)


def test_what_networks_reconstruct() -> None:
    recipe = planner.load("rcmae_vit_b_16", WORDS)

    def picture(device: torch.device) -> list[Tensor]:
        student = new_student(recipe)
        teacher = new_teacher(student, ("pixels",))
        batch = made_up_batch(student, 2, device)
        drawn = reconstruction_picture(
            student.to(device),
            None if teacher is None else teacher.to(device),
            batch,
            mean=(0.5,) * 3,
            std=(0.2,) * 3,
            norm_pix_loss=True,
        )
        return [torch.from_numpy(drawn.copy())]

    on_both(picture)
