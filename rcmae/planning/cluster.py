"""Nodes compared: versions, clocks, one run folder for all, and the speed of links between ranks.

`examine` is all that the doctor looks at, on this rank and together with the others.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as torch_dist

from rcmae import dist
from rcmae.config import Recipe
from rcmae.planning import node
from rcmae.planning.findings import COLOURS, Finding, OnRanks, merged
from rcmae.planning.gpus import check_gpus, gpus_asked_for, read_gpus

SKEW_S = (1.0, 30.0)  # seconds between clocks that are yellow, red
# GB/s of a link in one direction, by the maker: NVLink of one GPU. Others in a node meet over PCIe.
NVLINK_GBPS = {"B200": 900.0, "H200": 450.0, "H100": 450.0, "A100": 300.0, "V100": 150.0}
PCIE_GBPS = 16.0
LINK_BYTES = {"cuda": 256 * 2**20, "cpu": 4 * 2**20}  # what a collective moves to measure links


def examine(recipe: Recipe | None, gpus: int | None, now: Callable[[], float]) -> list[OnRanks]:
    """All findings, worst first, on every rank. Collective: every rank calls.

    Args:
        recipe: of the run, if one is known.
        gpus: that this process should see; None: what the scheduler says.
        now: this node's clock.
    """
    rows = read_gpus()  # before this process takes memory of a GPU
    port = check_port()
    if port is not None:
        return [OnRanks(port, [0])]
    dist.start(required=False, timeout_s=120.0)
    with left_as_it_was(recipe.run_dir if recipe else None):
        mine, facts = look(recipe, rows, gpus_asked_for(gpus))
        found = merged(dist.gather(mine))
        if dist.world() > 1:
            found += compare(recipe, facts, now)
    return sorted(found, key=lambda each: -COLOURS.index(each.finding.colour))


def look(
    recipe: Recipe | None, rows: list[dict[str, str]] | str, gpus: int
) -> tuple[list[Finding], dict[str, str]]:
    """This rank's findings, and the facts that should be alike on all."""
    facts = node.versions()
    facts["driver"] = "none"
    facts["gpus"] = "unknown"
    if isinstance(rows, list):
        facts["gpus"] = ", ".join(row["name"] for row in rows)
        if rows:
            facts["driver"] = rows[0]["driver_version"]
    mine = [*node.check_software(facts), *check_gpus(rows, gpus, recipe)]
    local_world = dist.launched().local_world
    mine += node.check_caches(node.caches(recipe), recipe, local_world)
    if recipe is not None:
        mine += node.check_ranks(recipe, dist.launched().world)
        mine += node.check_kernels(recipe)
        if not any(each.check == "packages" and each.colour == "red" for each in mine):
            needed = node.checkpoints_bytes(recipe)
            mine += node.check_folder("run folder", recipe.run_dir, needed)
            shards, facts["shards"] = node.check_shards(recipe)
            mine += [shards, *node.check_evaluation(recipe)]
    return mine, facts


def compare(
    recipe: Recipe | None, facts: dict[str, str], now: Callable[[], float]
) -> list[OnRanks]:
    """Findings about all ranks together. Collective: every rank calls."""
    hosts = dist.gather(socket.gethostname())
    found = [*check_same(dist.gather(facts), hosts), check_clocks(clock_skew(now), hosts)]
    if recipe is not None:
        found.append(check_shared(recipe.run_dir))
    kind = dist.device().type
    rates = measure_links(LINK_BYTES[kind])
    name = torch.cuda.get_device_name() if kind == "cuda" else ""
    found += check_links(rates, hosts, name, network_gbps())
    everyone = list(range(len(hosts)))
    return [OnRanks(finding, everyone) for finding in dist.from_first(found)]


# ---------------------------------------------------------------------------------------- all ranks


def check_port() -> Finding | None:
    """That rank 0 can listen where the others will look for it.

    To be called before the ranks meet.
    """
    env = os.environ
    if env.get("RANK", env.get("SLURM_PROCID", "0")) != "0" or "MASTER_PORT" not in env:
        return None
    if "TORCHELASTIC_RUN_ID" in env:  # torchrun listens there itself
        return None
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(env["MASTER_PORT"])))
        except OSError as error:
            return Finding(
                "port",
                "red",
                f"MASTER_PORT={env['MASTER_PORT']} on {socket.gethostname()}: {error.strerror}",
                "export another MASTER_PORT, or end the process that listens there",
            )
    return None


def check_same(facts: Sequence[dict[str, str]], hosts: Sequence[str]) -> Iterator[Finding]:
    """That ranks have the same versions, GPUs and shards."""
    for key in facts[0]:
        values: dict[str, list[str]] = {}
        for host, each in zip(hosts, facts, strict=True):
            values.setdefault(each[key], []).append(host)
        if len(values) > 1:
            shown = "; ".join(
                f"{value or 'none'} on {', '.join(sorted(set(at)))}" for value, at in values.items()
            )
            colour = "yellow" if key == "gpus" else "red"
            yield Finding(
                "nodes differ",
                colour,
                f"{key}: {shown}",
                "give all nodes the same environment and files",
            )


def clock_skew(now: Callable[[], float], rounds: int = 5) -> list[float]:
    """Seconds by which each rank's clock is before rank 0's. Collective: every rank calls."""
    offsets = []
    for _ in range(rounds):  # the least disturbed of several meetings
        dist.barrier()
        clocks = dist.gather(now())
        offsets.append([clock - clocks[0] for clock in clocks])
    return [statistics.median(each) for each in zip(*offsets, strict=True)]


def check_clocks(skew: Sequence[float], hosts: Sequence[str]) -> Finding:
    """That clocks agree: deadlines and logs use them."""
    worst = max(range(len(skew)), key=lambda rank: abs(skew[rank]))
    spread = max(skew) - min(skew)
    colour = COLOURS[sum(spread > limit for limit in SKEW_S)]
    text = f"{spread:.2f} s between the clocks of {len(set(hosts))} hosts"
    if colour == "green":
        return Finding("clocks", colour, text)
    shown = f"{text}; rank {worst} on {hosts[worst]} is {skew[worst]:+.1f} s from rank 0"
    return Finding("clocks", colour, shown, "start chrony or ntpd there")


def check_shared(folder: Path, wait_s: float = 5.0) -> Finding:
    """That all ranks see one folder. Collective: every rank calls."""
    token = dist.from_first(secrets.token_hex(8))
    mark = folder / f".doctor-{token}"
    seen = False
    if dist.rank() == 0:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text(token)
    dist.barrier()
    end = time.monotonic() + wait_s
    while not (seen := mark.exists()) and time.monotonic() < end:
        # network file systems can be late
        time.sleep(0.2)
    blind = [rank for rank, sees in enumerate(dist.gather(seen)) if not sees]
    if dist.rank() == 0:
        with contextlib.suppress(OSError):
            mark.unlink()
    if blind:
        return Finding(
            "run folder",
            "red",
            f"{folder} of rank 0 is not that of ranks {', '.join(map(str, blind))}",
            "use a folder on a file system that all nodes mount, by an absolute path",
        )
    return Finding("run folder", "green", f"{folder} is one folder on all ranks")


@contextlib.contextmanager
def left_as_it_was(folder: Path | None) -> Iterator[None]:
    """Take the folder and those above it away at the end, if they were not there.

    Collective: every rank calls.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()] if folder else []
    dist.barrier()  # all have looked before any makes it
    yield
    dist.barrier()
    for each in missing:
        with contextlib.suppress(OSError):  # not made, or another rank was faster
            each.rmdir()


def measure_links(size: int, rounds: int = 5) -> dict[str, float]:
    """GB/s of each GPU's or process's link in an all-reduce and an all-gather of `size` bytes.
    Collective.

    By NCCL's convention: what a link has to carry for it, whatever the number of ranks ("bus
    bandwidth")."""
    device = dist.device()
    world = dist.world()
    whole = torch.ones(size // 4 // world * world, device=device)
    part = whole[: len(whole) // world].clone()
    share = {"all-reduce": 2 * (world - 1) / world, "all-gather": (world - 1) / world}
    # its name since torch 2.13
    gather = getattr(torch_dist, "all_gather_single", torch_dist.all_gather_into_tensor)
    work: dict[str, Callable[[], object]] = {
        "all-reduce": lambda: torch_dist.all_reduce(whole, torch_dist.ReduceOp.MAX),
        "all-gather": lambda: gather(whole, part),
    }
    rates = {}
    for name, action in work.items():
        seconds = []
        for number in range(rounds + 1):
            dist.barrier()
            begin = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:  # the first one makes connections
                seconds.append(time.perf_counter() - begin)
        rates[name] = share[name] * whole.nbytes / statistics.median(seconds) / 1e9
    assert bool((whole == 1).all()), "a collective changed what it should not"
    return rates


def network_gbps(folder: Path = Path("/sys/class/infiniband")) -> float:
    """GB/s of this node's InfiniBand or RoCE ports together; 0 without any."""
    rates = [path.read_text().split()[0] for path in folder.glob("*/ports/*/rate")]
    return sum(float(rate) for rate in rates) / 8


def check_links(
    rates: dict[str, float], hosts: Sequence[str], name: str, network: float
) -> Iterator[Finding]:
    """Measured bandwidths against what the link should give: half of it is yellow, a tenth red.

    Args:
        rates: of `measure_links`.
        hosts: of the ranks.
        name: of the GPU; empty on CPUs, where nothing is expected.
        network: GB/s of a node's ports.
    """
    per_node = len(hosts) // len(set(hosts))
    inside = next((rate for kind, rate in NVLINK_GBPS.items() if kind in name), PCIE_GBPS)
    between = network / max(1, per_node) if len(set(hosts)) > 1 else None
    expected = inside if between is None else min(inside, between or inside)
    for what, rate in rates.items():
        text = f"{what} of {len(hosts)} ranks: {rate:.2f} GB/s a link"
        if not name:
            yield Finding("links", "green", text)
            continue
        colour = COLOURS[(rate < 0.5 * expected) + (rate < 0.1 * expected)]
        text += f", {expected:.0f} should be there"
        ways = "see slurm/README.md on NCCL; NCCL_DEBUG=INFO shows which network it uses"
        yield Finding("links", colour, text, "" if colour == "green" else ways)
