#!/usr/bin/env python3
"""Check this package against folders of recorded numbers: the same weights, images and masks in,
the same numbers out.

    python tools/check_parity.py FOLDER [FOLDER ...] [--json]

A folder holds `fixture.json` (sizes, formulas, limits, a checksum for each file) and
`*.safetensors`. Every size and limit is read from it, everything is computed by the package's own
code in float64 and in float32, and every array and value of the folder must be compared, or be
named here as left out with the reason.

Exit status: 0 all within limits; 1 something is not, or a folder or a part of one has no check; 2
unusable input."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rcmae.data.augment import Mix, mixed, mixed_targets
from rcmae.data.batch import Batch
from rcmae.data.masking import BlockMask, visible_count
from rcmae.engines.engine import clip, set_rates
from rcmae.engines.optim import LARS, param_groups
from rcmae.engines.schedules import epoch_momentum, teacher_momentum, warmup_half_cosine
from rcmae.engines.teacher import Teacher
from rcmae.evaluation import attention, knn
from rcmae.models import kernels
from rcmae.models.bootmae import BootstrappedAutoencoder
from rcmae.models.classifier import (
    Classification,
    Classifier,
    Fit,
    Pool,
    Probing,
    cross_entropy,
    fit_weights,
    probe_head,
)
from rcmae.models.vit import (
    ARCHITECTURES,
    MaskedAutoencoder,
    patchify,
    sincos_positions,
    unpatchify,
)
from rcmae.objectives import Context, Objective, new
from rcmae.objectives.mae import crowding, pixel_targets
from rcmae.weights.names import published_names

Kind = Literal["cosine", "constant", "published"]

PRECISIONS = {"float64": torch.float64, "float32": torch.float32}


class Unusable(ValueError):
    """The folder cannot be read as one of recorded numbers."""


class Limit(NamedTuple):
    """|difference| <= absolute + relative * largest magnitude recorded in that array."""

    absolute: float
    relative: float


EXACT = Limit(0.0, 0.0)


@dataclass
class Limits:
    """What a folder states for one precision."""

    loss: Limit
    activation: Limit
    gradient: Limit
    weight: Limit


@dataclass
class Row:
    """Comparisons of one kind in one precision."""

    precision: str
    what: str
    compared: int = 0
    worst: float = 0.0  # largest |difference|
    of_limit: float = 0.0  # largest share of a limit; above 1 fails
    failures: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------ folders


class Fixture:
    """One folder: what it states, what was read of it, and how the comparisons went."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._tree = json.loads((path / "fixture.json").read_text())
            self.name: str = self._tree["fixture"]
            self.config: dict[str, Any] = self._tree["config"]
            self._values: dict[str, Any] = self._tree["values"]
            self._files: dict[str, Any] = self._tree["files"]
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise Unusable(f"no readable fixture.json: {error}") from error
        except (KeyError, TypeError) as error:
            raise Unusable(f"fixture.json is not of this format: it lacks {error}") from error
        self.rows: dict[tuple[str, str], Row] = {}
        self.left_out: dict[str, str] = {}
        self._read: set[str] = set()
        self._arrays: dict[str, dict[str, Tensor]] = {}
        self._load()

    def _load(self) -> None:
        for name, stated in self._files.items():
            path = self.path / name
            try:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                self._arrays[name] = load_file(path)
            except (OSError, SafetensorError) as error:
                raise Unusable(f"{name}: {error}") from error
            self.true(
                "sha256 of files",
                name,
                digest == stated["sha256"],
                "not the file that fixture.json describes",
            )

    def value(self, name: str) -> Any:
        """A recorded value; it counts as checked."""
        self._read.add(name)
        return self._values[name]["value"]

    def has(self, name: str) -> bool:
        """Whether a value was recorded."""
        return name in self._values

    def arrays(self, name: str) -> dict[str, Tensor]:
        """All arrays of a file; they count as checked."""
        self._read.update(f"{name}/{key}" for key in self._arrays[name])
        return self._arrays[name]

    def files(self, pattern: str) -> list[str]:
        """Names of the files that match a regular expression."""
        return [name for name in self._files if re.fullmatch(pattern, name)]

    def meaning(self, file: str) -> str:
        """What the folder says of a file."""
        return str(self._files[file].get("meaning", ""))

    def leave_out(self, name: str, reason: str) -> None:
        """Say that a value or an array has no counterpart here."""
        self._read.add(name)
        self.left_out[name] = reason

    def unread(self) -> list[str]:
        """Values and arrays that no check has looked at."""
        everything = [
            *self._values,
            *(f"{file}/{key}" for file, arrays in self._arrays.items() for key in arrays),
        ]
        return [name for name in everything if name not in self._read]

    def tolerance(self, precision: str) -> str:
        """The limits of a precision, in the folder's words."""
        return str(self._tree["tolerance"][precision])

    def limits(self, precision: str) -> Limits:
        """The limits of a precision, as numbers.

        Raises:
            Unusable: they are not worded as in any known folder.
        """
        text = self.tolerance(precision)
        if precision == "float64":
            stated = re.search(r"\|difference\| <= (\S+) \+ (\S+) \* largest magnitude", text)
            losses = re.search(r"losses relative (\d\S*?\d)\b", text)
            if stated:
                limit = Limit(float(stated[1]), float(stated[2]))
                return Limits(
                    _of_losses(float(losses[1])) if losses else limit, limit, limit, limit
                )
        elif stated := re.search(r"suggested limits (.*?)(?:\.(?:\s|$)|;|$)", text):
            numbers = [
                float(number) for number in re.findall(r"\d[\d.]*e-?\d+|\d+\.\d+", stated[1])
            ]
            if len(numbers) == 4:  # losses, activations and gradients relative, weights absolute
                loss, activation, gradient, weight = numbers
                return Limits(
                    _of_losses(loss),
                    Limit(0.0, activation),
                    Limit(0.0, gradient),
                    Limit(weight, 0.0),
                )
            if len(numbers) == 3:  # weights without and with the key third of qkv.bias, losses
                weight, _, loss = numbers
                limit = Limit(weight, 0.0)
                return Limits(_of_losses(loss), limit, limit, limit)
        raise Unusable(f"states no limits for {precision} that can be read: {text!r}")

    # comparisons

    def row(self, what: str, precision: str) -> Row:
        """Where comparisons of a kind are counted."""
        return self.rows.setdefault((what, precision), Row(precision, what))

    def true(self, what: str, name: str, holds: bool, otherwise: str, precision: str = "") -> None:
        """Count an exact comparison."""
        row = self.row(what, precision)
        row.compared += 1
        if not holds:
            row.failures.append(f"{name}: {otherwise}")

    def close(
        self, what: str, name: str, got: Any, want: Any, limit: Limit, precision: str = ""
    ) -> None:
        """Count a comparison of two arrays or numbers within a limit."""
        row = self.row(what, precision)
        row.compared += 1
        got, want = (
            torch.as_tensor(values, dtype=torch.float64).detach() for values in (got, want)
        )
        if got.shape != want.shape:
            row.failures.append(f"{name}: shape {list(got.shape)}, recorded {list(want.shape)}")
            return
        if not want.numel():
            return
        difference = (got - want).abs().max().item()
        allowed = limit.absolute + limit.relative * want.abs().max().item()
        within = difference <= allowed  # false for what is not a number
        if not within:
            row.failures.append(f"{name}: off by {difference:.3g}, limit {allowed:.3g}")
        if not math.isfinite(difference):
            difference = math.inf
        share = difference / allowed if allowed else 0.0 if within else math.inf
        row.worst, row.of_limit = max(row.worst, difference), max(row.of_limit, share)

    def same(self, what: str, name: str, got: Any, want: Any) -> None:
        """Count a comparison of numbers that do not depend on the precision."""
        relative = re.search(r"relative (\d\S*\d)", self.tolerance("float64"))
        if relative is None:
            raise Unusable(f"states no relative limit: {self.tolerance('float64')!r}")
        self.close(what, name, got, want, Limit(0.0, float(relative[1])), "float64")

    def all_close(
        self,
        what: str,
        got: Mapping[Any, Tensor],
        want: Mapping[Any, Tensor],
        limit: Limit,
        precision: str,
    ) -> None:
        """`close` for each name recorded."""
        for name, array in want.items():
            if name in got:
                self.close(what, name, got[name], array, limit, precision)
            else:
                self.true(what, name, False, "this package has nothing of that name", precision)


def _of_losses(relative: float) -> Limit:
    return Limit(relative**2, relative)  # a loss of 0 is a sum of squared roundings


# ------------------------------------------------------------------------------------------- models


def build(
    fixture: Fixture,
    weights: str,
    dtype: torch.dtype,
    state: dict[str, Tensor] | None = None,
    **options: Any,
) -> MaskedAutoencoder:
    """The package's model of the folder's sizes, with a file of published weights, loaded strictly.

    `state`: those weights under this package's names, where they are not published so; `options`:
    of the model."""
    config = fixture.config
    for key, ours in (
        ("layer_norm_eps", kernels.LAYER_NORM_EPS),
        ("qkv_bias", True),
        ("adam_eps", kernels.ADAM_EPS),
    ):
        if config.get(key, ours) != ours:
            raise Unusable(f"config.{key}={config[key]}: this package has {ours}")
    side, state = config["img_size"], fixture.arrays(weights) if state is None else state
    model = MaskedAutoencoder(
        image_size=(side, side) if isinstance(side, int) else tuple(side),
        patch_size=config["patch_size"],
        in_channels=config.get("in_chans", state["patch_embed.proj.weight"].shape[1]),
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        decoder_dim=config["decoder_embed_dim"],
        decoder_depth=config["decoder_depth"],
        decoder_heads=config["decoder_num_heads"],
        mlp_ratio=config.get("mlp_ratio", 4),
        **options,
    )
    # float32 as published
    tables = {name: state[name] for name in ("pos_embed", "decoder_pos_embed") if name in state}
    fixture.all_close(
        "position tables", dict(model.named_buffers()), tables, Limit(1e-7, 0.0), "float32"
    )
    problem = ""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        problem = str(error)
    fixture.true("weights load strictly", weights, not problem, problem)
    return model.to(dtype)


def masked(
    fixture: Fixture,
    images: Tensor,
    noise: Tensor,
    dtype: torch.dtype,
    num_hidden: int | None = None,
) -> Batch:
    """The recorded images under the mask that the recorded noise makes: the smallest are seen.

    `num_hidden`: how many are not, where the folder does not say it by a mask_ratio.
    """
    nothing = torch.empty(0)
    return Batch(
        images=images.to(dtype),
        ids_shuffle=noise.argsort(dim=1, stable=True),
        num_visible=visible_count(noise.shape[1], fixture.config["mask_ratio"])
        if num_hidden is None
        else noise.shape[1] - num_hidden,
        labels=None,
        keys=(),
        positions=nothing,
        crops=nothing,
    )


def losses(
    objective: Objective,
    student: nn.Module,
    teacher: nn.Module | None,
    batch: Batch,
    progress: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total loss and each term, normalised as the training loop does."""
    sums, counts = objective(student, teacher, batch, progress), objective.counts(batch)
    terms = {term: total / counts[term] for term, total in sums.items()}
    return torch.stack(
        [objective.weights[term] * value for term, value in terms.items()]
    ).sum(), terms


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """d loss / d parameter by name; the model's own gradients are left empty."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def check_mask(fixture: Fixture, batch: Batch, expected: dict[str, Tensor]) -> None:
    """Polarity and order of what the noise hides."""
    # hidden: [B, L], 1 = not seen
    ids, hidden = batch.ids_shuffle, torch.ones(batch.ids_shuffle.shape)
    found = {
        "ids_shuffle": ids,
        "ids_restore": ids.argsort(dim=1),
        "mask": hidden.scatter(1, ids[:, : batch.num_visible], 0.0),
    }
    for name in found.keys() & expected.keys():
        fixture.close("masks", name, found[name], expected.pop(name), EXACT)
    if "len_keep" in fixture.config:
        fixture.close("masks", "len_keep", batch.num_visible, fixture.config["len_keep"], EXACT)


def check_grads(
    fixture: Fixture, case: str, grads: dict[str, Tensor], stated: dict[str, Any], precision: str
) -> None:
    """Norms of the whole gradient and of each parameter's."""
    limit = fixture.limits(precision).gradient
    norms = {name: grad.double().norm() for name, grad in grads.items()}
    total = torch.stack(list(norms.values())).norm()
    fixture.close(
        "gradient norms", f"{case} total", total, stated["grad_norm_total"], limit, precision
    )
    wanted = {
        name: torch.tensor(norm, dtype=torch.float64) for name, norm in stated["grad_norm"].items()
    }
    fixture.all_close("gradient norms", norms, wanted, limit, precision)


def without_key_bias(name: str, array: Tensor) -> Tensor:
    """The array without the key third of a qkv.bias: its true gradient is 0, and Adam blows up
    what rounding leaves.
    """
    return torch.cat([array.chunk(3)[0], array.chunk(3)[2]]) if ".attn.qkv.bias" in name else array


def check_trained(fixture: Fixture, file: str, arrays: dict[str, Tensor], precision: str) -> None:
    """Weights (or moments) after optimizer steps."""
    want = fixture.arrays(file)
    if precision == "float32":
        arrays = {
            name: without_key_bias(name, arrays[name]) for name in want.keys() & arrays.keys()
        }
        want = {name: without_key_bias(name, array) for name, array in want.items()}
    fixture.all_close(
        file.removesuffix(".safetensors"), arrays, want, fixture.limits(precision).weight, precision
    )


def optimizer_for(
    model: nn.Module, weight_decay: float, betas: Sequence[float] = (0.9, 0.95)
) -> torch.optim.Optimizer:
    """The package's optimizer over its parameter groups."""
    return kernels.adamw(param_groups(model, weight_decay), betas=(betas[0], betas[1]))


def update(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One step at a rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------------------------- checks


def mae_forward(fixture: Fixture) -> None:
    """Encoder, decoder, losses, gradients, then some training steps."""
    for precision, dtype in PRECISIONS.items():
        limits = fixture.limits(precision)
        model = build(fixture, "model.safetensors", dtype)
        inputs, expected = (
            fixture.arrays("inputs.safetensors"),
            dict(fixture.arrays("expected.safetensors")),
        )
        batch = masked(fixture, inputs["images"], inputs["noise"], dtype)
        check_mask(fixture, batch, expected)
        pred = model(batch.images, batch.ids_shuffle, batch.num_visible, "all")
        outputs = {
            "latent": model.encode(batch.images, batch.ids_shuffle[:, : batch.num_visible]),
            "pred": pred,
            "unpatchified_pred": unpatchify(
                pred, model.patch_size, model.image_size, model.in_channels
            ),
        }
        fixture.all_close("predictions", outputs, expected, limits.activation, precision)
        for case, stated in fixture.value("losses").items():
            norm_pix = case_of(case)["norm_pix"]
            loss, _ = losses(new("mae", norm_pix_loss=norm_pix), model, None, batch)
            fixture.close("losses", case, loss, stated["loss"], limits.loss, precision)
            grads = gradients(model, loss)
            check_grads(fixture, case, grads, stated, precision)
            for file in fixture.files("grads.*"):
                if case_of(fixture.meaning(file))["norm_pix"] == norm_pix:
                    fixture.all_close(
                        "gradients", grads, fixture.arrays(file), limits.gradient, precision
                    )

        train = fixture.config["train"]
        objective = new("mae", norm_pix_loss=train["norm_pix_loss"])
        optimizer = optimizer_for(model, train["weight_decay"])
        accumulation, per_epoch = train.get("accum_iter", 1), train["iters"]
        if accumulation != 1:
            raise Unusable(f"config.train.accum_iter={accumulation}: this check knows 1")
        for index, row in enumerate(fixture.value("train_rows")):
            lr = warmup_half_cosine(
                train["start_epoch"] * per_epoch + index,
                warmup_steps=train["warmup_epochs"] * per_epoch,
                total_steps=train["epochs"] * per_epoch,
                lr=train["lr"],
                min_lr=train["min_lr"],
            )
            batch = masked(
                fixture, inputs["train_images"][index], inputs["train_noise"][index], dtype
            )
            loss, _ = losses(objective, model, None, batch)
            loss.backward()
            update(optimizer, lr)
            for key, got in (("train_loss", loss), ("lr", lr)):
                fixture.close(
                    "training losses, rates",
                    f"{key} {index}",
                    got,
                    row[key],
                    limits.loss,
                    precision,
                )
        for file in fixture.files("after_.*"):
            check_trained(fixture, file, dict(model.named_parameters()), precision)


def rcmae_forward(fixture: Fixture) -> None:
    """Student and teacher on the same masked images: targets, predictions, losses and gradients
    for each weight.
    """
    for precision, dtype in PRECISIONS.items():
        limits = fixture.limits(precision)
        student = build(fixture, "student.safetensors", dtype)
        teacher = build(fixture, "teacher.safetensors", dtype).requires_grad_(False)
        inputs, expected = (
            fixture.arrays("inputs.safetensors"),
            dict(fixture.arrays("expected.safetensors")),
        )
        batch = masked(fixture, inputs["images"], inputs["noise"], dtype)
        check_mask(fixture, batch, expected)
        mask = (batch.ids_shuffle, batch.num_visible)
        everything = torch.arange(student.num_patches).expand(len(batch), -1)
        outputs = {
            "latent": student.encode(batch.images, batch.ids_shuffle[:, : batch.num_visible]),
            "student_pred": student(batch.images, *mask, "all"),
            "teacher_pred": teacher(batch.images, *mask, "all"),
            "target": patchify(batch.images, student.patch_size),
            "target_norm_pix": pixel_targets(
                batch.images, everything, student.num_patches, norm_pix=True
            ),
        }
        fixture.all_close(
            "predictions and targets", outputs, expected, limits.activation, precision
        )
        files = {file: case_of(fixture.meaning(file)) for file in fixture.files("grads.*")}
        for case, stated in fixture.value("cases").items():
            norm_pix, gamma = stated["norm_pix_loss"], stated["gamma"]
            objective = new("rcmae", norm_pix_loss=norm_pix, consistency_weight=gamma)
            loss, terms = losses(objective, student, teacher, batch)
            found = {
                "mae_loss": terms["reconstruction"],
                "consistency_loss": terms["consistency"],
                "total_loss": loss,
            }
            for name, value in found.items():
                fixture.close(
                    "losses", f"{case} {name}", value, stated[name], limits.loss, precision
                )
            grads = gradients(student, loss)
            check_grads(fixture, case, grads, stated, precision)
            for file, of in files.items():
                if of == {"norm_pix": norm_pix, "gamma": gamma}:
                    fixture.all_close(
                        "gradients", grads, fixture.arrays(file), limits.gradient, precision
                    )


def case_of(text: str) -> dict[str, Any]:
    """Settings named in words, as in `norm_pix_loss=True, gamma=1.0`."""
    found: dict[str, Any] = {}
    if match := re.search(r"norm_pix(?:_loss)?=(True|False)", text):
        found["norm_pix"] = match[1] == "True"
    if match := re.search(r"gamma=([\d.]*\d)", text):
        found["gamma"] = float(match[1])
    return found


class TrainCase(NamedTuple):
    """One recorded training: what it is called, and when the teacher moves with which momentum."""

    rows: str  # value: what was logged at each optimizer step
    student: str  # files
    teacher: str
    kind: Kind  # schedule of the momentum
    each_micro_step: bool  # whether the teacher moves at each, or at optimizer steps only
    # value: what it was at each micro-step, 1 where the teacher was left alone
    momentum: str | None = None


def published_momentum(
    update: int, kind: Kind, base: float, updates_per_epoch: int, epochs: int
) -> float:
    """The teacher's momentum as recorded: it ends at 1."""
    return teacher_momentum(
        update,
        kind=kind,
        base=base,
        end=1.0,
        total_updates=epochs * updates_per_epoch,
        updates_per_epoch=updates_per_epoch,
    )


def rcmae_train(fixture: Fixture) -> None:
    """Training steps over some epochs, the momentum indexed as published and as it was meant."""
    kinds: dict[str, Kind] = {"official": "published", "global_step": "cosine"}
    cases = [
        TrainCase(
            f"{case}_steps",
            f"{case}_student.safetensors",
            f"{case}_teacher.safetensors",
            kind,
            True,
        )
        for case, kind in kinds.items()
    ]
    check_training(fixture, cases)
    base, per_epoch, epochs = (
        fixture.config[key] for key in ("momentum_teacher", "iters", "epochs")
    )
    name, limit = "momentum_schedule", fixture.limits("float64").loss
    schedule = [
        published_momentum(index, "cosine", base, per_epoch, epochs)
        for index in range(epochs * per_epoch)
    ]
    fixture.close("momenta", name, schedule, fixture.value(name), limit, "float64")


def rcmae_train_accum(fixture: Fixture) -> None:
    """The same with accumulation: the teacher moved at each micro-step (published), or at
    optimizer steps.
    """
    check_training(
        fixture,
        [
            TrainCase(
                "official_rows",
                "student.safetensors",
                "official_teacher.safetensors",
                "published",
                True,
                "official_momentum",
            ),
            TrainCase(
                "ema_on_update_rows",
                "ema_on_update_student.safetensors",
                "ema_on_update_teacher.safetensors",
                "cosine",
                False,
                "ema_on_update_momentum",
            ),
        ],
    )


def check_training(fixture: Fixture, cases: Sequence[TrainCase]) -> None:
    """Train as each case says, in each precision, and compare rows, weights, teacher, moments
    and groups.
    """
    for precision, dtype in PRECISIONS.items():
        for case in cases:
            student = build(fixture, "init.safetensors", dtype)
            teacher = build(fixture, "init.safetensors", dtype).requires_grad_(False)
            optimizer = optimizer_for(
                student, fixture.config["weight_decay"], fixture.config["betas"]
            )
            check_groups(fixture, optimizer)
            train(fixture, case, student, teacher, optimizer, precision)
            check_trained(fixture, case.student, dict(student.named_parameters()), precision)
            check_trained(fixture, case.teacher, dict(teacher.named_parameters()), precision)
            for file in fixture.files(f"{case.rows.split('_')[0]}_adamw_state.safetensors"):
                moments = {
                    f"{name}.{key}": moment
                    for name, param in student.named_parameters()
                    for key, moment in optimizer.state[param].items()
                }
                check_trained(fixture, file, moments, precision)


def train(
    fixture: Fixture,
    case: TrainCase,
    student: MaskedAutoencoder,
    teacher: MaskedAutoencoder,
    optimizer: torch.optim.Optimizer,
    precision: str,
) -> None:
    """The recorded micro-steps, compared row by row."""
    config, limits = fixture.config, fixture.limits(precision)
    accumulation, per_epoch = config["accum_iter"], config["iters"]
    if per_epoch % accumulation:
        raise Unusable(f"config.iters={per_epoch} is not divisible by accum_iter={accumulation}")
    objective = new(
        "rcmae", norm_pix_loss=config["norm_pix_loss"], consistency_weight=config["gamma"]
    )
    move_teacher = moving_average(student, teacher)
    inputs, rows = fixture.arrays("inputs.safetensors"), fixture.value(case.rows)
    each = 1 if case.each_micro_step else accumulation
    momenta = []
    for micro, (images, noise) in enumerate(zip(inputs["images"], inputs["noise"], strict=True)):
        loss, terms = losses(
            objective, student, teacher, masked(fixture, images, noise, PRECISIONS[precision])
        )
        (loss / accumulation).backward()
        step, last = micro // accumulation, (micro + 1) % accumulation == 0
        lr = warmup_half_cosine(
            step,
            warmup_steps=config["warmup_epochs"] * per_epoch / accumulation,
            total_steps=config["epochs"] * per_epoch / accumulation,
            lr=config["lr"],
            min_lr=config["min_lr"],
        )
        if last:
            update(optimizer, lr)
        momentum = 1.0
        if case.each_micro_step or last:
            momentum = published_momentum(
                micro // each,
                case.kind,
                config["momentum_teacher"],
                per_epoch // each,
                config["epochs"],
            )
            move_teacher(momentum)
        momenta.append(momentum)
        if last:
            found = {
                "train_loss": loss,
                "s_loss": terms["reconstruction"],
                "rec_cons_loss": terms["consistency"],
                "lr": lr,
                "momentum": momentum,
                "student_l2": l2(student),
                "teacher_l2": l2(teacher),
            }
            what = f"{case.rows.rpartition('_')[0]} losses, rates and norms"
            for key in found.keys() & rows[step].keys():
                fixture.close(
                    what, f"{key} {step}", found[key], rows[step][key], limits.loss, precision
                )
    if case.momentum:
        fixture.close(
            "momenta", case.momentum, momenta, fixture.value(case.momentum), limits.loss, precision
        )


def moving_average(student: nn.Module, teacher: nn.Module) -> Callable[[float], None]:
    """What moves the teacher: in float32 the package's own.

    In float64, which that one does not keep, its formula.
    """
    masters = [param.data for param in student.parameters()]
    copies = [param.data for param in teacher.parameters()]
    if masters[0].dtype == torch.float32:
        return Teacher(masters, copies).update
    return lambda momentum: torch._foreach_lerp_(copies, masters, 1.0 - momentum)


def l2(model: nn.Module) -> Tensor:
    """L2 norm of all parameters and position tables."""
    arrays = [*model.parameters(), *model.buffers()]
    return torch.stack([array.detach().double().norm() for array in arrays]).norm()


def check_groups(fixture: Fixture, optimizer: torch.optim.Optimizer) -> None:
    """Which parameters decay."""
    for value, decays in (("no_decay", False), ("decay", True)):
        if fixture.has(value):
            groups = [
                group
                for group in optimizer.param_groups
                if group["name"].endswith("_no_decay") != decays
            ]
            names = {name for group in groups for name in group["param_names"]}
            fixture.true(
                "decay groups",
                value,
                names == set(fixture.value(value)),
                "other names than recorded",
            )


def lr_schedule(fixture: Fixture) -> None:
    """The learning rate at each step, and how many patches a mask ratio leaves."""
    for case in fixture.value("schedules"):
        for epoch, iteration, _, lr, scaled in case["rows"]:
            for name, want, scale in (("lr", lr, 1.0), ("lr with lr_scale 0.5", scaled, 0.5)):
                got = scale * warmup_half_cosine(
                    epoch * case["iters"] + iteration,
                    warmup_steps=case["warmup_epochs"] * case["iters"],
                    total_steps=case["epochs"] * case["iters"],
                    lr=case["lr"],
                    min_lr=case["min_lr"],
                )
                fixture.same(
                    "learning rates", f"{name} at epoch {epoch} iteration {iteration}", got, want
                )
    for patches, ratio, kept in fixture.value("len_keep"):
        what = f"{patches} patches, mask_ratio {ratio}"
        fixture.close("patches kept", what, visible_count(patches, ratio), kept, EXACT, "float64")


def momentum_schedule(fixture: Fixture) -> None:
    """The teacher's momentum at each step, as published and as meant."""
    for case in fixture.value("cases"):
        schedule_of = [case["momentum_teacher"], case["iters_per_epoch"], case["epochs"]]
        total = case["epochs"] * case["iters_per_epoch"]
        schedule = [published_momentum(update, "cosine", *schedule_of) for update in range(total)]
        fixture.same("momenta", "length", len(schedule), case["length"])
        parts = {
            "schedule": schedule,
            "head": schedule[: len(case["head"])],
            "tail": schedule[-len(case["tail"]) :],
        }
        for name, part in parts.items():
            if case[name] is not None:
                fixture.same("momenta", name, part, case[name])
        for epoch, iteration, published, meant in case["rows"]:
            place = epoch * case["iters_per_epoch"] + iteration
            kinds: dict[Kind, float] = {"published": published, "cosine": meant}
            for kind, want in kinds.items():
                got = published_momentum(place, kind, *schedule_of)
                fixture.same("momenta", f"{kind}, epoch {epoch} iteration {iteration}", got, want)
    if fixture.has("cosine_scheduler_with_warmup"):
        fixture.leave_out(
            "cosine_scheduler_with_warmup",
            "the teacher's momentum has no warm-up, in RC-MAE or here",
        )


def pos_embed(fixture: Fixture) -> None:
    """The position tables, and their float32 rounding that models keep."""
    stated = [
        re.search(r"(\d\S*) absolute", fixture.tolerance(precision)) for precision in PRECISIONS
    ]
    if None in stated:
        raise Unusable("states no absolute limits")
    limits = [Limit(float(match[1]), 0.0) for match in stated if match]
    for name, want in fixture.arrays("expected.safetensors").items():
        match = re.fullmatch(r"mae\.dim(\d+)\.grid(\d+)(?:x(\d+))?\.cls([01])", name)
        if match is None:
            fixture.true("tables", name, False, "no table of that name is known", "float64")
            continue
        grid = (int(match[2]), int(match[3] or match[2]))
        table = sincos_positions(int(match[1]), grid, cls_token=match[4] == "1")
        for precision, limit in zip(PRECISIONS, limits, strict=True):
            fixture.close("tables", name, table.to(PRECISIONS[precision]), want, limit, precision)


def arch_names(fixture: Fixture) -> None:
    """Names, shapes and counts of the published architectures, and the order in which an
    optimizer numbers them.
    """
    for name, stated in fixture.value("architectures").items():
        ours = re.sub(r"^(rc_|mae_)|_dec\d+d\d+b$", "", name)
        if ours not in ARCHITECTURES:
            fixture.true("architectures", name, False, f"not among {', '.join(ARCHITECTURES)}")
            continue
        side = fixture.config["img_size"]
        sizes: dict[str, Any] = dict(ARCHITECTURES[ours])
        with torch.device("meta"):
            model: nn.Module = MaskedAutoencoder(image_size=(side, side), in_channels=3, **sizes)
        shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        wanted = dict(stated["state_dict"])
        if "mask_token" not in wanted:  # one that classifies
            sizes = {key: value for key, value in sizes.items() if not key.startswith("decoder")}
            with torch.device("meta"):
                model = Classifier(
                    image_size=(side, side),
                    in_channels=3,
                    num_classes=wanted["head.weight"][0],
                    pool="mean" if "fc_norm.weight" in wanted else "cls",
                    **sizes,
                )
            shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
        differing = sorted(
            key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key)
        )
        fixture.true(
            "names and shapes", name, not differing, f"differ in {', '.join(differing[:5])}"
        )
        trainable = sum(param.numel() for param in model.parameters())
        everything = trainable + sum(buffer.numel() for buffer in model.buffers())
        for key, got in (("trainable", trainable), ("all_parameters", everything)):
            fixture.true(
                "counts", f"{name} {key}", got == stated[key], f"{got}, recorded {stated[key]}"
            )
        if "optimizer_order" in stated:
            decays = {
                param_name: group["weight_decay"] > 0
                for group in param_groups(model, 0.05)
                for param_name in group["param_names"]
            }
            order = [
                [key for key, _ in model.named_parameters() if decays[key] == decay]
                for decay in (False, True)
            ]
            fixture.true(
                "optimizer order",
                name,
                order == stated["optimizer_order"],
                "another order than recorded",
            )


def supmae_forward(fixture: Fixture) -> None:
    """Both terms with all and with some labels, the head in training and evaluation, gradients,
    then some steps.
    """
    config = fixture.config
    if config.get("bn_eps", 1e-5) != 1e-5 or config.get("bn_momentum", 0.1) != 0.1:
        raise Unusable("config.bn_eps and bn_momentum: this package has 1e-5 and 0.1")
    head = {
        "num_classes": config["nb_classes"],
        "class_pool": "mean" if config["global_pool"] else "cls",
    }
    objective = new(
        "supmae",
        norm_pix_loss=config["norm_pix_loss"],
        class_weight=config["cls_loss_ratio"],
        class_temperature=config["temperature"],
    )
    # it stands before a batch norm: nothing sees it
    zero = "cls_head.0.bias" if config["cls_hidden_mlp"] else ""
    for precision, dtype in PRECISIONS.items():
        limits = fixture.limits(precision)
        inputs, expected = (
            fixture.arrays("inputs.safetensors"),
            dict(fixture.arrays("expected.safetensors")),
        )
        for case, stated in fixture.value("losses").items():
            model = build(
                fixture, "model.safetensors", dtype, class_hidden=config["cls_hidden_mlp"], **head
            )
            model.cls_head.to(dtype)
            batch = masked(fixture, inputs["images"], inputs["noise"], dtype)
            labels = torch.tensor(stated["labels"])
            names = [key for key in inputs if key.startswith("labels")]
            fixture.true(
                "labels",
                case,
                any(labels.equal(inputs[key]) for key in names),
                "not among the inputs",
            )
            batch = replace(batch, labels=labels)
            if case == next(iter(fixture.value("losses"))):
                check_mask(fixture, batch, expected)
                check_class_head(fixture, model, batch, expected, precision)
                continue_from = {name: table.clone() for name, table in model.named_buffers()}
                fixture.all_close(
                    "batch norm's statistics",
                    {f"bn_after.{name}": table for name, table in continue_from.items()},
                    {
                        name: array
                        for name, array in expected.items()
                        if name.startswith("bn_after.")
                    },
                    limits.activation,
                    precision,
                )
            loss, terms = losses(objective, model, None, batch)
            found = {
                "rec_loss": terms["reconstruction"],
                "cls_loss_unweighted": terms["class"],
                "total_loss": loss,
                "cls_loss_weighted": config["cls_loss_ratio"] * terms["class"],
            }
            for name, value in found.items():
                fixture.close(
                    "losses", f"{case} {name}", value, stated[name], limits.loss, precision
                )
            grads = gradients(model, loss)
            rounding = grads.pop(zero, torch.zeros(()))
            fixture.close(
                "gradients that are 0",
                zero,
                rounding.abs().max(),
                0.0,
                Limit(1e-12, 0.0) if precision == "float64" else Limit(1e-6, 0.0),
                precision,
            )
            of_each = {name: norm for name, norm in stated["grad_norm"].items() if name != zero}
            check_grads(fixture, case, grads, {**stated, "grad_norm": of_each}, precision)
            for file in fixture.files("grads.*"):
                if labels.ge(0).all():
                    want = {
                        name: array for name, array in fixture.arrays(file).items() if name != zero
                    }
                    fixture.all_close("gradients", grads, want, limits.gradient, precision)
        supmae_steps(fixture, objective, head, inputs, precision)
        supmae_linear(fixture, head, inputs, precision)


def check_class_head(
    fixture: Fixture,
    model: MaskedAutoencoder,
    batch: Batch,
    expected: dict[str, Tensor],
    precision: str,
) -> None:
    """Latent, predictions and logits.

    The head's statistics move by its one forward pass in training.
    """
    model.eval()
    evaluated = model(batch.images, batch.ids_shuffle, batch.num_visible, ("classes",))["classes"]
    model.train()
    outputs = {
        "latent": model.encode(batch.images, batch.ids_shuffle[:, : batch.num_visible]),
        "pred": model(batch.images, batch.ids_shuffle, batch.num_visible, "all"),
        "logits_eval": evaluated,
        "logits_train": model(batch.images, batch.ids_shuffle, batch.num_visible, ("classes",))[
            "classes"
        ],
    }
    want = {name: expected[name] for name in outputs}
    fixture.all_close(
        "predictions and logits", outputs, want, fixture.limits(precision).activation, precision
    )


def supmae_linear(
    fixture: Fixture, head: dict[str, Any], inputs: dict[str, Tensor], precision: str
) -> None:
    """The head of one layer."""
    dtype = PRECISIONS[precision]
    state = {
        name: array
        for name, array in fixture.arrays("model.safetensors").items()
        if "cls_head" not in name
    }
    state |= fixture.arrays("linear_head.safetensors")
    model = build(fixture, "linear_head.safetensors", dtype, state, class_hidden=0, **head)
    batch = masked(fixture, inputs["images"], inputs["noise"], dtype)
    logits = model(batch.images, batch.ids_shuffle, batch.num_visible, ("classes",))["classes"]
    want = fixture.arrays("expected.safetensors")["logits_linear_head"]
    fixture.close(
        "predictions and logits",
        "logits_linear_head",
        logits,
        want,
        fixture.limits(precision).activation,
        precision,
    )


def supmae_steps(
    fixture: Fixture,
    objective: Objective,
    head: dict[str, Any],
    inputs: dict[str, Tensor],
    precision: str,
) -> None:
    """The recorded training steps, each on its own batch."""
    config, dtype, limits = fixture.config, PRECISIONS[precision], fixture.limits(precision)
    steps = config["train"]
    if steps.get("accum_iter", 1) != 1:
        raise Unusable(f"config.train.accum_iter={steps['accum_iter']}: this check knows 1")
    model = build(
        fixture, "model.safetensors", dtype, class_hidden=config["cls_hidden_mlp"], **head
    )
    model.cls_head.to(dtype)
    optimizer = optimizer_for(model, steps["weight_decay"], steps["betas"])
    for index, row in enumerate(fixture.value("train_rows")):
        lr = warmup_half_cosine(
            steps["start_epoch"] * steps["iters"] + index,
            warmup_steps=steps["warmup_epochs"] * steps["iters"],
            total_steps=steps["epochs"] * steps["iters"],
            lr=steps["lr"],
            min_lr=steps["min_lr"],
        )
        batch = masked(fixture, inputs["train_images"][index], inputs["train_noise"][index], dtype)
        loss, _ = losses(
            objective, model, None, replace(batch, labels=inputs["train_labels"][index])
        )
        loss.backward()
        update(optimizer, lr)
        for key, got in (("train_loss", loss), ("lr", lr)):
            fixture.close(
                "training losses, rates", f"{key} {index}", got, row[key], limits.loss, precision
            )
    stated = re.search(r"limit (\d\S*?\d),", fixture.tolerance(precision)) or re.search(
        r"steps: absolute (\S+\d)", fixture.tolerance(precision)
    )
    of_weights = Limit(float(stated[1]), 0.0) if stated else limits.weight
    arrays = model.state_dict()
    for file in fixture.files("after_.*"):
        want = dict(fixture.arrays(file))
        if precision == "float32":  # Adam blows up what rounding leaves of gradients that are 0
            want = {
                name: without_key_bias(name, array)
                for name, array in want.items()
                if name != "cls_head.0.bias"
            }
        found = {name: arrays[name] for name in want}
        if precision == "float32":
            found = {name: without_key_bias(name, array) for name, array in found.items()}
        fixture.all_close(file.removesuffix(".safetensors"), found, want, of_weights, precision)


def bootmae_limits(fixture: Fixture, precision: str, weighted: bool) -> Limits:
    """What the folder states, with weights of the mask and without."""
    text = fixture.tolerance(precision)
    if precision == "float64":
        stated = re.search(r"relative (\S+) where weight_mask is on.*else (\S+)", text)
        if stated is None:
            raise Unusable(f"states no limits for {precision} that can be read: {text!r}")
        limit = Limit(1e-12, float(stated[1 if weighted else 2]))
        return Limits(limit, limit, limit, limit)
    stated = re.search(r"losses relative (\S+), gradients relative (\S+) of", text)
    if stated is None:
        raise Unusable(f"states no limits for {precision} that can be read: {text!r}")
    loss, grad = float(stated[1]), float(stated[2])
    return Limits(Limit(0.0, loss), Limit(0.0, loss), Limit(0.0, grad), Limit(0.0, loss))


def bootmae_forward(fixture: Fixture) -> None:
    """Masks, both predictions and targets, both terms, gradients and a step of the moving
    average.
    """
    config = fixture.config
    per_row = config["img_size"] // config["patch_size"]
    low, high = config["fea_list"]

    def network(file: str, dtype: torch.dtype) -> BootstrappedAutoencoder:
        state, problem = fixture.arrays(file), ""
        model = BootstrappedAutoencoder(
            image_size=(config["img_size"],) * 2,
            patch_size=config["patch_size"],
            in_channels=state["patch_embed.proj.weight"].shape[1],
            embed_dim=config["embed_dim"],
            depth=config["depth"],
            num_heads=config["num_heads"],
            decoder_dim=config["decode_dim"],
            decoder_depth=config["decoder_depth"],
            decoder_heads=config["num_heads"],
            mlp_ratio=config["mlp_ratio"],
            low_layer=low,
            high_layer=high,
        )
        tables = {name: state[name] for name in model.TABLES}
        fixture.all_close(
            "position tables", dict(model.named_buffers()), tables, Limit(1e-6, 0.0), "float32"
        )
        try:
            model.load_state_dict(state, strict=True)
        except RuntimeError as error:
            problem = str(error)
        fixture.true("weights load strictly", file, not problem, problem)
        return model.to(dtype)

    for precision, dtype in PRECISIONS.items():
        student = network("model.safetensors", dtype)
        teacher = network("ema.safetensors", dtype).requires_grad_(False)
        teacher.keep(("tokens",))
        inputs, expected = (
            fixture.arrays("inputs.safetensors"),
            fixture.arrays("expected.safetensors"),
        )
        # the recorded order: what boxes hide comes last, in each part by noise; a roll may follow
        seen_first = (inputs["block_mask"].flatten(1) - inputs["noise"].flatten(1)).argsort(
            dim=1, stable=True
        )
        fixture.close("masks", "idx_shuffle", seen_first, expected["idx_shuffle"], EXACT)
        for case, stated in fixture.value("cases").items():
            if "official_code_fails" in stated:
                objective = new("bootmae", feature_weight=0.0)
                bare = not objective.needs_teacher and list(objective.weights) == ["reconstruction"]
                fixture.true(
                    "cases", f"{case}: a feature weight of 0 works", bare, "it has a teacher"
                )
                continue
            limits = bootmae_limits(fixture, precision, stated["weight_mask"])
            ids = seen_first.roll(stated["roll"], dims=1)
            if stated["roll"]:
                fixture.close(
                    "masks", "idx_shuffle_rolled", ids, expected["idx_shuffle_rolled"], EXACT
                )
            batch = replace(
                masked(
                    fixture, inputs["images"], inputs["noise"].flatten(1), dtype, config["mask_num"]
                ),
                ids_shuffle=ids,
            )
            objective = new(
                "bootmae",
                Context(epochs=config["epochs"]),
                feature_weight=config["feature_weight"],
                weight_mask=stated["weight_mask"],
            )
            if not stated["roll"] and precision == "float64":
                check_bootmae_outputs(
                    fixture, student, teacher, batch, expected, stated["weight_mask"], per_row
                )
            loss, terms = losses(
                objective, student, teacher, batch, config["epoch"] / config["epochs"]
            )
            used = min(1.0, 4 * (1 + config["epoch"]) / config["epochs"]) * config["feature_weight"]
            found = {
                "Rloss": terms["reconstruction"],
                "total_loss": loss,
                "feature_weight_used": used,
                "Ploss": terms["features"] * config["feature_weight"] / used,
            }
            for name, value in found.items():
                fixture.close(
                    "losses", f"{case} {name}", value, stated[name], limits.loss, precision
                )
            grads = gradients(student, loss)
            norms = {name: grad.double().norm() for name, grad in grads.items()}
            want = {
                name: torch.tensor(norm, dtype=torch.float64)
                for name, norm in stated["grad_norm"].items()
            }
            fixture.all_close("gradient norms", norms, want, limits.gradient, precision)
            total = torch.stack(list(norms.values())).norm()
            fixture.close(
                "gradient norms", case, total, stated["grad_norm_total"], limits.gradient, precision
            )
            if case == "main":
                for file in fixture.files("grads.*"):
                    fixture.all_close(
                        "gradients", grads, fixture.arrays(file), limits.gradient, precision
                    )
            momentum = epoch_momentum(
                config["epoch"], base=config["model_ema_decay"], dynamic=config["model_ema_dynamic"]
            )
            fixture.close("momenta", case, momentum, stated["ema_decay"], limits.loss, precision)
            moved = {
                name: array.to(dtype).lerp(param.detach(), 1.0 - momentum)
                for (name, param), array in zip(
                    student.named_parameters(),
                    (
                        fixture.arrays("ema.safetensors")[name]
                        for name, _ in student.named_parameters()
                    ),
                    strict=True,
                )
            }
            after = fixture.arrays("ema_after_update_some.safetensors")
            fixture.all_close(
                "moving average",
                moved,
                after,
                Limit(1e-12 if precision == "float64" else 1e-6, 1e-6),
                precision,
            )


def check_bootmae_outputs(
    fixture: Fixture,
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    expected: Mapping[str, Tensor],
    weighted: bool,
    per_row: int,
) -> None:
    """Predictions and targets of every hidden patch, of the folder's pictures and features."""
    limit, patch = (
        bootmae_limits(fixture, "float64", weighted).activation,
        fixture.config["patch_size"],
    )
    hidden = batch.ids_shuffle[:, batch.num_visible :]
    outputs = student(batch.images, batch.ids_shuffle, batch.num_visible, ("features", "pixels"))
    taught = teacher(batch.images, None, None, ("tokens",))["tokens"]
    fixture.close(
        "predictions and targets",
        "feature_target",
        taught,
        expected["feature_target"],
        limit,
        "float64",
    )

    def of_hidden(rows: Tensor) -> Tensor:
        return rows.take_along_dim(hidden[:, :, None], dim=1)

    # the published code also predicts what is seen; losses read the hidden patches alone, and so
    # does this package
    features = of_hidden(expected["feature_pred"])
    fixture.close(
        "predictions and targets", "feature_pred", outputs["features"], features, limit, "float64"
    )
    pixels = of_hidden(patchify(expected["pixel_pred"], patch))
    fixture.close(
        "predictions and targets", "pixel_pred", outputs["pixels"], pixels, limit, "float64"
    )
    everything = torch.arange(per_row**2).expand(len(batch), -1)
    target = pixel_targets(batch.images, everything, per_row**2, norm_pix=True, kind="channel")
    want = patchify(expected["pixel_target"], patch)
    fixture.close("predictions and targets", "pixel_target", target, want, limit, "float64")
    mask = torch.zeros(batch.ids_shuffle.shape).scatter(1, hidden, 1.0)  # [B, L], 1 = hidden
    fixture.close("masks", "loss_mask", mask, expected["loss_mask"].flatten(1), EXACT, "float64")
    if weighted:
        weights = torch.zeros(mask.shape, dtype=torch.float64).scatter(
            1, hidden, crowding(batch).double()
        )
        fixture.close(
            "masks", "weight_mask", weights, expected["weight_mask"].flatten(1), limit, "float64"
        )


def bootmae_schedules(fixture: Fixture) -> None:
    """The moving average's momentum by epochs, the learning rate, and what masks of boxes look
    like.
    """
    limit = Limit(float(fixture.tolerance("float64")), 0.0)
    for epoch, base, dynamic, want in fixture.value("ema_decay"):
        got = epoch_momentum(epoch, base=base, dynamic=dynamic)
        fixture.close("momenta", f"epoch {epoch} from {base}", got, want, limit, "float64")
    stated = fixture.value("cosine_scheduler")
    args = stated["args"]
    each, warmup = args["niter_per_ep"], args["warmup_epochs"] * args["niter_per_ep"]
    for index, want in enumerate(stated["values"]):
        # the published table reaches its height one step early and stands on it for two: the
        # warm-up's last is 1 here
        step = index if index >= warmup else index * warmup / (warmup - 1)
        got = args["base_value"]
        if step < warmup or index > warmup:
            got = warmup_half_cosine(
                step,
                warmup_steps=warmup,
                total_steps=args["epochs"] * each,
                lr=args["base_value"],
                min_lr=args["final_value"],
            )
        fixture.close("learning rates", f"step {index}", got, want, limit, "float64")
    config, masks = fixture.config, fixture.arrays("block_masks.safetensors")["masks"].bool()
    side = config["grid"]
    drawn = BlockMask(
        (side, side),
        num_visible=side**2 - config["num_mask_patches"],
        num_boxed=config["num_mask_patches"],
        smallest=config["min_mask_patches_per_block"],
        largest=config["max_mask_patches_per_block"],
    )
    ours = torch.stack([torch.from_numpy(drawn.boxes(0, position)) for position in range(500)])
    for name, found in (("recorded", masks), ("drawn", ours)):
        counts = found.flatten(1).sum(dim=1)
        fixture.true(
            "boxes",
            f"{name}: as many hidden in each",
            bool((counts == config["num_mask_patches"]).all()),
            f"{counts.min()} to {counts.max()}, wanted {config['num_mask_patches']}",
        )
    # how compact they are: hidden neighbours of hidden patches; within five deviations of the
    # difference of means
    theirs, mine = (neighbours(found) for found in (masks, ours))
    deviation = (theirs.var() / len(theirs) + mine.var() / len(mine)).sqrt().item()
    fixture.close(
        "boxes", "neighbours hidden together", mine.mean(), theirs.mean(), Limit(5 * deviation, 0.0)
    )


def neighbours(masks: Tensor) -> Tensor:
    """For each mask [n, rows, columns], how many pairs of adjacent patches it hides."""
    across = (masks[:, :, 1:] & masks[:, :, :-1]).flatten(1).sum(dim=1)
    return (across + (masks[:, 1:] & masks[:, :-1]).flatten(1).sum(dim=1)).double()


MAEPRIV_NAMES = (
    ("encoder_to_decoder.", "decoder_embed."),
    ("encoder.", ""),
    ("decoder.blocks.", "decoder_blocks."),
    ("decoder.norm.", "decoder_norm."),
    ("decoder.head.", "decoder_pred."),
)


def maepriv_name(name: str) -> str:
    """What this package calls a parameter of MAE-priv's model."""
    for theirs, ours in MAEPRIV_NAMES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def maepriv_pretrain(fixture: Fixture) -> None:
    """Each variant: masks, encoder's and decoder's output, targets, loss and gradients."""
    config, side = fixture.config, fixture.config["img_size"] // fixture.config["patch_size"]
    for key in ("embed_dim", "depth", "num_heads"):
        config.setdefault(key, config[f"encoder_{key}"])
    for precision, dtype in PRECISIONS.items():
        limits, inputs = fixture.limits(precision), fixture.arrays("inputs.safetensors")
        for case, stated in fixture.value("cases").items():
            raw = fixture.arrays(f"{case}.safetensors")
            state = {maepriv_name(name): array for name, array in raw.items()}
            shared = build_variant(fixture, case, stated, state)
            model = shared.to(dtype)
            noise = (
                inputs["noise"][:1].expand_as(inputs["noise"])
                if stated["batched_shuffle"]
                else inputs["noise"]
            )
            batch = masked(
                fixture, inputs["images"], noise, dtype, side**2 - stated["visible_size"]
            )
            expected = {
                name.partition(".")[2]: array
                for name, array in fixture.arrays("expected.safetensors").items()
                if name.startswith(f"{case}.")
            }
            fixture.close(
                "masks", f"{case} shuffle", batch.ids_shuffle, expected.pop("shuffle"), EXACT
            )
            latent = model.encode(batch.images, batch.ids_shuffle[:, : batch.num_visible])
            everything = torch.arange(side**2).expand(len(batch), -1)
            target = pixel_targets(
                batch.images,
                everything,
                side**2,
                norm_pix=stated["normalized_pixel"],
                kind="biased",
            )
            outputs = {
                "encoder_output": latent[:, model.num_prefix :],
                "decoder_output": channels_first(
                    model(batch.images, batch.ids_shuffle, batch.num_visible, "all")
                ),
                "target": channels_first(target),
            }
            fixture.all_close(f"{case} outputs", outputs, expected, limits.activation, precision)
            objective = new("mae", norm_pix_loss=stated["normalized_pixel"], pixel_norm="biased")
            loss, _ = losses(objective, model, None, batch)
            fixture.close("losses", case, loss, stated["loss"], limits.loss, precision)
            norms = {maepriv_name(name): norm for name, norm in stated["grad_norm"].items()}
            check_grads(
                fixture, case, gradients(model, loss), {**stated, "grad_norm": norms}, precision
            )


def build_variant(
    fixture: Fixture, case: str, stated: Mapping[str, Any], state: dict[str, Tensor]
) -> MaskedAutoencoder:
    """MAE-priv's model by this package's options."""
    return build(
        fixture,
        f"{case}.safetensors",
        torch.float32,
        state,
        cls_token=stated["use_cls_token"],
        decoder_cls=False,
        qkv_bias="qv",
        positions="row_first",
        pixel_order="chw",
    )


def channels_first(pixels: Tensor) -> Tensor:
    """Patches [B, n, p*p*C] of `patchify`, counted channel by channel."""
    return pixels.unflatten(2, (-1, 3)).transpose(2, 3).flatten(2)


def classifier(
    fixture: Fixture, weights: Mapping[str, Tensor], pool: Pool, dtype: torch.dtype
) -> tuple[Classifier, Fit]:
    """The package's classifier of the folder's sizes with these weights, and what of them
    matched.
    """
    config, side = fixture.config, fixture.config["img_size"]
    for key, ours in (
        ("layer_norm_eps", kernels.LAYER_NORM_EPS),
        ("qkv_bias", True),
        ("adam_eps", kernels.ADAM_EPS),
    ):
        if config.get(key, ours) != ours:
            raise Unusable(f"config.{key}={config[key]}: this package has {ours}")
    model = Classifier(
        image_size=(side, side) if isinstance(side, int) else tuple(side),
        patch_size=config["patch_size"],
        in_channels=weights["patch_embed.proj.weight"].shape[1],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        num_classes=config["num_classes"],
        pool=pool,
        drop_path=config.get("drop_path", 0.0),
        mlp_ratio=config.get("mlp_ratio", 4),
    ).to(dtype)
    fit = fit_weights(
        model, published_names({name: weight.to(dtype) for name, weight in weights.items()})
    )
    return model, fit


def images_of(images: Tensor, labels: Tensor) -> Batch:
    """Labelled images as the stream gives them, without masks."""
    nothing = torch.empty(0)
    return Batch(images, torch.empty(len(images), 0), 0, labels, (), nothing, nothing)


def vit_finetune(fixture: Fixture) -> None:
    """Weights of another grid into a classifier: scores, losses, gradients, layer decay, then
    training steps.
    """
    config = fixture.config
    for precision, dtype in PRECISIONS.items():
        limits, expected = fixture.limits(precision), fixture.arrays("expected.safetensors")
        inputs, head = fixture.arrays("inputs.safetensors"), fixture.arrays("head.safetensors")
        images, labels = inputs["images"].to(dtype), inputs["labels"]
        for case in ("gap", "cls"):
            stated = fixture.value(case)
            pool: Pool = "mean" if stated["global_pool"] else "cls"
            model, fit = classifier(fixture, fixture.arrays("checkpoint.safetensors"), pool, dtype)
            for key, names in (("missing_keys", fit.fresh), ("unexpected_keys", fit.unused)):
                fixture.true(
                    "what of the weights matched",
                    f"{case} {key}",
                    set(names) == set(stated[key]),
                    "differs",
                )
            fixture.close(
                "positions",
                case,
                model.pos_embed,
                expected["pos_embed"],
                limits.activation,
                precision,
            )
            model.load_state_dict(
                {**model.state_dict(), **{k: v for k, v in head.items() if k in model.state_dict()}}
            )
            features = model.forward_head(model(images, what="features"), pre_logits=True)
            scores = model(images)
            for name, got in (("features", features), ("logits", scores)):
                want = expected[f"{case}.{name}"]
                fixture.close(
                    "features and scores", f"{case}.{name}", got, want, limits.activation, precision
                )
            mix = Mix(config["lam"], None)
            targets = mixed_targets(
                labels,
                labels.flip(0),
                mix,
                num_classes=config["num_classes"],
                smoothing=config["smoothing"],
            )
            fixture.close(
                "targets", case, targets, expected["soft_targets"], Limit(1e-6, 0.0), precision
            )
            plain = images_of(images, labels)
            soft = replace(plain, targets=expected["soft_targets"].to(dtype))
            for name, batch, smoothing in (
                ("cross_entropy", plain, 0.0),
                ("label_smoothing_loss", plain, config["smoothing"]),
                ("soft_target_loss", soft, 0.0),
            ):
                loss = cross_entropy(model(images), batch, smoothing) / len(labels)
                fixture.close(
                    "losses", f"{case} {name}", loss, stated[name], limits.loss, precision
                )
                if name == "cross_entropy":
                    grads = gradients(model, loss)
                    check_grads(fixture, case, grads, stated, precision)
                    prefix = f"{case}.grad."
                    wanted = {
                        k.removeprefix(prefix): v
                        for k, v in expected.items()
                        if k.startswith(prefix)
                    }
                    fixture.all_close("gradients", grads, wanted, limits.gradient, precision)
            groups = param_groups(model, config["weight_decay"], config["layer_decay"])
            found, recorded = (
                # timm moved fc_norm
                {(each["lr_scale"], each["weight_decay"]): set(each[key]) for each in some}
                for some, key in ((groups, "param_names"), (stated["param_groups"], "params"))
            )
            fixture.true(
                "layer decay groups", case, found == recorded, "differ from those recorded"
            )
            each = {
                name: [g["lr_scale"], g["weight_decay"]]
                for g in groups
                for name in g["param_names"]
            }
            fixture.true(
                "layer decay groups", f"{case} each", each == stated["param_scale_and_wd"], "differ"
            )
            optimizer = kernels.adamw(groups, betas=tuple(config["adam_betas"]))
            objective = Classification(smoothing=config["smoothing"])
            per_epoch = len(stated["train_rows"])
            for index, row in enumerate(stated["train_rows"]):
                lr = rate_at(config, config["start_epoch"] * per_epoch + index, per_epoch)
                batch = images_of(
                    inputs["train_images"][index].to(dtype), inputs["train_labels"][index]
                )
                loss = objective(model, None, batch, 0.0)["classification"] / len(batch)
                loss.backward()
                found_grads = [param.grad for param in model.parameters() if param.grad is not None]
                clip(
                    found_grads,
                    torch.stack([grad.norm() for grad in found_grads]).norm(),
                    config["clip_grad"],
                )
                set_rates(optimizer.param_groups, lr=lr, weight_decay=config["weight_decay"])
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                for key, got in (("loss", loss), ("lr", lr)):
                    name = f"{case} {key} {index}"
                    fixture.close(
                        "training losses, rates", name, got, row[key], limits.loss, precision
                    )
            rates = [group["lr"] for group in optimizer.param_groups]
            fixture.close(
                "rates of the groups",
                case,
                rates,
                stated["group_lrs_at_last_step"],
                limits.loss,
                precision,
            )
            for file in fixture.files(f"after_.*_{case}.*"):
                check_trained(fixture, file, dict(model.named_parameters()), precision)


def rate_at(config: Mapping[str, Any], step: int, per_epoch: int) -> float:
    """The learning rate of a step of a folder's schedule."""
    return warmup_half_cosine(
        step,
        warmup_steps=config["warmup_epochs"] * per_epoch,
        total_steps=config["epochs"] * per_epoch,
        lr=config["lr"],
        min_lr=config["min_lr"],
    )


def linprobe_lars(fixture: Fixture) -> None:
    """A linear probe: features, steps of LARS, the norm's statistics, then scores."""
    config = fixture.config
    for precision, dtype in PRECISIONS.items():
        limits, expected = fixture.limits(precision), fixture.arrays("expected.safetensors")
        inputs, weights = fixture.arrays("inputs.safetensors"), fixture.arrays("vit.safetensors")
        model, _ = classifier(fixture, weights, "mean" if config["global_pool"] else "cls", dtype)
        model.eval()

        def encode(images: Tensor, model: Classifier = model) -> Tensor:
            return model.forward_head(model(images, what="features"), pre_logits=True)

        head = probe_head(config["embed_dim"], config["num_classes"]).to(dtype)
        linear: Any = head[1]  # type: ignore[index]
        linear.load_state_dict({"weight": weights["head.weight"], "bias": weights["head.bias"]})
        groups = param_groups(head, config["weight_decay"], 1.0)
        lars = config["lars"]
        optimizer = LARS(groups, momentum=lars["momentum"], trust=lars["trust_coefficient"])
        objective = Probing(encode)
        for index, row in enumerate(fixture.value("train_rows")):
            lr = rate_at(config, index, config["iters_per_epoch"])
            batch = images_of(
                inputs["train_images"][index].to(dtype), inputs["train_labels"][index]
            )
            got = encode(batch.images)
            fixture.close(
                "features",
                f"batch {index}",
                got,
                expected["features"][index],
                limits.activation,
                precision,
            )
            loss = objective(head, None, batch, 0.0)["classification"] / len(batch)
            loss.backward()
            set_rates(optimizer.param_groups, lr=lr, weight_decay=config["weight_decay"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for key, value in (("loss", loss), ("lr", lr)):
                fixture.close(
                    "training losses, rates",
                    f"{key} {index}",
                    value,
                    row[key],
                    limits.loss,
                    precision,
                )
        after = {f"head.{name}": value for name, value in head.state_dict().items()}
        after |= {
            f"mu.{name}": optimizer.state[param]["momentum"]
            for name, param in linear.named_parameters()
        }
        head.eval()
        with torch.no_grad():
            after["eval_logits"] = head(encode(inputs["train_images"][0].to(dtype)))
        wanted = {name: array for name, array in expected.items() if name != "features"}
        fixture.all_close("after the steps", after, wanted, limits.weight, precision)


def lars_steps(fixture: Fixture) -> None:
    """LARS by itself, corner cases too."""
    config = fixture.config
    for precision, dtype in PRECISIONS.items():
        limits, expected = fixture.limits(precision), fixture.arrays("expected.safetensors")
        params = {
            name: nn.Parameter(value.to(dtype))
            for name, value in fixture.arrays("params.safetensors").items()
        }
        grads = fixture.arrays("grads.safetensors")
        groups = [
            {"name": f"{name}_{'no_decay' if param.ndim == 1 else 'decay'}", "params": [param]}
            for name, param in params.items()
        ]
        optimizer = LARS(groups, momentum=config["momentum"], trust=config["trust_coefficient"])
        set_rates(optimizer.param_groups, lr=config["lr"], weight_decay=config["weight_decay"])
        for step in range(max(map(len, grads.values()))):
            for name, each in grads.items():
                params[name].grad = each[step].to(dtype)
            optimizer.step()
            got = {f"step{step}.{name}": param for name, param in params.items()}
            wanted = {
                name: value for name, value in expected.items() if name.startswith(f"step{step}.")
            }
            fixture.all_close("parameters after each step", got, wanted, limits.weight, precision)


def knn_votes(fixture: Fixture) -> None:
    """Scores, predictions and accuracies of the vote."""
    config, stated = fixture.config, fixture.value("accuracy")
    for precision, dtype in PRECISIONS.items():
        inputs, expected = (
            fixture.arrays("inputs.safetensors"),
            fixture.arrays("expected.safetensors"),
        )
        limits, labels = fixture.limits(precision), inputs["test_labels"]
        votes = knn.votes(
            inputs["train_features"].to(dtype),
            inputs["train_labels"],
            inputs["test_features"].to(dtype),
            k=config["ks"],
            num_classes=config["num_classes"],
            temperature=config["T"],
        )
        for k, scores in votes.items():
            fixture.close(
                "scores",
                f"k{k}.scores",
                scores,
                expected[f"k{k}.scores"],
                limits.activation,
                precision,
            )
            guess = scores.argmax(dim=1)
            same = torch.equal(guess, expected[f"k{k}.prediction"])
            fixture.true("predictions", f"k={k}", same, "differ from those recorded", precision)
            best = scores.topk(min(5, config["num_classes"]), dim=1)
            hits = ((best.indices == labels[:, None]) & (best.values > 0)).any(dim=1)
            row = stated[str(k)]
            for name, got in (
                ("top1", guess == labels),
                ("top5_counting_only_positive_scores", hits),
            ):
                share = 100.0 * got.double().mean()
                fixture.close(
                    "accuracies", f"k={k} {name}", share, row[name], limits.loss, precision
                )
    fixture.left_out["accuracy: top5"] = (
        "depends on how equal scores of 0 are sorted; the well-defined one is checked"
    )
    fixture.left_out["accuracy: smallest_gap_between_best_two_scores"] = (
        "says how safe the predictions are"
    )


def rollout(fixture: Fixture) -> None:
    """Attention of a classifier and its rollout, as published and by the textbook."""
    weights = published_names(fixture.arrays("vit.safetensors"))
    # of the class token
    weights = {re.sub(r"^fc_norm\.", "norm.", name): value for name, value in weights.items()}
    for precision, dtype in PRECISIONS.items():
        limits, expected = fixture.limits(precision), fixture.arrays("expected.safetensors")
        images = fixture.arrays("inputs.safetensors")["images"].to(dtype)
        model, _ = classifier(fixture, weights, "cls", dtype)
        features = model.forward_head(model(images, what="features"), pre_logits=True)
        outputs = {"logits": model(images), "features": features}
        wanted = {name: expected[name] for name in outputs}
        fixture.all_close("features and scores", outputs, wanted, limits.activation, precision)
        for index in range(len(images)):
            maps = attention.attention_maps(model, images[index : index + 1])[:, 0]
            # which entries are the smallest hangs on the last digits: discard by the maps recorded,
            # to this precision
            recorded = expected[f"image{index}.attention"].to(dtype)
            for name, want in expected.items():
                match = re.fullmatch(
                    rf"image{index}\.(mean|max|min)\.discard([\d.]*\d)(?:\.layer(\d+))?", name
                )
                if name == f"image{index}.attention":
                    fixture.close("attention", name, maps, want, limits.activation, precision)
                elif name == f"image{index}.textbook_mean":
                    got = attention.rollout(maps).view(want.shape)
                    fixture.close(
                        "rollout by the textbook", name, got, want, limits.activation, precision
                    )
                elif match:
                    fusion: Any = match[1]
                    share = float(match[2])
                    some = recorded if share else maps
                    some = some if match[3] is None else some[int(match[3])][None]
                    got = attention.rollout(some, fusion=fusion, discard=share, published=True)
                    fixture.close(
                        "rollout as published",
                        name,
                        got.view(want.shape),
                        want,
                        limits.activation,
                        precision,
                    )


def mixup_cutmix(fixture: Fixture) -> None:
    """Images and targets mixed as drawn."""
    config = fixture.config
    for precision, dtype in PRECISIONS.items():
        numbers = [
            float(number) for number in re.findall(r"\d\S*e-\d+", fixture.tolerance(precision))
        ]
        if not numbers:
            raise Unusable(f"states no limits for {precision}")
        inputs, expected = (
            fixture.arrays("inputs.safetensors"),
            fixture.arrays("expected.safetensors"),
        )
        images, labels = inputs["images"].to(dtype), inputs["labels"]
        for case, drawn in fixture.value("drawn").items():
            box = tuple(drawn["bbox_yl_yh_xl_xh"]) if drawn["use_cutmix"] else None
            mix = Mix(drawn["lam_used"], box)
            targets = mixed_targets(
                labels,
                labels.flip(0),
                mix,
                num_classes=config["num_classes"],
                smoothing=config["label_smoothing"],
            )
            got = {"images": mixed(images, images.flip(0), mix), "targets": targets}
            for (name, array), limit in zip(got.items(), (numbers[-1], numbers[0]), strict=True):
                fixture.close(
                    name,
                    f"{case}.{name}",
                    array,
                    expected[f"{case}.{name}"],
                    Limit(limit, 0.0),
                    precision,
                )
            if box:
                top, bottom, left, right = box
                area = 1 - (bottom - top) * (right - left) / config["size"] ** 2
                fixture.close("shares", case, area, drawn["lam_used"], Limit(1e-12, 0.0), precision)


# A fixture's name -> what checks a folder of it. A new objective adds its line here.
CHECKS: dict[str, Callable[[Fixture], None]] = {
    "mae-forward": mae_forward,
    "rcmae-forward": rcmae_forward,
    "rcmae-train": rcmae_train,
    "rcmae-train-accum": rcmae_train_accum,
    "lr-schedule": lr_schedule,
    "momentum-schedule": momentum_schedule,
    "pos-embed": pos_embed,
    "arch-names": arch_names,
    "supmae-forward": supmae_forward,
    "bootmae-forward": bootmae_forward,
    "bootmae-schedules": bootmae_schedules,
    "maepriv-pretrain": maepriv_pretrain,
    "vit-finetune": vit_finetune,
    "linprobe-lars": linprobe_lars,
    "lars-steps": lars_steps,
    "knn": knn_votes,
    "rollout": rollout,
    "mixup-cutmix": mixup_cutmix,
}


# ------------------------------------------------------------------------------------------- report


@dataclass
class Verdict:
    """How one folder went."""

    folder: str
    fixture: str = ""
    status: str = "unusable"  # passed | failed | no check | unusable
    problems: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Plain values for JSON, null for what is not finite."""
        rows = [
            {
                key: None if value in (math.inf, -math.inf) else value
                for key, value in vars(row).items()
            }
            | {"passed": not row.failures}
            for row in self.rows
        ]
        return vars(self) | {"rows": rows}


def check(path: Path) -> Verdict:
    """Check one folder."""
    verdict = Verdict(str(path))
    try:
        fixture = Fixture(path)
        verdict.fixture = fixture.name
        if fixture.name not in CHECKS:
            verdict.status = "no check"
            verdict.problems.append(
                f"there is no check for {fixture.name!r}; known: {', '.join(CHECKS)}"
            )
            return verdict
        CHECKS[fixture.name](fixture)
    except Unusable as error:
        verdict.problems.append(str(error))
        return verdict
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        verdict.problems.append(
            f"cannot be computed from what it holds: {type(error).__name__}: {error}"
        )
        return verdict
    verdict.rows, verdict.left_out = list(fixture.rows.values()), fixture.left_out
    verdict.problems += [f"{name}: no check has looked at it" for name in fixture.unread()]
    failed = verdict.problems or any(row.failures for row in verdict.rows)
    verdict.status = "failed" if failed else "passed"
    return verdict


def lines(verdict: Verdict) -> Iterator[str]:
    """A folder's part of the table."""
    yield f"{verdict.fixture or '?'}: {verdict.status}   {verdict.folder}"
    for row in sorted(verdict.rows, key=lambda row: row.precision, reverse=True):
        measured = (
            f"off by at most {row.worst:8.1e}, {row.of_limit:8.1e} of the limit"
            if row.worst
            else "equal"
        )
        verdict_word = "FAILED" if row.failures else "ok"
        yield (
            f"  {verdict_word:<7}{row.precision or 'exact':<9}{row.what:<44}{row.compared:>5} "
            f"compared, {measured}"
        )
        yield from (f"         {failure}" for failure in row.failures[:10])
        if len(row.failures) > 10:
            yield f"         and {len(row.failures) - 10} more"
    yield from (f"  FAILED {problem}" for problem in verdict.problems)
    yield from (f"  left out: {name} ({reason})" for name, reason in verdict.left_out.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    verdicts = [check(path) for path in options.folders]
    passed = all(verdict.status == "passed" for verdict in verdicts)
    if options.json:
        print(
            json.dumps(
                {"passed": passed, "folders": [verdict.document() for verdict in verdicts]},
                indent=1,
            )
        )
    else:
        for verdict in verdicts:
            print("\n".join(lines(verdict)))
        print(
            f"{sum(verdict.status == 'passed' for verdict in verdicts)} of {len(verdicts)} "
            "folders passed"
        )
    if any(verdict.status == "unusable" for verdict in verdicts):
        return 2
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
