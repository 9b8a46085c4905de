"""Run on ranks: doctor, on ranks whose clock, packages and run folder are not those of rank 0.

doctor_apart.py SECONDS STANDINS FOLDER RECIPE [key=value ...]
"""

import os
import sys
import time

from rcmae.commands import doctor

if __name__ == "__main__":
    seconds, standins, folder, recipe, *overrides = sys.argv[1:]
    apart = os.environ["RANK"] != "0"
    if apart:
        sys.path.insert(0, standins)
        overrides.append(f"run.dir={folder}")
    raise SystemExit(
        doctor.main(
            [recipe, "--json", *overrides],
            now=lambda: time.time() + (float(seconds) if apart else 0.0),
        )
    )
