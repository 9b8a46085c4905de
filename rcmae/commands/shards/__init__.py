"""Make, index and check WebDataset shards.

    rcmae shards make IMAGES [IMAGES ...] OUT     shards from folders, lists, Parquet or other tars
    rcmae shards index PATTERN [PATTERN ...]      an index for tars where they lie
    rcmae shards check verify|repair|report ...   what is in shards, and what is wrong with them

`rcmae shards make --help` and so on tell the arguments of each. Exit status: 0 done; 1 check found
something wrong; 2 the input cannot be used; 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rcmae.commands.arguments import check_verb
from rcmae.commands.shards.checking import check
from rcmae.commands.shards.indexing import index
from rcmae.commands.shards.making import make

__all__ = ["check", "index", "main", "make"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the three; the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"make": make, "index": index, "check": check}
    parser = argparse.ArgumentParser(
        prog="rcmae shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=tuple(commands))
    check_verb(parser, words, tuple(commands), "check verify")
    chosen = parser.parse_args(words[:1]).command
    return commands[chosen](words[1:])
