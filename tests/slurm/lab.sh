#!/usr/bin/env bash
# A real SLURM on one machine, as root: a controller here, and nodes that each have their own host name, /etc/hosts,
# /dev/shm and network address, 64 CPUs on paper and 8 GPUs that are nothing but device files.
#   lab.sh up DIR [NODES]    start the daemons (2 nodes)     lab.sh down DIR     end them and whatever runs on the nodes
#   lab.sh kill DIR N        a node dies with all on it      lab.sh start DIR N  it comes back
#   lab.sh cut DIR N         its network cable is pulled     lab.sh heal DIR N   and put back
#   lab.sh wire DIR [NODES]  the nodes alone, no SLURM       lab.sh on DIR N COMMAND...   a command on one
# Then: export SLURM_CONF=DIR/slurm.conf. DIR must have a short path (munge's socket lies in it).
set -euo pipefail
PATH="$PATH:/usr/sbin:/sbin"
verb=$1 dir=$(realpath -m "$2") number=${3:-2}
export SLURM_CONF="$dir/slurm.conf"

name() { echo "$(cat "$dir/lab")n$1"; }  # of a node's network namespace; its link to the bridge is called the same

on_node() {  # number, command...: the command becomes a process of the node
    local node=$1
    shift
    # shellcheck disable=SC2016  # in there
    exec nsenter --net="/run/netns/$(name "$node")" unshare --mount --uts bash -c '
        mount --bind "$1/hosts" /etc/hosts && mount -t tmpfs tmpfs /dev/shm && hostname "$2" && shift 2 && exec "$@"
    ' node "$dir" "node$node" "$@"
}

start_node() { (on_node "$1" nice -n -10 slurmd -f "$SLURM_CONF" -N "node$1"); }  # its slurmd goes into the background

wire() {  # number of nodes, name of the lab: a bridge, and on it nodes with addresses of their own
    local net
    net="10.$((100 + RANDOM % 100)).$((RANDOM % 250))"
    mkdir -p "$dir"
    echo "$2" > "$dir/lab"
    cp /etc/hosts "$dir/hosts"
    ip link add "$2" type bridge
    ip address add "$net.1/24" dev "$2"
    ip link set "$2" up
    echo "$net.1 controller" >> "$dir/hosts"
    for node in $(seq "$1"); do
        echo "$net.1$node node$node" >> "$dir/hosts"
        ip netns add "$(name "$node")"
        ip link add "$(name "$node")" type veth peer name eth0 netns "$(name "$node")"
        ip link set "$(name "$node")" master "$2" up
        ip -n "$(name "$node")" address add "$net.1$node/24" dev eth0
        ip -n "$(name "$node")" link set eth0 up
        ip -n "$(name "$node")" link set lo up
    done
}

address() { awk -v name="$1" '$2 == name {print $1}' "$dir/hosts"; }

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
    port=${PORT:-$((20000 + RANDOM % 400 * 20))}
    wire "$number" "lab$port"
    mkdir -p "$dir"/{munge,state,log,dev}
    chmod 755 "$dir" "$dir/munge"  # munged wants no folder that others may write
    (umask 077; head -c 128 /dev/urandom > "$dir/munge/key")
    for gpu in 0 1 2 3 4 5 6 7; do mknod "$dir/dev/nvidia$gpu" c 1 3; done  # the device number of /dev/null
    echo "Name=gpu Type=h100 File=$dir/dev/nvidia[0-7]" > "$dir/gres.conf"
    cat > "$SLURM_CONF" << CONF
ClusterName=lab
SlurmctldHost=$(hostname -s)($(address controller))
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
KillWait=120
SlurmdTimeout=12
MessageTimeout=8
TCPTimeout=4
UnkillableStepTimeout=300
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
CONF
    for node in $(seq "$number"); do
        mkdir "$dir/spool.node$node"
        echo "NodeName=node$node NodeAddr=$(address "node$node") Port=$((port + node)) CPUs=64 RealMemory=1000000" \
            "Gres=gpu:h100:8 State=UNKNOWN" >> "$SLURM_CONF"
    done
    cat >> "$SLURM_CONF" << CONF
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
    munged --key-file="$dir/munge/key" --socket="$dir/munge/sock" --pid-file="$dir/munge/pid" \
        --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
    nice -n -10 slurmctld -f "$SLURM_CONF"  # a busy machine must not look like lost nodes; nor may jobs time out
    for node in $(seq "$number"); do start_node "$node"; done
    for _ in $(seq 200); do
        [ "$(sinfo -h -p test -t idle -o %D 2> /dev/null)" != "$number" ] || exit 0
        sleep 0.1
    done
    sinfo -lN
    exit 1
    ;;
wire) wire "$number" "lab$((20000 + RANDOM % 400 * 20))" ;;
on) on_node "$number" "${@:4}" ;;
down)
    sed -n 's/.* node\([0-9]*\)$/\1/p' "$dir/hosts" | while read -r node; do
        kill_node "$node" || true
        ip netns delete "$(name "$node")" || true  # and its link
    done
    for file in "$dir"/slurmctld.pid "$dir"/munge/pid; do
        if [ -s "$file" ]; then kill "$(cat "$file")" || true; fi
    done
    ip link delete "$(cat "$dir/lab")" || true
    ;;
kill) kill_node "$number" ;;
start) start_node "$number" ;;
cut) ip link set "$(name "$number")" down ;;
heal) ip link set "$(name "$number")" up ;;
*) echo "unknown: $verb" >&2; exit 2 ;;
esac
