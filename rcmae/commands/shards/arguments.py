"""Arguments that `rcmae shards make`, `index` and `check` share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

STOPPED = 130  # exit status
PATTERNS = (
    "shards, as data.shards names them: 'data/train-{000000..000099}.tar', 'data/*.tar', paths, "
    "URLs, `pipe:` commands"
)


def parser_of(name: str, description: str) -> argparse.ArgumentParser:
    """Of `rcmae shards NAME`."""
    return argparse.ArgumentParser(
        prog=f"rcmae shards {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_kinds(parser: argparse.ArgumentParser) -> None:
    """Let a user name kinds of members."""
    parser.add_argument(
        "--kind",
        action="append",
        default=[],
        metavar="MODULE:NAME",
        help="a kind of members of your own (rcmae/data/members/kinds.py); again for another",
    )


def register_kinds(names: Sequence[str]) -> None:
    """Make the kinds of members known that a user names. Raises Refused."""
    if names:
        from rcmae.data.members.registry import register
        from rcmae.plugins import find

        for name in names:
            register(find(name, key="--kind")())


def positive(text: str) -> int:
    """A number from 1 on."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value
