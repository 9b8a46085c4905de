"""Where the ranks of a start find each other, and only those of the same start.

Rank 0 listens; the others look for it at the same ports, in the same order. A port may be another
program's, or another start's of this one: each start has a name, and a rank that finds another's
moves on to the next port. A wait names the ranks that it waits for.
"""

from __future__ import annotations

import datetime
import os
import socket
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as torch_dist

from rcmae.process import launchers, waits
from rcmae.process.launchers import Launched

_NAME = "rcmae/start"
_ALL = "rcmae/all ranks are here"
_HERE = "rcmae/here"
_STOP = "rcmae/stop"
_OTHERS_S = 15.0  # a port that was given, and is another start's, may be free by then
_MOMENT = datetime.timedelta(seconds=5)
_PAUSE_S = 0.1


@dataclass
class _Talk(waits.Link):
    """A connection to the store, for one thread."""

    store: torch_dist.Store

    def tell(self, reason: str) -> None:
        self.store.set(_STOP, reason)

    def heard(self) -> str | None:
        return self.store.get(_STOP).decode() if self.store.check([_STOP]) else None


def asks_each_s(world: int) -> float:
    """How often a rank looks whether another was asked to stop, in seconds."""
    return min(1.0, max(0.4, world / 1000))


class Met(NamedTuple):
    """What the ranks have in common."""

    store: torch_dist.Store
    link: waits.Link | None  # tells the others of a stop; None for one process
    port: int


def meet(where: Launched, address: str, timeout_s: float) -> Met:
    """The store that all ranks have, once all are there. Collective.

    In memory for one process, which needs no port.

    Args:
        where: this rank.
        address: of rank 0's host.
        timeout_s: for the others to come.

    Raises:
        RuntimeError: they do not come, or another start has the port.
        waits.StopAsked: somebody asks for a stop meanwhile.
    """
    if where.world == 1:
        return Met(torch_dist.HashStore(), None, launchers.ports(where)[0])
    doing = _Doing(f"rank 0 at {address}; {where.says} says that there are {where.world} ranks")
    end = time.monotonic() + timeout_s
    timeout = datetime.timedelta(seconds=timeout_s)
    with waits.waiting(lambda: doing.what, saved=True):
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            port = launchers.ports(where)[0]
            _until_open(address, port, end)
        elif where.rank == 0:
            store, port = _listen(where, address, timeout)
            store.set(_NAME, launchers.identity(where))
        else:
            port = _found(where, address, end)
        if where.rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = _joined(where, address, port, timeout)
        _wait_for_all(where, store, doing, end, timeout_s)
    return Met(store, _Talk(_joined(where, address, port, _MOMENT)), port)


@dataclass
class _Doing:
    what: str


def _listen(
    where: Launched, address: str, timeout: datetime.timedelta
) -> tuple[torch_dist.Store, int]:
    """Rank 0's store, at the first port that is free, and the port."""
    ports = launchers.ports(where)
    for port in ports:
        try:
            store = torch_dist.TCPStore(
                address, port, where.world, True, timeout=timeout, wait_for_workers=False
            )
            return store, port
        except RuntimeError:
            if port == ports[-1]:
                raise
    raise AssertionError("there is a port")


def _joined(
    where: Launched, address: str, port: int, timeout: datetime.timedelta
) -> torch_dist.Store:
    """A connection to the store."""
    store: torch_dist.Store = torch_dist.TCPStore(
        address, port, where.world, False, timeout=timeout, wait_for_workers=False
    )
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps its store over restarts of the ranks: without a prefix each would find
        # addresses of the dead
        start = os.environ["TORCHELASTIC_RESTART_COUNT"]
        store = torch_dist.PrefixStore(f"start-{start}", store)
    return store


def _found(where: Launched, address: str, end: float) -> int:
    """The port at which rank 0 of this start listens. Raises RuntimeError."""
    ports = launchers.ports(where)
    wanted = launchers.identity(where)
    met = ""
    give_up = end
    while time.monotonic() < give_up:
        for port in ports:
            if not _is_open(address, port):
                continue
            name = _name_at(where, address, port)
            if name == wanted:
                return port
            if name and len(ports) == 1:
                met = f"port {port} belongs to another training ({name}, this one is {wanted})"
                give_up = min(give_up, time.monotonic() + _OTHERS_S)
        time.sleep(_PAUSE_S)
    raise RuntimeError(met or f"nothing listens there; {where.says}")


def _until_open(address: str, port: int, end: float) -> None:
    while not _is_open(address, port):
        if time.monotonic() > end:
            raise RuntimeError("nothing listens there")
        time.sleep(_PAUSE_S)


def _is_open(address: str, port: int) -> bool:
    """Whether the port is open; torch's own client would print a page if it is not."""
    try:
        with socket.create_connection((address, port), timeout=1.0):
            return True
    except OSError:
        return False


def _name_at(where: Launched, address: str, port: int) -> str:
    """The name of the start that listens at a port; empty where it has none."""
    try:
        store = _joined(where, address, port, _MOMENT)
        store.wait([_NAME], datetime.timedelta(seconds=1))
        return store.get(_NAME).decode()
    except RuntimeError:  # another program, or it ended meanwhile
        return ""


def _wait_for_all(
    where: Launched, store: torch_dist.Store, doing: _Doing, end: float, timeout_s: float
) -> None:
    """Return when all ranks are here. Raises RuntimeError."""
    if store.add(f"rcmae/rank {where.rank}", 1) > 1:
        raise RuntimeError(
            f"there is a rank {where.rank} already: another process has its number, or another "
            "training its port"
        )
    here = store.add(_HERE, 1)
    while True:
        missing = where.world - here
        doing.what = (
            f"{missing} of {where.world} ranks; {where.says} says that there are {where.world}"
        )
        if missing == 0 or store.check([_ALL]):
            store.set(_ALL, "1")
            return
        if time.monotonic() > end:
            raise RuntimeError(
                f"{missing} of {where.world} ranks did not connect within {timeout_s:g} s; "
                f"{where.says} says that there are {where.world}"
            )
        time.sleep(_PAUSE_S)
        here = store.add(_HERE, 0)
