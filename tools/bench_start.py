#!/usr/bin/env python3
"""What the start of a large run takes before anything is read: index, plan and manifest, in
processor seconds and memory of one rank.

    python tools/bench_start.py [--ranks 1024] [--shards 100000] [--samples 12800] \\
        [--rounds 3] [--json [FILE]]

An index of so many shards is written as `rcmae shards index` writes it; its table of tens of GB is
a file with holes, of which only what a step reads is there. Then one rank, in a process of its own
each round, loads the index, plans its share of an epoch, and finds from nothing the offsets of a
step in the middle of a run, as a resume does. The manifest is that of a checkpoint of 200 tensors,
each with two moments and a teacher, of which every rank wrote its part.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from rcmae.checkpoint.layout import assembled, described, understood, written
from rcmae.commands.arguments import add_json, told
from rcmae.data.index import FORMAT, INDEX, VERSION, ShardIndex
from rcmae.data.plan import Plan
from rcmae.data.tars import HEADED, MEMBER, ROW, Shard, TablePart, hashes
from rcmae.planning.hardware import commit, cpu_name

TABLE = "index-large.bin"
LOOKED_AT = (777, 100)  # a shard and a sample in it, whose row is written
KEYS = 9  # bytes of a key
BATCH_OF_RANK = 64
TENSORS = 200
KINDS = ("weight", "exp_avg", "exp_avg_sq", "teacher")
_Out = TypeVar("_Out")


class Size(NamedTuple):
    """Of a run."""

    ranks: int
    shards: int
    samples: int  # of a shard

    @property
    def row_bytes(self) -> int:
        """Of the rows and keys of a shard in the table."""
        return self.samples * (ROW.itemsize + KEYS)

    @property
    def part_bytes(self) -> int:
        """Of a shard in the table: an image, a label, a map and an annotation of each sample."""
        return self.row_bytes + self.samples * (HEADED.itemsize + MEMBER.itemsize)

    @property
    def images(self) -> int:
        """Of a step."""
        return BATCH_OF_RANK * self.ranks

    def plan(self, counts: Any) -> Plan:
        """The order of the samples: a stream for each rank."""
        return Plan(counts, seed=0, images=self.images, streams=self.ranks, window=4096)

    @property
    def middle(self) -> int:
        """Position at which a step begins, in the middle of an epoch."""
        return self.shards * self.samples // self.images // 2 * self.images


def write_index(folder: str, size: Size) -> None:
    """An index whose digests hold for the shards that the middle step reads."""
    made = size.plan(np.full(size.shards, size.samples))
    asked = made.requests(size.middle, size.middle + size.images, size.ranks - 1, size.ranks)
    read = {LOOKED_AT[0], *(asked.samples // size.samples).tolist()}
    part = size.part_bytes
    key = b"%09d" % LOOKED_AT[1]
    row = np.array([(512, 1000, 7, KEYS * LOOKED_AT[1], KEYS)], ROW).tobytes()
    with open(Path(folder) / TABLE, "wb") as file:
        file.truncate(size.shards * part)  # holes
        start = LOOKED_AT[0] * part
        file.seek(start + LOOKED_AT[1] * ROW.itemsize)
        file.write(row)
        file.seek(start + size.samples * ROW.itemsize + KEYS * LOOKED_AT[1])
        file.write(key)
    shards = []
    with open(Path(folder) / TABLE, "rb") as file:
        for number in range(size.shards):
            shard = _shard(number, size)
            if number in read:
                file.seek(number * part)
                data = file.read(part)
                rows = data[: size.row_bytes]
                fingerprint, digest = hashes(shard, rows, data[size.row_bytes :])
                changed = {"fingerprint": fingerprint, "digest": digest}
                shard = Shard(**{**vars(shard), **changed})
            shards.append(shard)
    document = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": ShardIndex(shards).fingerprint,
        "samples": size.shards * size.samples,
        "table": TABLE,
        "bytes": size.shards * part,
        "shards": [_entry(shard, part) for shard in shards],
    }
    (Path(folder) / INDEX).write_text(json.dumps(document, indent=1))


def _shard(number: int, size: Size) -> Shard:
    fake = f"{number:064x}"
    return Shard(
        f"train-{number:06d}.tar",
        2**30,
        size.samples,
        fake,
        TablePart(b"", 0, size.part_bytes),
        "",
        f"mtime {10**18 + number}",
        fake,
        size.samples,
        ("image", "label", "map", "annotation"),
    )


def _entry(shard: Shard, part: int) -> dict[str, Any]:
    return {
        "name": shard.path,
        "bytes": shard.size,
        "samples": shard.samples,
        "table_bytes": part,
        "kinds": 4,
        "fingerprint": shard.fingerprint,
        "digest": shard.digest,
        "stamp": shard.stamp,
        "others": shard.samples,
    }


def _seconds(call: Callable[[], _Out]) -> tuple[float, _Out]:
    """Of the processor, and what the call gave."""
    begin = time.process_time()
    result = call()
    return time.process_time() - begin, result


def peak_mb() -> float:
    """Resident memory of this process at its height. Not by getrusage: that counts what started
    it, too.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e3


def measure_index(folder: str, size: Size) -> dict[str, float]:
    """What the last rank does with the index."""
    last, world = size.ranks - 1, size.ranks
    imports_mb = peak_mb()
    load_s, index = _seconds(lambda: ShardIndex.load(folder))
    assert index is not None
    made = size.plan(index.counts)
    epoch = made.samples_per_epoch
    plan_s, asked = _seconds(lambda: made.requests(epoch, 2 * epoch, last, world))
    assert len(asked.positions) == epoch // world

    def resumed() -> list[Any]:
        first = size.middle
        requests = size.plan(index.counts).requests(first, first + size.images, last, world)
        return [index[number] for number in requests.samples.tolist()]

    resume_s, step = _seconds(resumed)
    assert len(step) == BATCH_OF_RANK
    shard, number = LOOKED_AT
    sample = index[shard * size.samples + number]
    assert (sample.id, sample.offset, sample.size, sample.label) == (
        f"train-{shard:06d}/{number:09d}",
        512,
        1000,
        7,
    )
    return {
        "load_s": load_s,
        "plan_s": plan_s,
        "resume_s": resume_s,
        "imports_mb": imports_mb,
        "peak_mb": peak_mb(),
    }


def measure_manifest(ranks: int) -> dict[str, float]:
    """What the tensors of a manifest take, from what the ranks wrote to JSON and back."""
    shapes = {f"blocks.{number}.weight": (1000 + number, 7) for number in range(TENSORS)}
    reports = []
    for rank in range(ranks):
        runs = []
        for name, shape in shapes.items():
            numel = math.prod(shape)
            low, high = numel * rank // ranks, numel * (rank + 1) // ranks
            runs += [(f"{kind}/{name}", low, high - low, "F32") for kind in KINDS]
        reports.append(written(runs))
    write_s, text = _seconds(lambda: json.dumps(described(assembled(shapes, reports))))
    files = [f"{rank:05d}" for rank in range(ranks)]
    read_s, read = _seconds(lambda: understood({"format": 2, **json.loads(text)}, files))
    assert sum(len(stored.layout) for stored in read.values()) == len(KINDS) * TENSORS * ranks
    return {
        "manifest_mb": len(text) / 1e6,
        "manifest_write_s": write_s,
        "manifest_read_s": read_s,
    }


def apart(call: Callable[..., _Out], *arguments: Any) -> _Out:
    """What a call gives in a process of its own, so that memory is that of the call."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def measure(size: Size, rounds: int) -> dict[str, Any]:
    """The figures: medians of the rounds, and each round."""
    with tempfile.TemporaryDirectory() as folder:
        apart(write_index, folder, size)
        json_mb = os.path.getsize(Path(folder) / INDEX) / 1e6
        rows = []
        for _ in range(rounds):
            row = apart(measure_index, folder, size)
            rows.append(row | apart(measure_manifest, size.ranks))
    figures = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    figures["json_mb"] = json_mb
    figures["table_gb"] = size.shards * size.part_bytes / 1e9
    return {"figures": figures, "rounds": rows}


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/bench_start.py", description=(__doc__ or "").split("\n\n")[0]
    )
    for name, value in (("ranks", 1024), ("shards", 100_000), ("samples", 12_800), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value, help="(default: %(default)s)")
    add_json(parser)
    asked = parser.parse_args(argv)
    size = Size(asked.ranks, asked.shards, asked.samples)
    shard, sample = LOOKED_AT
    if min(size) < 1 or asked.rounds < 1 or size.shards <= shard or size.samples <= sample:
        parser.error(f"wants more than {shard} shards of more than {sample} samples")
    if size.shards * size.samples < size.images:
        parser.error(f"{size.ranks} ranks take {size.images} samples a step; there are fewer")
    found = measure(size, asked.rounds)
    report = {
        "tool": "bench_start",
        "command": "tools/bench_start.py " + " ".join(sys.argv[1:] if argv is None else argv),
        "commit": commit(),
        "hardware": {"cpu": cpu_name()},
        "versions": {"python": sys.version.split()[0], "numpy": np.__version__},
        "settings": size._asdict(),
        **found,
    }
    if not told(report, asked.json):
        for name, value in found["figures"].items():
            print(f"{name:<18}{value:10.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
