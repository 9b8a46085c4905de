"""A process that waits, in the way its first argument says; see test_waits.py."""

import fcntl
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from rcmae.process import waits
from rcmae.process.leaving import leaving


def main(how: str) -> None:
    if how == "launcher":  # ends before what it starts
        subprocess.Popen([sys.executable, __file__, "child"])
        time.sleep(60)
    waits.SPEAKS_AFTER_S = 0.3
    stop = waits.listen()
    if how == "child":
        print(f"child {os.getpid()}", flush=True)
    check = (lambda: RuntimeError("a worker is dead")) if how == "checked" else None
    collective = how in ("collective", "training")
    try:
        with waits.waiting(
            "the others", breaks=not collective, saved=how != "training", check=check
        ):
            print("waits", flush=True)
            time.sleep(20)
    except waits.StopAsked as asked:
        print(f"broken by {asked}", flush=True)
        stop.leave("nothing")
    except RuntimeError as error:
        print(error, flush=True)


def ranks() -> None:
    """Ranks: the first waits for samples, the others for the first."""
    from rcmae import dist
    from rcmae.process import meeting

    waits.SPEAKS_AFTER_S = 0.3
    meeting._OTHERS_S = 1.0
    stop = waits.listen()
    try:
        dist.start(required=True, timeout_s=60.0)
        with waits.waiting("samples", breaks=dist.rank() == 0):
            print("waits", flush=True)
            if dist.rank() == 0:
                time.sleep(30)
            dist.barrier()
    except waits.StopAsked as asked:
        print(f"broken by {asked}", flush=True)
        stop.leave("ranks")


def leave() -> int:
    """Ends while a thread of a pool waits for another process's lock."""
    lock = open(os.environ["LOCK"], "w")  # noqa: SIM115
    ThreadPoolExecutor(1).submit(fcntl.flock, lock, fcntl.LOCK_EX)
    print("ends", flush=True)
    return leaving(75)


if __name__ == "__main__":
    if sys.argv[1] == "leave":
        raise SystemExit(leave())
    if sys.argv[1] == "ranks":
        ranks()
    else:
        main(sys.argv[1])
