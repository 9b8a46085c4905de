"""What one rank of a user's own script may do alone: read, export, convert and judge weights, while
the other ranks are elsewhere.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from runs import Folder, python_path

ROOT = Path(__file__).parent.parent

# Rank 1 goes straight to a barrier: whatever waits for it in another collective fails in 30 s.
RANK = """
import datetime, sys
import torch, torch.distributed as ranks
from pathlib import Path

ranks.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
if ranks.get_rank() == 0:
    run, folder, train, test = map(Path, sys.argv[1:])
    import rcmae
    from rcmae.commands import convert, export
    from rcmae.commands.evaluation import probes
    from rcmae.weights.encoder import load_autoencoder
    from rcmae.weights.reading import find_checkpoint, read_network

    images = torch.zeros(2, *rcmae.load_encoder(run).pretrained_cfg["input_size"])
    assert rcmae.load_encoder(run)(images).isfinite().all()
    manifest, _ = find_checkpoint(run)
    assert read_network(manifest.path, "student").weights
    model, _ = load_autoencoder(run)
    assert not model.training
    out = folder / "weights.safetensors"
    assert export.main([str(run), "--format", "safetensors", "--out", str(out)]) == 0
    assert rcmae.load_encoder(out)(images).isfinite().all()
    assert convert.main([str(out), "--to", "bootmae", "--out", str(folder / "weights.pth")]) == 0
    words = ["--train", str(train), "--test", str(test), "--k", "5", "--draws", "1"]
    assert probes.main([str(run), "--cache", str(folder), *words]) == 0
    print("done alone", flush=True)
ranks.barrier()
ranks.destroy_process_group()
"""


def test_one_rank_reads_exports_and_judges_while_the_other_waits(
    uninterrupted: Folder, photo_shards: str, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM", "RANK", "WORLD", "LOCAL", "TORCHELASTIC"))
    }
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    sets = [photo_shards.replace("{000000..000005}", f"00000{number}") for number in (0, 1)]
    ranks = []
    for rank in ("0", "1"):
        own = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": python_path(),
        }
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(uninterrupted.path), str(tmp_path), *sets],
                env=kept | common | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [rank.communicate(timeout=150)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said[0]
    assert "done alone" in said[0]
