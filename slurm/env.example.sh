# shellcheck shell=bash disable=SC2034  # pretrain.sbatch sources this and uses what it sets
# The site's settings: copy to slurm/env.sh and keep what you need. The batch shell sources it on the first node; what
# is exported reaches every rank. Another file: RCMAE_ENV=FILE sbatch ...

# ---- Python: a virtual environment on a disk that all nodes see (default: .venv/bin/python, else python3)
# module purge; module load cuda/12.8      # only if something must be compiled (DeepSpeed's offload, apex)
# python=/shared/envs/rcmae/bin/python

# ---- or a container: the command before Python. Apptainer and enroot take the environment of the job with them.
# container=(apptainer exec --nv --bind /scratch,/data /shared/images/rcmae.sif)  python=python
# container=(enroot start --mount /scratch:/scratch --mount /data:/data rcmae)    python=python
# With pyxis the image is srun's, and the batch shell needs a Python of the host that has PyYAML and pydantic:
# srun_arguments=(--container-image=/shared/images/rcmae.sqsh --container-mounts="$PWD,/scratch,/data")
# srun_arguments+=(--container-workdir="$PWD")

# ---- caches. What compilers write is read at every start: a disk of the node's is faster, one that all nodes see is
# written once. Never a home folder with a quota: a full one fails a rank in the middle of the night.
# export TORCH_EXTENSIONS_DIR=/shared/cache/torch_extensions   # DeepSpeed's C++ (offload); built once, a minute
# export TORCHINDUCTOR_CACHE_DIR=/tmp/$USER/inductor           # engine.compile: a node's own disk has no slow locks; by
#                                                              # default the run's folder, which another node finds
# export TMPDIR=/tmp                                           # data workers put their sockets here: a short path

# ---- NCCL finds GPUs and networks by itself; set these where it chooses wrongly (NCCL_DEBUG=INFO tells what it chose)
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}        # errors say why; costs nothing
# export NCCL_SOCKET_IFNAME=ib0,eno1         # first connections: an interface that all nodes reach, not docker0
# export NCCL_IB_HCA=mlx5_0,mlx5_1           # only the compute network's adapters, where there is a storage one too
# export NCCL_IB_TIMEOUT=22                  # large or busy fabrics: 17 s before a link counts as lost, instead of 1
# export NCCL_NVLS_ENABLE=0                  # where a driver's NVLink multicast hangs at the first collective

# ---- gloo: agreements and checkpoints, a few bytes a step, over the interface that the host's name resolves to
# export GLOO_SOCKET_IFNAME=ib0              # where that is one the other nodes do not reach

# ---- this project's
# RANKS_PER_NODE=8                           # where SLURM does not manage GPUs: how many there are
# LAUNCHER=torchrun                          # or deepspeed; srun is the default
# IDLE_STARTS=5                              # so many starts in a row without a step of progress end the job
# BACKOFF_S=60                               # wait before the second such start; doubles
