"""Run on any number of ranks: each trains by its own command line, in its own folder.

Arguments: a JSON list with, for each rank, [folder to work in, module, argument, ...]. The module
`bug` stands for a mistake of ours: `rcmae.train` with a judge that raises a ValueError.
"""

import importlib
import json
import os
import sys

import torch

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, module, *arguments = json.loads(sys.argv[1])[int(os.environ["RANK"])]
    os.chdir(folder)
    if module == "bug":
        from rcmae.run import judge

        def broken(*_: object) -> None:
            raise ValueError("the mistake is ours")

        judge.judge = broken
        module = "rcmae.train"
    raise SystemExit(importlib.import_module(module).main(arguments))
