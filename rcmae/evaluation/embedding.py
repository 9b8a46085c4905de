"""Features of any images as a table: a key, a label where there is one, and a vector each.

Images are taken in parts. A part is written beside the table when it is done and is not computed
again, so a job that was stopped continues; ranks take parts in turn. The table is put together from
the parts at the end, in the order of the images, and does not depend on how many ranks there were.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rcmae import dist
from rcmae.data.cache import Reader, node_cache
from rcmae.data.index import ShardIndex
from rcmae.data.members.reading import image_bytes
from rcmae.data.packing.found import Labelling, Source
from rcmae.data.packing.inputs import find_images, ordered
from rcmae.data.sources import is_remote, stat_here
from rcmae.data.tars import NO_LABEL
from rcmae.data.transforms import BadImage, CentreTransform, Normalise
from rcmae.data.workers import end_with_owner, fork_server
from rcmae.errors import Refused
from rcmae.files import aside, write_aside
from rcmae.models.classifier import Classifier
from rcmae.weights.encoder import pixels_of

PART = 8192  # images
SUFFIXES = (".parquet", ".npz", ".safetensors")


class Images(Protocol):
    """Images by number, in an order that is always the same."""

    fingerprint: str  # of which images these are

    def __len__(self) -> int: ...

    def key(self, number: int) -> str:
        """The name of an image."""

    def label(self, number: int) -> int:
        """The number of its class; NO_LABEL: none."""

    def read(self, number: int) -> bytes:
        """The encoded image. Raises BadImage, OSError."""


class InShards:
    """Those of WebDataset shards, also on servers. Keys are "shard/key"."""

    def __init__(self, shards: Sequence[str]) -> None:
        self._index = ShardIndex.open(list(shards))
        self._reader = Reader(node_cache([self._index]))
        told = [self._index.fingerprint, *versions_of(self._index)]
        self.fingerprint = hashlib.sha256("\n".join(told).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._index)

    def key(self, number: int) -> str:
        """The shard's name and the sample's."""
        return self._index[number].id

    def label(self, number: int) -> int:
        """As the index has it."""
        return int(self._index.labels[number])

    def read(self, number: int) -> bytes:
        """The encoded image. Raises BadImage, OSError."""
        return image_bytes(self._reader, self._index[number])


class InFiles:
    """Those of a folder, whose sub-folders are classes, or of a list. Keys are paths in it."""

    def __init__(self, inputs: Sequence[str]) -> None:
        with tempfile.TemporaryDirectory() as spool:
            found = find_images(inputs, Path(spool) / "images.spool", Labelling(gaps=True))
        sources, _ = ordered(found.images, None, ", ".join(inputs))
        labels = {(source.path, source.offset): source.label for source in sources}
        named = sorted(found.images)
        self._names = [image.name for image in named]
        self._sources = [
            Source(image.path, image.name, labels[image.path, image.offset]) for image in named
        ]
        listed = json.dumps([[source.key, source.label] for source in self._sources])
        self.fingerprint = hashlib.sha256(listed.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._sources)

    def key(self, number: int) -> str:
        """The path in the folder."""
        return self._names[number]

    def label(self, number: int) -> int:
        """That of its folder's place among the classes."""
        label = self._sources[number].label
        return NO_LABEL if label is None else label

    def read(self, number: int) -> bytes:
        """The encoded image. Raises OSError."""
        return self._sources[number].read()


def images_of(inputs: Sequence[str]) -> Images:
    """The images of shards, a folder or a list.

    Raises:
        Refused: there are none.
    """
    plain = len(inputs) == 1 and (
        Path(inputs[0]).is_dir() or Path(inputs[0]).suffix.lower() in (".csv", ".tsv")
    )
    found: Images = InFiles(inputs) if plain else InShards(inputs)
    if len(found) == 0:
        raise Refused(f"{', '.join(inputs)} holds no image")
    return found


class Embedded(NamedTuple):
    """What was written."""

    path: Path
    images: int
    width: int  # of a vector
    bad: list[str]  # keys of images that could not be decoded: left out


class Part(NamedTuple):
    """Features of some images."""

    numbers: Tensor  # [n] int64, of the images
    vectors: Tensor  # [n, D] float32
    bad: list[int]  # numbers of images that could not be decoded


class _Decoded(Dataset[tuple[int, Tensor | None]]):
    """Number -> image at the centre, or None where it cannot be decoded."""

    def __init__(self, images: Images, numbers: range, transform: CentreTransform) -> None:
        self._images = images
        self._numbers = numbers
        self._transform = transform

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> tuple[int, Tensor | None]:
        number = self._numbers[place]
        try:
            return number, self._transform(self._images.read(number), 0, number).image
        except (BadImage, MemoryError):
            return number, None


def embed(
    model: Classifier,
    images: Images,
    out: Path,
    *,
    batch: int = 128,
    workers: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Embedded:
    """Write the features of images to a file. Collective: every rank calls; rank 0 writes.

    Args:
        model: images to vectors, in evaluation mode; the same on every rank.
        images: the same on every rank.
        out: the file; its suffix is one of SUFFIXES.
        batch: images of a forward.
        workers: decoding processes of this rank.
        say: told how far this rank is.

    Raises:
        Refused: the suffix is another, or no image can be decoded.
        OSError: the file cannot be written.
    """
    if out.suffix not in SUFFIXES:
        raise Refused(f"{out} should end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    about = f"{images.fingerprint} {fingerprint(model)} {pixels_of(model)} {model.global_pool}"
    folder = out.with_name(f".{out.name}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(images), PART)
    model = model.to(dist.device())
    for place, start in enumerate(starts):
        if place % dist.world() != dist.rank():
            continue
        path = folder / f"{place:06d}.safetensors"
        if not path.is_file():
            chosen = range(start, min(start + PART, len(images)))
            _save(path, part_of(model, images, chosen, batch=batch, workers=workers))
        say(f"{min(start + PART, len(images)):,} of {len(images):,} images")
    dist.gather(None)  # all parts are there
    parts = [_load(folder / f"{place:06d}.safetensors") for place in range(len(starts))]
    numbers = torch.cat([part.numbers for part in parts])
    vectors = torch.cat([part.vectors for part in parts])
    bad = [images.key(number) for part in parts for number in part.bad]
    dist.gather(None)  # all ranks have read them
    if not len(numbers):
        raise Refused(f"none of {len(images):,} images can be decoded, such as {bad[0]}")
    if dist.rank() == 0:
        write_table(out, images, numbers, vectors)
        shutil.rmtree(folder)
    return Embedded(out, len(numbers), vectors.shape[1], bad)


def fingerprint(model: Classifier) -> str:
    """Of all that its vectors follow from: weights and tables, heads, norms, activation, and what
    the pixels are normalised by.
    """
    config = model.pretrained_cfg
    heads = [part.num_heads for part in model.modules() if hasattr(part, "num_heads")]
    # what modules show: kinds of activation, the norms' epsilon
    about = [repr(model), heads, config.get("mean"), config.get("std")]
    digest = hashlib.sha256(repr(about).encode())
    for name, part in model.state_dict().items():
        digest.update(name.encode())
        digest.update(part.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def versions_of(index: ShardIndex) -> list[str]:
    """What identifies the shards' contents: hashes, or times of writing."""
    found = []
    for shard in index.shards:
        here = None if is_remote(shard.path) else stat_here(shard.path)
        found.append(shard.sha256 if here is None else here.stamp)
    return found


@torch.no_grad()
def part_of(model: Classifier, images: Images, numbers: range, *, batch: int, workers: int) -> Part:
    """The features of some of the images, on this rank alone."""
    device = dist.device()
    transform = CentreTransform(pixels_of(model), model.in_chans)
    config = model.pretrained_cfg
    normalise = Normalise(config["mean"], config["std"], device)
    good: list[int] = []
    bad: list[int] = []
    rows: list[Tensor] = []
    for decoded in _loaded(_Decoded(images, numbers, transform), batch, workers):
        there = [(number, image) for number, image in decoded if image is not None]
        bad += [number for number, image in decoded if image is None]
        if not there:
            continue
        good += [number for number, _ in there]
        pixels = torch.stack([image for _, image in there]).to(device)
        rows.append(model(normalise.images(pixels)).float().cpu())
    vectors = torch.cat(rows) if rows else torch.zeros(0, model.embed_dim)
    return Part(torch.tensor(good, dtype=torch.int64), vectors, bad)


def _loaded(
    decoded: _Decoded, batch: int, workers: int
) -> Iterator[list[tuple[int, Tensor | None]]]:
    processes = min(workers, -(-len(decoded) // batch))
    loader = DataLoader(
        decoded,
        batch_size=batch,
        num_workers=processes,
        collate_fn=list,
        multiprocessing_context=fork_server("rcmae.evaluation.embedding") if processes else None,
        worker_init_fn=_begin if processes else None,
    )
    yield from loader


def _begin(_: int) -> None:
    end_with_owner()
    torch.set_num_threads(1)


def _save(path: Path, part: Part) -> None:
    tensors = {
        "numbers": part.numbers,
        "vectors": part.vectors.contiguous(),
        "bad": torch.tensor(part.bad, dtype=torch.int64),
    }
    write_aside(path, save(tensors), durable=False)


def _load(path: Path) -> Part:
    tensors = load_file(path)
    return Part(tensors["numbers"], tensors["vectors"], tensors["bad"].tolist())


def write_table(out: Path, images: Images, numbers: Tensor, vectors: Tensor) -> None:
    """Write keys, labels and vectors: columns of Parquet, arrays of NumPy, or tensors.

    In safetensors the keys are one tensor of UTF-8 bytes, a key a line. Labels are left out where
    no image has one; NO_LABEL (-1) stands for one that has none (in Parquet, null).

    Raises:
        Refused: pyarrow is not installed.
        OSError: the file cannot be written.
    """
    keys = [images.key(number) for number in numbers.tolist()]
    labels = np.array([images.label(number) for number in numbers.tolist()], dtype=np.int64)
    has_labels = bool((labels != NO_LABEL).any())
    with aside(out) as file:
        if out.suffix == ".npz":
            arrays = {"keys": np.array(keys), "vectors": vectors.numpy()}
            if has_labels:
                arrays["labels"] = labels
            np.savez(file, allow_pickle=False, **arrays)
        elif out.suffix == ".safetensors":
            text = np.frombuffer("\n".join(keys).encode(), dtype=np.uint8).copy()
            tensors = {"vectors": vectors.contiguous(), "keys": torch.from_numpy(text)}
            if has_labels:
                tensors["labels"] = torch.from_numpy(labels)
            save_file(tensors, file.name)
        else:
            _write_parquet(file.name, keys, labels if has_labels else None, vectors)


def _write_parquet(
    path: str, keys: Sequence[str], labels: np.ndarray | None, vectors: Tensor
) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise Refused(".parquet needs pyarrow: pip install 'rcmae[parquet]'") from error
    flat = pyarrow.array(vectors.flatten().numpy())
    columns = {
        "key": pyarrow.array(keys),
        "vector": pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
    }
    if labels is not None:
        columns["label"] = pyarrow.array(labels, mask=labels == NO_LABEL)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
