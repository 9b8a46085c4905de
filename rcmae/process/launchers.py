"""Which process this is among all, as the variables of whoever started it say.

torchrun and DeepSpeed set RANK and WORLD_SIZE; srun, mpirun (Open MPI, MPICH, Intel's, MVAPICH,
Cray's PALS), flux and jsrun have variables of their own. Shells hand them on long after their job
is over, and a launcher hands on those of another: what cannot be true is refused with the
variable's name. Without torch, for entry points that answer at once.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import psutil

from rcmae.errors import Refused


class Names(NamedTuple):
    """The variables of a launcher."""

    rank: str
    world: str
    local_rank: str
    local_world: str  # empty: it has none
    who: str


_TORCH = Names("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "torchrun or deepspeed")
_SRUN = Names("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "", "srun")
_FLUX = Names("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", "", "flux run")
# An MPI that starts its own processes by srun hands on the variables of those: it comes first. Flux
# sets those of PMI, too, without the local ones.
_OTHERS = (
    Names(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "mpirun",
    ),
    Names(
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        "mpirun_rsh",
    ),
    _FLUX,
    Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "mpiexec"),
    Names("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE", "mpiexec"),  # PALS
    _SRUN,
    Names(
        "JSM_NAMESPACE_RANK",
        "JSM_NAMESPACE_SIZE",
        "JSM_NAMESPACE_LOCAL_RANK",
        "JSM_NAMESPACE_LOCAL_SIZE",
        "jsrun",
    ),
)
# What says that this is one of several, whatever started it: not how many there are.
_RANKS_ALONE = (
    *("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "PALS_RANKID"),
    *("FLUX_TASK_RANK", "JSM_NAMESPACE_RANK"),
)
# Set by launchers that RANK and WORLD_SIZE are really from, on nodes that another one started.
_OWN = ("TORCHELASTIC_RUN_ID", "CROSS_RANK", "GROUP_RANK")
_STARTS = {  # variables that tell one start of a launcher from another, the same on all its ranks
    "srun": ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
    "mpirun": ("PMIX_NAMESPACE",),
    "mpiexec": ("PALS_APID",),
    "flux run": ("FLUX_JOB_ID",),
    "jsrun": ("LSB_JOBID", "JSM_JSRUN_JOB_ID"),
}
_BY_MPI = ("mpirun", "mpiexec", "mpirun_rsh")  # they have no number for a start that all have
_MOST = 2**31 - 1  # of what a variable counts
_PORTS = 8  # that are tried, one after the other
_FIRST_PORT = 10000  # below the range that Linux gives to outgoing connections
_FIRST_NODE = re.compile(r"(?:[^\[\],\s]|\[[^\[\]]*\])+")
_RANGES = re.compile(r"\[([^\[\]]+)\]")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHELLS = {"bash", "sh", "dash", "zsh", "fish", "ksh", "tcsh", "csh", "tmux: server", "screen"}
_INITS = {"systemd", "init", "tini", "dumb-init", "docker-init", "catatonit", "s6-svscan"}
_LAUNCHERS = (
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed",
    "accelerate",
    "mpirun",
    "mpiexec",
    "prterun",
    "orted",
    "prted",
    "hydra_",
    "mpispawn",
    "palsd",
    "slurmstepd",
    "flux-shell",
    "jsrun",
)


# that end every rank as soon as one has failed
_END_ALL = (
    *("torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed"),
    *("mpirun", "mpiexec", "prterun"),
)


class Launched(NamedTuple):
    """This process among all, as its launcher has it."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    says: str = ""  # the variable and the value that tell how many there are; empty for one alone
    who: str = ""


def launched() -> Launched:
    """This process among all; one process where no launcher set a variable.

    Raises:
        Refused: the variables are incomplete, no numbers, or of two launchers that disagree.
    """
    env = {name: value for name, value in os.environ.items() if value.strip()}
    other = _by_others(env)
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return other
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in env]
    if missing and env.get("WORLD_SIZE") != "1":
        raise Refused(
            f"RANK or WORLD_SIZE is set but not {', '.join(missing)}; use a launcher, or unset them"
        )
    found = _read(_TORCH, env)
    if any(name in env for name in _OWN):
        return found
    if other.world > found.world:
        raise Refused(
            f"WORLD_SIZE={found.world}, but {other.says} says that {other.who} started "
            f"{other.world}: unset RANK and WORLD_SIZE, which are left over from something else"
        )
    if other.world == found.world and other.rank != found.rank:
        raise Refused(
            f"RANK={found.rank}, but {other.who} calls this process rank {other.rank} of "
            f"{other.world}: unset RANK and WORLD_SIZE, which are left over from something else"
        )
    return found


def _by_others(env: Mapping[str, str]) -> Launched:
    for names in _OTHERS:
        is_whole = names.world in env and (names.rank in env or names is _SRUN)
        is_pmi = names.rank == "PMI_RANK"
        # with srun's own plug-in it gives the same ranks, without the local ones
        if not is_whole or (is_pmi and (_SRUN.world in env or _is_other_pmi(names, env))):
            continue
        if is_pmi and env[names.world] != "1" and names.local_rank not in env:
            raise Refused(
                f"PMI_SIZE={env[names.world]} is set but not MPI_LOCALRANKID or PMI_LOCAL_RANK; "
                "set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each process, "
                "or unset it"
            )
        found = _read(names, env)
        if names is _SRUN and found.world > 1:
            _refuse_shell_of_srun(found)
        return found
    if "RANK" not in env and (told := [name for name in _RANKS_ALONE if name in env]):
        raise Refused(
            f"{told[0]}={env[told[0]]} says that a launcher started this process among others, but "
            "nothing says how many: set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT "
            f"for each, or unset {told[0]}"
        )
    return Launched(0, 1, 0, 1)


def _is_other_pmi(names: Names, env: Mapping[str, str]) -> bool:
    """Whether the local variables are those of the other MPI that has PMI's."""
    theirs = "PMI_LOCAL_RANK" if names.local_rank == "MPI_LOCALRANKID" else "MPI_LOCALRANKID"
    return names.local_rank not in env and theirs in env


def _read(names: Names, env: Mapping[str, str]) -> Launched:
    """By one launcher's variables. Raises Refused."""
    world = number(names.world, env)
    rank = number(names.rank, env) if world != 1 or names.rank in env else 0
    if world < 1 or not 0 <= rank < world:
        raise Refused(
            f"{names.rank}={rank} and {names.world}={world}: ranks are 0 to the size less 1; unset "
            "them, if they are left over from something else"
        )
    is_known = names is not _SRUN or world == 1
    local_rank = number(names.local_rank, env, rank if is_known else None)
    local_world = world
    told = names.local_world
    if names is _SRUN:
        local_world = max(-(-world // number("SLURM_STEP_NUM_NODES", env, 1)), local_rank + 1)
    elif names is _FLUX:
        local_world = max(-(-world // number("FLUX_JOB_NNODES", env, 1)), local_rank + 1)
    else:
        if names is _TORCH and told not in env:
            told = "LOCAL_SIZE"  # DeepSpeed's
        local_world = number(told, env, world)
        if not 0 <= local_rank < local_world <= world:
            raise Refused(
                f"{names.local_rank}={local_rank} and {told if told in env else names.world}="
                f"{local_world}, of {world} ranks: a rank's number on its host is 0 to the ranks "
                "there less 1; unset what is left over from something else"
            )
    if world == 1:
        local_rank, local_world = 0, 1  # of an earlier step of a scheduler's job
    return Launched(rank, world, local_rank, local_world, f"{names.world}={world}", names.who)


def number(name: str, env: Mapping[str, str] = os.environ, default: int | None = None) -> int:
    """A variable that is a whole number. Raises Refused where it is none, or not there."""
    text = env.get(name)
    if text is None or not text.strip():
        if default is not None:
            return default
        raise Refused(
            f"{name} is not set, though others of its launcher are; start all ranks by one "
            "launcher, or unset what is left over from another"
        )
    try:
        value = int(text)
    except ValueError as error:
        raise Refused(
            f"{name}={text!r:.80} is not a number; unset it, or set what it is"
        ) from error
    if abs(value) > _MOST:
        raise Refused(f"{name}={text:.80} is too large a number; unset it, or set what it is")
    return value


def _refuse_shell_of_srun(found: Launched) -> None:
    """A shell that `srun --pty` started is one of its tasks, and so is what is started in it."""
    if "SLURM_PTY_PORT" in os.environ and _name(os.getppid()) in _SHELLS:
        raise Refused(
            f"{found.says} says that {found.world} ranks start, but this shell is one task of "
            "`srun --pty`: unset SLURM_STEP_NUM_TASKS to train by this process alone, or start "
            "all of them by srun"
        )


def restarts() -> int:
    """How often the scheduler had started this job before. Raises Refused."""
    return number("SLURM_RESTART_COUNT", os.environ, 0)


# ------------------------------------------------------------------------------------------ meeting


def identity(found: Launched) -> str:
    """What distinguishes this start from others that may use the same port; the same on all
    ranks.
    """
    env = os.environ
    told = [f"{name}={env[name]}" for name in _STARTS.get(found.who, ()) if name in env]
    if not told and found.who in _BY_MPI and found.local_world == found.world:
        launcher = _nearest_launcher(_ancestors())  # over a shell that a rank may be started by
        told.append(f"parent={os.getppid() if launcher is None else launcher.pid}")
    return " ".join([*told, f"{found.world} ranks"])


def ports(found: Launched) -> list[int]:
    """Ports at which the ranks may meet, in the order in which they are tried; the same on all."""
    if os.environ.get("MASTER_PORT", "").strip():
        port = number("MASTER_PORT")
        if not 0 < port < 2**16:
            raise Refused(f"MASTER_PORT={port} is not a port: 1 to 65535; unset it, or set another")
        return [port]
    digest = hashlib.sha256(identity(found).encode()).digest()
    first = int.from_bytes(digest[:8], "little")
    return [_FIRST_PORT + (first + 997 * tried) % 20000 for tried in range(_PORTS)]


def host(found: Launched) -> str:
    """Where rank 0 runs. Raises Refused if it is unknown."""
    env = os.environ
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"]
    if found.local_world == found.world:
        return "127.0.0.1"
    if found.who != _SRUN.who:
        raise Refused(
            f"{found.says} says that {found.who} started ranks on several hosts, but nothing says "
            "where rank 0 runs: set MASTER_ADDR and MASTER_PORT for all of them (mpirun -x)"
        )
    name = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in env else "SLURM_JOB_NODELIST"
    first = first_host(env.get(name, ""))
    if first is None:
        raise Refused(
            f"cannot tell the first host of {name}={env.get(name, '')!r:.200}; export MASTER_ADDR "
            "in the job, or unset SLURM_STEP_NUM_TASKS if it is left over from another"
        )
    return first


def first_host(nodes: str) -> str | None:
    """The first host of a list in SLURM's notation, such as rack[1-2]n[003-9,12]-ib,login1; None
    where it is none. Without scontrol, which containers lack.
    """
    first = _FIRST_NODE.match(nodes.strip())
    if first is None or nodes.count("[") != nodes.count("]"):
        return None
    host = _RANGES.sub(lambda ranges: re.split("[-,]", ranges[1])[0], first.group())
    return host if _HOST.fullmatch(host) else None


# ------------------------------------------------------------------------------------- the launcher


def _name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return ""


def _is_launcher(process: psutil.Process, known: Sequence[str] = _LAUNCHERS) -> bool:
    try:
        words = " ".join([process.name(), *process.cmdline()[:4]])
    except psutil.Error:
        return False
    return any(word in words for word in known)


def _nearest_launcher(parents: Sequence[psutil.Process]) -> psutil.Process | None:
    return next((each for each in parents[:4] if _is_launcher(each)), None)


def ends_all(found: Launched) -> bool:
    """Whether the launcher ends all ranks once one has failed: they are on this host, and it is one
    that is known for it.
    """
    if found.local_world < found.world:
        return False
    launcher = _nearest_launcher(_ancestors())
    return launcher is not None and _is_launcher(launcher, _END_ALL)


def _ancestors() -> list[psutil.Process]:
    """The nearest first; none where they cannot be seen."""
    try:
        return psutil.Process().parents()
    except psutil.Error:
        return []


def watched_launcher() -> Callable[[], str | None]:
    """A question to ask now and then: how the launcher of this rank was lost, None while it lives.

    A process alone has none, and outlives the shell that it was started from. Of ranks the nearest
    ancestor that is a launcher counts, else the parent unless it is a shell.
    """
    env = os.environ
    is_rank = any(names.world in env for names in (_TORCH, *_OTHERS))
    if not is_rank:
        return lambda: None
    parents = _ancestors()
    found = _nearest_launcher(parents)
    if found is None and parents and parents[0].name() not in _SHELLS | _INITS:
        found = parents[0]
    if found is None:
        elastic = "TORCHELASTIC_RUN_ID" in env  # torchrun was there, and is not any more
        orphan = bool(parents) and parents[0].name() in _INITS
        return lambda: "its launcher is gone" if elastic and orphan else None
    launcher = found

    def lost() -> str | None:
        try:
            gone = not launcher.is_running() or launcher.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            gone = True
        except psutil.Error:
            gone = False
        return f"its launcher is gone (process {launcher.pid})" if gone else None

    return lost
