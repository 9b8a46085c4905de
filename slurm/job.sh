# shellcheck shell=bash disable=SC2034  # some are for the jobs
# What every job of slurm/ begins with, sourced in its batch shell: where it runs, the site's settings, and how a job
# starts its ranks, hands them the warning of its end, and sees whether it was ended for good. Lies in $templates.
set -euo pipefail

say() { echo "$(date '+%F %T') $*"; }
refuse() { say "refused: $*" >&2; exit 2; }

warned="" ended=""
trap 'warned=1' USR1  # the time limit is near
trap 'ended=1' TERM   # scancel, preemption, the time limit itself; the ranks have it too

me=$SLURM_JOB_ID
# The last task of an array has the array's own id: by that, scontrol would requeue them all.
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || me=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
cd "${RCMAE_HOME:-$SLURM_SUBMIT_DIR}"

python=.venv/bin/python
[ -x $python ] || python=python3
container=() srun_arguments=()
settings=${RCMAE_ENV:-${templates:?}/env.sh}
# shellcheck source=slurm/env.example.sh
[ ! -f "$settings" ] || source "$settings"
python=${PYTHON:-$python}
export PYTHONUNBUFFERED=1
[ ! -f rcmae/__init__.py ] || export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"  # a checkout: its own, not another
ask() { "${container[@]}" "$python" -m rcmae slurm-job "$@"; }
# take VERB [ARGUMENT ...]: asks, and takes the answers, a line name=value each, into the variables of these names.
# Nothing is evaluated: whatever lies in a run's folder, none of it is run as a command.
take() {
    local answers line
    answers=$(ask "$1" --lines "${@:2}") || return $?
    while IFS= read -r line; do
        case ${line%%=*} in
        run_dir | nodes | module | status | again | delay_s | step | followed)
            printf -v "${line%%=*}" %s "${line#*=}" ;;
        esac
    done <<< "$answers"
}
idle_starts=${IDLE_STARTS:-5} backoff_s=${BACKOFF_S:-60}

ranks=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}  # the first may be h100:8
ranks=${RANKS_PER_NODE:-${ranks##*:}}
cores=${SLURM_CPUS_PER_GPU:-${SLURM_CPUS_PER_TASK:-1}}  # of each rank
unset SLURM_CPUS_PER_GPU                                # srun refuses it beside --cpus-per-task
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cores}

# SLURM before 23.02 does not tell a job its end; the ranks save in time for it even where a warning went missing.
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    limit=$(squeue -h -j "$me" -o %e) && limit=$(date -d "$limit" +%s 2> /dev/null) || limit=""
    [ -z "$limit" ] || export SLURM_JOB_END_TIME="$limit"
fi

# launch COMMAND...: run it to its end; its exit status is in $status. Does not return where the job was ended.
launch() {
    if [ -n "$ended" ]; then exit 143; fi
    "$@" &
    local launched=$!
    sleep 1  # until srun listens: the default is to die of a warning
    while kill -0 $launched 2> /dev/null; do
        if [ -n "$warned" ]; then  # srun hands it on to the ranks; again and again, for those that were still starting
            kill -USR1 $launched 2> /dev/null || true
            sleep 10 &
            wait -n $launched $! || true
        else
            wait $launched || true  # returns when srun ends, and when a trap has run
        fi
    done
    status=0
    wait $launched || status=$?
    [ -n "$ended" ] || return 0
    local job
    job=$(scontrol -o show job "$me") || job=""
    case $job in
    *JobState=RUNNING*) ;;     # the grace time of a preemption: left alone the job would end before SLURM requeues it
    *Reason=TimeLimit*) ;;     # no warning came in time
    *) say "$(ended_by "$job"); $(committed); the launcher ended with $status ($(meaning "$status"))"; exit "$status" ;;
    esac
}

# ended_by JOB: who ended this job from outside, and what comes: by what scontrol shows of it, and by what slurmstepd
# wrote into its log in this start.
ended_by() {
    local log why=""
    log=$(sed -n 's/.* StdOut=\([^ ]*\).*/\1/p' <<< "$1")
    if [ -f "$log" ]; then
        why=$(awk '/, start [0-9]+: / { why = "" } / CANCELLED AT / { why = $0 } END { print why }' "$log")
    fi
    case $why$1 in
    *"DUE TO PREEMPTION"* | *PreemptTime=[0-9]*)
        echo "preempted: SLURM requeues it, unless the site cancels what it preempts" ;;
    *"DUE TO JOB REQUEUE"*) echo "requeued by SLURM: it comes back by itself" ;;
    *"DUE TO NODE FAILURE"*) echo "ended by the failure of a node: SLURM requeues it" ;;
    *" CANCELLED AT "* | *JobState=CANCELLED*) echo "ended by scancel: submit it again to continue" ;;
    *) echo "ended from outside: SLURM requeues it, or, after scancel, submit it again to continue" ;;
    esac
}

# What the next start resumes from.
committed() {
    local step=""
    step=$(cat "${run_dir:-.}/checkpoints/LATEST" 2> /dev/null) || true
    if [ -n "$step" ]; then echo "the next start resumes from $step"; else echo "no checkpoint is committed yet"; fi
}

# said LOG [LINES]: the end of what a rank said in this start; of a refusal the refusal alone.
said() {
    local text
    text=$(awk '/^== .* job / { text = "" } { text = text $0 "\n" } END { printf "%s", text }' "$1") || return 0
    if grep -q '^rcmae: ' <<< "$text"; then text=$(awk '/^rcmae: / { on = 1 } on' <<< "$text"); fi
    tail -n "${2:-20}" <<< "$text"
}

# What an exit status of the ranks means, where srun's own lines above it do not say.
meaning() {
    case $1 in
    0) echo "finished" ;;
    2) echo "refused before the first step" ;;
    75) echo "stopped on request, with a checkpoint; srun calls that an error of each task" ;;
    138) echo "a rank died of USR1, the warning, before it could listen: srun's 'User defined signal 1'" ;;
    143) echo "a rank was ended by TERM before it could commit" ;;
    137) echo "a rank was killed: out of memory, or KillWait was over" ;;
    *) echo "it failed" ;;
    esac
}

# start_again DELAY_S [DEPENDENCY]: back into the queue.
start_again() {
    trap '' TERM  # what the requeue sends to this shell
    scontrol requeue "$me" || return 1
    [ -z "${2:-}" ] || scontrol update JobId="$me" Dependency="$2" || true
    [ "$1" = 0 ] || scontrol update JobId="$me" StartTime="now+$1" || true
    say "requeued"
}
