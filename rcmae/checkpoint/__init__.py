"""Checkpoints that are committed or never were, and that open under any engine and number of ranks.

`checkpoints/step-00001000/` holds one safetensors file a rank and `manifest.json`. The modules, in
the order of a checkpoint's life: `saver` commits, `retention` says which stay, `manifest` is the
format and which checkpoints count, `layout` where each tensor's elements lie, `reader` reads any
slice of any tensor, `inspection` and `compare` look at them for people; `lease` sees to it that a
run has one writer.

Functions that look at a disk are local; the collective ones that training's own restore uses say so
in their names (`newest_together`) or in their first line (`load`, `Saver`).

Not used: `torch.distributed.checkpoint`, whose metadata is a pickle. safetensors files and a JSON
manifest can be read by anyone and can run nothing.
"""

from rcmae.checkpoint.manifest import (
    FORMAT,
    CheckpointError,
    Manifest,
    NewerFormat,
    checkpoint_folders,
    file_problem,
    find_checkpoint,
    newest,
    newest_unverified,
    open_verified,
    read_manifest,
    sealed,
    step_folders,
    step_name,
    step_of,
)
from rcmae.checkpoint.reader import (
    Reader,
    load,
    newest_together,
    open_verified_together,
    seen_by_first,
    tensor_of,
    whole_tensors,
)
from rcmae.checkpoint.retention import prune, start_from
from rcmae.checkpoint.saver import Saved, Saver

__all__ = [
    "FORMAT",
    "CheckpointError",
    "Manifest",
    "NewerFormat",
    "Reader",
    "Saved",
    "Saver",
    "checkpoint_folders",
    "file_problem",
    "find_checkpoint",
    "load",
    "newest",
    "newest_together",
    "newest_unverified",
    "open_verified",
    "open_verified_together",
    "prune",
    "read_manifest",
    "sealed",
    "seen_by_first",
    "start_from",
    "step_folders",
    "step_name",
    "step_of",
    "tensor_of",
    "whole_tensors",
]
