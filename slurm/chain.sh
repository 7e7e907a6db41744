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
set +u    # a site's lines may read variables that nobody has set
# shellcheck source=slurm/site.sh
source "$(dirname "${BASH_SOURCE[0]}")/site.sh"
set -u
if ! command -v squeue >/dev/null; then
    echo "slurm/chain.sh: no squeue here; run it where Slurm's commands are" >&2
    exit 2
fi
chain=chain-$(date +%s)-$$
# The jobs of the chain that Slurm has; fails where it does not answer: then there is no heading either.
submitted() {
    squeue --states=all --user="$(id -un)" --format="%i %k" |
        awk -v chain="$chain" 'NR > 1 && $2 == chain {print $1} END {exit NR == 0}'
}
# What counts is whether the job is there: an answer may come too late, and the job after it.
is_there() {
    local there waited
    for ((waited = 0; ; waited += 5)); do
        until there=$(submitted); do
            echo "slurm/chain.sh: Slurm's controller does not answer; trying again" >&2
            sleep 5
        done
        if (($(wc -w <<<"$there") > i)); then return 0; fi
        if ((waited >= 30)) || [[ $answer == *error:* && ! $answer =~ timed\ out|contact|Zero\ Bytes ]]; then
            echo "slurm/chain.sh: $i of $count jobs of $chain are submitted, see above;" \
                "${there:+cancel them before you submit a chain again: scancel ${there//$'\n'/ }}" >&2
            return 1
        fi
        sleep 5
    done
}
for ((i = 0; i < count; i++)); do
    code=0
    answer=$(sbatch --dependency=singleton --no-requeue --comment="$chain" --export="ALL,MOBILLAMA_CHAIN=$chain" "$@" \
        2>&1) || code=$?
    if ((code == 0)) && [[ -n $answer ]]; then
        echo "$answer"
        continue
    fi
    echo "${answer:-sbatch ended with status $code and said nothing}" >&2
    if [[ $answer == SBATCH_* ]]; then exit 2; fi    # site.sh has asked nobody
    is_there || exit 1
done
