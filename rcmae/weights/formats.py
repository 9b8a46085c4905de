"""A whole trained network in a file for other code: what a task adds to `rcmae export`.

A task names its formats (`Task.formats`): a classifier with its head, a segmenter, a detector. The
encoder alone is written by rcmae/weights/writing.py."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rcmae.checkpoint import Manifest
from rcmae.errors import Refused
from rcmae.weights.layouts import Which

if TYPE_CHECKING:
    from rcmae.weights.writing import Exported

PATH = "<path>"  # stands for the file in `Wrote.use`


class Wrote(NamedTuple):
    """What a format wrote."""

    network: str  # whose weights: student, teacher
    tensors: int
    use: str  # a line of Python that reads it, PATH for where it lies


class WeightsFormat(NamedTuple):
    """A file or a folder that others read."""

    about: str
    suffixes: tuple[str, ...]  # of the file's name; none: it is a folder
    # (verified checkpoint, whose weights if that was asked for, path that is not there) -> what was
    # written; raises Refused
    write: Callable[[Manifest, Which | None, Path], Wrote]


def export_whole(
    manifest: Manifest,
    out: Path,
    formats: Mapping[str, WeightsFormat],
    *,
    name: str,
    network: Which | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write the whole network of a checkpoint. What is at `out` is replaced whole or not at all.

    Args:
        manifest: of a verified checkpoint.
        out: the file or folder.
        formats: of its task.
        name: of one of them.
        network: whose weights; None: as the format has it.
        overwrite: replace what is there.

    Raises:
        Refused: these do not go together.
        OSError: it could not be written.
    """
    from rcmae.weights.writing import Exported  # it imports timm: not at the start of a training

    chosen = formats[name]
    if chosen.suffixes and out.suffix not in chosen.suffixes:
        raise Refused(f"{out}: a file of format {name} ends in {' or '.join(chosen.suffixes)}")
    if not out.parent.is_dir():
        raise Refused(f"{out.parent} is not a folder; create it first")
    if out.is_dir() and chosen.suffixes:
        raise Refused(f"{out} is a folder; give a file's name")
    if out.exists() and not overwrite:
        raise Refused(f"{out} already exists; give another name, or ask to overwrite it")
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise Refused(f"{out} is a folder of something else; give another name")
    aside = out.with_name(f".{out.stem}.{secrets.token_hex(4)}{out.suffix}")
    try:
        wrote = chosen.write(manifest, network, aside)
        if out.is_dir():
            shutil.rmtree(out)
        aside.replace(out)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)
    files = [out] if out.is_file() else list(out.iterdir())
    return Exported(
        path=out,
        layout=name,
        networks=(wrote.network,),
        step=manifest.step,
        tensors=wrote.tensors,
        bytes=sum(file.stat().st_size for file in files),
        use=wrote.use.replace(PATH, repr(str(out))),
    )
