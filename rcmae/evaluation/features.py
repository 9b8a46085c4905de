"""Features of labelled images, whole images with nothing hidden, by any number of networks at once.

Two rows tell what features are worth: those of the same architecture with fresh weights, and the
pixels themselves. Everything that calls a network is collective: under ZeRO-3 and FSDP2 a forward
gathers weights, so every rank runs the same number of forwards, always through the engine's own
wrapper."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F
from torch import Tensor, nn

from rcmae import dist
from rcmae.data.batch import Batch
from rcmae.errors import Refused
from rcmae.models.tuning import compiling

Extractor = Callable[[Tensor], Tensor]  # normalised images [B, C, H, W] -> one vector each [B, D]

PIXELS_SIDE = 32  # the raw-pixels row looks at images of at most this many pixels a side


def pooled(model: nn.Module, pool: str) -> Extractor:
    """The model as a feature extractor.

    Args:
        model: the wrapper of a network that pretrains; its forward gives "encoded".
        pool: "mean" for the mean over the patches, "cls" for the class token (the mean of several),
            "cls_before_norm" for that before the encoder's last norm, which Pixio's k-NN reads.

    Raises:
        Refused: another pool.
    """
    if pool not in ("cls", "cls_before_norm", "mean"):
        raise Refused(f"pool={pool!r} is unknown; use 'cls', 'cls_before_norm' or 'mean'")

    def features(images: Tensor) -> Tensor:
        if pool == "cls_before_norm":
            class_tokens = model(images, outputs=("class_tokens",))["class_tokens"]  # [B, c, D]
            return class_tokens.float().mean(dim=1)
        tokens = model(images, outputs=("encoded",))["encoded"].float()  # [B, 1 + L, D]
        return tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)

    return features


def pixels(images: Tensor) -> Tensor:
    """The images themselves as features [B, C*h*w], brought down to at most PIXELS_SIDE a side
    by averaging.
    """
    height = min(images.shape[-2], PIXELS_SIDE)
    width = min(images.shape[-1], PIXELS_SIDE)
    return F.adaptive_avg_pool2d(images.float(), (height, width)).flatten(1)


@contextlib.contextmanager
def evaluating(*models: nn.Module | None) -> Iterator[None]:
    """The models in evaluation mode (no drop path), without gradients and without compiled graphs,
    and back as they were.
    """
    there = [(model, model.training) for model in models if model is not None]
    for model, _ in there:
        model.eval()
    try:
        # not inference_mode: FSDP2 would keep what it gathers there
        with compiling.eagerly(), torch.no_grad():
            yield
    finally:
        for model, was_training in there:
            model.train(was_training)


@dataclass(frozen=True)
class Features:
    """One rank's share, or after `gathered` all of it, ordered by sample number. On the CPU."""

    vectors: dict[str, Tensor]  # network -> [n, D] float32
    labels: Tensor  # [n] int64
    samples: Tensor  # [n] int64, number of the sample in its set

    def gathered(self) -> Features:
        """The shares of all ranks, the same on every rank. Collective: every rank calls."""
        samples = gather_rows(self.samples)
        order = torch.argsort(samples)  # the order, and so every tie, is that of one process
        vectors = {name: gather_rows(rows)[order] for name, rows in self.vectors.items()}
        return Features(vectors, gather_rows(self.labels)[order], samples[order])


def extract_features(
    networks: Mapping[str, Extractor],
    batches: Iterable[Batch],
    *,
    device: torch.device,
    normalise: Extractor,
) -> Features:
    """What each network makes of this rank's share of the images, read once for all networks.

    Collective: every rank calls with as many batches, the last ones padded with samples of position
    -1, which are run and left out.

    Args:
        networks: name -> extractor; the models in them are to be in evaluation mode.
        batches: labelled, each as the data helper gives it: uint8 images.
        device: where the networks compute.
        normalise: uint8 images on the device -> what the networks were trained on.

    Raises:
        Refused: the images have no labels.
    """
    vectors: dict[str, list[Tensor]] = {name: [] for name in networks}
    labels: list[Tensor] = []
    samples: list[Tensor] = []
    unlabelled = False
    with torch.no_grad():
        for batch in batches:
            real = batch.positions >= 0
            if batch.labels is None:
                unlabelled = True
                break
            labels.append(batch.labels[real])
            samples.append(batch.positions[real])
            images = normalise(batch.images.to(device, non_blocking=True))
            for name, network in networks.items():
                vectors[name].append(network(images).float().cpu()[real])
    if unlabelled or any(bool((part < 0).any()) for part in labels):
        raise Refused(
            "k-NN needs a label for every image; give evaluate.train_shards and test_shards with "
            ".cls"
        )
    if not labels:  # a rank without images
        empty = torch.zeros(0, dtype=torch.int64)
        return Features({name: torch.zeros(0, 0) for name in networks}, empty, empty)
    joined = {name: torch.cat(parts) for name, parts in vectors.items()}
    return Features(joined, torch.cat(labels), torch.cat(samples))


def features_of_both(
    networks: Mapping[str, Extractor],
    train: Iterable[Batch],
    test: Iterable[Batch],
    *,
    device: torch.device,
    normalise: Extractor,
) -> tuple[Features, Features]:
    """This rank's share of the features of a training and a test set. Collective: every rank calls.

    Args:
        networks: name -> extractor, as `pooled(engine.student, pool)`, and `pixels`; models in
            evaluation mode.
        train: this rank's batches of the labelled training images, as many on every rank.
        test: the same of the test images.
        device: where the networks compute.
        normalise: uint8 images on the device -> what the networks were trained on.

    Raises:
        Refused: labels are missing; the same on every rank.
    """
    problem = None
    try:
        train_features = extract_features(networks, train, device=device, normalise=normalise)
        test_features = extract_features(networks, test, device=device, normalise=normalise)
    except Refused as error:
        problem = str(error)
    dist.together(problem)
    return train_features, test_features


def gather_rows(rows: Tensor) -> Tensor:
    """All ranks' rows of a CPU tensor, in rank order.

    Collective: every rank calls; the numbers of rows may differ.
    """
    if dist.world() == 1:
        return rows
    shapes = dist.gather(tuple(rows.shape))
    most = max(shape[0] for shape in shapes)
    # padded to the longest; a rank without rows learns their width
    mine = rows.new_zeros(most, *max(shapes)[1:])
    if len(rows):
        mine[: len(rows)] = rows
    parts = [torch.empty_like(mine) for _ in shapes]
    torch_dist.all_gather(parts, mine, group=dist.control())
    return torch.cat([part[: shape[0]] for part, shape in zip(parts, shapes, strict=True)])
