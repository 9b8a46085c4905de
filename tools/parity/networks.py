"""What checks share: this package's networks with recorded weights, batches under recorded masks,
losses, gradients and steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rcmae.data.batch import Batch
from rcmae.data.masking import visible_count
from rcmae.engines.optim import param_groups
from rcmae.models import kernels
from rcmae.models.protocol import TABLES
from rcmae.models.sizes import NetworkSizes
from rcmae.models.vit import MaskedAutoencoder
from rcmae.objectives import Objective

from .fixture import EXACT, Fixture, Limit, Unusable


def build(
    fixture: Fixture,
    weights: str,
    dtype: torch.dtype,
    state: dict[str, Tensor] | None = None,
    *,
    class_tokens: int = 1,
    **options: Any,
) -> MaskedAutoencoder:
    """The package's model of the folder's sizes, with a file of published weights, loaded strictly.

    `state`: those weights under this package's names, where they are not published so;
    `class_tokens`: of the encoder; `options`: of the model."""
    config = fixture.config
    for key, ours in (
        ("layer_norm_eps", kernels.LAYER_NORM_EPS),
        ("qkv_bias", True),
        ("adam_eps", kernels.ADAM_EPS),
    ):
        if config.get(key, ours) != ours:
            raise Unusable(f"config.{key}={config[key]}: this package has {ours}")
    state = fixture.arrays(weights) if state is None else state
    model = MaskedAutoencoder(
        NetworkSizes(
            image_size=image_size(config),
            patch_size=config["patch_size"],
            in_channels=config.get("in_chans", state["patch_embed.proj.weight"].shape[1]),
            embed_dim=config["embed_dim"],
            depth=config["depth"],
            num_heads=config["num_heads"],
            decoder_dim=config["decoder_embed_dim"],
            decoder_depth=config["decoder_depth"],
            decoder_heads=config["decoder_num_heads"],
            mlp_ratio=config.get("mlp_ratio", 4),
            class_tokens=class_tokens,
        ),
        **options,
    )
    # float32 as published
    fixed = dict(model.named_buffers())
    tables = {name: state[name] for name in TABLES if name in fixed and name in state}
    fixture.all_close("position tables", fixed, tables, Limit(1e-7, 0.0), "float32")
    problem = ""
    try:
        computed = {name: fixed[name] for name in TABLES if name in fixed}  # where none is recorded
        model.load_state_dict(computed | state, strict=True)
    except RuntimeError as error:
        problem = str(error)
    fixture.true("weights load strictly", weights, not problem, problem)
    return model.to(dtype)


def image_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the folder's images in pixels."""
    side = config["img_size"]
    return (side, side) if isinstance(side, int) else (side[0], side[1])


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
    sums = objective(student, teacher, batch, progress)
    counts = objective.counts(batch)
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
    ids = batch.ids_shuffle
    hidden = torch.ones(batch.ids_shuffle.shape)
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


def case_of(text: str) -> dict[str, Any]:
    """Settings named in words, as in `norm_pix_loss=True, gamma=1.0`."""
    found: dict[str, Any] = {}
    if match := re.search(r"norm_pix(?:_loss)?=(True|False)", text):
        found["norm_pix"] = match[1] == "True"
    if match := re.search(r"gamma=([\d.]*\d)", text):
        found["gamma"] = float(match[1])
    return found
