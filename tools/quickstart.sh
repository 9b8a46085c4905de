#!/usr/bin/env bash
# The main job on real photographs in a few minutes: installs what is needed into .venv, makes shards from photographs
# that ship inside installed packages, pretrains a small RC-MAE with DeepSpeed (two ranks on the CPU, or the GPUs that
# are there), stops it on the way as a scheduler would and resumes it, ends with k-NN and a reconstruction picture.
# Arguments are recipe keys set over rcmae/recipes/quickstart.yaml:
#   tools/quickstart.sh
#   tools/quickstart.sh engine.config=zero3.json schedule.steps=500 run.dir=runs/mine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

run=runs/quickstart ranks=2
for argument in "$@"; do
    case $argument in run.dir=*) run=${argument#run.dir=} ;; esac
done
if [ "$gpus" -gt 0 ]; then  # the batch wants a power of two
    ranks=1
    while [ $((2 * ranks)) -le "$gpus" ] && [ "$ranks" -lt 8 ]; do ranks=$((2 * ranks)); done
fi

# A mistyped key is told in a second: DeepSpeed's launcher imports for several before a rank sees it.
rcmae recipe quickstart "$@" > /dev/null || exit $?

say "shards of real photographs in data/quickstart"
python tools/quickstart_data.py data/quickstart

# A run that ends with 75 was stopped with a checkpoint committed: the same command goes on from there.
interrupted=""
trap 'interrupted=1' INT TERM
status=75
while [ "$status" = 75 ] && [ -z "$interrupted" ]; do
    # its launcher calls a stop on request an error; what ranks say comes through in any case
    command=(deepspeed --log_level critical --num_gpus "$ranks" --master_port "$(python -c '
import socket
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    print(probe.getsockname()[1])')" --module rcmae.train quickstart run.stop_after_steps=500 "$@")
    say "${command[*]}"
    status=0
    "${command[@]}" || status=$?
    [ "$status" != 75 ] || say "exit status 75: stopped on request, a checkpoint is committed"
done
[ "$status" = 0 ] || exit "$status"

say "done; what student and teacher make of hidden patches:"
find "$run/pictures" -name '*.png' | sort | tail -n 1
echo "To train anew: rm -r $run"
