#!/usr/bin/env bash
# Where a job may not requeue itself: submit it several times, one after the other.
#
#     slurm/chain.sh COUNT [option of sbatch ...] TEMPLATE [key=value ...]      e.g. chain.sh 5 slurm/pretrain_05b.sbatch
#
# `singleton` lets one job of a name run at a time: a second run of the same template needs a --job-name of its own, or
# it waits for the first. The job that finds the run complete, stopped or hopeless cancels those of its chain that wait.
set -euo pipefail
if (($# < 2)) || [[ ! $1 =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,4s/^# *//p' "$0" >&2
    exit 2
fi
count=$1
shift
chain=chain-$(date +%s)-$$
submitted() {
    squeue --noheader --states=all --user="$(id -un)" --format="%i %k" |
        awk -v chain="$chain" '$2 == chain {print $1}'
}
for ((i = 0; i < count; i++)); do
    if ! sbatch --dependency=singleton --no-requeue --comment="$chain" --export="ALL,MOBILLAMA_CHAIN=$chain" \
        ${SITE_TIME_LIMIT:+--time="$SITE_TIME_LIMIT"} "$@"; then
        # An answer that came too late: what counts is whether the job is there.
        until there=$(submitted); do
            echo "slurm/chain.sh: Slurm's controller does not answer; trying again" >&2
            sleep 5
        done
        if (($(wc -w <<<"$there") <= i)); then
            echo "slurm/chain.sh: $i of $count jobs of $chain are submitted, see above;" \
                "${there:+cancel them before you submit a chain again: scancel ${there//$'\n'/ }}" >&2
            exit 1
        fi
    fi
done
