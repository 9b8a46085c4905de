"""`rcmae shards make`: shards from folders, lists, Parquet or other tars."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rcmae.commands.shards.arguments import (
    STOPPED,
    add_kinds,
    parser_of,
    positive,
    register_kinds,
)
from rcmae.errors import counted
from rcmae.process import cores
from rcmae.process.console import in_line, say

if TYPE_CHECKING:
    from rcmae.data.packing.writer import Report

MAKE = """Make WebDataset shards, with their index, from images.

IMAGES is a folder with a sub-folder for each class, or with images alone (no labels then); or a
.csv or .tsv file with the columns `path` (relative to the file's folder) and, optionally, `label`;
or .parquet files with a column `image` (bytes, or a struct with `bytes`) and, if wanted, `label`;
or .tar files, whose images and labels are laid out again. Labels are whole numbers from 0, or
names; an empty cell and -1 are none (--unlabelled, where others have one); --label names another
column. Class folders are numbered in the order of the alphabet, or of their numbers; hidden and
system folders are not read. OUT gets NAME-000000.tar, ..., `index.json` and, with class names,
`classes.txt`: line i, counted from 0, is the class of label i (--classes takes such a file, so that
a validation set gets the training set's labels). ImageNet-1k in one command:

    rcmae shards make ILSVRC2012/train shards --name train --size 256

Label maps and boxes. A map goes beside its image as KEY.seg.png (a class a pixel, 255 is no label),
an annotation as KEY.json in COCO's words, with categories.json beside the shards:

    rcmae shards make ADEChallengeData2016 OUT --split training      and again: --split validation
    rcmae shards make CITYSCAPES OUT --split train        leftImg8bit and gtFine, the 19 classes
    rcmae shards make VOCdevkit/VOC2012 OUT --split train
    rcmae shards make --images A --maps B OUT --classes names.txt     paired by their names
    rcmae shards make pairs.csv OUT                       with the columns path and map
    rcmae shards make --coco instances_train2017.json train2017 OUT --name train

Shards of a split have its name: train-*.tar for training, val-*.tar for validation. ADE20K's 0
becomes "no label" and n becomes n - 1. COCO's images without objects are left out unless
--keep-empty (for validation). --size makes maps smaller by the nearest pixel and scales
annotations.

Every image is decoded once; what cannot be is left out and listed, as are those whose shorter side
has fewer pixels than --min-size. The order is that of a hash of the name, so each shard mixes the
classes. The same images and options give the same bytes. --size makes images whose shorter side has
more pixels than that smaller, as JPEG; all others go in as they are. Images of any number of
channels are taken, as .npy or TIFF (which stay .npy or TIFF when made smaller). --restart-markers
adds restart markers to JPEGs: the pixels stay as they are, and a random crop is decoded without
most of what lies beside it, with any decoder. A job that was
killed or stopped resumes when the same command is started again.

--hold-out 0.1 puts a tenth of the images, drawn by their names, into shards named val beside those
of NAME: a set to judge by, with the same classes.txt.
"""


def _make_arguments() -> argparse.ArgumentParser:
    parser = parser_of("make", MAKE)
    parser.add_argument(
        "images", nargs="*", metavar="IMAGES", help="a folder, a list, .parquet or .tar files"
    )
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="folder of the shards, their index.json and classes.txt; made if need be",
    )
    parser.add_argument(
        "--name", help="what the shards' names begin with (default: the split's, or else train)"
    )
    parser.add_argument(
        "--samples", type=positive, default=1000, help="most in a shard (default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=positive, help="shorter side, in pixels, of images that have more"
    )
    parser.add_argument(
        "--quality",
        type=positive,
        default=90,
        help="of the JPEG they become (default: %(default)s)",
    )
    parser.add_argument(
        "--min-size", type=positive, default=1, help="leave out images with fewer pixels a side"
    )
    parser.add_argument(
        "--restart-markers",
        action="store_true",
        help="add restart markers to JPEGs, without loss; needs jpegtran or libjpeg-turbo 3.1",
    )
    parser.add_argument(
        "--classes", type=Path, help="file with a class on each line, in the order of the labels"
    )
    parser.add_argument(
        "--label", metavar="COLUMN", help="that has the labels, where it is not label; none: none"
    )
    parser.add_argument(
        "--unlabelled", action="store_true", help="take images without a label among others"
    )
    parser.add_argument(
        "--jobs", type=positive, default=cores.usable(), help="processes (default: the cores)"
    )
    parser.add_argument(
        "--hold-out",
        type=_share,
        metavar="SHARE",
        help="of the images go into shards named val, with the same classes (0.1: a tenth)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace shards of this name")
    add_kinds(parser)
    targets = parser.add_argument_group("label maps and boxes")
    targets.add_argument("--images", dest="folder", metavar="FOLDER", help="of images, with --maps")
    targets.add_argument("--maps", metavar="FOLDER", help="of a map for each image")
    targets.add_argument("--split", help="of a set that is laid out in splits")
    targets.add_argument("--coco", metavar="JSON", help="annotations of the images, as COCO's")
    targets.add_argument(
        "--keep-empty", action="store_true", help="with --coco: images without objects, too"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _share(text: str) -> float:
    """A number between 0 and 1."""
    share = float(text)
    if not 0.0 < share < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return share


def make(arguments: Sequence[str] | None = None) -> int:
    """Make shards; the exit status."""
    asked = _make_arguments().parse_args(arguments)
    from rcmae.data.packing.encoding import Encoding
    from rcmae.data.packing.found import Targets
    from rcmae.data.packing.layouts import name_of_split
    from rcmae.data.packing.writer import PackingOptions, make_shards
    from rcmae.data.sets import names_in
    from rcmae.errors import Refused

    try:
        register_kinds(asked.kind)
        options = PackingOptions(
            name=asked.name or name_of_split(asked.split),
            samples=asked.samples,
            images=Encoding(asked.size, asked.quality, asked.min_size, asked.restart_markers),
            classes=None if asked.classes is None else list(names_in(asked.classes)),
            label=asked.label,
            unlabelled=asked.unlabelled,
            jobs=asked.jobs,
            overwrite=asked.overwrite,
            progress=sys.stderr.isatty(),
            targets=Targets(asked.maps, asked.coco, asked.split, asked.keep_empty),
        )
        report = make_shards(_images(asked), asked.out, options, hold_out=asked.hold_out)
    except (Refused, OSError) as error:
        say(f"rcmae: {error}", error=True)
        return 2
    except KeyboardInterrupt:
        say("stopped; run the same command again to resume", error=True)
        return STOPPED
    if asked.json:
        rejected = [reject._asdict() for reject in report.rejected]
        say(json.dumps(report._asdict() | {"rejected": rejected}, indent=1))
    else:
        print_report(report, asked.out, _unnamed(asked))
    return 0


def _images(asked: argparse.Namespace) -> list[str]:
    """What holds the images. Raises Refused where the arguments do not go together."""
    from rcmae.errors import Refused

    if (asked.folder is None) != (asked.maps is None):
        raise Refused("--images A --maps B go together: a folder of images and one of their maps")
    images = [*asked.images, *([] if asked.folder is None else [asked.folder])]
    if not images:
        raise Refused("no images: give a folder, a list, .parquet or .tar files before OUT")
    if asked.keep_empty and asked.coco is None:
        raise Refused("--keep-empty belongs to --coco")
    return images


def _unnamed(asked: argparse.Namespace) -> str:
    """What images are said to have, where no class has a name."""
    if asked.coco is not None:
        return "with annotations"
    if asked.maps is not None:
        return "with maps, whose classes have no names (--classes gives them)"
    return "of no classes"


def print_report(report: Report, out: Path, unnamed: str) -> None:
    """Print what was made, for people."""
    from rcmae.data.packing.found import some

    named = f"of {counted(len(report.classes), 'class', 'classes')}"
    classes = named if report.classes else unnamed
    say(
        f"{out}: {counted(report.samples, 'image')} {classes}"
        f" in {counted(len(report.shards), 'shard')}, {report.bytes / 1e6:,.1f} MB"
    )
    for note in report.notes:
        say(f"  {note}")
    if report.restarts:
        say(f"  restart markers: {_restarts(report.restarts)}")
    if report.kept:
        were = "was" if report.kept == 1 else "were"
        say(f"  {counted(report.kept, 'shard')} {were} there from an unfinished job")
    if report.other_files:
        were = "was" if report.other_files == 1 else "were"
        say(
            f"  {counted(report.other_files, 'other file')} {were} not looked at: "
            f"{some(report.such_as, report.other_files)}"
        )
    for reject in report.rejected:
        say(f"  left out: {in_line(reject.path)} ({in_line(reject.reason)})")


def _restarts(found: dict[str, int]) -> str:
    """How many images got restart markers, and of the others why not."""
    from rcmae.data.packing.encoding import ADDED, HAD

    parts = [f"added to {counted(found.get(ADDED, 0), 'image')}"]
    if HAD in found:
        parts.append(f"in {found[HAD]:,} before")
    reasons = [f"{count:,} ({why})" for why, count in found.items() if why not in (ADDED, HAD)]
    if reasons:
        parts.append(f"left as they were: {', '.join(reasons)}")
    return "; ".join(parts)
