"""SupMAE: reconstruction and classes together."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from rcmae.data.batch import Batch
from rcmae.models.vit import Heads, MaskedAutoencoder
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
from .schedules import rate_at


def supmae_forward(fixture: Fixture) -> None:
    """Both terms with all and with some labels, the head in training and evaluation, gradients,
    then some steps.
    """
    config = fixture.config
    if config.get("bn_eps", 1e-5) != 1e-5 or config.get("bn_momentum", 0.1) != 0.1:
        raise Unusable("config.bn_eps and bn_momentum: this package has 1e-5 and 0.1")
    head = Heads(
        num_classes=config["nb_classes"],
        class_hidden=config["cls_hidden_mlp"],
        class_pool="mean" if config["global_pool"] else "cls",
    )
    objective = new(
        "supmae",
        norm_pix_loss=config["norm_pix_loss"],
        class_weight=config["cls_loss_ratio"],
        class_temperature=config["temperature"],
    )
    for precision in PRECISIONS:
        fixture.limits(precision)  # or it is unusable
        inputs = fixture.arrays("inputs.safetensors")
        for number, case in enumerate(fixture.value("losses")):
            model = _model(fixture, head, precision)
            batch = _batch(fixture, case, precision)
            if number == 0:
                _check_outputs(fixture, model, batch, precision)
            _check_losses(fixture, objective, model, batch, case, precision)
        supmae_steps(fixture, objective, head, inputs, precision)
        supmae_linear(fixture, head, inputs, precision)


def _model(fixture: Fixture, head: Heads, precision: str) -> MaskedAutoencoder:
    dtype = PRECISIONS[precision]
    model = build(fixture, "model.safetensors", dtype, heads=head)
    model.cls_head.to(dtype)
    return model


def _batch(fixture: Fixture, case: str, precision: str) -> Batch:
    """The recorded images with the labels of a case."""
    inputs = fixture.arrays("inputs.safetensors")
    labels = torch.tensor(fixture.value("losses")[case]["labels"])
    recorded = [array for key, array in inputs.items() if key.startswith("labels")]
    there = any(labels.equal(array) for array in recorded)
    fixture.true("labels", case, there, "not among the inputs")
    batch = masked(fixture, inputs["images"], inputs["noise"], PRECISIONS[precision])
    return replace(batch, labels=labels)


def _check_outputs(
    fixture: Fixture, model: MaskedAutoencoder, batch: Batch, precision: str
) -> None:
    """Masks, what the network gives, and what its head has learnt of the batch's statistics."""
    expected = dict(fixture.arrays("expected.safetensors"))
    check_mask(fixture, batch, expected)
    check_class_head(fixture, model, batch, expected, precision)
    tables = {f"bn_after.{name}": table.clone() for name, table in model.named_buffers()}
    wanted = {name: array for name, array in expected.items() if name.startswith("bn_after.")}
    limit = fixture.limits(precision).activation
    fixture.all_close("batch norm's statistics", tables, wanted, limit, precision)


def _check_losses(
    fixture: Fixture,
    objective: Objective,
    model: MaskedAutoencoder,
    batch: Batch,
    case: str,
    precision: str,
) -> None:
    """Both terms and the gradients of a case."""
    config = fixture.config
    limits = fixture.limits(precision)
    stated = fixture.value("losses")[case]
    loss, terms = losses(objective, model, None, batch)
    found = {
        "rec_loss": terms["reconstruction"],
        "cls_loss_unweighted": terms["class"],
        "total_loss": loss,
        "cls_loss_weighted": config["cls_loss_ratio"] * terms["class"],
    }
    for name, value in found.items():
        fixture.close("losses", f"{case} {name}", value, stated[name], limits.loss, precision)
    grads = gradients(model, loss)
    # it stands before a batch norm: nothing sees it
    zero = "cls_head.0.bias" if config["cls_hidden_mlp"] else ""
    rounding = grads.pop(zero, torch.zeros(())).abs().max()
    nothing = Limit(1e-12 if precision == "float64" else 1e-6, 0.0)
    fixture.close("gradients that are 0", zero, rounding, 0.0, nothing, precision)
    of_each = {name: norm for name, norm in stated["grad_norm"].items() if name != zero}
    check_grads(fixture, case, grads, {**stated, "grad_norm": of_each}, precision)
    assert batch.labels is not None
    if not batch.labels.ge(0).all():
        return
    for file in fixture.files("grads.*"):
        wanted = {name: array for name, array in fixture.arrays(file).items() if name != zero}
        fixture.all_close("gradients", grads, wanted, limits.gradient, precision)


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


def supmae_linear(fixture: Fixture, head: Heads, inputs: dict[str, Tensor], precision: str) -> None:
    """The head of one layer."""
    dtype = PRECISIONS[precision]
    state = {
        name: array
        for name, array in fixture.arrays("model.safetensors").items()
        if "cls_head" not in name
    }
    state |= fixture.arrays("linear_head.safetensors")
    model = build(
        fixture, "linear_head.safetensors", dtype, state, heads=replace(head, class_hidden=0)
    )
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
    head: Heads,
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
    model = _model(fixture, head, precision)
    optimizer = optimizer_for(model, steps["weight_decay"], steps["betas"])
    for index, row in enumerate(fixture.value("train_rows")):
        lr = rate_at(steps, steps["start_epoch"] * steps["iters"] + index, steps["iters"])
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
