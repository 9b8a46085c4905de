"""Pictures of what a network sees and does, of a run, a checkpoint or a file of any family.

    rcmae visualize reconstruct RUN --images photos/ --out pictures/
        input, masked, student, teacher
    rcmae visualize attention RUN --images photo.jpg --out pictures/
        heads of the last block, rollout
    rcmae visualize features RUN --images shard.tar --out pictures/
        tokens by PCA, images by t-SNE, UMAP
    rcmae visualize filters RUN --out pictures/
        patch embedding, positions
    rcmae visualize segment RUN --images photos/
        what a segmenter sees: a class for each pixel
    rcmae visualize detect RUN --images photos/
        boxes, masks, classes and scores that a detector finds
    rcmae visualize page RUN
        RUN/pictures as one HTML file

Images are files, folders of them, or shards. What was written is printed. Exit status: 0 written; 2
these do not go together; 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rcmae.commands.arguments import check_verb
from rcmae.errors import Refused

if TYPE_CHECKING:
    from rcmae.evaluation.visualisation import Pictures

KINDS = ("reconstruct", "attention", "features", "filters", "segment", "detect", "page")
NORMS = ("unbiased", "biased", "channel", "none")
STATISTICS = ("visible", "true", "none")
PLANES = ("tsne", "umap")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    check_verb(parser, words, KINDS, "reconstruct")
    options = parser.parse_args(words)
    from rcmae.checkpoint import CheckpointError

    try:
        written = _write_page(options) if options.kind == "page" else _write_pictures(options)
    except (Refused, CheckpointError, OSError) as error:
        print(f"rcmae: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    if options.json:
        print(json.dumps({"kind": options.kind, "written": [str(path) for path in written]}))
    else:
        print(*written, sep="\n")
    return 0


def _write_page(options: argparse.Namespace) -> list[Path]:
    from rcmae.evaluation.visualisation import page
    from rcmae.files import write_aside

    out = options.source / "pictures.html"
    write_aside(out, page(options.source), durable=False)
    return [out]


def _write_pictures(options: argparse.Namespace) -> list[Path]:
    from rcmae.evaluation.pictures import save_png

    if options.images is None and options.kind != "filters":
        raise Refused(f"{options.kind} needs --images: files, folders or shards")
    lacking = [str(path) for path in options.images or [] if not path.exists()]
    if lacking:
        raise Refused(
            f"--images {', '.join(lacking)}: no such file or folder; give files, folders or shards"
        )
    if options.source.is_file() and options.out is None:
        raise Refused("give --out: a file of weights has no folder for pictures")
    folder = options.out or options.source / "pictures"
    written = []
    for name, picture in _drawn(options).items():
        written.append(folder / f"{name}.png")
        save_png(picture, written[-1])
    return written


def _drawn(options: argparse.Namespace) -> Pictures:
    from rcmae.evaluation import visualisation

    if options.kind == "filters":
        return visualisation.filters(options.source)
    count = options.count or (200 if options.kind == "features" else 4)
    images = visualisation.Images(options.images, count)
    if options.kind == "segment":
        from rcmae.evaluation.visualisation.segments import segments

        return segments(options.source, images)
    if options.kind == "detect":
        from rcmae.evaluation.visualisation.detections import detections

        return detections(options.source, images)
    if options.kind == "reconstruct":
        return visualisation.reconstruct(
            options.source,
            images,
            seed=options.seed,
            mask_ratio=options.mask_ratio,
            statistics=options.statistics,
            pixel_norm=options.pixel_norm,
        )
    if options.kind == "attention":
        return visualisation.attention(
            options.source, images, discard=options.discard, classes=options.classes
        )
    return visualisation.features(options.source, images, planes=options.plane, seed=options.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcmae visualize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("source", type=Path, metavar="RUN_OR_FILE")
    parser.add_argument(
        "--images", type=Path, nargs="+", metavar="PATH", help="files, folders, shards"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/pictures")
    parser.add_argument("--count", type=int, help="number of images (4; 200 for features)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the masks and of t-SNE")
    parser.add_argument(
        "--mask-ratio",
        type=float,
        help="share of the patches that is hidden (that of the run; 0.75 of a file of weights)",
    )
    parser.add_argument(
        "--pixel-norm",
        choices=NORMS,
        help="normalisation of the predicted patches (that of the recipe)",
    )
    parser.add_argument(
        "--plane",
        choices=PLANES,
        nargs="+",
        default=["tsne"],
        help="how labelled images are drawn in the plane (tsne)",
    )
    parser.add_argument(
        "--statistics",
        choices=STATISTICS,
        default="visible",
        help="statistics that un-normalise the pixels (visible)",
    )
    parser.add_argument(
        "--discard",
        type=float,
        default=0.0,
        help="share of the weakest attention that rollout ignores",
    )
    parser.add_argument(
        "--classes",
        type=int,
        nargs="+",
        default=[],
        help="gradient rollout for these classes of a classifier",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser
