"""Folders of recorded numbers of Pixio, made from plain mathematics: several class tokens, learned
positions, blocks of patches, every token put back in raster order."""

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
CLASS_TOKENS = 2
PLAIN32 = "1e-5 of the largest magnitude (another computation: 5e-7)"
FLOAT64 = "|difference| <= 1e-11 + 1e-9 * largest magnitude of that array (and so on)"


def weights(sizes: Sizes, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed + 500)
    shapes = {
        "cls_token": (1, CLASS_TOKENS, sizes.width),
        "pos_embed": (1, CLASS_TOKENS + sizes.patches, sizes.width),
        "decoder_pos_embed": (1, CLASS_TOKENS + sizes.patches, sizes.decoder_width),
    }
    drawn = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return reference.weights(sizes, seed) | drawn


def leaves(state: State) -> State:
    return {name: array.double().requires_grad_() for name, array in state.items()}


def orders(noise: Tensor, sizes: Sizes, block: int, ratio: float) -> tuple[Tensor, int]:
    """ids_shuffle [N, L] and how many are seen, block by block in loops."""
    rows, columns = sizes.grid
    across = columns // block
    kept = int((rows // block) * across * (1 - ratio))
    found = []
    for values in noise:
        order = []
        for number in values.argsort().tolist():
            top, left = number // across * block, number % across * block
            for row in range(top, top + block):
                order += [row * columns + column for column in range(left, left + block)]
        found.append(order)
    return torch.tensor(found), kept * block**2


def embedded(state: State, sizes: Sizes, images: Tensor) -> Tensor:
    kernel = state["patch_embed.proj.weight"]
    x = F.conv2d(images, kernel, state["patch_embed.proj.bias"], stride=sizes.patch)
    return x.flatten(2).transpose(1, 2)


def forward(state: State, sizes: Sizes, images: Tensor, ids: Tensor, kept: int) -> State:
    x = embedded(state, sizes, images) + state["pos_embed"][:, CLASS_TOKENS:]
    x = torch.stack([tokens[row[:kept]] for tokens, row in zip(x, ids, strict=True)])
    first = (state["cls_token"] + state["pos_embed"][:, :CLASS_TOKENS]).expand(len(x), -1, -1)
    latent = reference.transformer(
        state, "", sizes.depth, sizes.heads, torch.cat([first, x], dim=1)
    )
    y = latent @ state["decoder_embed.weight"].T + state["decoder_embed.bias"]
    hidden = state["mask_token"].expand(len(y), sizes.patches - kept, -1)
    filled = torch.cat([y[:, CLASS_TOKENS:], hidden], dim=1)
    restore = ids.argsort(dim=1)
    filled = torch.stack([tokens[row] for tokens, row in zip(filled, restore, strict=True)])
    y = torch.cat([y[:, :CLASS_TOKENS], filled], dim=1) + state["decoder_pos_embed"]
    y = reference.transformer(state, "decoder_", sizes.decoder_depth, sizes.decoder_heads, y)
    pred = (y @ state["decoder_pred.weight"].T + state["decoder_pred.bias"])[:, CLASS_TOKENS:]
    mask = (restore >= kept).double()
    return {
        "latent": latent,
        "pred": pred,
        "mask": mask,
        "ids_restore": restore,
        "ids_keep": ids[:, :kept],
    }


def scores(found: State, sizes: Sizes, images: Tensor, norm_pix: bool) -> Tensor:
    """The loss of each image [N]."""
    target = reference.patchify(images, sizes.patch)
    target = reference.normalised(target) if norm_pix else target
    error = (found["pred"] - target).square().mean(dim=-1) * found["mask"]
    return error.sum(dim=1) / found["mask"].sum(dim=1)


def norms(grads: State) -> dict[str, float]:
    return {name: grad.norm().item() for name, grad in grads.items()}


def pixio_forward(folder: Path, write: Write) -> Path:
    sizes = Sizes(image=(24, 24), patch=4, decoder_depth=3)
    ratio, blocks, train_block = 0.6, [1, 3], 2
    images, noise = reference.inputs(sizes, 2, seed=60)
    images = images.float()
    noises = {block: noise[:, : sizes.patches // block**2].contiguous() for block in blocks}
    start = weights(sizes, 61)
    state = leaves(start)
    expected: State = {}
    cases: dict[str, Any] = {}
    grads: dict[tuple[int, bool], State] = {}
    for block in blocks:
        mask = orders(noises[block], sizes, block, ratio)
        for norm_pix in (True, False):
            found = forward(state, sizes, images.double(), *mask)
            each = scores(found, sizes, images.double(), norm_pix)
            grads[block, norm_pix] = reference.gradients(state, each.mean())
            own = norms(grads[block, norm_pix])
            cases[f"mask_grid={block} norm_pix={norm_pix}"] = {
                "loss": each.mean().item(),
                "scores": each.tolist(),
                "grad_norm_total": math.hypot(*own.values()),
                "grad_norm": own,
            }
        expected |= {f"{key}_block{block}": value for key, value in found.items()}
        expected[f"mask_block{block}"] = found["mask"].float()

    config = {
        "img_size": 24,
        "patch_size": 4,
        "embed_dim": sizes.width,
        "depth": sizes.depth,
        "num_heads": sizes.heads,
        "decoder_embed_dim": sizes.decoder_width,
        "decoder_depth": sizes.decoder_depth,
        "decoder_num_heads": sizes.decoder_heads,
        "n_cls_tokens": CLASS_TOKENS,
        "mask_ratio": ratio,
        "mask_grid": blocks,
        "train": {
            "mask_grid": train_block,
            "norm_pix_loss": True,
            "lr": 0.003,
            "min_lr": 0.0,
            "warmup_epochs": 1,
            "epochs": 4,
            "iters_per_epoch": 2,
            "betas": [0.9, 0.99],
            "weight_decay": 0.1,
            "clip_grad": None,
        },
    }
    trained = {name: array.detach().clone().requires_grad_() for name, array in state.items()}
    optimizer, rows, batches = reference.AdamW(0.1, betas=(0.9, 0.99)), [], []
    for step in range(2):
        step_images, step_noise = reference.inputs(sizes, 2, seed=70 + step)
        step_noise = step_noise[:, : sizes.patches // train_block**2].contiguous()
        lr = reference.lr_at(1 + step / 2, warmup=1, epochs=4, lr=0.003, min_lr=0.0)
        mask = orders(step_noise, sizes, train_block, ratio)
        found = forward(trained, sizes, step_images.double(), *mask)
        loss = scores(found, sizes, step_images.double(), True).mean()
        optimizer.step(trained, reference.gradients(trained, loss), lr)
        rows.append({"loss": loss.item(), "lr": lr})
        batches.append((step_images, step_noise))

    of_student = forward(state, sizes, images.double(), *orders(noises[3], sizes, 3, ratio))
    of_teacher = forward(trained, sizes, images.double(), *orders(noises[3], sizes, 3, ratio))
    theirs = of_teacher["pred"].detach()
    error = scores(of_student, sizes, images.double(), True).mean()
    apart = reference.hidden_mean((of_student["pred"] - theirs).square(), of_student["mask"])
    with_teacher = reference.gradients(state, error + apart)
    expected["teacher_pred_block3"] = theirs
    some = {f"block3_raw/{name}": grads[3, False][name] for name in ("pos_embed", "mask_token")}
    some |= {f"rcpixio/{name}": with_teacher[name] for name in ("cls_token", "norm.weight")}
    order = [name for name in start if reference.decays(name, start[name])]
    first = ["cls_token", "pos_embed", "mask_token", "decoder_pos_embed"]
    decayed = first + [name for name in order if name not in first]
    inputs = {"images": images}
    inputs |= {f"noise_block{block}": values for block, values in noises.items()}
    inputs |= {
        "train_images": torch.stack([batch[0] for batch in batches]),
        "train_noise": torch.stack([batch[1] for batch in batches]),
    }
    return write(
        folder,
        "pixio-forward",
        config=config,
        values={
            "losses": cases,
            "train_rows": rows,
            "optimizer_groups": [[name for name in start if name not in decayed], decayed],
            "rcpixio": {
                "reconstruction": error.item(),
                "consistency": apart.item(),
                "total": (error + apart).item(),
                "grad_norm": norms(with_teacher),
            },
        },
        files={
            "model.safetensors": ("state_dict", start),
            "inputs.safetensors": ("inputs", inputs),
            "expected.safetensors": ("expected", expected),
            "grads.safetensors": ("loss, mask_grid 1, norm_pix_loss=True", grads[1, True]),
            "grads_others_some.safetensors": ("some", some),
            "after_2_steps.safetensors": ("after the steps", trained),
        },
    )


def pixio_masks(folder: Path, write: Write) -> Path:
    cases = [("g6_b3_r0.75", 6, 3, 0.75), ("g10_b1_r0.9", 10, 1, 0.9), ("g8_b2_r0.4", 8, 2, 0.4)]
    generator = torch.Generator().manual_seed(80)
    noise, expected, shares = {}, {}, {}
    for name, side, block, ratio in cases:
        sizes = Sizes(image=(side, side), patch=1)
        noise[name] = torch.rand(2, (side // block) ** 2, generator=generator)
        ids, kept = orders(noise[name], sizes, block, ratio)
        expected[f"{name}/ids_keep"] = ids[:, :kept]
        expected[f"{name}/ids_restore"] = ids.argsort(dim=1)
        expected[f"{name}/mask"] = (ids.argsort(dim=1) >= kept).float()
        shares[name] = {
            "blocks": (side // block) ** 2,
            "visible_blocks": kept // block**2,
            "visible_patches": kept,
            "hidden_share": expected[f"{name}/mask"].mean().item(),
        }
    config = {
        "cases": [
            {"name": name, "grid": side, "mask_grid": block, "mask_ratio": ratio}
            for name, side, block, ratio in cases
        ]
    }
    return write(
        folder,
        "pixio-masks",
        config=config,
        values={"hidden_share": shares, "unfit": {"g7_b2_r0.75": "no fit", "g4_b4_r0.5": "none"}},
        files={
            "noise.safetensors": ("noise", noise),
            "expected.safetensors": ("masks", expected),
        },
    )


def pixio_encoder(folder: Path, write: Write) -> Path:
    sizes = Sizes(image=(20, 20), patch=4)
    start = {
        name: value
        for name, value in weights(sizes, 90).items()
        if not name.startswith(("decoder", "mask_"))
    }
    state = reference.double(start)
    expected, inputs, off = {}, {}, {}
    for height, width in ((20, 20), (12, 28)):
        size = f"{height}x{width}"
        images, _ = reference.inputs(Sizes(image=(height, width), patch=4), 2, seed=height)
        inputs[f"images_{size}"] = images
        table = state["pos_embed"][:, CLASS_TOKENS:].unflatten(1, (5, 5)).permute(0, 3, 1, 2)
        if (height, width) != (20, 20):
            new = (height // 4, width // 4)
            table = F.interpolate(table, size=new, mode="bicubic", align_corners=False)
        x = embedded(state, sizes, images.double()) + table.flatten(2).transpose(1, 2)
        first = state["cls_token"] + state["pos_embed"][:, :CLASS_TOKENS]
        x = torch.cat([first.expand(len(x), -1, -1), x], dim=1)
        for block in range(sizes.depth):
            inner = {
                name.replace(f"blocks.{block}.", "blocks.0."): value
                for name, value in state.items()
                if name.startswith(f"blocks.{block}.")
            }
            x = reference.transformer(inner, "", 1, sizes.heads, x, last="")
            for ending, tokens in (("", x), ("_norm", reference.layer_norm(state, "norm", x))):
                expected[f"{size}/block{block}/cls_tokens{ending}"] = tokens[:, :CLASS_TOKENS]
                expected[f"{size}/block{block}/patch_tokens{ending}"] = tokens[:, CLASS_TOKENS:]
        mean = x[:, :CLASS_TOKENS].mean(dim=1)
        expected[f"{size}/knn_feature"] = mean / mean.norm(dim=1, keepdim=True)
        last = f"{size}/block{sizes.depth - 1}/cls_tokens_norm"
        expected[f"{size}/hf_pooler_output"] = expected[last].mean(dim=1)
        off[size] = {"pooler_output - mean of cls_tokens_norm": 0.0}
    config = {
        "img_size": 20,
        "patch_size": 4,
        "embed_dim": sizes.width,
        "depth": sizes.depth,
        "num_heads": sizes.heads,
        "mlp_ratio": 4,
        "n_cls_tokens": CLASS_TOKENS,
        "sizes": [[20, 20], [12, 28]],
        "blocks_recorded": list(range(sizes.depth)),
    }
    return write(
        folder,
        "pixio-encoder",
        config=config,
        values={"transformers_difference": off},
        files={
            "model.safetensors": ("state_dict", start),
            "inputs.safetensors": ("images", inputs),
            "expected.safetensors": ("tokens", expected),
        },
        tolerance=(FLOAT64, PLAIN32),
    )


def pixio_arch_names(folder: Path, write: Write) -> Path:
    sizes = Sizes(image=(8, 8), patch=4, width=192, depth=1, decoder_width=256, decoder_depth=2)
    drawn = {name: tuple(array.shape) for name, array in weights(sizes, 1).items()}
    first = ("cls_token", "pos_embed", "mask_token", "decoder_pos_embed")
    order = [*first, *(name for name in drawn if name not in first)]
    whole = {name: drawn[name] for name in order}
    parts = ("mask_token", "decoder")
    encoder = {name: shape for name, shape in whole.items() if not name.startswith(parts)}
    numbers = [sum(map(math.prod, shapes.values())) for shapes in (whole, encoder)]
    architectures = {
        "encoder": {
            "state_dict": [[name, list(shape)] for name, shape in encoder.items()],
            "parameters": numbers[1],
            "encoder_parameters": numbers[1],
            "heads": 3,
        },
        "whole": {
            "state_dict": [[name, list(shape)] for name, shape in whole.items()],
            "parameters": numbers[0],
            "encoder_parameters": numbers[1],
            "decoder_parameters": numbers[0] - numbers[1],
            "heads": 3,
            "decoder_heads": 8,
            "decay": ["cls_token", "pos_embed", "decoder_pred.weight"],
            "no_decay_is": "every parameter of one dimension",
        },
    }
    return write(
        folder,
        "pixio-arch-names",
        config={"img_size": 8, "patch_size": 4, "n_cls_tokens": CLASS_TOKENS},
        values={"architectures": architectures},
    )


MAKERS: dict[str, Callable[..., Path]] = {
    "pixio-forward": pixio_forward,
    "pixio-masks": pixio_masks,
    "pixio-encoder": pixio_encoder,
    "pixio-arch-names": pixio_arch_names,
}
