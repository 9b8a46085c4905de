"""SupMAE: reconstruction and classes together."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rcmae.data.batch import Batch
from rcmae.engines.schedules import warmup_half_cosine
from rcmae.models.vit import MaskedAutoencoder
from rcmae.objectives import Objective, new

from .fixture import PRECISIONS, Fixture, Limit, Unusable
from .networks import (
    build,
    check_grads,
    check_mask,
    gradients,
    losses,
    masked,
    optimizer_for,
    update,
    without_key_bias,
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
        inputs = fixture.arrays("inputs.safetensors")
        expected = dict(fixture.arrays("expected.safetensors"))
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
        "pred": model(batch.images, batch.ids_shuffle, batch.num_visible, ("all_pixels",))[
            "all_pixels"
        ],
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
    config = fixture.config
    dtype = PRECISIONS[precision]
    limits = fixture.limits(precision)
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
