# Shared by the batch scripts; sourced by bash with `set -euo pipefail`.

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
