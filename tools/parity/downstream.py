"""Fine-tuning and probing: weights of another grid, layer decay, LARS, Mixup and CutMix."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rcmae.data.augment import Mix, mixed, mixed_targets
from rcmae.data.batch import Batch
from rcmae.engines.optim import LARS, param_groups, set_rates
from rcmae.engines.updates import clip
from rcmae.models import kernels
from rcmae.models.classifier import Classifier, Pool, probe_head
from rcmae.models.fitting import Fit, fit_weights
from rcmae.models.sizes import NetworkSizes
from rcmae.objectives.classification import ClassifierLoss, ProbeLoss, cross_entropy
from rcmae.weights.names import published_names

from .fixture import PRECISIONS, Fixture, Limit, Unusable
from .networks import check_grads, check_trained, gradients
from .schedules import rate_at


def classifier(
    fixture: Fixture, weights: Mapping[str, Tensor], pool: Pool, dtype: torch.dtype
) -> tuple[Classifier, Fit]:
    """The package's classifier of the folder's sizes with these weights, and what of them
    matched.
    """
    config = fixture.config
    side = fixture.config["img_size"]
    for key, ours in (
        ("layer_norm_eps", kernels.LAYER_NORM_EPS),
        ("qkv_bias", True),
        ("adam_eps", kernels.ADAM_EPS),
    ):
        if config.get(key, ours) != ours:
            raise Unusable(f"config.{key}={config[key]}: this package has {ours}")
    model = Classifier(
        NetworkSizes(
            image_size=(side, side) if isinstance(side, int) else tuple(side),
            patch_size=config["patch_size"],
            in_channels=weights["patch_embed.proj.weight"].shape[1],
            embed_dim=config["embed_dim"],
            depth=config["depth"],
            num_heads=config["num_heads"],
            mlp_ratio=config.get("mlp_ratio", 4),
        ),
        num_classes=config["num_classes"],
        pool=pool,
        drop_path=config.get("drop_path", 0.0),
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
    for precision in PRECISIONS:
        fixture.limits(precision)  # or it is unusable
        for case in ("gap", "cls"):
            model = _started(fixture, case, precision)
            _check_scores(fixture, model, case, precision)
            _check_losses(fixture, model, case, precision)
            groups = _check_decay(fixture, model, case)
            _check_steps(fixture, model, groups, case, precision)
            for file in fixture.files(f"after_.*_{case}.*"):
                check_trained(fixture, file, dict(model.named_parameters()), precision)


def _started(fixture: Fixture, case: str, precision: str) -> Classifier:
    """A classifier that starts from the recorded weights and head."""
    stated = fixture.value(case)
    pool: Pool = "mean" if stated["global_pool"] else "cls"
    weights = fixture.arrays("checkpoint.safetensors")
    model, fit = classifier(fixture, weights, pool, PRECISIONS[precision])
    for key, names in (("missing_keys", fit.fresh), ("unexpected_keys", fit.unused)):
        same = set(names) == set(stated[key])
        fixture.true("what of the weights matched", f"{case} {key}", same, "differs")
    wanted = fixture.arrays("expected.safetensors")["pos_embed"]
    limit = fixture.limits(precision).activation
    fixture.close("positions", case, model.pos_embed, wanted, limit, precision)
    state = model.state_dict()
    head = fixture.arrays("head.safetensors")
    state |= {name: array for name, array in head.items() if name in state}
    model.load_state_dict(state)
    return model


def _check_scores(fixture: Fixture, model: Classifier, case: str, precision: str) -> None:
    images = fixture.arrays("inputs.safetensors")["images"].to(PRECISIONS[precision])
    expected = fixture.arrays("expected.safetensors")
    limit = fixture.limits(precision).activation
    features = model.forward_head(model.encoded(images), pre_logits=True)
    for name, got in (("features", features), ("logits", model(images))):
        key = f"{case}.{name}"
        fixture.close("features and scores", key, got, expected[key], limit, precision)


def _check_losses(fixture: Fixture, model: Classifier, case: str, precision: str) -> None:
    """Soft targets, each loss, and the gradients of the plain one."""
    config = fixture.config
    limits = fixture.limits(precision)
    stated = fixture.value(case)
    expected = fixture.arrays("expected.safetensors")
    inputs = fixture.arrays("inputs.safetensors")
    images = inputs["images"].to(PRECISIONS[precision])
    labels = inputs["labels"]
    targets = mixed_targets(
        labels,
        labels.flip(0),
        Mix(config["lam"], None),
        num_classes=config["num_classes"],
        smoothing=config["smoothing"],
    )
    wanted = expected["soft_targets"]
    fixture.close("targets", case, targets, wanted, Limit(1e-6, 0.0), precision)
    plain = images_of(images, labels)
    soft = replace(plain, targets=wanted.to(images.dtype))
    for name, batch, smoothing in (
        ("cross_entropy", plain, 0.0),
        ("label_smoothing_loss", plain, config["smoothing"]),
        ("soft_target_loss", soft, 0.0),
    ):
        loss = cross_entropy(model(images), batch, smoothing) / len(labels)
        fixture.close("losses", f"{case} {name}", loss, stated[name], limits.loss, precision)
        if name == "cross_entropy":
            grads = gradients(model, loss)
            check_grads(fixture, case, grads, stated, precision)
            prefix = f"{case}.grad."
            of_case = {
                key.removeprefix(prefix): array
                for key, array in expected.items()
                if key.startswith(prefix)
            }
            fixture.all_close("gradients", grads, of_case, limits.gradient, precision)


def _check_decay(fixture: Fixture, model: Classifier, case: str) -> list[dict[str, Any]]:
    """The groups of parameters: which scale of the rate and which decay each has."""
    config = fixture.config
    stated = fixture.value(case)
    groups = param_groups(model, config["weight_decay"], config["layer_decay"])

    def members(some: Sequence[Mapping[str, Any]], key: str) -> dict[tuple[float, float], set[str]]:
        return {(each["lr_scale"], each["weight_decay"]): set(each[key]) for each in some}

    same = members(groups, "param_names") == members(stated["param_groups"], "params")
    fixture.true("layer decay groups", case, same, "differ from those recorded")
    each = {}
    for group in groups:
        for name in group["param_names"]:
            each[name] = [group["lr_scale"], group["weight_decay"]]
    same = each == stated["param_scale_and_wd"]
    fixture.true("layer decay groups", f"{case} each", same, "differ")
    return groups


def _check_steps(
    fixture: Fixture, model: Classifier, groups: list[dict[str, Any]], case: str, precision: str
) -> None:
    """The recorded training steps: losses and rates of each, of each group at the last."""
    config = fixture.config
    limit = fixture.limits(precision).loss
    stated = fixture.value(case)
    inputs = fixture.arrays("inputs.safetensors")
    optimizer = kernels.adamw(groups, betas=tuple(config["adam_betas"]))
    objective = ClassifierLoss(smoothing=config["smoothing"])
    per_epoch = len(stated["train_rows"])
    for index, row in enumerate(stated["train_rows"]):
        lr = rate_at(config, config["start_epoch"] * per_epoch + index, per_epoch)
        images = inputs["train_images"][index].to(PRECISIONS[precision])
        batch = images_of(images, inputs["train_labels"][index])
        loss = objective(model, None, batch, 0.0)["classification"] / len(batch)
        loss.backward()
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        clip(grads, norm, config["clip_grad"])
        set_rates(optimizer.param_groups, lr=lr, weight_decay=config["weight_decay"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for key, got in (("loss", loss), ("lr", lr)):
            name = f"{case} {key} {index}"
            fixture.close("training losses, rates", name, got, row[key], limit, precision)
    rates = [group["lr"] for group in optimizer.param_groups]
    wanted = stated["group_lrs_at_last_step"]
    fixture.close("rates of the groups", case, rates, wanted, limit, precision)


def linprobe_lars(fixture: Fixture) -> None:
    """A linear probe: features, steps of LARS, the norm's statistics, then scores."""
    config = fixture.config
    for precision, dtype in PRECISIONS.items():
        limits = fixture.limits(precision)
        expected = fixture.arrays("expected.safetensors")
        inputs = fixture.arrays("inputs.safetensors")
        weights = fixture.arrays("vit.safetensors")
        model, _ = classifier(fixture, weights, "mean" if config["global_pool"] else "cls", dtype)
        model.eval()

        def encode(images: Tensor, model: Classifier = model) -> Tensor:
            return model.forward_head(model.encoded(images), pre_logits=True)

        head = probe_head(config["embed_dim"], config["num_classes"]).to(dtype)
        linear: Any = head[1]  # type: ignore[index]
        linear.load_state_dict({"weight": weights["head.weight"], "bias": weights["head.bias"]})
        groups = param_groups(head, config["weight_decay"], 1.0)
        lars = config["lars"]
        optimizer = LARS(groups, momentum=lars["momentum"], trust=lars["trust_coefficient"])
        objective = ProbeLoss(encode)
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
        limits = fixture.limits(precision)
        expected = fixture.arrays("expected.safetensors")
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


def mixup_cutmix(fixture: Fixture) -> None:
    """Images and targets mixed as drawn."""
    config = fixture.config
    for precision, dtype in PRECISIONS.items():
        numbers = [
            float(number) for number in re.findall(r"\d\S*e-\d+", fixture.tolerance(precision))
        ]
        if not numbers:
            raise Unusable(f"states no limits for {precision}")
        inputs = fixture.arrays("inputs.safetensors")
        expected = fixture.arrays("expected.safetensors")
        images = inputs["images"].to(dtype)
        labels = inputs["labels"]
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
