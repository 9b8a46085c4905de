"""A process that compiles, until it is ended; see test_building.py."""

import sys
import time

from rcmae.process import waits
from rcmae.process.building import Baton

waits.SPEAKS_AFTER_S = 0.3
if sys.argv[2] == "listening":
    waits.listen()
baton = Baton(sys.argv[1])
with waits.waiting("the engine", breaks=False, saved=True):
    if baton.try_acquire():
        print("compiles", flush=True)
        time.sleep(60)
    baton.wait()
    print("waited", flush=True)
