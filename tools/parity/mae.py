"""MAE: encoder, decoder, losses, gradients and training steps."""

from __future__ import annotations

from rcmae.models.patches import unpatchify
from rcmae.models.vit import MaskedAutoencoder
from rcmae.objectives import new

from .fixture import PRECISIONS, Fixture, Unusable
from .networks import (
    build,
    case_of,
    check_grads,
    check_mask,
    check_trained,
    gradients,
    losses,
    masked,
    optimizer_for,
    update,
)
from .schedules import rate_at


def mae_forward(fixture: Fixture) -> None:
    """Encoder, decoder, losses, gradients, then some training steps."""
    for precision in PRECISIONS:
        fixture.limits(precision)  # or it is unusable
        model = build(fixture, "model.safetensors", PRECISIONS[precision])
        _check_pass(fixture, model, precision)
        _check_steps(fixture, model, precision)


def _check_pass(fixture: Fixture, model: MaskedAutoencoder, precision: str) -> None:
    """Outputs, losses and gradients."""
    limits = fixture.limits(precision)
    inputs = fixture.arrays("inputs.safetensors")
    expected = dict(fixture.arrays("expected.safetensors"))
    batch = masked(fixture, inputs["images"], inputs["noise"], PRECISIONS[precision])
    check_mask(fixture, batch, expected)
    outputs = model(batch.images, batch.ids_shuffle, batch.num_visible, ("all_pixels",))
    pred = outputs["all_pixels"]
    found = {
        "latent": model.encode(batch.images, batch.ids_shuffle[:, : batch.num_visible]),
        "pred": pred,
        "unpatchified_pred": unpatchify(
            pred, model.patch_size, model.image_size, model.in_channels
        ),
    }
    fixture.all_close("predictions", found, expected, limits.activation, precision)
    for case, stated in fixture.value("losses").items():
        norm_pix = case_of(case)["norm_pix"]
        loss, _ = losses(new("mae", norm_pix_loss=norm_pix), model, None, batch)
        fixture.close("losses", case, loss, stated["loss"], limits.loss, precision)
        grads = gradients(model, loss)
        check_grads(fixture, case, grads, stated, precision)
        for file in fixture.files("grads.*"):
            if case_of(fixture.meaning(file))["norm_pix"] == norm_pix:
                wanted = fixture.arrays(file)
                fixture.all_close("gradients", grads, wanted, limits.gradient, precision)


def _check_steps(fixture: Fixture, model: MaskedAutoencoder, precision: str) -> None:
    """Training steps: losses and rates of each, and the weights after them."""
    train = fixture.config["train"]
    accumulation = train.get("accum_iter", 1)
    if accumulation != 1:
        raise Unusable(f"config.train.accum_iter={accumulation}: this check knows 1")
    limit = fixture.limits(precision).loss
    inputs = fixture.arrays("inputs.safetensors")
    objective = new("mae", norm_pix_loss=train["norm_pix_loss"])
    optimizer = optimizer_for(model, train["weight_decay"])
    per_epoch = train["iters"]
    for index, row in enumerate(fixture.value("train_rows")):
        lr = rate_at(train, train["start_epoch"] * per_epoch + index, per_epoch)
        images = inputs["train_images"][index]
        noise = inputs["train_noise"][index]
        batch = masked(fixture, images, noise, PRECISIONS[precision])
        loss, _ = losses(objective, model, None, batch)
        loss.backward()
        update(optimizer, lr)
        for key, got in (("train_loss", loss), ("lr", lr)):
            name = f"{key} {index}"
            fixture.close("training losses, rates", name, got, row[key], limit, precision)
    for file in fixture.files("after_.*"):
        check_trained(fixture, file, dict(model.named_parameters()), precision)
