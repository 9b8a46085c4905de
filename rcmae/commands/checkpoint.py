"""List, show, verify, compare and prune checkpoints.

    rcmae checkpoint list RUN                   what there is
    rcmae checkpoint show RUN_OR_CHECKPOINT     what is in one
    rcmae checkpoint verify RUN_OR_CHECKPOINT   every file against its checksum
    rcmae checkpoint diff A B                   differences by parameter
    rcmae checkpoint prune RUN --keep 2         delete all valid ones but the newest

Where one checkpoint is expected, RUN means its newest valid one. `list` and `show` look at
manifests and sizes alone; the others read every byte. Exit status: 0 fine, or equal; 1 something is
damaged, or two differ; 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcmae.commands.arguments import check_verb, from_zero

if TYPE_CHECKING:
    from rich.console import Console

    from rcmae.checkpoint import Manifest
    from rcmae.checkpoint.compare import Comparison, Difference
    from rcmae.checkpoint.inspection import Found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    check_verb(parser, words, ("list", "show", "verify", "diff", "prune"), "list")
    asked = parser.parse_args(words)

    from rich.console import Console

    from rcmae.checkpoint import CheckpointError
    from rcmae.errors import Refused

    out = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)
    try:
        return int(asked.run(asked, out))
    except (Refused, CheckpointError, OSError) as error:
        print(f"rcmae: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rcmae checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str, *sources: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, allow_abbrev=False)
        for source in sources:
            key = source.lower() if len(sources) > 1 else "source"
            added.add_argument(key, type=Path, metavar=source)
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
        type=from_zero,
        default=0.0,
        help="relative L2 up to which a tensor is equal (default: exactly)",
    )
    prunes = command(
        "prune", prune, "delete old checkpoints, after reading every byte of all", "RUN"
    )
    prunes.add_argument(
        "--keep", type=_positive, required=True, help="how many of the newest valid ones to keep"
    )
    prunes.add_argument(
        "--keep-every",
        type=_positive,
        help="also keep steps that are multiples of this (default: as the run does)",
    )
    prunes.add_argument(
        "--dry-run", action="store_true", help="show what would be deleted, delete nothing"
    )
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _natural(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


# --------------------------------------------------------------------------------------------- list


def list_run(asked: argparse.Namespace, out: Console) -> int:
    """`list`."""
    from rich.markup import escape
    from rich.table import Table

    from rcmae.checkpoint import checkpoint_folders
    from rcmae.checkpoint.inspection import look_at, others_beside, pointed_at

    folders = checkpoint_folders(asked.source)
    root = folders[0].parent
    rows = [look_at(path, every_byte=False) for path in folders]
    latest = pointed_at(root)
    others = others_beside(root, folders) if folders != [asked.source] else []
    status = int(any(row.problems for row in rows))
    if asked.json:
        found = [row.facts for row in rows]
        print(json.dumps({"latest": latest, "checkpoints": found, "others": others}, indent=1))
        return status
    columns = ("step", "images", "saved", "engine", "ranks", "generation", "size", "state")
    table = Table(*columns, title=escape(str(root)))
    for row in rows:
        state = "not valid" if row.problems else "whole"
        if row.path.name == latest:
            state += ", LATEST"
        table.add_row(*_listed(row), state)
    out.print(table)
    _print_problems(out, rows)
    if others:
        out.print(f"no checkpoints: {', '.join(others)}", style="dim", markup=False)
    return status


def _listed(row: Found) -> list[str]:
    """A line of `list` up to its state."""
    if row.manifest is None:
        return [row.path.name, *[""] * 6]
    facts = row.facts
    return [
        f"{facts['step']:,}",
        f"{facts['images']:,}",
        _when(facts["saved"]),
        _engine(facts),
        str(facts["world"]),
        str(facts["generation"]),
        _size(facts["bytes"]),
    ]


# --------------------------------------------------------------------------------------------- show


def show(asked: argparse.Namespace, out: Console) -> int:
    """`show`."""
    from rcmae.checkpoint import CheckpointError, checkpoint_folders
    from rcmae.checkpoint.inspection import kinds, look_at

    rows = [look_at(path, every_byte=False) for path in reversed(checkpoint_folders(asked.source))]
    found = next((row for row in rows if not row.problems), rows[0])
    manifest = found.manifest
    if manifest is None:
        raise CheckpointError("; ".join(found.problems))
    if asked.json:
        document = {
            **found.facts,
            "kinds": {name: kind._asdict() for name, kind in kinds(manifest).items()},
            "files": manifest.files,
            "tensors": {key: _stored(manifest, key) for key in manifest.tensors},
            "meta": manifest.meta,
        }
        print(json.dumps(document, indent=1))
    else:
        _show_facts(found, out)
        _show_contents(manifest, out, tensors=asked.tensors)
    return int(bool(found.problems))


def _stored(manifest: Manifest, key: str) -> dict[str, Any]:
    row = manifest.tensors[key]
    return {"shape": row.shape, "dtype": row.dtype, "runs": manifest.runs(key)}


def _show_facts(found: Found, out: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    from rcmae.checkpoint.inspection import COUNTERS

    facts = found.facts
    versions = [f"{name} {version}" for name, version in facts["versions"].items()]
    shown = {
        **{key.replace("_", " "): f"{facts[key]:,}" for key in COUNTERS},
        "saved": _when(facts["saved"]),
        "generation": str(facts["generation"]),
        "engine": f"{_engine(facts)}, {facts['world']} ranks",
        "objective": f"{facts['objective']}, {facts['model']}",
        "data": facts["data_fingerprint"],
        "versions": ", ".join(versions),
        "size": _size(facts["bytes"]),
        "state": "not valid" if found.problems else "whole, by sizes",
    }
    table = Table(show_header=False, title=escape(str(found.path)))
    for name, text in shown.items():
        table.add_row(name, escape(text))
    out.print(table)
    _print_problems(out, [found])


def _show_contents(manifest: Manifest, out: Console, *, tensors: bool) -> None:
    from rich.table import Table

    from rcmae.checkpoint.inspection import kinds

    by_kind = Table("kind", "tensors", "elements", "type", "size")
    for name, kind in kinds(manifest).items():
        by_kind.add_row(
            name,
            f"{kind.tensors:,}",
            f"{kind.elements:,}",
            ", ".join(kind.dtypes),
            _size(kind.bytes),
        )
    out.print(by_kind)
    files = Table("file", "size", "sha256")
    for name, file in sorted(manifest.files.items()):
        files.add_row(name, _size(file["bytes"]), file["sha256"][:16])
    out.print(files)
    if not tensors:
        return
    table = Table("tensor", "shape", "type", "pieces")
    for key, row in manifest.tensors.items():
        table.add_row(key, "x".join(map(str, row.shape)), row.dtype, str(len(row.layout)))
    out.print(table)


# ------------------------------------------------------------------------------------------- verify


def verify(asked: argparse.Namespace, out: Console) -> int:
    """`verify`."""
    from rich.table import Table

    from rcmae.checkpoint import checkpoint_folders
    from rcmae.checkpoint.inspection import look_at

    rows = [look_at(path, every_byte=True) for path in checkpoint_folders(asked.source)]
    damaged = any(row.problems for row in rows)
    if asked.json:
        document = {"valid": not damaged, "checkpoints": [row.facts for row in rows]}
        print(json.dumps(document, indent=1))
        return int(damaged)
    table = Table("checkpoint", "files", "size", "verdict")
    for row in rows:
        files = len(row.manifest.files) if row.manifest else 0
        verdict = "not valid" if row.problems else "valid"
        table.add_row(row.path.name, str(files), _size(row.bytes), verdict)
    out.print(table)
    _print_problems(out, rows)
    return int(damaged)


# --------------------------------------------------------------------------------------------- diff


def diff(asked: argparse.Namespace, out: Console) -> int:
    """`diff`."""
    from rcmae.checkpoint.compare import compare

    a = _verified(asked.a)
    b = _verified(asked.b)
    found = compare(a, b, asked.kind)
    differs = found.differs(asked.tolerance)
    shown = found.tensors[: asked.top or None]
    if asked.json:
        document = {
            "a": str(a.path),
            "b": str(b.path),
            "equal": not differs,
            **asdict(found),
            "kinds": {kind: row.facts for kind, row in found.kinds.items()},
            "tensors": [row.facts for row in shown],
        }
        print(json.dumps(document, indent=1))
        return int(differs)
    out.print(f"A {a.path}\nB {b.path}", markup=False)
    _show_comparison(found, shown, out)
    if differs:
        out.print("they differ")
    else:
        out.print("they are equal" + (" within the tolerance" if found.tensors else ""))
    return int(differs)


def _verified(path: Path) -> Manifest:
    from rcmae.checkpoint import find_checkpoint

    manifest, passed_over = find_checkpoint(path)
    for problem in passed_over:
        print(f"skipped: {problem}", file=sys.stderr)
    return manifest


def _show_comparison(found: Comparison, shown: Sequence[Difference], out: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    sections: dict[str, Mapping[str, tuple[Any, Any]]] = {
        "counter": found.counters,
        "recipe": found.recipe,
        "shape": found.shapes,
    }
    for title, pairs in sections.items():
        if not pairs:
            continue
        table = Table(title, "A", "B")
        for name, (left, right) in pairs.items():
            table.add_row(name, escape(str(left)), escape(str(right)))
        out.print(table)
    for which, names in (("A", found.only_in_a), ("B", found.only_in_b)):
        if names:
            out.print(f"only in {which}: {', '.join(names)}", markup=False)
    by_kind = Table("kind", "tensors", "differing", "relative L2", "max abs")
    for row in found.kinds.values():
        measures = (f"{row.relative:.3g}", f"{row.max_abs:.3g}")
        by_kind.add_row(row.name, str(row.tensors), str(row.differing), *measures)
    out.print(by_kind)
    if shown:
        title = f"worst {len(shown)} of {len(found.tensors)} tensors that differ"
        worst = Table(title, "relative L2", "max abs")
        for row in shown:
            worst.add_row(row.name, f"{row.relative:.3g}", f"{row.max_abs:.3g}")
        out.print(worst)


# -------------------------------------------------------------------------------------------- prune


def prune(asked: argparse.Namespace, out: Console) -> int:
    """`prune`. What is damaged and newer than what stays is left for someone to look at."""
    from rich.table import Table

    from rcmae.checkpoint import checkpoint_folders
    from rcmae.checkpoint.inspection import prune_verified
    from rcmae.errors import Refused

    if checkpoint_folders(asked.source) == [asked.source]:
        raise Refused(f"{asked.source} is a checkpoint; give the run's folder")
    rows, gone = prune_verified(
        asked.source, keep=asked.keep, keep_every=asked.keep_every, dry_run=asked.dry_run
    )
    freed = sum(row.bytes for row in gone)
    if asked.json:
        document = {
            "dry_run": asked.dry_run,
            "deleted": [row.path.name for row in gone],
            "kept": [row.path.name for row in rows if row not in gone],
            "bytes": freed,
        }
        print(json.dumps(document, indent=1))
        return 0
    table = Table("checkpoint", "size", "state", "")
    for row in rows:
        fate = "stays"
        if row in gone:
            fate = "would go" if asked.dry_run else "deleted"
        state = "not valid" if row.problems else "valid"
        table.add_row(row.path.name, _size(row.bytes), state, fate)
    out.print(table)
    _print_problems(out, rows)
    out.print(f"{_size(freed)} {'would be' if asked.dry_run else 'are'} free")
    return 0


# ------------------------------------------------------------------------------------------- words


def _print_problems(out: Console, rows: Iterable[Found]) -> None:
    """What is wrong, a line each, whole however narrow the terminal is."""
    for row in rows:
        for problem in row.problems:
            out.print(problem, markup=False, soft_wrap=True)


def _when(time: float) -> str:
    """Local time, to the second."""
    return datetime.datetime.fromtimestamp(time).strftime("%Y-%m-%d %H:%M:%S")


def _size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def _engine(facts: Mapping[str, Any]) -> str:
    """Engine, its file and the precision."""
    words = (facts["engine"], facts["engine_config"], facts["precision"])
    return " ".join(filter(None, words))
