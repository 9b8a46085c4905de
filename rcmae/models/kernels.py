"""The one table of fused choices: attention, layer norm, optimizer, compilation, activation
checkpointing.

Every choice computes the same function; they differ in speed and memory. What is used, and why not
the others, is printed at start-up (`table`). Attention is torch's `scaled_dot_product_attention`,
but for bf16 on a CPU that multiplies it in hardware. NVIDIA apex is found at run time where a site
has built it.

Not done: swapping modules for fused ones after construction. A choice is made when a part is built.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rcmae.errors import Refused
from rcmae.models.precision import bf16_of
from rcmae.models.protocol import blocks_of
from rcmae.models.tuning import attention as tuning

Source = Literal["torch", "apex"]
Checkpointing = Literal["none", "torch", "fairscale", "fairscale_offload"]
NormFactory = Callable[..., nn.Module]  # called with the width, and device and dtype by timm

LAYER_NORM_EPS = 1e-6  # as in the published models
ADAM_EPS = 1e-8

# --------------------------------------------------------------------------------------------- apex


class ApexStatus(NamedTuple):
    """Whether NVIDIA apex can be used, and what was found."""

    usable: bool
    found: str


def apex_status() -> ApexStatus:
    """What the name `apex` stands for here.

    Nothing of it is imported: the index has another project of that name.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return ApexStatus(False, "NVIDIA apex is not installed")
    folder = Path(spec.submodule_search_locations[0])
    if not all(
        (folder / part / "__init__.py").is_file() for part in ("normalization", "optimizers")
    ):
        return ApexStatus(
            False,
            f"the apex in {folder} is not NVIDIA's (the index has a web toolkit of that name)",
        )
    return ApexStatus(True, f"NVIDIA apex in {folder}")


def _apex(module: str, name: str, key: str) -> Any:
    status = apex_status()
    if not status.usable:
        raise Refused(
            f"{key}=apex: {status.found}; build github.com/NVIDIA/apex, or use {key}=torch"
        )
    return getattr(importlib.import_module(f"apex.{module}"), name)


def layer_norm(kind: Source = "torch") -> NormFactory:
    """What makes a layer norm of a given width: torch's, or apex's FusedLayerNorm.

    Raises:
        Refused: apex was asked for and is not there.
    """
    if kind == "torch":
        return functools.partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
    fused = _apex("normalization", "FusedLayerNorm", "engine.layer_norm")

    def make(
        width: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> nn.Module:
        norm: nn.Module = fused(width, eps=LAYER_NORM_EPS, elementwise_affine=True)
        return norm.to(device=device, dtype=dtype)

    return make


def adamw(
    groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], kind: Source = "torch"
) -> torch.optim.Optimizer:
    """AdamW in one pass over each group: torch's fused kernel, or apex's FusedAdam.

    The learning rate starts at 0: the loop sets it before every step, and a group's weight decay
    with it.

    Raises:
        Refused: apex was asked for and is not there.
    """
    groups = list(groups)
    if kind == "torch":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=ADAM_EPS, fused=True)
    fused_adam: Callable[..., torch.optim.Optimizer] = _apex(
        "optimizers", "FusedAdam", "engine.optimizer"
    )
    return fused_adam(groups, lr=0.0, betas=betas, eps=ADAM_EPS, adam_w_mode=True, weight_decay=0.0)


# ------------------------------------------------------------------------------------------- blocks


def checkpoint_blocks(model: nn.Module, kind: Checkpointing) -> None:
    """Keep only each block's input in the forward pass and compute the block again in the backward
    pass, in place.

    `fairscale_offload` keeps the inputs in host memory. Names in the state dict stay as they are.
    fairscale's wrapper points at the block by weak reference, so a deep copy made afterwards would
    compute with the weights of the
    original: copy first. A teacher has no backward pass and needs none of this.
    """
    if kind == "none":
        return
    for block in blocks_of(model):
        compiled: Any = vars(block).pop("forward", None)  # by compile_blocks of tuning.compiling
        assert compiled is None or compiled.args == (block,), "blocks are checkpointed once"
        forward = type(block).forward if compiled is None else compiled.func
        if kind == "torch":
            block.forward = functools.partial(
                checkpoint, forward, block, use_reentrant=False, preserve_rng_state=False
            )
        else:
            from fairscale.nn import checkpoint_wrapper  # slow to import, for who asks for it

            checkpoint_wrapper(block, offload_to_cpu=kind == "fairscale_offload")
            wrapped: Any = block.forward  # a partial over (the class's forward, block, offload)
            block.forward = functools.partial(wrapped.func, forward, *wrapped.args[1:])


def choose_attention(model: nn.Module, device: torch.device, precision: str) -> None:
    """Let the blocks of a model compute attention by the faster of two ways; `attention` is what
    they ask.

    torch's fused kernel, but for bf16 on a CPU that multiplies it in hardware: its backward pass
    takes several times as long there as two matrix products and a softmax (torch 2.13, AVX512-BF16:
    28 ms against 3.7 ms at 17 tokens, 54 against 11 at 50, 215 against 135 at 197), which in turn
    keep the matrix of attention. Where bf16 is emulated the products are the slow part (the same
    CPU held to AVX2: 3.4 ms against 7.7 at 17 tokens, 13 against 30 at 50, 86 against 210 at 197);
    in fp32 the two take the same time to a tenth. Not measured at start-up: ranks and starts would
    round differently.
    """
    for block in blocks_of(model):
        for attn in filter(None, (block.attn, getattr(block, "c_attn", None))):
            attn.fused_attn = attention_is_fused(device, precision)


def attention_is_fused(device: torch.device, precision: str) -> bool:
    """What `choose_attention` chooses."""
    return device.type != "cpu" or precision != "bf16" or not bf16_of(device).units


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, fused: bool, bias: Tensor | None = None
) -> Tensor:
    """Scaled dot-product attention: queries [B, heads, M, d], keys and values [B, heads, N, d]
    to [B, heads, M, d].

    `bias`: [heads, M, N], added before the softmax.
    """
    if fused:
        if bias is not None:
            return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        return tuning.attended(q, k, v)
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (weights if bias is None else weights + bias).softmax(dim=-1) @ v


# -------------------------------------------------------------------------------------------- table


class Choice(NamedTuple):
    """One row of the start-up print."""

    part: str
    used: str
    why: str  # why it, and not the others

    def __str__(self) -> str:
        return f"{self.part:<12}{self.used} ({self.why})"


def table(
    *,
    device: torch.device,
    precision: str = "fp32",
    layer_norm: Source = "torch",
    optimizer: str = "torch",
    compile: bool = False,
    checkpointing: Checkpointing = "none",
) -> list[Choice]:
    """What computes each part, and why not the alternatives.

    Args:
        device: where the model computes.
        precision: "fp32" or "bf16".
        layer_norm: "torch" or "apex".
        optimizer: "torch", "apex", or the name of the one that an engine brings (DeepSpeed's
            offload).
        compile: whether blocks are compiled.
        checkpointing: what keeps activations small.
    """
    return [
        _attention(device, precision),
        _layer_norm(layer_norm),
        _optimizer(optimizer),
        _compile(compile),
        Choice(
            "activations",
            ACTIVATIONS[checkpointing],
            "engine.activation_checkpointing trades time for memory"
            if checkpointing == "none"
            else ASKED,
        ),
    ]


ASKED = "as requested"
ACTIVATIONS: dict[Checkpointing, str] = {
    "none": "all kept",
    "torch": "recomputed (torch)",
    "fairscale": "recomputed (fairscale)",
    "fairscale_offload": "recomputed from block inputs in host memory (fairscale)",
}


def _why_not_apex(key: str) -> str:
    apex = apex_status()
    return f"{apex.found}; engine.{key}=apex uses it" if apex.usable else apex.found


def _attention(device: torch.device, precision: str) -> Choice:
    if not attention_is_fused(device, precision):
        why = "the fused kernel's backward pass is slow here"
        return Choice("attention", "matrix products and softmax", why)
    if measured := tuning.told():
        return Choice("attention", measured, "each the fastest in a measurement here; it is kept")
    used = f"scaled_dot_product_attention: {_sdpa_backends(device)}"
    return Choice("attention", used, "torch picks by shape and type")


def _layer_norm(kind: Source) -> Choice:
    if kind == "apex":
        return Choice("layer norm", "apex FusedLayerNorm", ASKED)
    return Choice("layer norm", "torch LayerNorm", _why_not_apex("layer_norm"))


def _optimizer(kind: str) -> Choice:
    if kind == "torch":
        return Choice("optimizer", "torch AdamW, fused", _why_not_apex("optimizer"))
    if kind == "apex":
        return Choice("optimizer", "apex FusedAdam", ASKED)
    return Choice("optimizer", kind, "the engine's own")


def _compile(compile: bool) -> Choice:
    if compile:
        why = "the first step takes seconds to minutes more; what it made is kept for later starts"
        return Choice("compile", "each block, a graph for each shape", why)
    why = "engine.compile=true, or auto on a GPU, is faster after the first step"
    return Choice("compile", "off", why)


def _sdpa_backends(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device.type} flash kernel, or plain matrix products"
    backends = torch.backends.cuda
    enabled = {
        "cudnn": backends.cudnn_sdp_enabled(),
        "flash": backends.flash_sdp_enabled(),
        "memory-efficient": backends.mem_efficient_sdp_enabled(),
        "plain": backends.math_sdp_enabled(),
    }
    return " or ".join(name for name, on in enabled.items() if on)
