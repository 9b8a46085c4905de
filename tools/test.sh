#!/usr/bin/env bash
# Installs what is needed into .venv, then lints, checks types and runs the tests. Other arguments go to pytest:
#   tools/test.sh               everything that must pass
#   tools/test.sh --all         and every block of commands in the READMEs, run as it stands, and trackers that are
#                               installed (pip install 'rcmae[wandb,mlflow,trackio]'): minutes more
#   tools/test.sh --fast        lint, types, and the tests that start no ranks: about two minutes
#   tools/test.sh -k resume -x  some of the tests, after lint and types
# The tests of slurm/ start a real SLURM, where tests/slurm/install.sh could install it; elsewhere they skip themselves.
# So do those that want Chromium or jpegtran (tests/install_programs.sh).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

# What a change breaks first: layers, recipes, the command line, networks, objectives, golden losses. No ranks.
fast_tests=(package cli config golden_losses objectives masking vit classifier optim schedules transforms augment
    attention scores logistic guard batchnorm)
which=most
case ${1:-} in --fast | --all) which=${1#--} && shift ;; esac

say "ruff: lint and format"
ruff check .
ruff format --check .
say "mypy"
mypy

tests=()
if [ "$which" = fast ]; then
    for name in "${fast_tests[@]}"; do tests+=("tests/test_$name.py"); done
    set -- -m "not slow" "$@"
else
    [ "$which" = all ] || set -- -m "not readme and not trackers" "$@"
    say "DeepSpeed's C++ optimizer for offload (built once, in .venv)"
    command -v c++ > /dev/null || stop "no C++ compiler, which torch.compile and DeepSpeed's optimizer need (g++, for one)"
    mkdir -p "$TORCH_EXTENSIONS_DIR"
    log="$TORCH_EXTENSIONS_DIR/build.log"
    build='from deepspeed.ops.op_builder import CPUAdamBuilder
from rcmae.process.building import batons
with batons(): CPUAdamBuilder().load()'
    if ! python -c "$build" > "$log" 2>&1; then
        tail -n 5 "$log"
        echo "it does not build here (beside a CUDA torch it needs CUDA's toolkit; see $log): tests of offload will fail"
    fi
fi

say "pytest"
export OMP_NUM_THREADS=1  # tests start ranks of their own; more threads than cores would only slow them down
unset PYTHONDONTWRITEBYTECODE  # hundreds of processes import the same modules: compiled once
# by file: what a module sets up is set up once; the longest first, as tests/conftest.py orders them
python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "${tests[@]}" "$@"

if command -v nvidia-smi > /dev/null; then
    say "pytest on the GPU"  # the tests above are of the CPU
    python -m pytest -m gpu
fi
