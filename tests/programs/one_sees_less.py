"""Run on two ranks: read a run's checkpoints where one rank looks alone, or sees less than the
other.

Argument: the run's folder. Prints `RESULT <JSON>` on rank 0: the steps found by rank 0 alone, by
both, by both where rank 1 does not yet see the newest folder, and what both said where rank 1 may
not list the folder at all.
"""

import json
import sys
from pathlib import Path

from rcmae import checkpoint, dist
from rcmae.checkpoint import reader


def main(run: Path) -> None:
    dist.start(required=True, timeout_s=60)
    root = run / "checkpoints"
    found: dict[str, object] = {}
    if dist.rank() == 0:
        last, _ = checkpoint.newest(root)
        named, _ = checkpoint.find_checkpoint(run)
        found["alone"] = [last.step if last else None, named.step]
    dist.barrier()
    found["both"] = steps(root)

    if dist.rank() == 1:
        reader.step_folders = lambda root: []
    found["one sees none"] = steps(root)

    if dist.rank() == 1:
        reader.read_manifest = refuse
    found["one cannot read"] = dist.gather(checkpoint.newest_together(root)[1])
    if dist.rank() == 0:
        print("RESULT", json.dumps(found))
    dist.finish()


def steps(root: Path) -> list[int | None]:
    """The newest step that each rank has found."""
    last, _ = checkpoint.newest_together(root)
    return dist.gather(last.step if last else None)


def refuse(path: Path) -> checkpoint.Manifest:
    raise checkpoint.CheckpointError(f"{path.name} is not there on this node")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
