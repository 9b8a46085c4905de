#!/usr/bin/env bash
# Installs what the cluster tests need (SLURM, munge, iproute2) where that is possible: as root on Debian or Ubuntu.
# Does nothing where it is there already. Elsewhere it says why not, ends with 0, and the tests that want a scheduler
# skip themselves.
set -euo pipefail

for program in slurmctld slurmd sbatch munged ip unshare; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "$program" > /dev/null || missing="${missing:-}$program "
done
[ -n "${missing:-}" ] || exit 0
why=""
[ "$(id -u)" = 0 ] || why="not root"
command -v apt-get > /dev/null || why="no apt-get"
if [ -n "$why" ]; then
    echo "SLURM is not installed ($why): the tests of slurm/ are skipped"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
log="$(mktemp)"
packages=(slurm-wlm munge iproute2 shellcheck)
install() { timeout 300 apt-get update -qq && timeout 600 apt-get install -y -qq --no-install-recommends "$@"; }
if ! install "${packages[@]}" > "$log" 2>&1; then
    tail -n 3 "$log"
    echo "SLURM cannot be installed here: the tests of slurm/ are skipped"
fi
rm -f "$log"
