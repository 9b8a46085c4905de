"""MAE: encoder, decoder, losses, gradients and training steps."""

from __future__ import annotations

from rcmae.engines.schedules import warmup_half_cosine
from rcmae.models.patches import unpatchify
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


def mae_forward(fixture: Fixture) -> None:
    """Encoder, decoder, losses, gradients, then some training steps."""
    for precision, dtype in PRECISIONS.items():
        limits = fixture.limits(precision)
        model = build(fixture, "model.safetensors", dtype)
        inputs = fixture.arrays("inputs.safetensors")
        expected = dict(fixture.arrays("expected.safetensors"))
        batch = masked(fixture, inputs["images"], inputs["noise"], dtype)
        check_mask(fixture, batch, expected)
        pred = model(batch.images, batch.ids_shuffle, batch.num_visible, ("all_pixels",))[
            "all_pixels"
        ]
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
        accumulation = train.get("accum_iter", 1)
        per_epoch = train["iters"]
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
