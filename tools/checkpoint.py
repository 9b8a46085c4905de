#!/usr/bin/env python3
"""Look at checkpoints, check them, compare two, delete old ones.

    python tools/checkpoint.py list RUN                   what there is
    python tools/checkpoint.py show RUN_OR_CHECKPOINT     what is in one
    python tools/checkpoint.py verify RUN_OR_CHECKPOINT   every file against its checksum
    python tools/checkpoint.py diff A B                   differences by parameter
    python tools/checkpoint.py prune RUN --keep 2         delete all valid ones but the newest

Where one checkpoint is wanted, RUN stands for its newest valid one. `list` and `show` look at
manifests and sizes alone; the others read every byte. Exit status: 0 fine, or equal; 1 something is
damaged, or two differ; 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rcmae import checkpoint
from rcmae.checkpoint import CheckpointError, Manifest
from rcmae.checkpoint.lease import fence
from rcmae.errors import Refused
from rcmae.weights.reading import checkpoint_folders, find_checkpoint, whole_tensors

COUNTERS = ("step", "images", "optimizer_step", "teacher_updates")


@dataclass(frozen=True)
class Found:
    """A folder that calls itself a checkpoint, and what is wrong with it."""

    path: Path
    manifest: Manifest | None  # None where it cannot be read
    problems: list[str]

    @property
    def facts(self) -> dict[str, Any]:
        """Plain values, for JSON and for tables."""
        facts: dict[str, Any] = {
            "path": str(self.path),
            "valid": not self.problems,
            "problems": self.problems,
        }
        if self.manifest is None:
            return facts
        recipe, meta = self.manifest.meta["recipe"], self.manifest.meta
        return facts | {
            **{key: getattr(self.manifest, key) for key in COUNTERS},
            "generation": self.manifest.generation,
            "saved": os.stat(self.path / "manifest.json").st_mtime,
            "engine": recipe["engine"]["name"],
            "engine_config": recipe["engine"]["config"],
            "precision": recipe["engine"]["precision"],
            "world": meta["sizes"]["world"],
            "objective": recipe["objective"]["name"],
            "model": recipe["model"]["name"],
            "data_fingerprint": meta["data_fingerprint"],
            "versions": meta["versions"],
            "bytes": sum(about["bytes"] for about in self.manifest.files.values()),
        }


def look_at(path: Path, *, every_byte: bool) -> Found:
    """Judge a checkpoint as a reader of its run would: by manifest, lease and its files' sizes
    or checksums.
    """
    try:
        manifest = checkpoint.read_manifest(path)
    except CheckpointError as error:
        return Found(path, None, [str(error)])
    if every_byte:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            judged = list(
                pool.map(
                    lambda name: checkpoint.file_problem(manifest, name), sorted(manifest.files)
                )
            )
    else:
        judged = [size_problem(manifest, name) for name in sorted(manifest.files)]
    problems = [problem for problem in judged if problem]
    if not fence(path.parent.parent).allows(manifest.generation, manifest.step):
        problems.append(f"{path}: its writer, generation {manifest.generation}, had lost the run")
    return Found(path, manifest, problems)


def print_problems(out: Console, rows: Iterable[Found]) -> None:
    """What is wrong, a line each, whole however narrow the terminal is."""
    for problem in (problem for row in rows for problem in row.problems):
        out.print(problem, markup=False, soft_wrap=True)


def size_problem(manifest: Manifest, name: str) -> str | None:
    """What is wrong with a file, by its size alone."""
    path, wanted = manifest.path / name, manifest.files[name]["bytes"]
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None if size == wanted else f"{path} has {size} bytes, the manifest says {wanted}"


# --------------------------------------------------------------------------------------------- list


def list_run(options: argparse.Namespace, out: Console) -> int:
    """`list`."""
    folders = checkpoint_folders(options.source)
    root = folders[0].parent
    rows = [look_at(path, every_byte=False) for path in folders]
    latest = (root / "LATEST").read_text().strip() if (root / "LATEST").exists() else None
    known = {"LATEST", *(path.name for path in folders)}
    beside = root.iterdir() if folders != [options.source] else ()
    others = sorted(path.name for path in beside if path.name not in known)
    if options.json:
        print(
            json.dumps(
                {"latest": latest, "checkpoints": [row.facts for row in rows], "others": others},
                indent=1,
            )
        )
    else:
        table = Table(
            "step",
            "images",
            "saved",
            "engine",
            "ranks",
            "generation",
            "size",
            "state",
            title=escape(str(root)),
        )
        for row in rows:
            facts = row.facts
            state = ("not valid" if row.problems else "whole") + (
                ", LATEST" if row.path.name == latest else ""
            )
            if row.manifest is None:
                table.add_row(row.path.name, *[""] * 6, state)
                continue
            table.add_row(
                f"{facts['step']:,}",
                f"{facts['images']:,}",
                when(facts["saved"]),
                engine(facts),
                str(facts["world"]),
                str(facts["generation"]),
                size(facts["bytes"]),
                state,
            )
        out.print(table)
        print_problems(out, rows)
        if others:
            out.print(f"no checkpoints: {', '.join(others)}", style="dim", markup=False)
    return int(any(row.problems for row in rows))


# --------------------------------------------------------------------------------------------- show


def show(options: argparse.Namespace, out: Console) -> int:
    """`show`."""
    rows = [
        look_at(path, every_byte=False) for path in reversed(checkpoint_folders(options.source))
    ]
    found = next((row for row in rows if not row.problems), rows[0])
    if found.manifest is None:
        raise CheckpointError("; ".join(found.problems))
    manifest, facts = found.manifest, found.facts
    if options.json:
        more = {"files": manifest.files, "tensors": manifest.tensors, "meta": manifest.meta}
        print(json.dumps({**facts, "kinds": kinds(manifest), **more}, indent=1))
        return int(bool(found.problems))
    told = Table(show_header=False, title=escape(str(found.path)))
    for name, text in {
        **{key.replace("_", " "): f"{facts[key]:,}" for key in COUNTERS},
        "saved": when(facts["saved"]),
        "generation": str(facts["generation"]),
        "engine": f"{engine(facts)}, {facts['world']} ranks",
        "objective": f"{facts['objective']}, {facts['model']}",
        "data": facts["data_fingerprint"],
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "size": size(facts["bytes"]),
        "state": "not valid" if found.problems else "whole, by sizes",
    }.items():
        told.add_row(name, escape(text))
    out.print(told)
    print_problems(out, [found])
    by_kind = Table("kind", "tensors", "elements", "type", "size")
    for kind, row in kinds(manifest).items():
        by_kind.add_row(
            kind,
            f"{row['tensors']:,}",
            f"{row['elements']:,}",
            ", ".join(row["dtypes"]),
            size(row["bytes"]),
        )
    out.print(by_kind)
    files = Table("file", "size", "sha256")
    for name, file in sorted(manifest.files.items()):
        files.add_row(name, size(file["bytes"]), file["sha256"][:16])
    out.print(files)
    if options.tensors:
        tensors = Table("tensor", "shape", "type", "pieces")
        for key, row in manifest.tensors.items():
            tensors.add_row(
                key, "x".join(map(str, row["shape"])), row["dtype"], str(len(row["runs"]))
            )
        out.print(tensors)
    return int(bool(found.problems))


def kinds(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """How many tensors, elements and bytes of each kind."""
    table: dict[str, dict[str, Any]] = {}
    for key, row in manifest.tensors.items():
        about = table.setdefault(
            key.partition("/")[0], {"tensors": 0, "elements": 0, "dtypes": [], "bytes": 0}
        )
        elements = math.prod(row["shape"])
        about["tensors"] += 1
        about["elements"] += elements
        about["bytes"] += elements * {"F64": 8, "I64": 8, "F32": 4, "BF16": 2}[row["dtype"]]
        about["dtypes"] = sorted({*about["dtypes"], row["dtype"]})
    return table


# ------------------------------------------------------------------------------------------- verify


def verify(options: argparse.Namespace, out: Console) -> int:
    """`verify`."""
    rows = [look_at(path, every_byte=True) for path in checkpoint_folders(options.source)]
    if options.json:
        verdict = {
            "valid": not any(row.problems for row in rows),
            "checkpoints": [row.facts for row in rows],
        }
        print(json.dumps(verdict, indent=1))
    else:
        table = Table("checkpoint", "files", "size", "verdict")
        for row in rows:
            files = row.manifest.files.values() if row.manifest else []
            table.add_row(
                row.path.name,
                str(len(files)),
                size(sum(file["bytes"] for file in files)),
                "not valid" if row.problems else "valid",
            )
        out.print(table)
        print_problems(out, rows)
    return int(any(row.problems for row in rows))


# --------------------------------------------------------------------------------------------- diff


@dataclass
class Difference:
    """Of one tensor, or of all of a kind."""

    name: str
    squares: float = 0.0  # sum of squared differences
    of_squares: float = 0.0  # sum of squares of the first
    max_abs: float = 0.0
    tensors: int = 0
    differing: int = 0

    def add(self, other: Difference) -> None:
        """Count another one in."""
        self.squares += other.squares
        self.of_squares += other.of_squares
        self.max_abs = max(self.max_abs, other.max_abs, key=_order)
        self.tensors += other.tensors
        self.differing += other.differing

    @property
    def relative(self) -> float:
        """L2 norm of the difference over that of the first: inf where that is 0, nan where a
        number is not finite.
        """
        if self.squares == 0 or math.isnan(self.squares):
            return self.squares
        return math.sqrt(self.squares / self.of_squares) if self.of_squares else math.inf

    @property
    def facts(self) -> dict[str, Any]:
        """Plain values; a number that JSON has no way to write is null."""
        measures = {"relative_l2": self.relative, "max_abs": self.max_abs}
        finite = {key: value if math.isfinite(value) else None for key, value in measures.items()}
        return {"name": self.name, **finite, "tensors": self.tensors, "differing": self.differing}


def _order(value: float) -> float:
    """Numbers that are none come last, as the worst."""
    return math.inf if math.isnan(value) else value


def difference(one: torch.Tensor, other: torch.Tensor, name: str) -> Difference:
    """Of two tensors [n] in float64. NaN on both sides at the same place is no difference."""
    gap = torch.where((one == other) | (one.isnan() & other.isnan()), 0.0, one - other)
    squares, largest = float(gap.square().sum()), float(gap.abs().max())
    if not math.isfinite(squares):
        squares = largest = math.nan
    return Difference(
        name, squares, float(one.square().sum()), largest, 1, int(bool(gap.count_nonzero()))
    )


@dataclass
class Comparison:
    """Two checkpoints beside each other."""

    counters: dict[str, tuple[int, int]] = field(default_factory=dict)  # those that differ
    recipe: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # leaves that differ
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    # those that differ
    shapes: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    tensors: list[Difference] = field(default_factory=list)  # that differ, the worst first
    kinds: dict[str, Difference] = field(default_factory=dict)


def compare(a: Manifest, b: Manifest, kind: str | None) -> Comparison:
    """Every tensor of both, one at a time."""
    names = [
        {key for key in manifest.tensors if kind is None or key.partition("/")[0] == kind}
        for manifest in (a, b)
    ]
    if not any(names):
        known = sorted({key.partition("/")[0] for manifest in (a, b) for key in manifest.tensors})
        raise Refused(f"--kind {kind}: neither has such tensors; there are {', '.join(known)}")
    leaves = [dict(_leaves(manifest.meta["recipe"])) for manifest in (a, b)]
    result = Comparison(
        counters={
            key: (getattr(a, key), getattr(b, key))
            for key in COUNTERS
            if getattr(a, key) != getattr(b, key)
        },
        recipe={
            key: (leaves[0].get(key), leaves[1].get(key))
            for key in sorted(leaves[0].keys() | leaves[1].keys())
            if leaves[0].get(key) != leaves[1].get(key)
        },
        only_in_a=sorted(names[0] - names[1]),
        only_in_b=sorted(names[1] - names[0]),
    )
    both, alike = names[0] & names[1], []
    for key in (key for key in a.tensors if key in both):
        shapes = a.tensors[key]["shape"], b.tensors[key]["shape"]
        if shapes[0] == shapes[1]:
            alike.append(key)
        else:
            result.shapes[key] = shapes
    pairs = zip(
        alike, *(whole_tensors(manifest, alike, torch.float64) for manifest in (a, b)), strict=True
    )
    for key, one, other in pairs:
        found = difference(one, other, key)
        result.kinds.setdefault(key.partition("/")[0], Difference(key.partition("/")[0])).add(found)
        if found.differing:
            result.tensors.append(found)
    result.tensors.sort(
        key=lambda found: (_order(found.relative), _order(found.max_abs)), reverse=True
    )
    return result


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def diff(options: argparse.Namespace, out: Console) -> int:
    """`diff`."""
    a, b = (_verified(path) for path in (options.a, options.b))
    found = compare(a, b, options.kind)
    beyond = [row for row in found.tensors if not row.relative <= options.tolerance]
    apart = bool(found.counters or found.only_in_a or found.only_in_b or found.shapes or beyond)
    shown = found.tensors[: options.top or None]
    if options.json:
        measured = {
            "kinds": {kind: row.facts for kind, row in found.kinds.items()},
            "tensors": [row.facts for row in shown],
        }
        print(
            json.dumps(
                {
                    "a": str(a.path),
                    "b": str(b.path),
                    "equal": not apart,
                    **asdict(found),
                    **measured,
                },
                indent=1,
            )
        )
        return int(apart)
    out.print(f"A {a.path}\nB {b.path}", markup=False)
    for title, pairs in (
        ("counter", found.counters),
        ("recipe", found.recipe),
        ("shape", found.shapes),
    ):
        if pairs:
            table = Table(title, "A", "B")
            for name, (left, right) in pairs.items():
                table.add_row(name, escape(str(left)), escape(str(right)))
            out.print(table)
    for which, names in (("A", found.only_in_a), ("B", found.only_in_b)):
        if names:
            out.print(f"only in {which}: {', '.join(names)}", markup=False)
    by_kind = Table("kind", "tensors", "differing", "relative L2", "max abs")
    for row in found.kinds.values():
        by_kind.add_row(
            row.name,
            str(row.tensors),
            str(row.differing),
            f"{row.relative:.3g}",
            f"{row.max_abs:.3g}",
        )
    out.print(by_kind)
    if shown:
        worst = Table(
            f"worst {len(shown)} of {len(found.tensors)} tensors that differ",
            "relative L2",
            "max abs",
        )
        for row in shown:
            worst.add_row(row.name, f"{row.relative:.3g}", f"{row.max_abs:.3g}")
        out.print(worst)
    out.print(
        "they differ"
        if apart
        else "they are equal" + (" within the tolerance" if found.tensors else "")
    )
    return int(apart)


def _verified(path: Path) -> Manifest:
    manifest, passed_over = find_checkpoint(path)
    for problem in passed_over:
        print(f"passed over: {problem}", file=sys.stderr)
    return manifest


# -------------------------------------------------------------------------------------------- prune


def prune(options: argparse.Namespace, out: Console) -> int:
    """`prune`. What is damaged and newer than what stays is left for someone to look at."""
    folders = checkpoint_folders(options.source)
    if folders == [options.source]:
        raise Refused(f"{options.source} is a checkpoint; give the run's folder")
    rows = [look_at(path, every_byte=True) for path in reversed(folders)]  # newest first
    valid = [row for row in rows if not row.problems]
    if not valid:
        raise CheckpointError(
            f"{folders[0].parent} has no valid checkpoint, so nothing is deleted: "
            f"{rows[0].problems[0]}"
        )
    every = options.keep_every
    if every is None and valid[0].manifest is not None:
        every = valid[0].manifest.meta["recipe"]["checkpoint"]["keep_every"]
    stay = valid[: options.keep]
    stay += [
        row
        for row in valid[options.keep :]
        if every and row.manifest and row.manifest.step % every == 0
    ]
    oldest = min(row.path.name for row in stay)
    gone = [row for row in rows if row not in stay and (not row.problems or row.path.name < oldest)]
    sizes = {row.path: row.facts.get("bytes", 0) for row in rows}
    freed = sum(sizes[row.path] for row in gone)
    for row in gone if not options.dry_run else ():
        doomed = row.path.with_name(f".dropped-{row.path.name}-{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):  # the run itself was faster
            row.path.rename(doomed)  # first the name, so that a kill leaves no half of a checkpoint
            shutil.rmtree(doomed)
    names = {
        "deleted": [row.path.name for row in gone],
        "kept": [row.path.name for row in rows if row not in gone],
    }
    if options.json:
        print(json.dumps({"dry_run": options.dry_run, **names, "bytes": freed}, indent=1))
        return 0
    table = Table("checkpoint", "size", "state", "")
    for row in rows:
        fate = ("would go" if options.dry_run else "deleted") if row in gone else "stays"
        table.add_row(
            row.path.name, size(sizes[row.path]), "not valid" if row.problems else "valid", fate
        )
    out.print(table)
    print_problems(out, rows)
    out.print(f"{size(freed)} {'would be' if options.dry_run else 'are'} free")
    return 0


# ------------------------------------------------------------------------------------------ command


def when(time: float) -> str:
    """Local time, to the second."""
    return datetime.datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M:%S")


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def engine(facts: Mapping[str, Any]) -> str:
    """Engine, its file and the precision."""
    return " ".join(filter(None, (facts["engine"], facts["engine_config"], facts["precision"])))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str, *sources: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, allow_abbrev=False)
        for source in sources:
            added.add_argument(
                source.lower() if len(sources) > 1 else "source", type=Path, metavar=source
            )
        added.add_argument("--json", action="store_true", help="print one JSON document")
        added.set_defaults(run=run)
        return added

    command("list", list_run, "what there is", "RUN")
    shows = command("show", show, "what is in one", "RUN_OR_CHECKPOINT")
    shows.add_argument(
        "--tensors", action="store_true", help="every tensor too (with --json: always)"
    )
    command("verify", verify, "every file against its checksum", "RUN_OR_CHECKPOINT")
    differs = command(
        "diff", diff, "differences by parameter; each is a checkpoint or a run", "A", "B"
    )
    differs.add_argument(
        "--top", type=_natural, default=20, help="tensors shown, 0 for all (default: %(default)s)"
    )
    differs.add_argument(
        "--kind", help="one kind of tensors: weight, exp_avg, exp_avg_sq, teacher or buffer"
    )
    differs.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        help="relative L2 up to which a tensor is equal (default: exactly)",
    )
    prunes = command(
        "prune", prune, "delete old checkpoints, after reading every byte of all", "RUN"
    )
    prunes.add_argument(
        "--keep", type=_positive, required=True, help="how many of the newest valid ones stay"
    )
    prunes.add_argument(
        "--keep-every", type=_positive, help="steps; multiples stay too (default: as the run does)"
    )
    prunes.add_argument("--dry-run", action="store_true", help="say what would go, delete nothing")
    options = parser.parse_args(arguments)
    out = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)
    try:
        return int(options.run(options, out))
    except (ValueError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _natural(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
