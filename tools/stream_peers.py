"""What other packages make of the photographs of tools/bench_stream.py: its sides that are not
ours, each written as its own documentation has it.

A side is an iterable: each pass over it is an epoch, in batches of tensors, on one thread of this
process. `litdata`, `mosaicml-streaming` and `opencv` are tried where they are installed; this
package needs none of them. All crops are RandomResizedCrop (0.2 to 1) and a flip; `crops_of` are
those that stay uint8, bicubic with antialiasing.

`litdata` reads chunks of its own `optimize` and decodes by its own deserializer: torchvision.io.
Where that does not load it has no decoder, and is given the one of `uint8 v2`. `mosaicml-streaming`
reads MDS shards whose column is `jpeg`, which it decodes by PIL, or `bytes`, decoded as `uint8 v2`
does. `opencv` decodes and resizes by itself; its INTER_CUBIC has no antialiasing."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from rcmae.process.extensions import guard_torchvision

guard_torchvision()
from torchvision import transforms  # noqa: E402
from torchvision.io import ImageReadMode, decode_jpeg  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

SCALE = (0.2, 1.0)
SHARD = "64MB"  # the default of both packages that cut shards
NOTES = {"opencv": "its cubic resize has no antialiasing, so these are not the same views"}


@dataclass(frozen=True)
class Photographs:
    """What all sides read, and what they make of it."""

    files: Sequence[Path]  # a JPEG each
    folder: Path  # for the shards of a side; temporary
    size: int  # pixels of a view's side
    batch: int


class Peer(NamedTuple):
    """A package, ready to be measured."""

    version: str
    sides: dict[str, Iterable[torch.Tensor]]


class Peers(NamedTuple):
    """What there is to compare with."""

    sides: dict[str, Iterable[torch.Tensor]]
    versions: dict[str, str]
    left_out: dict[str, str]  # package -> why, and the way to have it


def uint8_decoder() -> tuple[str, Callable[[bytes], torch.Tensor]]:
    """What decodes to [3, H, W] uint8: torchvision.io, or simplejpeg where that does not load."""

    def by_torchvision(data: bytes) -> torch.Tensor:
        raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels: torch.Tensor = decode_jpeg(raw, ImageReadMode.RGB)
        return pixels

    def by_simplejpeg(data: bytes) -> torch.Tensor:
        return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)

    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        by_torchvision(file.getvalue())
    except RuntimeError:
        return "simplejpeg", by_simplejpeg
    return "torchvision.io", by_torchvision


def crops_of(size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """[3, H, W] uint8 to a crop of it, [3, size, size] uint8, by transforms.v2."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                size, scale=SCALE, interpolation=v2.InterpolationMode.BICUBIC, antialias=True
            ),
            v2.RandomHorizontalFlip(),
        ]
    )


class Crops(Dataset[torch.Tensor]):
    """Files as crops: `view` makes one, [3, size, size] uint8, of a file's bytes."""

    def __init__(self, files: Sequence[Path], view: Callable[[bytes], torch.Tensor]) -> None:
        self._files = files
        self._view = view

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self._view(self._files[number].read_bytes())


def uint8_side(photographs: Photographs) -> Iterable[torch.Tensor]:
    """`uint8 v2`: files, libjpeg-turbo to uint8, transforms.v2; nothing through PIL."""
    _, decode = uint8_decoder()
    crop = crops_of(photographs.size)
    crops = Crops(photographs.files, lambda data: crop(decode(data)))
    return DataLoader(crops, photographs.batch, shuffle=True)


def litdata_peer(photographs: Photographs) -> Peer:
    """StreamingDataset over chunks of `optimize`, which keep the files' bytes as they are."""
    import litdata
    from litdata.streaming.serializers import JPEGSerializer

    decoder, decode = uint8_decoder()

    class Decoding(JPEGSerializer):
        """litdata's own serializer where torchvision.io does not load."""

        def deserialize(self, data: bytes) -> torch.Tensor:
            return decode(bytes(data))

    chunks = str(photographs.folder / "litdata")
    with redirect_stdout(None):
        litdata.optimize(
            fn=Image.open,
            inputs=[str(path) for path in photographs.files],
            output_dir=chunks,
            chunk_bytes=SHARD,
            num_workers=1,
            start_method="spawn",
            verbose=False,
        )
    dataset = litdata.StreamingDataset(
        chunks,
        shuffle=True,
        serializers=None if decoder == "torchvision.io" else {"jpeg": Decoding()},
        transform=crops_of(photographs.size),
    )
    loader = litdata.StreamingDataLoader(dataset, batch_size=photographs.batch, shuffle=True)
    return Peer(litdata.__version__, {"litdata": loader})


def mosaicml_peer(photographs: Photographs) -> Peer:
    """StreamingDataset over MDS shards: its own decode to PIL's images, and bytes decoded here."""
    import streaming

    crop = crops_of(photographs.size)
    _, decode = uint8_decoder()

    class Views(streaming.StreamingDataset):
        """Crops: a sample is the column `image`."""

        def __getitem__(self, at: Any) -> torch.Tensor:
            image = super().__getitem__(at)["image"]
            if isinstance(image, bytes):
                return crop(decode(image))
            return crop(v2.functional.pil_to_tensor(image.convert("RGB")))

    sides: dict[str, Iterable[torch.Tensor]] = {}
    for column, name in (("jpeg", "mosaicml-streaming"), ("bytes", "mosaicml-streaming, bytes")):
        shards = str(photographs.folder / f"mosaicml_{column}")
        with streaming.MDSWriter(
            out=shards, columns={"image": column}, size_limit=SHARD.lower()
        ) as writer:
            for path in photographs.files:
                with Image.open(
                    path, formats=["JPEG"]
                ) as image:  # of which `jpeg` keeps the file's bytes
                    writer.write({"image": path.read_bytes() if column == "bytes" else image})
        views = Views(local=shards, shuffle=True, batch_size=photographs.batch)
        sides[name] = DataLoader(views, photographs.batch)
    return Peer(streaming.__version__, sides)


def opencv_peer(photographs: Photographs) -> Peer:
    """Files in a DataLoader: imdecode, a crop, resize, flip, and RGB at the last."""
    import cv2

    cv2.setNumThreads(1)
    size = (photographs.size, photographs.size)

    def view(data: bytes) -> torch.Tensor:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        whole = torch.empty((), dtype=torch.uint8).expand(3, *pixels.shape[:2])
        top, left, rows, columns = transforms.RandomResizedCrop.get_params(
            whole, list(SCALE), [3 / 4, 4 / 3]
        )
        crop = pixels[top : top + rows, left : left + columns]
        crop = cv2.resize(crop, size, interpolation=cv2.INTER_CUBIC)
        if torch.rand(1) < 0.5:
            crop = cv2.flip(crop, 1)
        return torch.from_numpy(cv2.cvtColor(crop, cv2.COLOR_BGR2RGB)).permute(2, 0, 1)

    loader = DataLoader(Crops(photographs.files, view), photographs.batch, shuffle=True)
    return Peer(cv2.__version__, {"opencv": loader})


# a package as pip knows it -> what makes its sides
PEERS: dict[str, Callable[[Photographs], Peer]] = {
    "litdata": litdata_peer,
    "mosaicml-streaming": mosaicml_peer,
    "opencv-python-headless": opencv_peer,
}


def peers(photographs: Photographs) -> Peers:
    """The sides of all packages that can be imported here, and which others were left out."""
    found = Peers({}, {}, {})
    for package, make in PEERS.items():
        try:
            peer = make(photographs)
        except ImportError as error:
            found.left_out[package] = f"{error}; pip install {package}"
            continue
        found.versions[package] = peer.version
        found.sides.update(peer.sides)
    return found
