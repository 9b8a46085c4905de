"""Compiled extensions of other packages that do not fit the torch that is here.

Importing this module makes torchvision, and so timm, importable beside a CPU build of torch:
import it before either.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import torch

FIRST = "import rcmae.process.extensions"  # what a program says before it imports timm

_torchvision_ops: torch.library.Library | None = None  # the definitions live as long as this does


def guard_torchvision() -> bool:
    """Let `import torchvision` succeed beside a torch that its compiled extension was not built
    for.

    torchvision's wheels carry a CUDA extension that a CPU torch cannot load; it then fails at
    import for want of two operators that nothing here calls. They are declared (calling them still
    fails, clearly). Where the extension loads nothing is touched. True where the declaration was
    needed."""
    global _torchvision_ops
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations or _torchvision_ops is not None:
        return _torchvision_ops is not None
    try:
        torch.ops.load_library(str(Path(spec.submodule_search_locations[0]) / "_C.so"))
    except (OSError, RuntimeError):
        _torchvision_ops = torch.library.Library("torchvision", "DEF")
        _torchvision_ops.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision_ops.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return _torchvision_ops is not None


def remedy() -> str:
    """How to get a torchvision that fits the torch that is here, and what does without it."""
    release, _, build = torch.__version__.partition("+")  # build: cpu, cu130
    wanted = torch_of("torchvision")
    if wanted and wanted != release:
        pair = (
            f"install the torchvision that belongs to torch {release}; this one belongs to {wanted}"
        )
    else:
        if not build:
            build = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
        version = importlib.metadata.version("torchvision").partition("+")[0]
        pair = (
            f"pip install --force-reinstall --no-deps torchvision=={version}+{build}, from where "
            "that torch came"
        )
    return f"{pair}; or `{FIRST}` before timm or transformers"


def torch_of(package: str) -> str | None:
    """The version of torch that a package was built for, by its metadata.

    None where it says none.
    """
    try:
        lines = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    pins = [re.match(r"torch\s*\(?==\s*([\w.]+)", line) for line in lines]
    return next((pin.group(1) for pin in pins if pin), None)


guard_torchvision()
