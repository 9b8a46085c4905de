"""Run on any number of ranks: one network on one set of whole pictures.

Arguments: a tar with maps, the number of classes, then batches of windows. Prints `RESULT {batch:
confusion matrix}` on rank 0."""

import json
import sys

import torch

from rcmae import dist
from rcmae.data.dense.crops import Labels
from rcmae.data.index import ShardIndex
from rcmae.data.members.whole import whole_samples
from rcmae.data.stream import Readers
from rcmae.evaluation.dense.judging import Prepare, Sight, judge
from rcmae.models.segmentation.backbone import Form
from rcmae.models.segmentation.segmenter import Heads, Segmenter
from rcmae.models.sizes import NetworkSizes

SIZES = NetworkSizes((16, 16), patch_size=4, in_channels=3, embed_dim=16, depth=4, num_heads=2)


def matrices(tar: str, num_classes: int, batches: list[int]) -> dict[str, list[list[int]]]:
    """Batch -> matrix. Collective."""
    heads = Heads(num_classes, width=8)
    network = Segmenter(SIZES, Form(levels=(0, 1, 2, 3)), heads).eval()
    found = {}
    for batch in batches:
        sight = Sight((16, 16), scales=(1.0, 1.5), flip=True) if batch == 3 else Sight((16, 16))
        pictures = whole_samples(
            ShardIndex.open(tar),
            Prepare(sight, Labels(num_classes)),
            kinds=("map",),
            rank=dist.rank(),
            world=dist.world(),
            readers=Readers(0),
        )
        with torch.no_grad():
            matrix, _ = judge(
                lambda images: network(images)[0],
                pictures,
                sight,
                num_classes=num_classes,
                batch=batch,
                normalise=lambda images: images.float() / 255 - 0.5,
                device=torch.device("cpu"),
            )
        found[str(batch)] = matrix.tolist()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.start(required=True, timeout_s=120)
    tar, num_classes, *batches = sys.argv[1:]
    said = matrices(tar, int(num_classes), [int(batch) for batch in batches])
    if dist.rank() == 0:
        print("RESULT " + json.dumps(said))
    dist.finish()
