"""What variables of launchers mean: which rank this is, or a refusal that names the variable."""

from __future__ import annotations

import os
import re

import psutil
import pytest

from rcmae import dist
from rcmae.errors import Refused
from rcmae.process import cores, launchers

ALL = re.compile(
    r"(SLURM|OMPI|MV2|PMI|PMIX|PALS|MPI|FLUX|JSM|MASTER|LOCAL|TORCHELASTIC|CROSS|GROUP)_|RANK$"
)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if ALL.match(name) or name == "WORLD_SIZE":
            monkeypatch.delenv(name)


def under(monkeypatch: pytest.MonkeyPatch, text: str) -> launchers.Launched:
    for pair in text.split():
        monkeypatch.setenv(*pair.split("=", 1))
    return launchers.launched()


STEP = "SLURM_JOB_ID=815 SLURM_STEP_ID=0 SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_STEP_NUM_TASKS=4"
STEP += " SLURM_STEP_NUM_NODES=2"
MPIRUN = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1"
MPIRUN += " OMPI_COMM_WORLD_LOCAL_SIZE=2"
MVAPICH = "MV2_COMM_WORLD_RANK=3 MV2_COMM_WORLD_SIZE=4 MV2_COMM_WORLD_LOCAL_RANK=1"
MVAPICH += " MV2_COMM_WORLD_LOCAL_SIZE=2"
TORCHRUN = "RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 MASTER_ADDR=a MASTER_PORT=1"


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ("", (0, 1, 0, 1)),
        ("MASTER_ADDR=somewhere", (0, 1, 0, 1)),
        ("RANK=0 WORLD_SIZE=1", (0, 1, 0, 1)),
        (TORCHRUN, (5, 8, 1, 4)),
        (f"{TORCHRUN} TORCHELASTIC_RUN_ID=x {STEP}", (5, 8, 1, 4)),  # srun starts torchruns
        (STEP, (3, 4, 1, 2)),
        ("SLURM_JOB_ID=815 SLURM_NTASKS=4 SLURM_PROCID=0", (0, 1, 0, 1)),  # the batch shell
        ("SLURM_STEP_NUM_TASKS=1", (0, 1, 0, 1)),
        (MPIRUN, (1, 2, 1, 2)),
        (f"{MPIRUN} SLURM_STEP_NUM_TASKS=1 SLURM_PROCID=0", (1, 2, 1, 2)),  # mpirun's own srun
        ("PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2", (1, 2, 1, 2)),
        ("FLUX_TASK_RANK=2 FLUX_JOB_SIZE=4 FLUX_TASK_LOCAL_ID=0 FLUX_JOB_NNODES=2", (2, 4, 0, 2)),
        # flux has a plug-in for PMI, which knows no local ranks
        (
            "FLUX_TASK_RANK=1 FLUX_JOB_SIZE=2 FLUX_TASK_LOCAL_ID=1 PMI_RANK=1 PMI_SIZE=2",
            (1, 2, 1, 2),
        ),
        ("PMI_RANK=3 PMI_SIZE=4 PMI_LOCAL_RANK=1 PMI_LOCAL_SIZE=2", (3, 4, 1, 2)),  # PALS
        (f"{MVAPICH} PMI_RANK=3 PMI_SIZE=4", (3, 4, 1, 2)),
        ("RANK= WORLD_SIZE= MASTER_ADDR=", (0, 1, 0, 1)),
        ("SLURM_STEP_NUM_TASKS=1 SLURM_LOCALID=5", (0, 1, 0, 1)),  # of another step
        (
            "SLURM_STEP_NUM_TASKS=4 SLURM_STEP_NUM_NODES=2 SLURM_PROCID=2 SLURM_LOCALID=2",
            (2, 4, 2, 3),
        ),
    ],
)
def test_a_launcher_says_which_rank_this_is(
    monkeypatch: pytest.MonkeyPatch, variables: str, place: tuple[int, int, int, int]
) -> None:
    assert under(monkeypatch, variables)[:4] == place


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ("RANK=0", "RANK or WORLD_SIZE is set but not WORLD_SIZE"),
        ("RANK=0 WORLD_SIZE=2", "not MASTER_ADDR, MASTER_PORT"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=a", "not MASTER_PORT"),
        ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "RANK=2 and WORLD_SIZE=2"),
        ("RANK=x WORLD_SIZE=1", "RANK='x' is not a number"),
        (f"RANK=0 WORLD_SIZE=1 {MPIRUN}", "WORLD_SIZE=1, but OMPI_COMM_WORLD_SIZE=2"),
        ("SLURM_STEP_NUM_TASKS=2", "SLURM_PROCID is not set"),
        ("SLURM_STEP_NUM_TASKS=two SLURM_PROCID=0", "SLURM_STEP_NUM_TASKS='two' is not a number"),
        ("PMI_RANK=1 PMI_SIZE=2", "PMI_SIZE=2 is set but not MPI_LOCALRANKID or PMI_LOCAL_RANK"),
        ("PMIX_RANK=1 PMIX_NAMESPACE=x", "PMIX_RANK=1 says that a launcher started this process"),
        ("PALS_RANKID=1", "PALS_RANKID=1 says"),
        (f"{TORCHRUN} LOCAL_RANK=9", "LOCAL_RANK=9 and LOCAL_WORLD_SIZE=4, of 8 ranks"),
        (f"{TORCHRUN} LOCAL_WORLD_SIZE=16", "LOCAL_RANK=1 and LOCAL_WORLD_SIZE=16"),
        (f"{MPIRUN} OMPI_COMM_WORLD_LOCAL_RANK=-1", "OMPI_COMM_WORLD_LOCAL_RANK=-1 and"),
        (f"{STEP} RANK=0 WORLD_SIZE=4 MASTER_ADDR=a MASTER_PORT=1", "RANK=0, but srun calls"),
        (f"{TORCHRUN} WORLD_SIZE=99999999999999999999", "too large a number"),
    ],
)
def test_what_cannot_be_true_is_refused_with_its_name(
    monkeypatch: pytest.MonkeyPatch, variables: str, named: str
) -> None:
    with pytest.raises(Refused, match=re.escape(named)) as caught:
        under(monkeypatch, variables)
    assert "\n" not in str(caught.value)


def test_a_shell_of_srun_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_name", lambda pid: "bash")
    with pytest.raises(Refused, match=r"SLURM_STEP_NUM_TASKS=4 .* `srun --pty`"):
        under(monkeypatch, f"{STEP} SLURM_PTY_PORT=1")
    monkeypatch.setattr(launchers, "_name", lambda pid: "slurmstepd")
    assert launchers.launched().rank == 3


def test_steps_of_a_job_meet_at_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for job, step in (("815", "0"), ("815", "1"), ("20815", "0")):
        monkeypatch.setenv("SLURM_STEP_ID", step)
        found = under(monkeypatch, f"{STEP} SLURM_JOB_ID={job} SLURM_STEP_ID={step}")
        assert launchers.ports(found) == launchers.ports(found)
        seen.append(tuple(launchers.ports(found)))
        assert all(10000 <= port < 30000 for port in seen[-1])
    assert len(set(seen)) == 3
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert launchers.ports(launchers.launched()) == [1234]


def test_a_port_is_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    for port in ("0", "99999"):
        found = under(monkeypatch, f"{TORCHRUN} MASTER_PORT={port}")
        with pytest.raises(Refused, match=f"MASTER_PORT={port} is not a port"):
            launchers.ports(found)
    monkeypatch.setenv("MASTER_PORT", "")
    assert len(launchers.ports(found)) > 1


def test_ranks_under_shells_of_their_own_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mpirun -n 2 wrapper.sh`: each rank has another parent, and all the same launcher."""
    found = under(monkeypatch, "PMI_RANK=0 PMI_SIZE=2 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=2")
    launcher = psutil.Process()
    monkeypatch.setattr(launchers, "_ancestors", lambda: [launcher])
    monkeypatch.setattr(launchers, "_is_launcher", lambda process: process is launcher)
    met = []
    for parent in (101, 102):
        monkeypatch.setattr(os, "getppid", lambda parent=parent: parent)
        met.append(launchers.ports(found))
    assert met[0] == met[1]


def test_the_ranks_of_a_host_are_known_once_they_have_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's variables are set for DeepSpeed, and read before those of the launcher."""
    found = under(monkeypatch, STEP)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MASTER_ADDR", "")
    monkeypatch.setenv("MASTER_PORT", "")
    dist._set_variables(found, "first", 12345)
    assert launchers.launched()[:4] == found[:4]


def test_where_rank_0_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launchers.host(under(monkeypatch, MPIRUN)) == "127.0.0.1"
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")
    with pytest.raises(Refused, match=r"OMPI_COMM_WORLD_SIZE=2 .* set MASTER_ADDR"):
        launchers.host(launchers.launched())
    monkeypatch.setenv("MASTER_ADDR", "first")
    assert launchers.host(launchers.launched()) == "first"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[01-04,07]", "node01"),
        ("n[3,1],m1", "n3"),
        ("host-a,host-b", "host-a"),
        ("rack[1-2]node[001-3]", "rack1node001"),
        ("node[1-2]-ib0.example.org", "node1-ib0.example.org"),
        ("gpu-a[0001-0100:2]", "gpu-a0001"),
        *((odd, None) for odd in ("", "node[1-4", "n[]", "node]", "-h", "$(id)", "[a")),
    ],
)
def test_the_first_host_of_a_node_list_in_any_notation(
    nodes: str, first: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without scontrol, which a container lacks, and which waits for minutes for its slurm.conf."""
    assert launchers.first_host(nodes) == first
    step = "SLURM_PROCID=1 SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=2"
    found = under(monkeypatch, f"{step} SLURM_STEP_NODELIST={nodes}")
    if first is not None:
        assert launchers.host(found) == first
    else:
        with pytest.raises(Refused, match=r"SLURM_STEP_NODELIST=.* export MASTER_ADDR"):
            launchers.host(found)


def test_cores_are_those_of_the_mask_and_of_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setattr(cores, "_quota", lambda: float("inf"))
    assert cores.usable() == 12
    assert cores.of_a_rank(4) == 3
    monkeypatch.setattr(cores, "_quota", lambda: 2.5)
    assert cores.usable() == 3
    assert cores.of_a_rank(8) == 1
    monkeypatch.setattr(os, "sysconf", lambda name: 96)
    assert cores.of_a_rank(8, bound=True) == 3
