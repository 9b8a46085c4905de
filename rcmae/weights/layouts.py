"""The files that others read: layouts that a run's weights are exported in, and families that
weights are converted between.

Tables alone, without torch: the command line prints them."""

from __future__ import annotations

from typing import Literal, NamedTuple

Which = Literal["student", "teacher"]

KIND = {"student": "weight", "teacher": "teacher"}  # what a checkpoint calls a network's tensors


class Layout(NamedTuple):
    """A file that others read."""

    about: str
    suffixes: tuple[str, ...]  # of its name
    decoder: bool  # the whole network, or its encoder alone


TORCH = (".pth", ".pt")

LAYOUTS = {
    "safetensors": Layout(
        "the network, its decoder where that is MAE's, with what made it in the metadata",
        (".safetensors",),
        True,
    ),
    "mae": Layout("MAE's published file for fine-tuning: the encoder under 'model'", TORCH, False),
    "mae-full": Layout(
        "MAE's published file with the decoder: the whole network under 'model'", TORCH, True
    ),
    "rcmae": Layout(
        "RC-MAE's checkpoint: student and teacher, each wrapped and plain, epoch, args", TORCH, True
    ),
    "timm": Layout("the encoder as timm's vit_* models name it", (".safetensors", *TORCH), False),
}


class Family(NamedTuple):
    """What a family's files hold."""

    text: str
    decoder: bool  # whether a whole network can be written, or its encoder alone


FAMILIES: dict[str, Family] = {
    "mae": Family("MAE's .pth, under 'model'; SupMAE's is the same", True),
    "bootmae": Family("BootMAE's .pth: its encoder under 'model', with q_bias and v_bias", False),
    "maepriv": Family(
        "MAE-priv's .pth: its pretraining's 'encoder.' under 'model', with q_bias and v_bias", False
    ),
    "timm": Family("timm's vit_*: the encoder, as safetensors or .pth", False),
    "huggingface": Family("Hugging Face's ViTMAE: a folder that from_pretrained reads", True),
    "pixio": Family("Hugging Face's Pixio: its encoder, a folder for from_pretrained", False),
}

TARGETS = {
    **{name: family.text for name, family in FAMILIES.items()},
    "safetensors": "this package's: MAE's names, with what is known of the weights in the metadata",
    "onnx": "the encoder: images [B, C, H, W] to tokens [B, 1 + L, D]",
}
