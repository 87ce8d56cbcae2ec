# Shared by the batch scripts; sourced by bash with `set -euo pipefail`.

# What a job of the pipeline knows: T2V_CLUSTER and T2V_SETTINGS name the files, T2V_OUT the folder; the job's folder is the one it was
# submitted from.
t2v_job() {
    source "$T2V_CLUSTER"
    source "$T2V_SETTINGS"
    cd "$SLURM_SUBMIT_DIR"
    set +u  # activation scripts read what is not set
    setup
    set -u
    T2V_COMMAND=("${CONTAINER[@]}" "${T2V:-t2v}")
    echo "job ${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}, restart ${SLURM_RESTART_COUNT:-0}," \
        "on $SLURM_JOB_NODELIST, $(date '+%F %T')"
}

# How many chunks `t2v prepare` has made in a folder.
t2v_chunks() {
    grep -o '"chunk": [0-9]*' "$1/manifest.json" | sort -u | wc -l
}

# Where the first rank listens. The job's number keeps two jobs on one node apart.
# t2v reads SLURM's variables itself (one task a rank); these two only make its choice visible and the same for all.
t2v_rendezvous() {
    local hosts
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=${hosts%%$'\n'*}  # not `| head`: scontrol could die of SIGPIPE, and with pipefail the job
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    export MASTER_ADDR MASTER_PORT
}

# The value of an option in "$@": `t2v_option --out "$@"` for both `--out DIR` and `--out=DIR`.
t2v_option() {
    local name=$1 value=
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            "$name") value=${2-} ;;
            "$name"=*) value=${1#*=} ;;
        esac
        shift
    done
    printf '%s' "$value"
}

# Run a command as a job step that can be stopped: USR1 (sent by SLURM before the time limit, see --signal, or by
# `scancel --batch --signal=USR1 JOB`) is passed on, t2v saves a checkpoint and exits with 0. Sets T2V_STOPPED=1 then.
# The command runs in the background because bash runs traps only between commands, and `wait` is one.
t2v_step() {
    T2V_STOPPED=0
    local step status=0
    trap 'T2V_STOPPED=1; kill -USR1 "$step" 2>/dev/null || true' USR1
    "$@" &
    step=$!
    while :; do
        status=0
        wait "$step" || status=$?
        # A signal also ends `wait`, with 128 + its number: the step is over only when the process is gone.
        kill -0 "$step" 2>/dev/null || break
    done
    # The last status may be that of an interrupted wait; a second one gives the step's own.
    if [ "$status" -gt 128 ]; then
        status=0
        wait "$step" 2>/dev/null || status=$?
    fi
    trap - USR1
    return "$status"
}

# Train: `t2v_train RUN t2v train-... --out RUN ...`, one task a rank. Stopped by a signal before RUN/DONE is there, the job goes back into
# the queue, and goes on from the checkpoint.
t2v_train() {
    local out=$1 status=0
    shift
    t2v_rendezvous
    t2v_step srun --kill-on-bad-exit=1 --label "$@" || status=$?
    if [ "$T2V_STOPPED" = 1 ] && [ "$status" -eq 0 ] && [ ! -e "$out/DONE" ]; then
        echo "stopped after a checkpoint: back into the queue"
        # An element of an array by its place in it: the number of the last one is the whole array's.
        scontrol requeue "${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
        sleep 5  # the requeueing ends this job; should it be slow, the job must not end as finished first
    fi
    return "$status"
}
