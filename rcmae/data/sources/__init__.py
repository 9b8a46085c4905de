"""Where shards come from: this machine's file systems, any URL that fsspec knows, and the output of
a command.

A shard on a file system is read in place, by offset. A remote one (`https://`,
`s3://`, `gs://`, ..., or `pipe:COMMAND` as webdataset has it) is first copied whole into a cache on
the node's disk, which all processes of the node share, and read from there: shards are made to be
read whole, and a store sees one reader a node. A `pipe:` command is the user's own, run by the
shell word for word; none is ever put together here.

`names` says what is called how, `asking` what is there, `copying` gets it."""

from rcmae.data.sources.asking import (
    FULL,
    USUAL,
    AccessDenied,
    Patience,
    SourceGone,
    Stat,
    find,
    is_other,
    patience,
    small_file,
    stamp_of,
    stat_here,
    stat_of,
    stats,
)
from rcmae.data.sources.copying import Copied, Stored, copy, fetched, part, pread
from rcmae.data.sources.names import (
    PIPE,
    bare,
    basename,
    folder_of,
    identity,
    is_remote,
    local,
)
from rcmae.data.sources.secrets import holds_secret, indexing, redacted, without_secrets

__all__ = [
    "FULL",
    "PIPE",
    "USUAL",
    "AccessDenied",
    "Copied",
    "Patience",
    "SourceGone",
    "Stat",
    "Stored",
    "bare",
    "basename",
    "copy",
    "fetched",
    "find",
    "folder_of",
    "holds_secret",
    "identity",
    "indexing",
    "is_other",
    "is_remote",
    "local",
    "part",
    "patience",
    "pread",
    "redacted",
    "small_file",
    "stamp_of",
    "stat_here",
    "stat_of",
    "stats",
    "without_secrets",
]
