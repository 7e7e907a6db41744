# shellcheck shell=bash disable=SC2034,SC2154  # launch.sh sources it, and has what is not set here
# What launch.sh asks of Slurm: how its job stands, to put it back, to cancel the rest of its chain.
#
# What Slurm was asked is judged by what it did, never by a client's exit status: the request may end the client that
# made it, be answered too late, or be done already.

# A signal to the whole job, as before a preemption, ends a sleep too, which must not end this script.
pause() { sleep "$1" || true; }

# Slurm's clients wait seconds for its controller, a failover takes minutes.
await_controller() {
    until scontrol ping >/dev/null 2>&1; do
        log "Slurm's controller does not answer; trying again" >&2
        pause 5
    done
}

# ask_slurm: sets `standing`, what Slurm says of this attempt: runs, back (the job is in the queue again) or ended.
# Half an answer is none. Where none comes in minutes the job still runs, as this script does.
ask_slurm() {
    local tries said job
    standing=runs
    for ((tries = 0; tries < 30; tries++)); do
        said=$(scontrol --oneliner show job "$SLURM_JOB_ID" 2>&1) || true
        job=$(grep "^JobId=$SLURM_JOB_ID .* JobState=.* Restarts=" <<<"$said") || true
        if [[ -n $job ]]; then break; fi
        if [[ $said == *"Invalid job id"* ]]; then
            standing=ended
            return
        fi
        log "Slurm does not say how this job stands (${said:-no answer}); asking again"
        pause 5
        await_controller
    done
    if [[ $job =~ \ Restarts=([0-9]+) ]] && ((BASH_REMATCH[1] > ${SLURM_RESTART_COUNT:-0})); then
        standing=back
    elif [[ $job =~ \ JobState=(PENDING|REQUEUE|SPECIAL_EXIT|RESV_DEL_HOLD) ]]; then
        standing=back
    elif [[ -n $job && ! $job =~ \ JobState=(RUNNING|SUSPENDED|STOPPED|SIGNALING|CONFIGURING|RESIZING|STAGE_OUT) ]]; then
        standing=ended
    fi
}

# Where Slurm no longer runs this attempt, that its steps failed says nothing about nodes, data or recipe.
leave_if_over() {
    ask_slurm
    case $standing in
    back)
        log "Slurm has put this job back in the queue"
        exit 0
        ;;
    ended)
        log "Slurm has ended this job and does not put it back; submit the template again to go on"
        exit 1
        ;;
    esac
}

# The other jobs of a chain, which bear its name as their comment, have nothing left to do.
end_chain() {
    if [[ -z ${MOBILLAMA_CHAIN:-} ]]; then return; fi
    local tries waiting
    for tries in 1 2 3 4; do
        await_controller
        # Without the heading nothing was answered.
        if waiting=$(squeue --states=PENDING --user="$(id -un)" --format="%i %k" |
            awk -v chain="$MOBILLAMA_CHAIN" 'NR > 1 && $2 == chain {print $1} END {exit NR == 0}'); then
            if [[ -z $waiting ]]; then return; fi
            # shellcheck disable=SC2086  # one word a job
            ((tries == 4)) || scancel $waiting || true
        fi
    done
    log "jobs of $MOBILLAMA_CHAIN still wait and could not be cancelled; scancel them:" "${waiting//$'\n'/ }"
}

# The number of an array's last task is the array's too, and would name all of its tasks.
this_job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then this_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

requeue() {
    local tries said refusals=0
    log "putting the job back in the queue"
    # A refusal is given time too: Slurm has such answers for what it has not heard.
    for ((tries = 1; tries <= 30 && refusals < 3; tries++)); do
        said=$(scontrol requeue "$this_job" 2>&1) || true
        ask_slurm
        if [[ $standing == back ]]; then return; fi
        leave_if_over
        log "Slurm has not put this job back: ${said:-no answer}"
        if [[ $said == *disabled* || $said == *denied* ]]; then ((++refusals)); fi
        pause "$((tries < 10 ? tries : 10))"
    done
    give_up "Slurm does not put this job back (--no-requeue?): submit it again, or use slurm/chain.sh"
}
