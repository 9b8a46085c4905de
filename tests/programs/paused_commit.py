"""Train, and be paused in the last moment: SIGSTOP between the last look at the lease and the
commit of a step.

paused_commit.py STEP RECIPE [key=value ...]
"""

import os
import signal
import sys
import threading
from pathlib import Path

from rcmae import train

if __name__ == "__main__":
    name, rename = f"step-{int(sys.argv[1]):08d}", os.rename

    def paused(source, target, *args, **named):
        if Path(target).name == name:
            # by this thread: it goes no step further
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        rename(source, target, *args, **named)

    os.rename = paused
    raise SystemExit(train.main(sys.argv[2:]))
