#!/usr/bin/env bash
# Where a job may not requeue itself: submit it several times, one after the other.
#
#     slurm/chain.sh COUNT [option of sbatch ...] TEMPLATE [key=value ...]      e.g. chain.sh 5 slurm/pretrain_05b.sbatch
#
# `singleton` lets one job of a name run at a time. The job that finds the run complete, stopped or hopeless cancels
# those that still wait.
set -euo pipefail
if (($# < 2)); then
    sed -n '2,4s/^# *//p' "$0" >&2
    exit 2
fi
count=$1
shift
chain=chain-$(date +%s)-$$
for ((i = 0; i < count; i++)); do
    sbatch --dependency=singleton --no-requeue --export="ALL,MOBILLAMA_CHAIN=$chain" "$@"
done
