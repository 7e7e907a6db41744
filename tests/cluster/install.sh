#!/usr/bin/env bash
# Install Slurm from the distribution's packages for the cluster tests, without letting a service start by itself.
# Needs root and a Debian or Ubuntu with working package sources.
set -euo pipefail

policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    # invoke-rc.d asks this file before it starts a freshly installed service; 101 means "forbidden".
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi

export DEBIAN_FRONTEND=noninteractive
apt=(apt-get -qq -o DPkg::Lock::Timeout=300)
"${apt[@]}" update
"${apt[@]}" install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2 util-linux zsh >/dev/null
slurmctld -V
