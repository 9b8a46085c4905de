#!/usr/bin/env bash
# One rank: shows it its own GPU alone, keeps its log over requeues, and becomes the command.
#   rank.sh LOG_DIR COMMAND [ARGUMENT ...]        started by srun, torchrun or deepspeed; see pretrain.sbatch
set -eu
rank=${RANK:-${SLURM_PROCID:?no launcher started this}} local_rank=${LOCAL_RANK:-${SLURM_LOCALID:?}}
log="$1/rank-$(printf %05d "$rank").log"
shift

# Python's default for USR1 is to die, and the trainer's handlers are seconds away. What is missed comes again.
trap '' USR1

# The node's GPUs as SLURM gave them (torchrun and deepspeed may have renumbered them since). Hidden by the variable and
# not by srun's --gpu-bind, which can take peers' devices out of the cgroup, and with them NCCL's path over NVLink.
gpus=${JOB_GPUS:-${CUDA_VISIBLE_DEVICES:-}}
if [ -n "$gpus" ]; then
    IFS=, read -ra gpus <<< "$gpus"
    export CUDA_VISIBLE_DEVICES="${gpus[local_rank % ${#gpus[@]}]}"
fi

exec >> "$log" 2>&1
echo "== $(date '+%F %T') job ${SLURM_JOB_ID:-none}, start ${SLURM_RESTART_COUNT:-0}, rank $rank on $(hostname)," \
    "GPU ${CUDA_VISIBLE_DEVICES:-none}, cores $(taskset -cp $$ 2> /dev/null | sed 's/.*: //')"
exec "$@"
