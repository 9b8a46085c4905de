"""Folders of recorded numbers of fine-tuning, probes, k-NN, rollout and mixing, made from plain
mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import reference
from reference import Sizes, State

Write = Callable[..., Path]


def _smooth(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    target = torch.full((len(labels), classes), smoothing / classes, dtype=torch.float64)
    return target.scatter(1, labels[:, None], 1 - smoothing + smoothing / classes)


def _mixed_target(labels: Tensor, classes: int, smoothing: float, share: float) -> Tensor:
    smooth = _smooth(labels, classes, smoothing)
    return smooth * share + smooth.flip(0) * (1 - share)


def _cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    return -(target * scores.log_softmax(dim=1)).sum(dim=1).mean()


def vit_finetune(folder: Path, write: Write) -> Path:
    old, sizes = Sizes(image=(12, 12), patch=4), Sizes(image=(20, 20), patch=4)
    classes, smoothing, decay, rate, layer_decay = 5, 0.2, 0.1, 0.003, 0.6
    config: dict[str, Any] = {
        "img_size": 20,
        "patch_size": 4,
        "embed_dim": sizes.width,
        "depth": sizes.depth,
        "num_heads": sizes.heads,
        "num_classes": classes,
        "batch": 3,
        "layer_decay": layer_decay,
        "weight_decay": decay,
        "lr": rate,
        "min_lr": 1e-5,
        "warmup_epochs": 2,
        "epochs": 5,
        "start_epoch": 1,
        "clip_grad": 0.7,
        "smoothing": smoothing,
        "mlp_ratio": 4,
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "drop_path": 0.0,
        "lam": 0.85,
        "adam_betas": [0.8, 0.99],
        "adam_eps": 1e-8,
        "accum_iter": 1,
    }
    checkpoint = reference.weights(old, 3)
    whole = reference.classifier_weights(sizes, classes, 4)
    generator = torch.Generator().manual_seed(5)
    head = {name: value for name, value in whole.items() if name.startswith("head")}
    head |= {
        f"fc_norm.{k}": torch.rand(sizes.width, generator=generator) for k in ("weight", "bias")
    }
    images, labels = torch.randn(3, 3, 20, 20, generator=generator), torch.tensor([4, 0, 2])
    train = torch.randn(2, 3, 3, 20, 20, generator=generator), torch.tensor([[1, 2, 3], [0, 4, 1]])
    patches = checkpoint["pos_embed"][:, 1:].double().unflatten(1, (3, 3)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(5, 5), mode="bicubic", align_corners=False)
    table = torch.cat(
        [checkpoint["pos_embed"][:, :1].double(), patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1
    )
    targets = _mixed_target(labels, classes, smoothing, 0.85)
    expected: State = {"pos_embed": table, "soft_targets": targets}
    values, files = {}, {}
    for case in ("gap", "cls"):
        own = ("fc_norm.weight", "fc_norm.bias") if case == "gap" else ("norm.weight", "norm.bias")
        names = [name for name in whole if not name.startswith("norm")] + list(own)
        state = {
            name: (head | checkpoint)[name] if name in head else checkpoint[name] for name in names
        }
        state = {
            name: value.double().clone() for name, value in (state | {"pos_embed": table}).items()
        }
        state = {name: value.requires_grad_() for name, value in state.items()}
        features, scores = reference.classify(state, sizes, images.double())
        loss = _cross_entropy(scores, _smooth(labels, classes, 0.0))
        grads = reference.gradients(state, loss)
        expected |= {f"{case}.features": features, f"{case}.logits": scores}
        expected |= {
            f"{case}.grad.{name}": grads[name] for name in ("pos_embed", "head.bias", own[0])
        }
        norms = {name: grad.norm().item() for name, grad in grads.items()}
        losses = {
            "cross_entropy": loss,
            "label_smoothing_loss": _cross_entropy(scores, _smooth(labels, classes, smoothing)),
            "soft_target_loss": _cross_entropy(scores, targets),
        }
        groups, each = _layer_groups(state, sizes.depth, layer_decay, decay)
        rows, last = _train(state, sizes, train, config, each)
        drop = [name for name in checkpoint if name not in whole] + (
            ["norm.weight", "norm.bias"] * (case == "gap")
        )
        values[case] = {
            "global_pool": case == "gap",
            **{name: value.item() for name, value in losses.items()},
            "grad_norm_total": math.sqrt(sum(norm**2 for norm in norms.values())),
            "grad_norm": norms,
            "missing_keys": [name for name in names if name.startswith(("head", "fc_norm"))],
            "unexpected_keys": drop,
            "param_groups": groups,
            "param_scale_and_wd": each,
            "train_rows": rows,
            "group_lrs_at_last_step": [last * group["lr_scale"] for group in groups],
        }
        files[f"after_2_steps_{case}.safetensors"] = ("weights after the steps", state)
    inputs = {
        "images": images,
        "labels": labels,
        "train_images": train[0],
        "train_labels": train[1],
    }
    files |= {
        "checkpoint.safetensors": ("an encoder and its decoder", checkpoint),
        "head.safetensors": ("new", head),
        "inputs.safetensors": ("inputs", inputs),
        "expected.safetensors": ("expected", expected),
    }
    return write(folder, "vit-finetune", config=config, values=values, files=files)


def _layer_groups(
    state: State, depth: int, layer_decay: float, decay: float
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    each = {}
    order = [
        "cls_token",
        "pos_embed",
        *(name for name in state if name not in ("cls_token", "pos_embed")),
    ]
    for name in sorted(
        order, key=lambda name: (not name.startswith(("cls", "pos", "patch")), "blocks" not in name)
    ):
        layer = depth + 1
        if name.startswith(("cls", "pos", "patch")):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        decays = state[name].ndim > 1 and name not in ("cls_token", "pos_embed")
        scale, weight_decay = layer_decay ** (depth + 1 - layer), decay if decays else 0.0
        group = groups.setdefault(
            (layer, decays), {"lr_scale": scale, "weight_decay": weight_decay, "params": []}
        )
        group["params"].append(name)
        each[name] = [scale, weight_decay]
    return list(groups.values()), each


def _train(
    state: State,
    sizes: Sizes,
    data: tuple[Tensor, Tensor],
    config: dict[str, Any],
    each: dict[str, list[float]],
) -> tuple[list[dict[str, float]], float]:
    optimizers = {
        key: reference.AdamW(key, tuple(config["adam_betas"]))
        for key in (0.0, config["weight_decay"])
    }
    rows, lr = [], 0.0
    for index, (images, labels) in enumerate(zip(*data, strict=True)):
        lr = reference.lr_at(
            config["start_epoch"] + index / len(data[0]),
            warmup=config["warmup_epochs"],
            epochs=config["epochs"],
            lr=config["lr"],
            min_lr=config["min_lr"],
        )
        _, scores = reference.classify(state, sizes, images.double())
        loss = _cross_entropy(scores, _smooth(labels, config["num_classes"], config["smoothing"]))
        grads = reference.gradients(state, loss)
        norm = math.sqrt(sum(grad.square().sum().item() for grad in grads.values()))
        for name, grad in grads.items():
            grads[name] = grad * min(1.0, config["clip_grad"] / (norm + 1e-6))
        for optimizer in optimizers.values():
            optimizer.steps += 1
        for name, grad in grads.items():
            optimizer = optimizers[each[name][1]]
            optimizer.steps -= 1  # one step for all of its parameters
            flat = state[name].detach().view(-1) if each[name][1] == 0.0 else state[name].detach()
            optimizer.step({name: flat}, {name: grad.view(flat.shape)}, lr * each[name][0])
        rows.append({"loss": loss.item(), "epoch_1000x": 0, "lr": lr})
    return rows, lr


def linprobe_lars(folder: Path, write: Write) -> Path:
    sizes, classes, rate = Sizes(image=(8, 8)), 4, 0.3
    config = {
        "img_size": 8,
        "patch_size": 4,
        "embed_dim": sizes.width,
        "depth": sizes.depth,
        "num_heads": sizes.heads,
        "num_classes": classes,
        "batch": 6,
        "lr": rate,
        "weight_decay": 0.02,
        "min_lr": 0.01,
        "warmup_epochs": 1,
        "epochs": 4,
        "global_pool": False,
        "mlp_ratio": 4,
        "layer_norm_eps": 1e-6,
        "iters_per_epoch": 2,
        "bn_momentum": 0.1,
        "lars": {"momentum": 0.8, "trust_coefficient": 0.002},
    }
    vit = reference.classifier_weights(sizes, classes, 7)
    state, generator = reference.double(vit), torch.Generator().manual_seed(8)
    images = torch.randn(3, 6, 3, 8, 8, generator=generator)
    labels = torch.randint(classes, (3, 6), generator=generator)
    weight, bias = state["head.weight"].detach(), state["head.bias"].detach()
    mean, variance = torch.zeros(sizes.width).double(), torch.ones(sizes.width).double()
    moved, all_features, rows = (
        {"weight": torch.zeros_like(weight), "bias": torch.zeros_like(bias)},
        [],
        [],
    )
    for step in range(3):
        lr = reference.lr_at(step / 2, warmup=1, epochs=4, lr=rate, min_lr=0.01)
        features, _ = reference.classify(state, sizes, images[step].double())
        all_features.append(features)
        middle, spread = features.mean(0), features.var(0, unbiased=False)
        x = (features - middle) / (spread + 1e-6).sqrt()
        mean, variance = 0.9 * mean + 0.1 * middle, 0.9 * variance + 0.1 * features.var(0)
        weight.requires_grad_(), bias.requires_grad_()
        loss = _cross_entropy(x @ weight.T + bias, _smooth(labels[step], classes, 0.0))
        grads = torch.autograd.grad(loss, (weight, bias))
        weight, bias = weight.detach(), bias.detach()
        lars_step(weight, grads[0], moved["weight"], lr, 0.02, 0.8, 0.002)
        lars_step(bias, grads[1], moved["bias"], lr, 0.02, 0.8, 0.002)
        rows.append({"loss": loss.item(), "epoch_1000x": 0, "lr": lr})
    scores = ((all_features[0] - mean) / (variance + 1e-6).sqrt()) @ weight.T + bias
    expected = {
        "features": torch.stack(all_features),
        "head.1.weight": weight,
        "head.1.bias": bias,
        "head.0.running_mean": mean,
        "head.0.running_var": variance,
        "head.0.num_batches_tracked": torch.tensor(3),
        "eval_logits": scores,
        **{f"mu.{name}": value for name, value in moved.items()},
    }
    files = {
        "vit.safetensors": ("a classifier", vit),
        "expected.safetensors": ("expected", expected),
        "inputs.safetensors": ("inputs", {"train_images": images, "train_labels": labels}),
    }
    return write(folder, "linprobe-lars", config=config, values={"train_rows": rows}, files=files)


def lars_step(
    param: Tensor,
    grad: Tensor,
    moved: Tensor,
    lr: float,
    decay: float,
    momentum: float,
    trust: float,
) -> None:
    """In place, as the paper writes it."""
    if param.ndim > 1:
        grad = grad + decay * param
        long, way = param.norm().item(), grad.norm().item()
        grad = grad * (trust * long / way if long > 0 and way > 0 else 1.0)
    moved.mul_(momentum).add_(grad)
    param.sub_(lr * moved)


def lars_steps(folder: Path, write: Write) -> Path:
    generator = torch.Generator().manual_seed(9)
    config = {"lr": 0.4, "weight_decay": 0.05, "momentum": 0.7, "trust_coefficient": 0.01}
    shapes = {
        "matrix": (3, 4),
        "vector": (5,),
        "zeros": (2, 2),
        "tensor": (2, 3, 1, 2),
        "left": (2, 3),
    }
    params = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    params["zeros"].zero_()
    grads = {
        k: torch.randn(2, *shape, generator=generator) for k, shape in shapes.items() if k != "left"
    }
    state, moved, expected = {k: v.double() for k, v in params.items()}, {}, {}
    for step in range(2):
        for name, grad in grads.items():
            buffer = moved.setdefault(name, torch.zeros_like(state[name]))
            lars_step(state[name], grad[step].double(), buffer, 0.4, 0.05, 0.7, 0.01)
        expected |= {f"step{step}.{name}": value.clone() for name, value in state.items()}
    files = {
        "params.safetensors": ("start", params),
        "grads.safetensors": ("gradients", grads),
        "expected.safetensors": ("after each step", expected),
    }
    return write(folder, "lars-steps", config=config, files=files)


def knn(folder: Path, write: Write) -> Path:
    generator = torch.Generator().manual_seed(10)
    config = {"n_train": 60, "n_test": 31, "dim": 9, "num_classes": 7, "ks": [1, 4, 30], "T": 0.1}
    train, test = torch.randn(60, 9, generator=generator), torch.randn(31, 9, generator=generator)
    train_labels, labels = (torch.randint(7, (n,), generator=generator) for n in (60, 31))
    similarity = F.normalize(test.double()) @ F.normalize(train.double()).T
    expected, accuracy = {}, {}
    for k in config["ks"]:
        scores = torch.zeros(31, 7, dtype=torch.float64)
        for row in range(31):
            for column in similarity[row].argsort(descending=True)[:k].tolist():
                scores[row, train_labels[column]] += math.exp(similarity[row, column] / 0.1)
        guess = scores.argmax(dim=1)
        five = [
            int(labels[row])
            in [c for c in scores[row].argsort(descending=True)[:5].tolist() if scores[row, c] > 0]
            for row in range(31)
        ]
        expected |= {f"k{k}.scores": scores, f"k{k}.prediction": guess}
        accuracy[str(k)] = {
            "top1": 100 * (guess == labels).double().mean().item(),
            "top5": 0.0,
            "top5_counting_only_positive_scores": 100 * sum(five) / 31,
            "smallest_gap_between_best_two_scores": 0.0,
        }
    inputs = {
        "train_features": train,
        "train_labels": train_labels,
        "test_features": test,
        "test_labels": labels,
    }
    files = {"inputs.safetensors": ("inputs", inputs), "expected.safetensors": ("per k", expected)}
    return write(folder, "knn", config=config, values={"accuracy": accuracy}, files=files)


def rollout(folder: Path, write: Write) -> Path:
    sizes, classes = Sizes(image=(16, 16)), 3
    config = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": sizes.width,
        "depth": sizes.depth,
        "num_heads": sizes.heads,
        "num_classes": classes,
        "mlp_ratio": 4,
        "qkv_bias": True,
        "use_cls_token": True,
        "layer_norm_eps": 1e-6,
    }
    vit = reference.classifier_weights(sizes, classes, 11)
    for index in range(sizes.depth):  # biases of keys are 0 in that family
        vit[f"blocks.{index}.attn.qkv.bias"][sizes.width : 2 * sizes.width] = 0
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(12))
    maps: list[Tensor] = []
    features, scores = reference.classify(reference.double(vit), sizes, images.double(), maps)
    expected = {"features": features, "logits": scores}
    for image in range(2):
        layers = torch.stack([each[image] for each in maps])
        expected[f"image{image}.attention"] = layers
        expected[f"image{image}.textbook_mean"] = _rolled(layers, "mean", 0.0, published=False)
        for fusion in ("mean", "max", "min"):
            for share in (0.0, 0.3):
                name = f"image{image}.{fusion}.discard{share}"
                expected[name] = _rolled(layers, fusion, share, published=True)
                expected[f"{name}.layer1"] = _rolled(layers[1:2], fusion, share, published=True)
    theirs: State = {}
    for name, value in vit.items():
        if name.endswith("qkv.bias"):
            query, _, last = value.chunk(3)
            (
                theirs[name.replace("qkv.bias", "q_bias")],
                theirs[name.replace("qkv.bias", "v_bias")],
            ) = query, last
        else:
            theirs[name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name] = value
    files = {
        "vit.safetensors": ("that family's names", theirs),
        "inputs.safetensors": ("inputs", {"images": images}),
        "expected.safetensors": ("expected", expected),
    }
    return write(folder, "rollout", config=config, files=files)


def _rolled(layers: Tensor, fusion: str, share: float, *, published: bool) -> Tensor:
    tokens = layers.shape[-1]
    result = torch.eye(tokens, dtype=torch.float64)
    for layer in layers:
        fused = {"mean": layer.mean(0), "max": layer.max(0).values, "min": layer.min(0).values}[
            fusion
        ].flatten()
        for place in fused.argsort()[: int(tokens**2 * share)].tolist():
            if place:
                fused[place] = 0.0
        mixed = (fused.view(tokens, tokens) + torch.eye(tokens)) / 2
        by = mixed.sum(dim=1)
        result = (mixed / (by[None, :] if published else by[:, None])) @ result
    seen = result[0, 1:].view(4, 4)
    return seen / seen.max()


def mixup_cutmix(folder: Path, write: Write) -> Path:
    generator = torch.Generator().manual_seed(13)
    images, labels = torch.randn(6, 3, 9, 9, generator=generator), torch.tensor([0, 3, 3, 1, 2, 0])
    config = {
        "num_classes": 4,
        "label_smoothing": 0.3,
        "size": 9,
        "mode": "batch",
        "correct_lam": True,
    }
    drawn = {
        "mixup": {"lam_drawn": 0.6, "use_cutmix": False, "lam_used": 0.6},
        "cutmix": {
            "lam_drawn": 0.5,
            "use_cutmix": True,
            "bbox_yl_yh_xl_xh": [2, 7, 0, 6],
            "lam_used": 1 - 30 / 81,
        },
    }
    blended = images.double() * 0.6 + images.double().flip(0) * 0.4
    cut = images.double().clone()
    cut[:, :, 2:7, 0:6] = images.double().flip(0)[:, :, 2:7, 0:6]
    expected = {"mixup.images": blended, "cutmix.images": cut}
    for case, row in drawn.items():
        expected[f"{case}.targets"] = _mixed_target(labels, 4, 0.3, row["lam_used"]).float()
    files = {
        "inputs.safetensors": ("inputs", {"images": images, "labels": labels}),
        "expected.safetensors": ("expected", expected),
    }
    limits = ("targets 1e-6 (float32 arithmetic), pictures 1e-9", "1e-6")
    return write(
        folder,
        "mixup-cutmix",
        config=config,
        values={"drawn": drawn},
        files=files,
        tolerance=limits,
    )


MAKERS: dict[str, Callable[[Path, Write], Path]] = {
    "vit-finetune": vit_finetune,
    "linprobe-lars": linprobe_lars,
    "lars-steps": lars_steps,
    "knn": knn,
    "rollout": rollout,
    "mixup-cutmix": mixup_cutmix,
}
