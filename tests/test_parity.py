"""tools/check_parity.py passes on numbers made another way, of sizes it never saw, and fails where
one is off.

The folders are written here from `reference` (plain float64 mathematics) in the format of the
recorded ones. Where the recorded ones are at hand they are checked too.
"""

import functools
import hashlib
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parity_detection
import parity_downstream
import parity_pixio
import parity_segmentation
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import reference
import relatives
from parity.report import CHECKS
from rcmae.models.bootmae import BootstrappedAutoencoder
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import Heads, MaskedAutoencoder
from reference import Sizes
from tools import check_parity as tool

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
FLOAT64 = "|difference| <= 1e-11 + 1e-9 * largest magnitude of that array (and so on)"
FLOAT32 = (
    "an independent one was off by at most 3e-7; suggested limits 1e-5, 1e-5, 1e-4 and "
    "5e-4. leave a third out"
)
TRAINED64 = (
    "weights after all steps: |difference| <= 1e-10 + 1e-8 * largest magnitude of that "
    "array, losses relative 1e-9"
)
TRAINED32 = (
    "off by at most 8e-7 without (1.3e-4 with); suggested limits 1e-5 (1e-3) and 1e-5. "
    "leave that third out"
)


# ------------------------------------------------------------------------------------ the generator


def write(
    folder: Path,
    name: str,
    *,
    config: dict[str, Any] | None = None,
    values: dict[str, Any] | None = None,
    files: dict[str, tuple[str, dict[str, Tensor]]] | None = None,
    tolerance: tuple[str, str] = (FLOAT64, FLOAT32),
    meanings: dict[str, str] | None = None,
) -> Path:
    """A folder of the recorded format; files: name -> (meaning, arrays); meanings: of values."""
    folder.mkdir(parents=True)
    listed = {}
    for file, (meaning, arrays) in (files or {}).items():
        save_file(
            {key: array.detach().clone().contiguous() for key, array in arrays.items()},
            folder / file,
        )
        listed[file] = {
            "meaning": meaning,
            "sha256": hashlib.sha256((folder / file).read_bytes()).hexdigest(),
        }
    tree = {
        "fixture": name,
        "config": config or {},
        "tolerance": {"float64": tolerance[0], "float32": tolerance[1]},
        "files": listed,
        "values": {
            key: {"value": value, "meaning": (meanings or {}).get(key, "as named")}
            for key, value in (values or {}).items()
        },
    }
    (folder / "fixture.json").write_text(json.dumps(tree))
    return folder


def model_config(sizes: Sizes, ratio: float, kept: int) -> dict[str, Any]:
    return {
        "img_size": list(sizes.image) if sizes.image[0] != sizes.image[1] else sizes.image[0],
        "patch_size": sizes.patch,
        "embed_dim": sizes.width,
        "depth": sizes.depth,
        "num_heads": sizes.heads,
        "decoder_embed_dim": sizes.decoder_width,
        "decoder_depth": sizes.decoder_depth,
        "decoder_num_heads": sizes.decoder_heads,
        "mask_ratio": ratio,
        "mlp_ratio": 4,
        "in_chans": sizes.channels,
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "num_patches": sizes.patches,
        "len_keep": kept,
    }


def norms(grads: reference.State) -> dict[str, Any]:
    each = {name: grad.norm().item() for name, grad in grads.items()}
    return {"grad_norm_total": sum(value**2 for value in each.values()) ** 0.5, "grad_norm": each}


def trainable(state: reference.State) -> reference.State:
    return {name: array for name, array in state.items() if "pos_embed" not in name}


def mae_forward(folder: Path) -> Path:
    sizes, ratio, kept = Sizes(image=(20, 30), patch=5, depth=1, decoder_depth=3), 0.6, 9
    config = model_config(sizes, ratio, kept)
    images, noise = reference.inputs(sizes, 2, seed=20)
    start = reference.weights(sizes, 21)
    state = reference.double(start, grad=True)
    found = reference.forward(state, sizes, images.double(), noise, kept)
    cases, grads = {}, {}
    for norm_pix in (False, True):
        loss, _ = reference.losses(state, None, sizes, images.double(), noise, kept, norm_pix)
        grads[norm_pix] = reference.gradients(state, loss)
        cases[f"norm_pix={norm_pix}"] = {"loss": loss.item(), **norms(grads[norm_pix])}
    config["train"] = {
        "lr": 0.002,
        "min_lr": 1e-4,
        "warmup_epochs": 2,
        "epochs": 5,
        "weight_decay": 0.1,
        "start_epoch": 1,
        "iters": 2,
        "accum_iter": 1,
        "norm_pix_loss": False,
    }
    batches = [reference.inputs(sizes, 2, seed=30 + step) for step in range(4)]
    optimizer, rows = reference.AdamW(0.1), []
    for step, (step_images, step_noise) in enumerate(batches):
        lr = reference.lr_at(1 + step / 2, warmup=2, epochs=5, lr=0.002, min_lr=1e-4)
        loss, _ = reference.losses(
            state, None, sizes, step_images.double(), step_noise, kept, False
        )
        optimizer.step(state, reference.gradients(state, loss), lr)
        rows.append({"train_loss": loss.item(), "lr": lr, "epoch_1000x": 0})
    pixels = found["pred"].detach().unflatten(2, (5, 5, 3))
    picture = torch.zeros(2, 3, 20, 30, dtype=torch.float64)
    for index in range(sizes.patches):
        top, left = index // 6 * 5, index % 6 * 5
        picture[:, :, top : top + 5, left : left + 5] = pixels[:, index].permute(0, 3, 1, 2)
    expected = {key: found[key] for key in ("latent", "pred", "ids_restore")}
    expected |= {"mask": found["mask"].float(), "unpatchified_pred": picture}
    inputs = {"images": images, "noise": noise}
    inputs |= {
        "train_images": torch.stack([b[0] for b in batches]),
        "train_noise": torch.stack([b[1] for b in batches]),
    }
    files = {
        "model.safetensors": ("state_dict", start),
        "inputs.safetensors": ("inputs", inputs),
        "expected.safetensors": ("expected", expected),
        "grads.safetensors": ("gradient of the loss, norm_pix_loss=False", grads[False]),
        "after_4_steps.safetensors": ("weights after 4 steps", trainable(state)),
    }
    return write(
        folder,
        "mae-forward",
        config=config,
        values={"losses": cases, "train_rows": rows},
        files=files,
    )


def rcmae_forward(folder: Path) -> Path:
    sizes, ratio, kept = Sizes(image=(16, 16), patch=4, decoder_depth=1), 0.5, 8
    images, noise = reference.inputs(sizes, 3, seed=40)
    starts = reference.weights(sizes, 41), reference.weights(sizes, 42)
    state, teacher = reference.double(starts[0], grad=True), reference.double(starts[1])
    found = reference.forward(state, sizes, images.double(), noise, kept)
    target = reference.patchify(images.double(), sizes.patch)
    expected = {key: found[key] for key in ("latent", "ids_shuffle", "ids_restore")}
    expected |= {"mask": found["mask"].float(), "student_pred": found["pred"], "target": target}
    expected["teacher_pred"] = reference.forward(teacher, sizes, images.double(), noise, kept)[
        "pred"
    ]
    expected["target_norm_pix"] = reference.normalised(target)
    cases, grads = {}, {}
    for norm_pix, gamma in ((True, 0.0), (True, 0.3), (False, 0.3), (False, 4.0)):
        parts = reference.losses(state, teacher, sizes, images.double(), noise, kept, norm_pix)
        grads[norm_pix, gamma] = reference.gradients(state, parts[0] + gamma * parts[1])
        cases[f"norm_pix={norm_pix},gamma={gamma}"] = {
            "norm_pix_loss": norm_pix,
            "gamma": gamma,
            "mae_loss": parts[0].item(),
            "consistency_loss": parts[1].item(),
            "total_loss": (parts[0] + gamma * parts[1]).item(),
            **norms(grads[norm_pix, gamma]),
        }
    few = {
        name: grads[False, 0.3][name]
        for name in ("cls_token", "norm.weight", "blocks.1.attn.qkv.bias")
    }
    files = {
        "student.safetensors": ("student", starts[0]),
        "teacher.safetensors": ("teacher", starts[1]),
        "inputs.safetensors": ("inputs", {"images": images, "noise": noise}),
        "expected.safetensors": ("expected", expected),
        "grads.safetensors": (
            "d total_loss for norm_pix_loss=True, gamma=0.3; every parameter",
            grads[True, 0.3],
        ),
        "grads_no_norm_pix.safetensors": (
            "the same for norm_pix_loss=False, gamma=0.3: a few",
            few,
        ),
    }
    return write(
        folder,
        "rcmae-forward",
        config=model_config(sizes, ratio, kept),
        values={"cases": cases},
        files=files,
    )


def training(
    sizes: Sizes,
    config: dict[str, Any],
    batches: list[tuple[Tensor, Tensor]],
    start: reference.State,
    momenta: list[float],
) -> tuple[reference.State, reference.State, reference.AdamW, list[dict[str, float]]]:
    """Student, teacher and optimizer after all micro-steps, and a row for each optimizer step."""
    state, teacher = reference.double(start, grad=True), reference.double(start)
    optimizer, rows = reference.AdamW(config["weight_decay"]), []
    accumulation, per_epoch = config["accum_iter"], config["iters"]
    held: dict[str, Tensor] = {}
    lr = 0.0
    for micro, (images, noise) in enumerate(batches):
        if micro % accumulation == 0:
            schedule = {key: config[key] for key in ("epochs", "lr", "min_lr")}
            lr = reference.lr_at(micro / per_epoch, warmup=config["warmup_epochs"], **schedule)
        parts = reference.losses(
            state,
            teacher,
            sizes,
            images.double(),
            noise,
            config["len_keep"],
            config["norm_pix_loss"],
        )
        loss = parts[0] + config["gamma"] * parts[1]
        row = {
            "train_loss": loss.item(),
            "s_loss": parts[0].item(),
            "rec_cons_loss": parts[1].item(),
            "lr": lr,
        }
        grads = reference.gradients(state, loss / accumulation)
        held = {name: held[name] + grad if held else grad for name, grad in grads.items()}
        if last := (micro + 1) % accumulation == 0:
            optimizer.step(state, held, lr)
            held = {}
        reference.move(teacher, state, momenta[micro])
        if last:
            for name, arrays in (("student_l2", state), ("teacher_l2", teacher)):
                row[name] = (
                    torch.stack([array.detach().norm() for array in arrays.values()]).norm().item()
                )
            rows.append(row | {"momentum": momenta[micro]})
    return state, teacher, optimizer, rows


def train_config(sizes: Sizes, **changed: Any) -> dict[str, Any]:
    return (
        model_config(sizes, 0.75, sizes.patches // 4)
        | {
            "gamma": 0.7,
            "norm_pix_loss": True,
            "epochs": 5,
            "warmup_epochs": 1,
            "lr": 0.003,
            "min_lr": 1e-5,
            "weight_decay": 0.05,
            "momentum_teacher": 0.8,
            "betas": [0.9, 0.95],
            "adam_eps": 1e-8,
        }
        | changed
    )


def rcmae_train(folder: Path) -> Path:
    sizes = Sizes(image=(16, 16), decoder_depth=1)
    config = train_config(sizes, iters=2, accum_iter=1)
    batches = [reference.inputs(sizes, 2, seed=50 + step) for step in range(6)]
    start = reference.weights(sizes, 51)
    schedule = [reference.momentum_at(place, 10, 0.8) for place in range(10)]
    inputs = {
        "images": torch.stack([b[0] for b in batches]),
        "noise": torch.stack([b[1] for b in batches]),
    }
    files = {
        "init.safetensors": ("initial", start),
        "inputs.safetensors": ("one batch a step", inputs),
    }
    values: dict[str, Any] = {"momentum_schedule": schedule}
    for case, momenta in (
        ("official", [schedule[step % 2] for step in range(6)]),
        ("global_step", schedule[:6]),
    ):
        state, teacher, optimizer, values[f"{case}_steps"] = training(
            sizes, config, batches, start, momenta
        )
        files[f"{case}_student.safetensors"] = (f"student, case {case}", trainable(state))
        files[f"{case}_teacher.safetensors"] = (f"teacher, case {case}", trainable(teacher))
        if case == "official":
            moments = {
                f"mask_token.{key}": kind["mask_token"]
                for key, kind in moments_of(optimizer).items()
            }
            files["official_adamw_state.safetensors"] = ("moments", moments)
    names = {True: [], False: []}
    for name, array in trainable(start).items():
        names[reference.decays(name, array)].append(name)
    values |= {"decay": names[True], "no_decay": names[False]}
    return write(
        folder,
        "rcmae-train",
        config=config,
        values=values,
        files=files,
        tolerance=(TRAINED64, TRAINED32),
    )


def moments_of(optimizer: reference.AdamW) -> dict[str, reference.State]:
    return {"exp_avg": optimizer.first, "exp_avg_sq": optimizer.second}


def rcmae_train_accum(folder: Path) -> Path:
    sizes = Sizes(image=(16, 16), decoder_depth=1)
    config = train_config(sizes, iters=6, accum_iter=3, epochs=3)
    batches = [reference.inputs(sizes, 1, seed=60 + step) for step in range(12)]
    start = reference.weights(sizes, 61)
    published = [reference.momentum_at(micro % 6, 18, 0.8) for micro in range(12)]
    meant = [
        reference.momentum_at(micro // 3, 6, 0.8) if micro % 3 == 2 else 1.0 for micro in range(12)
    ]
    inputs = {
        "images": torch.stack([b[0] for b in batches]),
        "noise": torch.stack([b[1] for b in batches]),
    }
    files = {
        "init.safetensors": ("initial", start),
        "inputs.safetensors": ("one micro-batch a row", inputs),
    }
    values: dict[str, Any] = {"official_momentum": published, "ema_on_update_momentum": meant}
    for case, momenta in (("official", published), ("ema_on_update", meant)):
        state, teacher, _, rows = training(sizes, config, batches, start, momenta)
        values[f"{case}_rows"] = [
            {key: value for key, value in row.items() if key != "momentum"} for row in rows
        ]
        prefix = "" if case == "official" else "ema_on_update_"
        files[f"{prefix}student.safetensors"] = (f"student, case {case}", trainable(state))
        files[f"{case}_teacher.safetensors"] = (f"teacher, case {case}", trainable(teacher))
    return write(
        folder,
        "rcmae-train-accum",
        config=config,
        values=values,
        files=files,
        tolerance=(TRAINED64, TRAINED32),
    )


def lr_schedule(folder: Path) -> Path:
    case: dict[str, Any] = {
        "lr": 0.01,
        "min_lr": 1e-4,
        "warmup_epochs": 3,
        "epochs": 11,
        "iters": 7,
        "rows": [],
    }
    for epoch, step in ((0, 0), (0, 6), (2, 6), (3, 0), (10, 6)):
        lr = reference.lr_at(epoch + step / 7, warmup=3, epochs=11, lr=0.01, min_lr=1e-4)
        case["rows"].append([epoch, step, epoch + step / 7, lr, lr / 2])
    kept = [[100, 0.9, 9], [36, 0.6, 14], [196, 0.75, 49]]
    values = {"schedules": [case], "len_keep": kept}
    return write(folder, "lr-schedule", values=values, tolerance=("relative 1e-12", ""))


def momentum_schedule(folder: Path) -> Path:
    schedule = [reference.momentum_at(place, 21, 0.97) for place in range(21)]
    rows = [
        [place // 3, place % 3, schedule[place % 3], schedule[place]] for place in range(0, 21, 2)
    ]
    case = {
        "momentum_teacher": 0.97,
        "epochs": 7,
        "iters_per_epoch": 3,
        "accum_iter": 1,
        "schedule": None,
        "head": schedule[:4],
        "tail": schedule[-2:],
        "length": 21,
        "rows": rows,
    }
    values = {"cases": [case, case | {"schedule": schedule}]}
    return write(folder, "momentum-schedule", values=values, tolerance=("relative 1e-14", ""))


def pos_embed(folder: Path) -> Path:
    tables = {}
    for width, grid in ((16, 3), (40, 6)):
        table = reference.positions_exact(width, (grid, grid))
        tables |= {
            f"mae.dim{width}.grid{grid}.cls1": table,
            f"mae.dim{width}.grid{grid}.cls0": table[1:].clone(),
        }
        for family in ("bootmae", "moco-v3"):
            own = relatives.row_first(width, (grid, grid), cls_token=True)[0].double()
            tables[f"{family}.dim{width}.grid{grid}.cls1"] = own
    files = {"expected.safetensors": ("[rows, dim]", tables)}
    return write(
        folder,
        "pos-embed",
        files=files,
        tolerance=("1e-12 absolute", "stored rounded: 1e-7 absolute"),
    )


def architecture(decoder: tuple[int, int]) -> dict[str, Any]:
    """Of a tiny encoder at 64 pixels, with a decoder of this width and depth."""
    sizes = Sizes((64, 64), 16, 3, 192, 12, 3, *decoder, 4)
    shapes: dict[str, Any] = dict(reference.shapes(sizes)) | {
        "pos_embed": (1, 17, 192),
        "decoder_pos_embed": (1, 17, decoder[0]),
    }
    counts = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    trained = {name: shape for name, shape in shapes.items() if "pos_embed" not in name}
    decays = {name: len(shape) > 1 for name, shape in trained.items()}
    return {
        "state_dict": [[name, list(shape)] for name, shape in shapes.items()],
        "trainable": sum(counts[name] for name in trained),
        "all_parameters": sum(counts.values()),
        "optimizer_order": [
            [name for name, decay in decays.items() if decay == wanted] for wanted in (False, True)
        ],
    }


def arch_names(folder: Path) -> Path:
    values = {
        "architectures": {
            "rc_vit_tiny_patch16": architecture((128, 2)),
            "mae_vit_tiny_patch16_dec128d2b": architecture((128, 2)),
            "mae_vit_tiny_patch16_dec512d8b": architecture((512, 8)),
            "rc_mae_vit_tiny_patch16_dec48d1b": architecture((48, 1)),
        }
    }
    return write(
        folder, "arch-names", config={"img_size": 64}, values=values, tolerance=("exact", "exact")
    )


def published_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(array.shape)
        for name, array in model.state_dict().items()
        if "pos_embed" not in name
    }


def supmae_forward(folder: Path) -> Path:
    sizes, ratio, kept, classes, hidden, weight, temperature = (
        Sizes(image=(16, 16)),
        0.6,
        6,
        7,
        12,
        0.3,
        2.5,
    )
    config = model_config(sizes, ratio, kept)
    config |= {
        "cls_hidden_mlp": hidden,
        "nb_classes": classes,
        "global_pool": False,
        "norm_pix_loss": False,
        "temperature": temperature,
        "cls_loss_ratio": weight,
        "bn_eps": 1e-5,
        "bn_momentum": 0.1,
    }
    with torch.device("meta"):
        model = MaskedAutoencoder(
            NetworkSizes(**sizes.model()),
            heads=Heads(num_classes=classes, class_hidden=hidden, class_pool="cls"),
        )
    head = {name: shape for name, shape in published_shapes(model).items() if "cls_head" in name}
    start = reference.weights(sizes, 81) | relatives.drawn(head, 82)
    start["cls_head.1.num_batches_tracked"] = torch.tensor(4)
    images, noise = reference.inputs(sizes, 5, seed=83)
    labels = {
        "labels": torch.tensor([3, 0, 6, 6, 2]),
        "labels_one_ignored": torch.tensor([3, 0, -100, 6, 2]),
    }

    def leaves() -> reference.State:
        state = reference.double(
            {name: array for name, array in start.items() if "tracked" not in name}, grad=True
        )
        return {
            name: array.detach() if "running" in name else array for name, array in state.items()
        }

    def total(
        state: reference.State, images: Tensor, noise: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        found = reference.forward(state, sizes, images.double(), noise, kept)
        pixels, _ = reference.losses(state, None, sizes, images.double(), noise, kept, False)
        logits, mean, variance = relatives.class_logits(state, found["latent"][:, 0], True)
        loss = relatives.class_loss(logits, labels, temperature)
        return pixels + weight * loss, pixels, loss, logits, mean, variance

    state, cases = leaves(), {}
    for case, key in (("all_labelled", "labels"), ("one_ignored", "labels_one_ignored")):
        loss, pixels, of_class, logits, mean, variance = total(state, images, noise, labels[key])
        grads = reference.gradients(state, loss)
        cases[case] = {
            "labels": labels[key].tolist(),
            "rec_loss": pixels.item(),
            "cls_loss_unweighted": of_class.item(),
            "cls_loss_weighted": weight * of_class.item(),
            "total_loss": loss.item(),
            **norms(grads),
        }
        if case == "all_labelled":
            all_grads = {name: grad.detach() for name, grad in grads.items()}
    found = reference.forward(state, sizes, images.double(), noise, kept)
    linear = relatives.drawn(
        {"cls_head.weight": (classes, sizes.width), "cls_head.bias": (classes,)}, 84
    )
    feature = found["latent"][:, 0]
    expected = {key: found[key] for key in ("latent", "pred", "ids_restore")} | {
        "mask": found["mask"].float()
    }
    expected |= {
        "logits_train": logits,
        "logits_eval": relatives.class_logits(state, feature, False)[0],
        "logits_linear_head": relatives.linear(reference.double(linear), "cls_head", feature),
        "bn_after.cls_head.1.running_mean": mean,
        "bn_after.cls_head.1.running_var": variance,
        "bn_after.cls_head.1.num_batches_tracked": torch.tensor(5),
    }
    config["train"] = {
        "lr": 0.002,
        "min_lr": 1e-4,
        "warmup_epochs": 1,
        "epochs": 4,
        "weight_decay": 0.1,
        "start_epoch": 1,
        "accum_iter": 1,
        "iters": 2,
        "betas": [0.9, 0.95],
    }
    optimizer, rows, trained = reference.AdamW(0.1), [], leaves()
    batches = [reference.inputs(sizes, 5, seed=85 + step) for step in range(2)]
    train_labels = torch.tensor([[1, 2, 3, 4, 5], [0, 0, -100, 6, 1]])
    for step, batch in enumerate(batches):
        lr = reference.lr_at(1 + step / 2, warmup=1, epochs=4, lr=0.002, min_lr=1e-4)
        loss, *_, mean, variance = total(trained, *batch, train_labels[step])
        optimizer.step(trained, reference.gradients(trained, loss), lr)
        trained["cls_head.1.running_mean"], trained["cls_head.1.running_var"] = mean, variance
        rows.append({"train_loss": loss.item(), "lr": lr})
    kept_names = (
        "cls_head.1.running_mean",
        "cls_head.1.running_var",
        "cls_head.3.weight",
        "blocks.1.mlp.fc1.weight",
    )
    inputs = {"images": images, "noise": noise, **labels, "train_labels": train_labels}
    inputs |= {"train_images": torch.stack([b[0] for b in batches])}
    inputs |= {"train_noise": torch.stack([b[1] for b in batches])}
    files = {
        "model.safetensors": ("state_dict", start),
        "linear_head.safetensors": ("of a head of one layer", linear),
        "inputs.safetensors": ("inputs", inputs),
        "expected.safetensors": ("expected", expected),
        "grads.safetensors": ("gradient of the total loss, all labels valid", all_grads),
        "after_2_steps.safetensors": ("some weights", {name: trained[name] for name in kept_names}),
    }
    return write(
        folder,
        "supmae-forward",
        config=config,
        values={"losses": cases, "train_rows": rows},
        files=files,
    )


BOOT64 = "relative 1e-6 where weight_mask is on (and so on), else 1e-9"
BOOT32 = "losses relative 1e-5, gradients relative 1e-3 of the largest magnitude"


def bootmae_forward(folder: Path) -> Path:
    side, patch, width, depth, heads, narrow, decoder_depth, layers = 20, 4, 24, 3, 2, 16, 2, (1, 2)
    patches, hidden_count = 25, 18
    config = {
        "img_size": side,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "decode_dim": narrow,
        "decoder_depth": decoder_depth,
        "fea_list": list(layers),
        "mask_num": hidden_count,
        "feature_weight": 0.7,
        "epoch": 3,
        "epochs": 40,
        "model_ema_decay": 0.99,
        "model_ema_dynamic": False,
        "mlp_ratio": 4,
    }
    with torch.device("meta"):
        model = BootstrappedAutoencoder(
            NetworkSizes(
                image_size=(side, side),
                patch_size=patch,
                in_channels=3,
                embed_dim=width,
                depth=depth,
                num_heads=heads,
                decoder_dim=narrow,
                decoder_depth=decoder_depth,
                decoder_heads=heads,
            ),
            low_layer=1,
            high_layer=2,
        )
    tables = {
        "pos_embed": relatives.row_first(width, (5, 5), cls_token=True),
        "de_pos_embed": relatives.row_first(narrow, (5, 5), cls_token=True),
    }
    start, theirs = (relatives.drawn(published_shapes(model), seed) | tables for seed in (91, 92))
    generator = torch.Generator().manual_seed(93)
    images, noise = (
        torch.randn(2, 3, side, side, generator=generator),
        torch.rand(2, 5, 5, generator=generator),
    )
    boxes = torch.zeros(2, 5, 5)
    boxes[0, 1:4, 0:3], boxes[1, 0:2, 1:4] = 1, 1
    order = (boxes - noise).flatten(1).argsort(dim=1)
    state, teacher = reference.double(start, grad=True), reference.double(theirs)
    taught = relatives.boot_features(teacher, images.double(), patch, depth, heads)
    cases, used, momentum = {}, min(4 * 0.7 * 4 / 40, 0.7), 0.99 + 0.03 * (0.9999 - 0.99)
    for case, weighted, roll in (("main", True, 0), ("plain", False, 0), ("rolled", True, 3)):
        ids = order.roll(roll, dims=1)
        found = relatives.boot_forward(
            state,
            images.double(),
            ids,
            patches - hidden_count,
            patch,
            depth,
            heads,
            decoder_depth,
            layers,
        )
        hidden = torch.zeros(2, patches, dtype=torch.float64).scatter(
            1, ids[:, patches - hidden_count :], 1.0
        )
        pixels, features = relatives.boot_losses(
            *found, taught, images.double(), hidden.view(2, 5, 5), patch, weighted
        )
        grads = reference.gradients(state, pixels + used * features)
        cases[case] = {
            "weight_mask": weighted,
            "roll": roll,
            "feature_weight_used": used,
            "Rloss": pixels.item(),
            "Ploss": features.item(),
            "total_loss": (pixels + used * features).item(),
            **norms(grads),
            "ema_decay": momentum,
        }
        if case == "main":
            main, main_grads, main_hidden = found, grads, hidden.view(2, 5, 5)
    cases["no_feature"] = {"official_code_fails": "it does"}
    expected = {
        "idx_shuffle": order,
        "idx_shuffle_rolled": order.roll(3, dims=1),
        "feature_pred": main[1],
        "pixel_pred": main[0],
        "feature_target": taught,
        "loss_mask": main_hidden.float(),
        "pixel_target": relatives.boot_target(images.double(), patch),
        "weight_mask": relatives.boot_weights(main_hidden, True),
    }
    some = ("norm.bias", "lm_head.proj.weight", "blocks.0.attn.q_bias")
    after = {
        name: momentum * theirs[name].double() + (1 - momentum) * start[name].double()
        for name in some
    }
    files = {
        "model.safetensors": ("state_dict", start),
        "ema.safetensors": ("state_dict of the average", theirs),
        "inputs.safetensors": ("inputs", {"images": images, "noise": noise, "block_mask": boxes}),
        "expected.safetensors": ("expected", expected),
        "grads.safetensors": (
            "gradient of case main",
            {name: grad.detach() for name, grad in main_grads.items()},
        ),
        "ema_after_update_some.safetensors": ("after an update", after),
    }
    return write(
        folder,
        "bootmae-forward",
        config=config,
        values={"cases": cases},
        files=files,
        tolerance=(BOOT64, BOOT32),
    )


def bootmae_schedules(folder: Path) -> Path:
    rows = [
        [0, 0.9, True, 0.9],
        [50, 0.9, True, 0.94995],
        [100, 0.9, False, 0.9999],
        [250, 0.9, True, 0.999945],
    ]
    rows += [[300, 0.9, False, 0.9999], [1000, 0.9, True, 0.99999]]
    peak, end, each, warmup, total = 0.5, 0.1, 3, 6, 15
    heights = [peak * index / (warmup - 1) for index in range(warmup)]
    falls = [
        end + 0.5 * (peak - end) * (1 + math.cos(math.pi * i / (total - warmup)))
        for i in range(total - warmup)
    ]
    args = {
        "base_value": peak,
        "final_value": end,
        "epochs": 5,
        "niter_per_ep": each,
        "warmup_epochs": 2,
    }
    chance, masks = random.Random(7), torch.zeros(40, 7, 7)
    for mask in masks:
        while (left := 18 - int(mask.sum())) > 0:
            area, flat = (
                chance.uniform(3, min(left, 8)),
                math.exp(chance.uniform(math.log(0.3), -math.log(0.3))),
            )
            height, width = round(math.sqrt(area * flat)), round(math.sqrt(area / flat))
            if height >= 7 or width >= 7:
                continue
            top, start = chance.randint(0, 7 - height), chance.randint(0, 7 - width)
            tried = mask.clone()
            tried[top : top + height, start : start + width] = 1
            if 0 < int(tried.sum() - mask.sum()) <= min(left, 8):
                mask.copy_(tried)
    config = {
        "grid": 7,
        "num_mask_patches": 18,
        "max_mask_patches_per_block": 8,
        "min_mask_patches_per_block": 3,
    }
    return write(
        folder,
        "bootmae-schedules",
        config=config,
        values={"ema_decay": rows, "cosine_scheduler": {"args": args, "values": heights + falls}},
        files={"block_masks.safetensors": ("masks", {"masks": masks})},
        tolerance=("1e-12", "1e-12"),
    )


def maepriv_pretrain(folder: Path) -> Path:
    side, patch, grid, depths, heads, widths, visible = 15, 5, (3, 3), (2, 1), (3, 2), (24, 16), 4
    config = {
        "img_size": side,
        "patch_size": patch,
        "encoder_embed_dim": widths[0],
        "encoder_depth": depths[0],
        "encoder_num_heads": heads[0],
        "decoder_embed_dim": widths[1],
        "decoder_depth": depths[1],
        "decoder_num_heads": heads[1],
        "mask_ratio": 0.6,
        "mlp_ratio": 4,
        "layer_norm_eps": 1e-6,
    }
    generator = torch.Generator().manual_seed(95)
    images, noise = (
        torch.randn(3, 3, side, side, generator=generator),
        torch.rand(3, 9, generator=generator),
    )
    cases, expected, files = {}, {}, {}
    for case, has_cls, shared, normalised in (
        ("one", True, False, True),
        ("two", False, True, False),
    ):
        with torch.device("meta"):
            model = MaskedAutoencoder(
                NetworkSizes(
                    image_size=(side, side),
                    patch_size=patch,
                    in_channels=3,
                    embed_dim=widths[0],
                    depth=depths[0],
                    num_heads=heads[0],
                    decoder_dim=widths[1],
                    decoder_depth=depths[1],
                    decoder_heads=heads[1],
                    class_tokens=int(has_cls),
                ),
                decoder_cls=False,
                qkv_bias="qv",
            )
        shapes = {published_name(name): shape for name, shape in published_shapes(model).items()}
        start = relatives.drawn(shapes, 96) | {
            "encoder.pos_embed": relatives.row_first(widths[0], grid, cls_token=has_cls),
            "decoder_pos_embed": relatives.row_first(widths[1], grid, cls_token=False),
        }
        state = reference.double(start, grad=True)
        ids = (noise[:1].expand_as(noise) if shared else noise).argsort(dim=1)
        latent, pred = relatives.priv_forward(
            state, images.double(), ids, visible, patch, depths, heads
        )
        target = relatives.priv_target(images.double(), patch, normalised)
        hidden = ids[:, visible:, None].expand(-1, -1, target.shape[2])
        loss = (pred.gather(1, hidden) - target.gather(1, hidden)).square().mean()
        cases[case] = {
            "use_cls_token": has_cls,
            "batched_shuffle": shared,
            "normalized_pixel": normalised,
            "visible_size": visible,
            "loss": loss.item(),
            **norms(reference.gradients(state, loss)),
        }
        outputs = {
            "shuffle": ids.contiguous(),
            "encoder_output": latent,
            "decoder_output": pred,
            "target": target,
        }
        expected |= {f"{case}.{name}": array for name, array in outputs.items()}
        files[f"{case}.safetensors"] = ("state_dict", start)
    files |= {
        "inputs.safetensors": ("inputs", {"images": images, "noise": noise}),
        "expected.safetensors": ("expected", expected),
    }
    return write(folder, "maepriv-pretrain", config=config, values={"cases": cases}, files=files)


def published_name(name: str) -> str:
    """MAE-priv's name of a parameter."""
    head, _, rest = name.partition(".")
    decoder = {"decoder_embed": "encoder_to_decoder", "decoder_pred": "decoder.head"}
    decoder |= {"decoder_blocks": "decoder.blocks", "decoder_norm": "decoder.norm"}
    if head in decoder:
        return f"{decoder[head]}.{rest}"
    return name if name == "mask_token" else f"encoder.{name}"


MAKERS: dict[str, Callable[[Path], Path]] = {
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
    **{
        name: functools.partial(make, write=write)
        for name, make in (
            parity_downstream.MAKERS
            | parity_detection.MAKERS
            | parity_segmentation.MAKERS
            | parity_pixio.MAKERS
        ).items()
    },
}


# ---------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("name", MAKERS)
def test_numbers_made_another_way_pass(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = MAKERS[name](tmp_path / name)
    status = tool.main([str(folder)])
    assert status == 0, capsys.readouterr().out


def recorded() -> list[Path]:
    return [path for path in sorted(GOLDEN.glob("*")) if path.name in CHECKS]


def test_recorded_numbers_pass_where_they_are_at_hand(capsys: pytest.CaptureFixture[str]) -> None:
    for folder in recorded():
        assert tool.main([str(folder)]) == 0, capsys.readouterr().out


def test_every_check_is_tried_here() -> None:
    assert list(MAKERS) == list(CHECKS)


def perturb(folder: Path, file: str, key: str) -> None:
    """Move one number of an array by a thousandth of the largest, and say that the file is meant
    so.
    """
    arrays = load_file(folder / file)
    flat = arrays[key].view(-1)
    flat[flat.numel() // 2] += 1 if flat.dtype == torch.int64 else 1e-3 * flat.abs().max() + 1e-6
    save_file(arrays, folder / file)
    edit(
        folder,
        lambda tree: tree["files"][file].update(
            sha256=hashlib.sha256((folder / file).read_bytes()).hexdigest()
        ),
    )


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = json.loads((folder / "fixture.json").read_text())
    change(tree)
    (folder / "fixture.json").write_text(json.dumps(tree))


PERTURBED = [
    ("mae-forward", "expected.safetensors", "latent"),
    ("mae-forward", "expected.safetensors", "ids_restore"),
    ("mae-forward", "expected.safetensors", "unpatchified_pred"),
    ("mae-forward", "grads.safetensors", "decoder_blocks.1.attn.qkv.weight"),
    ("mae-forward", "after_4_steps.safetensors", "cls_token"),
    ("rcmae-forward", "expected.safetensors", "teacher_pred"),
    ("rcmae-forward", "expected.safetensors", "target_norm_pix"),
    ("rcmae-forward", "grads.safetensors", "mask_token"),
    ("rcmae-forward", "grads_no_norm_pix.safetensors", "norm.weight"),
    ("rcmae-forward", "student.safetensors", "pos_embed"),
    ("rcmae-train", "official_teacher.safetensors", "decoder_pred.bias"),
    ("rcmae-train", "global_step_student.safetensors", "blocks.0.attn.proj.bias"),
    ("rcmae-train", "official_adamw_state.safetensors", "mask_token.exp_avg"),
    ("rcmae-train-accum", "ema_on_update_teacher.safetensors", "blocks.1.mlp.fc1.weight"),
    ("pos-embed", "expected.safetensors", "mae.dim40.grid6.cls0"),
    ("vit-finetune", "expected.safetensors", "gap.features"),
    ("vit-finetune", "after_2_steps_cls.safetensors", "pos_embed"),
    ("linprobe-lars", "expected.safetensors", "head.0.running_var"),
    ("lars-steps", "expected.safetensors", "step1.tensor"),
    ("knn", "expected.safetensors", "k4.scores"),
    ("rollout", "expected.safetensors", "image1.min.discard0.3"),
    ("mixup-cutmix", "expected.safetensors", "cutmix.images"),
    ("seg-backbone", "expected_mae.safetensors", "level_1"),
    ("seg-backbone", "grads_bootmae.safetensors", "blocks.3.attn.relative_position_bias_table"),
    ("upernet", "expected.safetensors", "dropout_logits_decode"),
    ("slide-inference", "expected.safetensors", "averaged_probabilities"),
    ("seg-schedule", "after_3_steps_some.safetensors", "decode_head.fpn_bottleneck.conv.weight"),
    ("vitdet-backbone", "expected.safetensors", "block.1"),
    ("vitdet-backbone", "grads.safetensors", "net.blocks.3.attn.rel_pos_h"),
    ("benchmark-backbone", "statistics.safetensors", "fpn_lateral3.norm.running_var"),
    ("benchmark-backbone", "expected.safetensors", "adapted.s0"),
    ("maskrcnn-losses", "expected_inference.safetensors", "1.scores"),
    ("maskrcnn-losses", "grads_by_image.safetensors", "roi_heads.mask_head.deconv.weight"),
    ("detect-inputs", "expected.safetensors", "1.vitdet.classes"),
    ("coco-ap", "expected.safetensors", "segm.precision"),
    ("pixio-forward", "expected.safetensors", "ids_keep_block3"),
    ("pixio-forward", "grads_others_some.safetensors", "rcpixio/cls_token"),
    ("pixio-forward", "after_2_steps.safetensors", "decoder_pos_embed"),
    ("pixio-masks", "expected.safetensors", "g6_b3_r0.75/ids_restore"),
    ("pixio-encoder", "expected.safetensors", "12x28/knn_feature"),
]


@pytest.mark.parametrize(("name", "file", "key"), PERTURBED)
def test_one_number_off_in_an_array_fails_and_is_named(
    name: str, file: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = MAKERS[name](tmp_path / name)
    perturb(folder, file, key)
    assert tool.main([str(folder)]) == 1
    assert key in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mae-forward", lambda v: v["losses"]["value"]["norm_pix=True"].update(loss=1.0)),
        (
            "rcmae-forward",
            lambda v: v["cases"]["value"]["norm_pix=False,gamma=4.0"]["grad_norm"].update(
                cls_token=0.1
            ),
        ),
        ("rcmae-train", lambda v: v["official_steps"]["value"][4].update(lr=0.001)),
        ("rcmae-train", lambda v: v["decay"]["value"].remove("cls_token")),
        ("rcmae-train-accum", lambda v: v["ema_on_update_momentum"]["value"].__setitem__(5, 0.9)),
        ("lr-schedule", lambda v: v["schedules"]["value"][0]["rows"][2].__setitem__(3, 0.01)),
        ("lr-schedule", lambda v: v["len_keep"]["value"][0].__setitem__(2, 10)),
        ("momentum-schedule", lambda v: v["cases"]["value"][0]["rows"][3].__setitem__(2, 0.98)),
        (
            "arch-names",
            lambda v: v["architectures"]["value"]["rc_vit_tiny_patch16"].update(trainable=1),
        ),
        (
            "arch-names",
            lambda v: v["architectures"]["value"]["rc_vit_tiny_patch16"]["optimizer_order"][
                1
            ].reverse(),
        ),
        ("pos-embed", lambda v: v.update(unheard_of={"value": 1})),
        ("vit-finetune", lambda v: v["gap"]["value"]["missing_keys"].remove("head.bias")),
        ("vit-finetune", lambda v: v["cls"]["value"]["param_groups"][0].update(lr_scale=0.5)),
        (
            "knn",
            lambda v: v["accuracy"]["value"]["30"].update(top5_counting_only_positive_scores=1.0),
        ),
        ("mixup-cutmix", lambda v: v["drawn"]["value"]["cutmix"].update(lam_used=0.5)),
        ("miou", lambda v: v["plain"]["value"]["intersect"].__setitem__(0, 0)),
        ("miou", lambda v: v["plain"]["value"].update(mIoU=0.5)),
        ("seg-schedule", lambda v: v["schedules"]["value"][0]["rows"][2].__setitem__(1, 0.01)),
        ("seg-augment", lambda v: v["cases"]["value"][0].update(box=[0, 0])),
        ("slide-inference", lambda v: v["windows"]["value"].pop()),
    ],
)
def test_one_value_off_or_unknown_fails(
    name: str, change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    folder = MAKERS[name](tmp_path / name)
    edit(folder, lambda tree: change(tree["values"]))
    assert tool.main([str(folder)]) == 1


def test_a_number_that_is_not_one_fails(tmp_path: Path) -> None:
    folder = rcmae_forward(tmp_path / "nan")
    edit(
        folder,
        lambda tree: tree["values"]["cases"]["value"]["norm_pix=True,gamma=0.3"].update(
            mae_loss=float("nan")
        ),
    )
    assert tool.main([str(folder)]) == 1


def test_folders_without_a_check_or_of_another_file_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([str(write(tmp_path / "else", "something-else"))]) == 1
    assert "there is no check for 'something-else'" in capsys.readouterr().out
    folder = pos_embed(tmp_path / "tables")
    edit(folder, lambda tree: tree["files"]["expected.safetensors"].update(sha256="0" * 64))
    assert tool.main([str(folder)]) == 1
    assert "not the file that fixture.json describes" in capsys.readouterr().out
    assert tool.main([str(folder), str(tmp_path / "nowhere")]) == 1  # whatever else is unusable


def test_unusable_folders_are_named_and_the_others_still_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = lr_schedule(tmp_path / "good")
    incomplete = mae_forward(tmp_path / "incomplete")
    (incomplete / "grads.safetensors").unlink()
    vague = write(tmp_path / "vague", "mae-forward", tolerance=("close enough", "close enough"))
    assert (
        tool.main([str(good), str(tmp_path / "nowhere"), str(incomplete), str(vague), "--json"])
        == 2
    )
    document = json.loads(capsys.readouterr().out)
    assert [folder["status"] for folder in document["folders"]] == [
        "passed",
        "unusable",
        "unusable",
        "unusable",
    ]
    assert not document["passed"]
    problems = [" ".join(folder["problems"]) for folder in document["folders"]]
    assert "no readable fixture.json" in problems[1]
    assert "grads.safetensors" in problems[2]
    assert "states no limits for float64" in problems[3]


def test_the_command_gives_one_json_document_and_its_status(tmp_path: Path) -> None:
    folder = lr_schedule(tmp_path / "lr")
    command = [sys.executable, str(ROOT / "tools" / "check_parity.py"), str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["passed"]
    (checked,) = document["folders"]
    assert {row["what"]: row["compared"] for row in checked["rows"]} == {
        "learning rates": 10,
        "patches kept": 3,
    }
    assert all(row["passed"] and row["of_limit"] <= 1 for row in checked["rows"])
