#!/usr/bin/env bash
# Installs what is needed into .venv, then lints, checks types and runs the tests. Arguments go to pytest:
#   tools/test.sh                      everything that must pass
#   tools/test.sh -k resume -x         some of the tests, after lint and types
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

say "ruff"
ruff check .
say "mypy"
mypy

say "DeepSpeed's C++ optimizer for offload (built once, in .venv)"
mkdir -p "$TORCH_EXTENSIONS_DIR"
log="$TORCH_EXTENSIONS_DIR/build.log"
if ! python -c 'from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()' > "$log" 2>&1; then
    tail -n 5 "$log"
    echo "it does not build here (it needs a C++ compiler, such as g++, and CUDA's toolkit beside a CUDA torch; see $log):"
    echo "tests of optimizer offload are skipped, and without a compiler those of torch.compile too"
fi

say "pytest"
export OMP_NUM_THREADS=1  # tests start ranks of their own; more threads than cores would only slow them down
python -m pytest -n auto --maxprocesses 4 "$@"
