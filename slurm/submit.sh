#!/usr/bin/env bash
# sbatch for what can run: the plan of the job first, and into the queue only if it is not refused. As sbatch otherwise.
#   slurm/submit.sh [sbatch's options] TEMPLATE [arguments]
#   GPU=h200 slurm/submit.sh --nodes=2-8 slurm/pretrain_vit_l.sbatch data.shards=... run.dir=...
# GPU is the kind that the plan is for, one of `rcmae plan --gpu`. The same: rcmae slurm-job submit ...
root=$(dirname "${BASH_SOURCE[0]}")/..
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=python3
[ ! -f "$root/rcmae/__init__.py" ] || export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m rcmae slurm-job submit "$@"
