"""Which process it is, on which start of which host, and whether it is still there."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path


def boot() -> str:
    """Names this host since it started, and this set of processes of it: a pid means nothing
    elsewhere.
    """
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{name} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex(8)  # not known: then only a beat tells


def died_here(host: str, its_boot: str, pid: int) -> bool:
    """Whether a process ran here, on this start of this host, and is gone.

    False of one elsewhere: that cannot be seen from here.
    """
    return host == socket.gethostname() and its_boot == boot() and not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        # a zombie writes nothing
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
