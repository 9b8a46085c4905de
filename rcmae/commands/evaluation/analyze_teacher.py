"""What the teacher does to a run's gradients: RC-MAE's analysis (Lee et al., ICLR 2023, section 3)
of a run of yours.

    rcmae analyze-teacher RUN [--images 128] [--pairs 48] [--out FOLDER] [--json]

Writes FOLDER/teacher.png and FOLDER/teacher.json (by default in RUN/pictures, where `rcmae
visualize page` finds it). At each checkpoint that the run has kept (checkpoint.keep_every), in
float64, the total and each layer's:

1. the gradient of the reconstruction and of the consistency at the batch that comes next: cosine
   and ratio of norms;
2. what the run's own teacher pulls at: the cosine of the consistency's gradient with the way that
   the student has gone from the teacher, and with the reconstruction's gradient at the last batch;
   at that batch, at it under other masks, at other images;
3. the conditional momentum: from student = teacher one small step is taken along one image's
   gradient. What share of it would the consistency take back at the same image and mask, under
   another mask, at other images? Against how alike the encoder's features are.

And 4., the paper's linear model: one matrix on masked images, where the consistency's gradient is
by algebra the sum of all earlier gradients, each times a power of the momentum, projected on the
input: at an input b, of the gradient left by an input a, it takes back the share rate x momentum x
|b|^2 x cos(a, b)^2.

What it says of rcmae_cifar10_demo (tools/results/teacher_cifar10.json): the paper's claim is seen
for single images. At step 3,120 a step is taken back under another mask 0.63 as much as at the same
input, at another image 0.34, and more where features are alike (rank correlation 0.44; among other
images alone 0.51 at step 100 and 0.18 at the end). It is not seen in the run's own teacher at whole
batches: it pulls as much at other images as at those just learnt from, at steps 100, 300 and 3,120
against the last reconstruction's gradient, at 600, 1,000 and 2,000 with it.

Not done: the optimizer's scaling; steps are those of plain gradient descent, as in the paper's
argument. Exit status: 0 written; 2 the run has nothing to analyse, or the input is wrong; 1
anything else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rcmae.errors import Refused


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    options = _parser().parse_args(arguments)
    from rcmae.checkpoint import CheckpointError
    from rcmae.evaluation.teacher_analysis.page import draw, summary
    from rcmae.files import write_aside

    out = options.out or options.run / "pictures"
    try:
        told = _analysed(options)
        draw(told, out / "teacher.png")
        write_aside(out / "teacher.json", json.dumps(told, indent=1) + "\n")
    except (Refused, CheckpointError, OSError) as error:
        print(f"rcmae: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    if options.json:
        print(json.dumps(told, indent=1))
    else:
        print(f"{summary(told)}\nwritten: {out / 'teacher.png'}, {out / 'teacher.json'}")
    return 0


def _analysed(options: argparse.Namespace) -> dict[str, Any]:
    from rcmae.evaluation.teacher_analysis.run import Sizes, document, look_at, open_run

    if min(options.images, options.pairs) < 2 or options.size <= 0:
        raise Refused("--images and --pairs must be at least 2, --size above 0")
    sizes = Sizes(options.images, options.pairs, options.size)
    run = open_run(options.run, options.images, options.shards, allow_pipe=options.allow_pipe)
    found = []
    for manifest in run.checkpoints:
        found.append(look_at(run, manifest, sizes))
        print(f"step {manifest.step}: done", file=sys.stderr)
    return document(run, options.run.name, sizes, found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcmae analyze-teacher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="its run.dir")
    parser.add_argument("--images", type=int, default=128, help="of a batch (128)")
    parser.add_argument(
        "--pairs", type=int, default=48, help="images whose gradient is stepped along (48)"
    )
    parser.add_argument(
        "--size", type=float, default=1e-3, help="of that step, over the weights' length (1e-3)"
    )
    parser.add_argument("--shards", help="where data.shards lie now, if they have moved")
    parser.add_argument(
        "--allow-pipe",
        action="store_true",
        help="run the commands (pipe:) by which its recipe reads data",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: RUN/pictures")
    parser.add_argument("--json", action="store_true", help="print teacher.json instead of a table")
    return parser
