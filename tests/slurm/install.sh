#!/usr/bin/env bash
# Installs what the cluster tests need (SLURM, munge, iproute2) where that is possible (tests/apt.sh) and it is not
# there already; elsewhere the tests that want a scheduler skip themselves.
set -euo pipefail
# shellcheck source=tests/apt.sh
source "$(dirname "${BASH_SOURCE[0]}")/../apt.sh"

for program in slurmctld slurmd sbatch munged ip unshare; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "$program" > /dev/null || missing="${missing:-}$program "
done
[ -z "${missing:-}" ] || install_by_apt SLURM "the tests of slurm/" slurm-wlm munge iproute2 shellcheck
