"""Exports a run into its own folder, and prints by how many bytes anonymous memory rose above that
before.

python tests/programs/export_memory.py RUN LAYOUT [LAYOUT ...]
"""

import json
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import rcmae.models.vit  # noqa: F401, what export imports late belongs to the baseline
from rcmae.checkpoint import find_checkpoint
from rcmae.weights.layouts import LAYOUTS
from rcmae.weights.writing import export


def anonymous() -> int:
    """Bytes of memory that no file is behind."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def measured(run: Path, layout: str) -> dict[str, float]:
    """Export once, watched."""
    baseline, seen, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.monotonic()
    manifest, _ = find_checkpoint(run)
    verified = time.monotonic()
    out = run / f"{layout}{LAYOUTS[layout].suffixes[0]}"
    written = export(manifest, out, layout=layout).bytes
    end = time.monotonic()
    done.set()
    watcher.join()
    largest = max(4 * row.elements for row in manifest.tensors.values())
    return {
        "baseline": baseline,
        "rise": max(seen) - baseline,
        "largest": largest,
        "written": written,
        "verify_s": verified - begin,
        "write_s": end - verified,
    }


print(json.dumps([measured(Path(sys.argv[1]), layout) for layout in sys.argv[2:]]))
