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
for ((i = 0; i < count; i++)); do
    sbatch --dependency=singleton --no-requeue --comment="$chain" --export="ALL,MOBILLAMA_CHAIN=$chain" "$@"
done
