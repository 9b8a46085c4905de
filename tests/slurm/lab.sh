#!/usr/bin/env bash
# A real SLURM on one machine, as root: a controller here, and nodes that each have their own host name, /etc/hosts,
# /dev/shm and network address, 64 CPUs on paper and 8 GPUs that are nothing but device files.
#   lab.sh up DIR [NODES]    start the daemons (2 nodes)     lab.sh down DIR     end them and whatever runs on the nodes
#   lab.sh kill DIR N        a node dies with all on it      lab.sh start DIR N  it comes back
#   lab.sh cut DIR N         its network cable is pulled     lab.sh heal DIR N   and put back
# Then: export SLURM_CONF=DIR/slurm.conf. DIR must have a short path (munge's socket lies in it).
set -euo pipefail
PATH="$PATH:/usr/sbin:/sbin"
verb=$1 dir=$(realpath -m "$2") number=${3:-2}
export SLURM_CONF="$dir/slurm.conf"

controller_port() { sed -n 's/^SlurmctldPort=//p' "$SLURM_CONF"; }
name() { echo "lab$(controller_port)n$1"; }  # of a node's network namespace; its link to the bridge is called the same

start_node() {  # number; its slurmd, in namespaces of its own
    nsenter --net="/run/netns/$(name "$1")" unshare --mount --uts bash -c "
        mount --bind '$dir/hosts' /etc/hosts && mount -t tmpfs tmpfs /dev/shm && hostname node$1 \
            && exec slurmd -f '$SLURM_CONF' -N node$1"
}

kill_node() {  # number; every process in its network namespace
    for _ in 1 2 3; do  # what was being forked meanwhile
        local pids
        pids=$(ip netns pids "$(name "$1")")
        [ -n "$pids" ] || return 0
        # shellcheck disable=SC2086  # one word a process
        kill -9 $pids 2> /dev/null || true
        sleep 0.1
    done
}

case $verb in
up)
    port=${PORT:-$((20000 + RANDOM % 400 * 20))} net="10.$((100 + RANDOM % 100)).$((RANDOM % 250))"
    mkdir -p "$dir"/{munge,state,log,dev}
    chmod 755 "$dir" "$dir/munge"  # munged wants no folder that others may write
    (umask 077; head -c 128 /dev/urandom > "$dir/munge/key")
    cp /etc/hosts "$dir/hosts"
    for gpu in 0 1 2 3 4 5 6 7; do mknod "$dir/dev/nvidia$gpu" c 1 3; done  # the device number of /dev/null
    echo "Name=gpu Type=h100 File=$dir/dev/nvidia[0-7]" > "$dir/gres.conf"
    cat > "$SLURM_CONF" << CONF
ClusterName=lab
SlurmctldHost=$(hostname -s)($net.1)
SlurmctldPort=$port
FirstJobId=$((1000 + RANDOM))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=${KILL_WAIT:-20}
SlurmdTimeout=12
MessageTimeout=8
TCPTimeout=4
UnkillableStepTimeout=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
CONF
    ip link add "lab$port" type bridge
    ip address add "$net.1/24" dev "lab$port"
    ip link set "lab$port" up
    for node in $(seq "$number"); do
        mkdir "$dir/spool.node$node"
        echo "$net.1$node node$node" >> "$dir/hosts"
        echo "NodeName=node$node NodeAddr=$net.1$node Port=$((port + node)) CPUs=64 RealMemory=1000000" \
            "Gres=gpu:h100:8 State=UNKNOWN" >> "$SLURM_CONF"
        ip netns add "$(name "$node")"
        ip link add "$(name "$node")" type veth peer name eth0 netns "$(name "$node")"
        ip link set "$(name "$node")" master "lab$port" up
        ip -n "$(name "$node")" address add "$net.1$node/24" dev eth0
        ip -n "$(name "$node")" link set eth0 up
        ip -n "$(name "$node")" link set lo up
    done
    cat >> "$SLURM_CONF" << CONF
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
    munged --key-file="$dir/munge/key" --socket="$dir/munge/sock" --pid-file="$dir/munge/pid" \
        --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
    nice -n -10 slurmctld -f "$SLURM_CONF"  # a busy machine must not look like lost nodes
    for node in $(seq "$number"); do start_node "$node"; done
    for _ in $(seq 200); do
        [ "$(sinfo -h -p test -t idle -o %D 2> /dev/null)" != "$number" ] || exit 0
        sleep 0.1
    done
    sinfo -lN
    exit 1
    ;;
down)
    sed -n 's/^NodeName=node\([0-9]*\) .*/\1/p' "$SLURM_CONF" | while read -r node; do
        kill_node "$node" || true
        ip netns delete "$(name "$node")" || true  # and its link
    done
    for file in "$dir"/slurmctld.pid "$dir"/munge/pid; do
        if [ -s "$file" ]; then kill "$(cat "$file")" || true; fi
    done
    ip link delete "lab$(controller_port)" || true
    ;;
kill) kill_node "$number" ;;
start) start_node "$number" ;;
cut) ip link set "$(name "$number")" down ;;
heal) ip link set "$(name "$number")" up ;;
*) echo "unknown: $verb" >&2; exit 2 ;;
esac
