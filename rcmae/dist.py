"""Where this process stands among the others: rank, world, device, and the few collectives the loop
needs.

Works under torchrun, the `deepspeed` launcher, `srun`, or alone. Alone means: no process group
unless an engine asks for one, and every function below returns at once. Two groups exist: the
default one moves tensors (NCCL on GPUs, gloo on CPU); `control` is always gloo, so agreements and
checkpoints never queue behind gradients."""

from __future__ import annotations

import datetime
import gc
import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rcmae.errors import Refused
from rcmae.process import cores, launchers, meeting, waits
from rcmae.process.launchers import Launched, launched

_control: torch_dist.ProcessGroup | None = None
_before_leaving: list[Callable[[], None]] = []
USUAL_TIMEOUT_S = 1800.0
_timeout = datetime.timedelta(seconds=USUAL_TIMEOUT_S)


class Unreachable(RuntimeError):
    """This rank cannot join the others; names the address and what to check."""


def rank() -> int:
    """This process among all, 0-based."""
    return torch_dist.get_rank() if torch_dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def ranks_of_node() -> int:
    """Ranks on this node."""
    return min(launched().local_world, world())


def launched_first() -> bool:
    """Whether the launcher made this rank 0, also where its variables are incomplete: who speaks
    for all ranks.
    """
    try:
        return launched().rank == 0
    except Refused:
        return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def device() -> torch.device:
    """This rank's accelerator, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # srun can show each task only its own GPU: then the local rank is not an index
    return torch.device("cuda", launched().local_rank % torch.cuda.device_count())


def start(*, required: bool, timeout_s: float | None = USUAL_TIMEOUT_S) -> None:
    """Join the other ranks. Collective: every rank calls, once, before anything else here.

    Args:
        required: make a process group even for a single process (DeepSpeed and FSDP2 want one).
        timeout_s: seconds after which a collective that a peer never joins raises. Rank 0's holds
            for all; None: the usual.

    Raises:
        Refused: the launcher's variables are incomplete.
        Unreachable: this rank cannot join the others.
    """
    where = launched()
    if device().type == "cuda":
        torch.cuda.set_device(device())
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores.of_a_rank(where.local_world, bound=where.who == "srun"))
    if where.world == 1 and not required:
        return
    address = "127.0.0.1" if where.world == 1 else launchers.host(where)
    tried = f"{address}:{launchers.ports(where)[0]}"
    try:
        port = _join(where, address, timeout_s or USUAL_TIMEOUT_S)
    except (RuntimeError, ValueError) as error:  # torch has no narrower one for all that can fail
        reason = str(error).strip().splitlines()[0]
        raise Unreachable(
            f"rank {where.rank} of {where.world} on {platform.node()} cannot join the others "
            f"at {tried}: {reason}; see that rank 0 runs there, that MASTER_ADDR and MASTER_PORT "
            "are the same on all ranks, and that no other program has the port"
        ) from error
    _set_variables(where, address, port)


def _set_variables(where: Launched, address: str, port: int) -> None:
    """What DeepSpeed reads, whatever the launcher was."""
    variables = {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "RANK": where.rank,
        "WORLD_SIZE": where.world,
        "LOCAL_RANK": where.local_rank,
        "LOCAL_WORLD_SIZE": where.local_world,
    }
    for name, value in variables.items():
        if not os.environ.get(name, "").strip():
            os.environ[name] = str(value)
    if device().type == "cuda":
        # DeepSpeed takes it for the index of a GPU: 0 where a rank sees only its own
        os.environ["LOCAL_RANK"] = str(device().index)


def _join(where: Launched, address: str, timeout_s: float) -> int:
    """Make the two groups, with rank 0's time-out; the port at which the ranks met."""
    global _control, _timeout
    store, link, port = meeting.meet(where, address, timeout_s)
    if where.rank == 0:
        store.set("timeout_s", str(timeout_s))
    _timeout = datetime.timedelta(seconds=float(store.get("timeout_s")))
    # DeepSpeed makes groups of its own, without a word about time: 10 minutes under NCCL, 30 under
    # gloo, else
    distributed_c10d.default_pg_timeout = _timeout
    distributed_c10d.default_pg_nccl_timeout = _timeout
    backend = "cpu:gloo,cuda:nccl" if device().type == "cuda" else "gloo"
    torch_dist.init_process_group(
        backend, store=store, rank=where.rank, world_size=where.world, timeout=_timeout
    )
    _control = _gloo_group()
    if link is not None:
        waits.connect(link, meeting.asks_each_s(where.world))
    return port


def control() -> torch_dist.ProcessGroup | None:
    """The gloo group of all ranks for agreements; None for a process alone."""
    return _control


def barrier() -> None:
    """Collective: every rank calls. Returns when all have."""
    if world() > 1:
        torch_dist.barrier(group=_control)


def all_sum(values: Tensor, group: torch_dist.ProcessGroup | None = None) -> Tensor:
    """`values` summed over the ranks of a group (None: all), in place.

    Collective: every rank calls, same shape and type.
    """
    if world() > 1:
        torch_dist.all_reduce(values, group=group)
    return values


def mesh(shards: int) -> DeviceMesh:
    """All ranks: `shards` neighbours in the last dimension, and copies of such neighbours in the
    first, where there are several. Collective: every rank calls, with what divides the ranks.
    """
    if shards == world():
        return init_device_mesh(device().type, (shards,), mesh_dim_names=("shards",))
    sides = (world() // shards, shards)
    return init_device_mesh(device().type, sides, mesh_dim_names=("copies", "shards"))


def sum_numbers(values: Sequence[float]) -> list[float]:
    """Plain numbers summed over the ranks, without the accelerator.

    Collective: every rank calls, as many numbers.
    """
    if world() == 1:
        return list(values)
    box = torch.tensor(values, dtype=torch.float64)
    torch_dist.all_reduce(box, group=_control)
    return box.tolist()


def gather_numbers(values: Sequence[float]) -> list[list[float]]:
    """Every rank's plain numbers, in rank order, on every rank, without the accelerator.

    Collective: every rank calls, as many numbers.
    """
    if world() == 1:
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.float64)
    parts = [torch.empty_like(mine) for _ in range(world())]
    torch_dist.all_gather(parts, mine, group=_control)
    return torch.stack(parts).tolist()


def agree(flag: bool) -> bool:
    """True on every rank if it is on any. Collective: every rank calls."""
    if world() == 1:
        return flag
    votes = torch.tensor([int(flag)])
    torch_dist.all_reduce(votes, torch_dist.ReduceOp.MAX, group=_control)
    return bool(votes.item())


def gather(item: Any, group: torch_dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's small object, in rank order, on every rank. Collective: every rank calls."""
    if world() == 1:
        return [item]
    items: list[Any] = [None] * world()
    torch_dist.all_gather_object(items, item, group=group or _control)
    return items


def to_first(item: Any, group: torch_dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's object, in rank order, on rank 0; empty on the others.

    Collective: every rank calls.
    """
    if world() == 1:
        return [item]
    items: list[Any] | None = [None] * world() if rank() == 0 else None
    torch_dist.gather_object(item, items, dst=0, group=group or _control)
    return items or []


def from_first(item: Any, group: torch_dist.ProcessGroup | None = None) -> Any:
    """Rank 0's object on every rank.

    Collective: every rank calls; others' arguments are ignored.
    """
    if world() == 1:
        return item
    box = [item]
    torch_dist.broadcast_object_list(box, src=0, group=group or _control)
    return box[0]


def tensors_from_first(tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Rank 0's tensors on every rank, in host memory. Collective: every rank calls.

    The other ranks' arguments are ignored.
    """
    if world() == 1:
        assert tensors is not None
        return tensors
    told = {name: (value.shape, value.dtype) for name, value in (tensors or {}).items()}
    received = {}
    for name, (shape, dtype) in from_first(told).items():
        if rank() == 0:
            assert tensors is not None
            value = tensors[name].cpu().contiguous()
        else:
            value = torch.empty(shape, dtype=dtype)
        torch_dist.broadcast(value, src=0, group=_control)
        received[name] = value
    return received


def own_group() -> torch_dist.ProcessGroup | None:
    """A gloo group of all ranks for one thread to itself; None for a process alone.

    Collective: every rank calls.
    """
    return _gloo_group() if world() > 1 else None


def _gloo_group() -> torch_dist.ProcessGroup:
    """Of all ranks. Collective: every rank calls."""
    group = torch_dist.new_group(backend="gloo", timeout=_timeout)
    assert isinstance(group, torch_dist.ProcessGroup)  # a number where a rank is not in it
    return group


def together(problem: str | None) -> None:
    """Raise on all ranks if any has a problem, naming them. Collective: every rank calls.

    Raises:
        ValueError: with each rank's problem, one a line.
    """
    told = gather(problem)
    if len(set(told)) == 1 and problem:  # the same everywhere
        raise Refused(problem)
    if any(told):
        raise Refused("\n".join(f"rank {index}: {text}" for index, text in enumerate(told) if text))


def before_leaving(action: Callable[[], None]) -> None:
    """What to do before the groups end: a thread that uses them has to be done."""
    _before_leaving.append(action)


def finish() -> None:
    """Leave the group. Collective: every rank calls, after its last collective.

    gloo's threads abort the process when they outlive the interpreter (5 to 25 % of runs without
    the collection, the barrier and the half second).
    """
    global _control
    if not torch_dist.is_initialized():
        return
    while _before_leaving:
        _before_leaving.pop()()
    gc.collect()
    if world() > 1:
        barrier()
        time.sleep(0.5)
    torch_dist.destroy_process_group()
    _control = None
