#!/usr/bin/env bash
# Submit the whole pipeline as dependent jobs:
#
#   slurm/pipeline.sh --out /shared/run --source /shared/gifs                     at the spec size (slurm/tgif.env)
#   slurm/pipeline.sh --out /shared/run --settings slurm/demo.env                 a demonstration, minutes on CPUs
#
#   prepare (array) -> pack -> start -> threads (array) -> merge -> tokenize (array) -> transformer -> generate
#                                                                                                   -> evaluate
#
# --settings FILE  what each stage does [slurm/tgif.env]     --cluster FILE  partition, times, nodes [slurm/cluster.env]
# --source SRC     of `t2v prepare`                           --dry-run       print the commands, submit nothing
#
# Run again with the same arguments, it submits only the stages that are not finished. See slurm/README.md.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out= source= settings=$here/tgif.env cluster=$here/cluster.env dry=
fail() { echo "slurm/pipeline.sh: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        --out | --source | --settings | --cluster)
            [ $# -ge 2 ] || fail "$1 needs a value"
            declare "${1#--}=$2"
            shift 2 ;;
        --dry-run) dry=1; shift ;;
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;;
        *) fail "unknown argument '$1'; valid: --out, --source, --settings, --cluster, --dry-run" ;;
    esac
done
[ -n "$out" ] || fail "--out is not given; name a folder that all nodes share"
for file in "$settings" "$cluster"; do [ -f "$file" ] || fail "there is no file $file"; done
source "$here/common.sh"
source "$cluster"
source "$settings"
[ -n "$dry" ] || command -v sbatch > /dev/null || fail "there is no sbatch here; run this on a machine that submits to SLURM"

out=$(realpath -m "$out")
logs=$out/logs
jobs=$out/jobs.txt
export T2V_OUT=$out T2V_SLURM=$here T2V_SETTINGS T2V_CLUSTER
T2V_SETTINGS=$(realpath "$settings")
T2V_CLUSTER=$(realpath "$cluster")

# Jobs of an earlier call: those that can never start are cancelled, others must end first.
if [ -z "$dry" ]; then
    mkdir -p "$logs"  # SLURM does not make it, and a job without its log's folder fails with no message
    if [ -f "$jobs" ]; then
        ids=$(cut -d' ' -f2 "$jobs" | paste -sd,)
        queue=$(squeue --noheader --jobs "$ids" --format '%A %T %r' 2> /dev/null || true)
        dead=$(awk '/DependencyNeverSatisfied/ { print $1 }' <<< "$queue" | sort -u)
        [ -z "$dead" ] || scancel $dead
        alive=$(awk 'NF && !/DependencyNeverSatisfied/ { print $1 }' <<< "$queue" | sort -u | paste -sd' ')
        # What waits for a job that never starts will never start either, but does not say so yet.
        for id in $alive; do
            if scontrol -o show job "$id" 2> /dev/null | grep -q 'JobState=PENDING.*Dependency=' && [ -n "$dead" ]; then
                scancel "$id"
                alive=$(tr ' ' '\n' <<< "$alive" | grep -vx "$id" | paste -sd' ' || true)
            fi
        done
        [ -z "$alive" ] || fail "jobs of an earlier call are in the queue: $alive; wait, or cancel them: scancel $alive"
    fi
    : > "$jobs"
fi

# submit STAGE FINISHED [sbatch options]: unless the file FINISHED is there, submit STAGE after the stage before it.
after=
submit() {
    local stage=$1 finished=$2 id command log=%j
    shift 2
    if [ -e "$finished" ]; then
        printf '%-13s finished (%s)\n' "$stage" "$finished"
        return
    fi
    [[ " $* " != *" --array"* ]] || log=%A_%a
    command=(sbatch --parsable --export=ALL --job-name="t2v-$stage" --output="$logs/$stage-$log.log")
    [ -z "$PARTITION" ] || command+=(--partition="$PARTITION")
    [ -z "$ACCOUNT" ] || command+=(--account="$ACCOUNT")
    [ -z "$after" ] || command+=(--dependency="afterok:$after")
    command+=("${SBATCH_EXTRA[@]}" "$@" "$here/$stage.sbatch")
    [[ $stage != prepare && $stage != pack ]] || [ -z "$source" ] || command+=(--source "$source")
    if [ -n "$dry" ]; then
        printf '%q ' "${command[@]}"
        echo
        after=JOB_OF_${stage^^}
        return
    fi
    id=$("${command[@]}")
    after=${id%%;*}
    echo "$stage $after" >> "$jobs"
    printf '%-13s job %s\n' "$stage" "$after"
}

one=(--nodes=1 --ntasks=1 --cpus-per-task="$CPUS_PER_RANK")
[ -z "$MEMORY_PER_NODE" ] || one+=(--mem="$MEMORY_PER_NODE")
ranks() {  # of a training on $1 nodes
    training=(--nodes="$1" --ntasks-per-node="$RANKS_PER_NODE" --cpus-per-task="$CPUS_PER_RANK" --signal="B:USR1@$GRACE")
    [ "$GPUS_PER_NODE" -eq 0 ] || training+=(--gres="gpu:$GPUS_PER_NODE")
    [ -z "$MEMORY_PER_NODE" ] || training+=(--mem="$MEMORY_PER_NODE")
}
gpu=()
[ "$GPUS_PER_NODE" -eq 0 ] || gpu=(--gres=gpu:1)

submit prepare "$out/raw/manifest.json" "${one[@]}" --time="$TIME_PREPARE" --array="0-$((PREPARE_PARTS - 1))"
submit pack "$out/raw/manifest.json" "${one[@]}" --time="$TIME_PREPARE"
ranks "$THREAD_NODES"
submit vqvae_start "$out/start/DONE" "${training[@]}" --time="$TIME_THREAD"
[ ! -e "$out/raw/manifest.json" ] || CHUNKS=$(t2v_chunks "$out/raw")  # fewer, where more clips were rejected than expected
missing=
for ((chunk = 0; chunk < CHUNKS; ++chunk)); do [ -e "$out/thread-$chunk/DONE" ] || missing+=${missing:+,}$chunk; done
if [ -n "$missing" ]; then
    submit vqvae_thread "$out/no-such-file" "${training[@]}" --time="$TIME_THREAD" --array="$missing%$THREADS_AT_ONCE"
else
    printf '%-13s finished\n' vqvae_thread
fi
submit merge "$out/tokenizer/report.md" "${training[@]}" --time="$TIME_THREAD"
submit tokenize "$out/tokens/manifest.json" "${one[@]}" "${gpu[@]}" --time="$TIME_TOKENIZE" --array="0-$((TOKENIZE_PARTS - 1))"
ranks "$TRANSFORMER_NODES"
submit transformer "$out/generator/DONE" "${training[@]}" --time="$TIME_TRANSFORMER"
trained=$after
submit generate "$out/sheet.png" "${one[@]}" "${gpu[@]}" --time="$TIME_PREPARE"
after=$trained  # beside it
submit evaluate "$out/evaluation/report.json" "${one[@]}" "${gpu[@]}" --time="${TIME_EVALUATE:-12:00:00}"
[ -z "$dry" ] || exit 0
if [ ! -s "$jobs" ]; then
    echo "nothing is left to do"
    exit 0
fi

cat << TEXT

watch    squeue --me; tail -f $logs/*.log; .venv/bin/tensorboard --logdir $out
repair   this command again: finished stages, and finished elements of the array of threads, are left alone
cancel   scancel$(cut -d' ' -f2 "$jobs" | sed 's/^/ /' | tr -d '\n')
TEXT
