#!/usr/bin/env bash
# One attempt of a job; every template calls this once. Runs on the first node of the allocation.
#
#     launch.sh train RECIPE [key=value ...]     check the nodes, train, put the job back until the run is complete
#     launch.sh check RECIPE [key=value ...]     check the nodes only
#     launch.sh index [option of index ...]      index the segment of this array task
#     launch.sh evaluate RUN [option ...]        evaluate milestones as they appear, until the run is over
#
# Exit status: 0 the run is complete, was put back, or was stopped on request; 1 it is given up; 2 it was refused.
set -euo pipefail

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "slurm/launch.sh: not inside a Slurm job; submit a template with sbatch" >&2
    exit 2
fi
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repository"

# A full disk under SITE_LOGS costs lines, not the run.
log() { printf '%(%F %T)T launch: %s\n' -1 "$*" || true; }

# What the submitting shell had for another Python must not shadow the site's packages, nor may ~/.local.
unset PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE=1
site_failed() {
    log "refused: slurm/site.sh failed on $SLURMD_NODENAME, see above; site_environment must end with a python that" \
        "has the dependencies (make env, or environment.yml)"
    exit 2
}
trap site_failed EXIT
set +u    # module and conda scripts read variables that nobody has set
# shellcheck source=slurm/site.sh
source slurm/site.sh
site_environment
set -u
cd "$repository"
trap - EXIT
for name in SITE_{RAW_DATA,DATA,RUNS,BENCHMARKS,EVALUATIONS,LOGS,RANKS_PER_NODE,SPARE_NODES,MOST_BAD_NODES} \
    SITE_{ATTEMPTS,PREFLIGHT}; do
    if [[ -z ${!name:-} ]]; then
        log "refused: slurm/site.sh does not set $name"
        exit 2
    fi
done

attempt_job=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
series=${MOBILLAMA_CHAIN:-job-$SLURM_JOB_ID}    # slurm/chain.sh names a chain
# These describe the batch script's own step, or the allocation in which somebody typed sbatch (salloc, srun --pty), and
# would be taken as options by every srun below.
unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_GPUS_PER_TASK \
    SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SLURM_THREADS_PER_CORE SLURM_DISTRIBUTION
unset SLURM_EXPORT_ENV    # sbatch --export=NONE: this shell starts bare, its ranks need what it has set since

# shellcheck source=slurm/queue.sh
source slurm/queue.sh

# An alert that cannot be sent ends no run.
alert() { (set +u && site_alert "$@") || log "site_alert in slurm/site.sh failed with status $?"; }

give_up() {
    log "given up: $1"
    end_chain
    alert "job $SLURM_JOB_ID ($SLURM_JOB_NAME) is given up" "$1"
    exit 1
}

# Another job of a chain goes on where this one ends.
put_back() {
    [[ -n ${MOBILLAMA_CHAIN:-} ]] || requeue
    exit 0
}

# step OPTION... -- COMMAND...: a job step in the site's environment or container. Takes the place of the shell, so that
# signals meant for srun reach it: call it in the background or in a substitution.
step() {
    local options=()
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    exec srun --cpu-bind=none "${SITE_SRUN_OPTIONS[@]}" "${options[@]}" "${SITE_WRAPPER[@]}" "$@"
}

# One process on this node, beside whatever runs.
here() { step --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" --overlap --quiet -- "$@"; }

# The allocated nodes, those of a leaf switch next to each other: neighbouring ranks are few hops apart.
hosts_by_switch() {
    local allocated
    allocated=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    {
        scontrol show topology 2>/dev/null | sed -n 's/.*Level=0 .*Nodes=\([^ ]*\).*/\1/p' |
            while read -r leaf; do scontrol show hostnames "$leaf"; done | grep -Fx "$allocated" || true
        echo "$allocated"
    } | awk '!seen[$0]++'
}

# write_hosts FOLDER NODES: FOLDER/hosts names the host of each rank, in the order of ranks.
write_hosts() {
    local node i
    for node in $2; do
        for ((i = 0; i < SITE_RANKS_PER_NODE; i++)); do echo "$node"; done
    done >"$1/hosts"
}

# check_node FOLDER NODE FIRST_RANK: a step of its own, in which the node's ranks take part in the check.
check_node() {
    # shellcheck disable=SC2016  # every rank expands its own number
    FIRST_RANK=$3 step --nodes=1 --nodelist="$2" --ntasks="$SITE_RANKS_PER_NODE" --mem=0 --quiet \
        --output="$1/%N.log" --open-mode=append -- \
        bash -c 'export LOCAL_RANK=$SLURM_LOCALID RANK=$((FIRST_RANK + SLURM_LOCALID)); exec "$@"' rank \
        python -m megatron_patch check "$recipe" "${overrides[@]}" --folder "$1" "${SITE_PREFLIGHT_OPTIONS[@]}"
}

# check FOLDER: leaves the fit nodes in FOLDER/good and the others, with reasons, in FOLDER/bad.
check() {
    local folder=$1 node first=0 rank seconds
    local -A started=() node_of=()
    write_hosts "$folder" "$nodes"
    MASTER_ADDR=${nodes%%[[:space:]]*}
    WORLD_SIZE=$(wc -l <"$folder/hosts")
    export MASTER_ADDR WORLD_SIZE LOCAL_WORLD_SIZE=$SITE_RANKS_PER_NODE
    log "checking $(wc -w <<<"$nodes") nodes"
    # A step a node: where srun cannot start one, it ends the whole step.
    for node in $nodes; do
        check_node "$folder" "$node" "$first" &
        started[$first]=$! node_of[$first]=$node
        first=$((first + SITE_RANKS_PER_NODE))
    done
    # A rank that hangs keeps its step alive; the verdict does not wait for it.
    for ((seconds = 0; seconds < 1800; seconds++)); do
        if [[ -e $folder/verdict.json ]] && ((seconds < 1780)); then seconds=1780; fi
        for first in "${!started[@]}"; do
            kill -0 "${started[$first]}" 2>/dev/null && continue
            # The controller may have been away, which is not the node's fault: a step that gave no answer has one more try.
            if [[ -n ${node_of[$first]:-} && ! -e $folder/node.$first.json ]]; then
                await_controller
                check_node "$folder" "${node_of[$first]}" "$first" &
                started[$first]=$!
                unset "node_of[$first]"
                continue
            fi
            unset "started[$first]"
            for ((rank = first; rank < first + SITE_RANKS_PER_NODE; rank++)); do
                [[ -e $folder/node.$rank.json ]] || echo '{"error": "ended before it answered"}' >"$folder/node.$rank.json"
            done
        done
        if ((${#started[@]} == 0)); then break; fi
        pause 1
    done
    for first in "${!started[@]}"; do kill -KILL "${started[$first]}" || true; done
    unset MASTER_ADDR WORLD_SIZE LOCAL_WORLD_SIZE
    if [[ ! -e $folder/verdict.json ]]; then
        : >"$folder/good"
        echo "${nodes%%[[:space:]]*}: ended without a verdict on the others" >"$folder/bad"
    fi
    if [[ -s $folder/bad ]]; then
        leave_if_over
        # A preemption's grace time: Slurm asks the steps of the check to end too.
        if [[ -n ${asked_to_stop:-} ]]; then put_back; fi
        log "bad nodes:"$'\n'"$(cat "$folder/bad")"
        alert "bad nodes found by job $SLURM_JOB_ID" "$(cat "$folder/bad")"
    fi
}

verb=$1
shift
await_controller
case $verb in
index)
    log "segment $SLURM_ARRAY_TASK_ID"
    step --nodes=1 --ntasks=1 -- python data_tools/build_amber.py index --input "$SITE_RAW_DATA" \
        --output "$SITE_DATA" --segment "$SLURM_ARRAY_TASK_ID" "$@"
    ;;
evaluate)
    if (($# == 0)); then
        log "name the run: sbatch slurm/evaluate.sbatch runs/mobillama_05b"
        exit 2
    fi
    # Before the time limit the job is put back in the queue; what the watch is at then is done again, by whoever is next.
    trap requeue USR1
    step --nodes=1 --ntasks=1 -- python -m megatron_patch eval "$@" --watch --data "$SITE_BENCHMARKS" \
        --output "$SITE_EVALUATIONS" &
    watch=$!
    while kill -0 "$watch" 2>/dev/null; do wait "$watch" || true; done
    wait "$watch"
    exit
    ;;
esac
if ((SITE_RANKS_PER_NODE > ${SLURM_GPUS_ON_NODE:-SITE_RANKS_PER_NODE})); then
    log "refused: SITE_RANKS_PER_NODE is $SITE_RANKS_PER_NODE in slurm/site.sh, the job has $SLURM_GPUS_ON_NODE GPUs a" \
        "node: lower it, or submit with --gpus-per-node=$SITE_RANKS_PER_NODE"
    exit 2
fi
until nodes=$(hosts_by_switch) && [[ -n $nodes ]]; do pause 1; done
recipe=$1
shift
data=$SITE_DATA
case $recipe in
*_chat.yaml) data=${SITE_CHAT_DATA:?is not set in slurm/site.sh: the folder that data_tools/build_chat.py wrote} ;;
*_v_align.yaml) data=${SITE_ALIGN_DATA:?is not set in slurm/site.sh: captions that data_tools/build_vision.py packed} ;;
*_v.yaml) data=${SITE_VISION_DATA:?is not set in slurm/site.sh: instructions that data_tools/build_vision.py packed} ;;
esac
overrides=("data.folder=$data" "run.folder=$SITE_RUNS/${MOBILLAMA_RUN:-$(basename "$recipe" .yaml)}" "$@")

if [[ $verb == check ]]; then
    folder=$SITE_LOGS/preflight/$attempt_job
    mkdir -p "$folder"
    check "$folder"
    log "fit nodes: $(wc -l <"$folder/good") of $SLURM_JOB_NUM_NODES; details in $folder"
    [[ ! -s $folder/bad ]]
    exit
fi

# The early signal before the time limit, or a preemption: hold it while there are no ranks, then hand it on.
asked_to_stop='' too_early=''
ask_to_stop() {
    asked_to_stop=yes
    log "asked to stop: saving a checkpoint first"
}
trap ask_to_stop TERM
# Where the time limit is shorter than what --signal asks for, it comes at once, and every attempt would make one step.
trap 'grep -qs "\"state\": \"running\"" "${run:-}/status.json" || too_early=yes; ask_to_stop' USR1

not_started=$SITE_LOGS/not_started.$SLURM_JOB_ID    # a line for each time in a row
# An answer counts, however the step that brought it ended; 2 is a refusal; else Slurm started nothing: once more.
for tries in 1 2; do
    code=0
    # shellcheck disable=SC2086  # one word a node
    answer=$(here python -m megatron_patch.run.attempts begin "$recipe" "${overrides[@]}" \
        --series "$series" --limit "$SITE_ATTEMPTS" --nodes $nodes) || code=$?
    if [[ -n $answer || $code == 2 ]]; then break; fi
    leave_if_over
    if [[ -n $asked_to_stop ]]; then put_back; fi
done
if [[ -z $answer ]]; then
    # After two nodes died at once, 22.05 brings a job back without its GPUs.
    if ((code != 2 && ${SLURM_RESTART_COUNT:-0})) && echo "$attempt_job" >>"$not_started" &&
        (($(wc -l <"$not_started") < SITE_ATTEMPTS)); then
        requeue
        exit
    fi
    log "not started, for the reason above; submit the template again when it is mended"
    exit 2
fi
rm -f "$not_started"
read -r decision attempt run <<<"$answer"
case $decision in
go) ;;
complete | stop)
    end_chain
    exit 0
    ;;
busy) exit 2 ;;
*) give_up "see the reason above and in status.json" ;;
esac
log "attempt $attempt of $run on $SLURM_JOB_NUM_NODES nodes"
folder=$run/logs/attempt_$attempt
mkdir -p "$folder/nccl"
export NCCL_DEBUG_FILE=$folder/nccl/%h.%p.log
export TORCH_FR_DUMP_TEMP_FILE=$folder/nccl/flight_recorder_

if [[ $SITE_PREFLIGHT == yes ]]; then
    check "$folder"
else
    echo "$nodes" >"$folder/good"
fi
num_good=$(wc -l <"$folder/good")
# A job of few nodes, as the rehearsal, has no node to spare.
num_wanted=$((SLURM_JOB_NUM_NODES > SITE_SPARE_NODES ? SLURM_JOB_NUM_NODES - SITE_SPARE_NODES : 1))
num_least=$((num_wanted > SITE_MOST_BAD_NODES ? num_wanted - SITE_MOST_BAD_NODES : 1))
num_used=$((num_good < num_wanted ? num_good : num_wanted))
if ((num_used < num_least)); then
    give_up "only $num_good nodes are fit, an attempt needs $num_least (SITE_MOST_BAD_NODES, SITE_SPARE_NODES in site.sh)"
fi
used=$(head -n "$num_used" "$folder/good")

log "training on $num_used nodes of $SITE_RANKS_PER_NODE ranks"
write_hosts "$folder" "$used"
# Until Python handles USR1 it must not end a rank; this script repeats it.
SLURM_HOSTFILE=$folder/hosts MASTER_ADDR=${used%%[[:space:]]*} step --distribution=arbitrary \
    --ntasks="$(wc -l <"$folder/hosts")" --mem=0 --label --unbuffered --kill-on-bad-exit=1 --wait=60 -- \
    bash -c 'trap "" USR1; exec "$@"' rank python -m megatron_patch train "$recipe" "${overrides[@]}" &
training=$!
while kill -0 "$training" 2>/dev/null; do
    [[ -e $run/STOP ]] && asked_to_stop=yes
    # The smoke job's rehearsal: as if the time limit came while the ranks start. They stop after their first step.
    if [[ -n ${MOBILLAMA_INTERRUPT:-} && $attempt == 1 && -z $asked_to_stop && -e $run/status.json ]]; then
        asked_to_stop=yes
        log "asking for a checkpoint and a restart, as before a time limit"
    fi
    if [[ -n $asked_to_stop ]]; then
        # srun hands it to every rank; once more does no harm until the ranks are about to leave.
        grep -qs '"state": "\(stopped\|completed\)"' "$run/status.json" || kill -USR1 "$training" 2>/dev/null || true
        sleep 5 &
    else
        sleep 0.5 &
    fi
    wait -n || true    # a trapped signal ends the wait at once
done
status=0
wait "$training" || status=$?
log "the ranks ended with status $status"

for tries in 1 2; do
    decision=$(here python -m megatron_patch.run.attempts end "$run" --series "$series" --limit "$SITE_ATTEMPTS") || true
    if [[ -n $decision ]]; then break; fi
    leave_if_over
done
if [[ -z $decision ]]; then give_up "no step could be started to decide how the run goes on, see above"; fi
case $decision in
again)
    [[ -z $too_early ]] ||
        give_up "Slurm's early signal came before the first step: ask for more --time (SITE_TIME_LIMIT)"
    put_back
    ;;
complete | stop) end_chain ;;
*) give_up "see the reason above and in $run/status.json" ;;
esac
