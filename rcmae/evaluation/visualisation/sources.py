"""What is drawn and of what: images, pictures by name, and how a title names a network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

Pictures = dict[str, np.ndarray]  # name -> pixels uint8 [H, W, 3]


class Images(NamedTuple):
    """Which images are drawn."""

    paths: Sequence[Path]  # files, folders of them, shards
    limit: int  # the first so many


def named(about: str) -> str:
    """A network as titles name it: "teacher of RUN, step 150", or its file."""
    return re.sub(r"\S*?([^/\s]+)/checkpoints/step-\d+", r"\1", about)
