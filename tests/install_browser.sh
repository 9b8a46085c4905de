#!/usr/bin/env bash
# Installs Chromium, in which tests open the page of a run, where that is possible: as root on Debian or Ubuntu. Does
# nothing where a Chromium is there already. Elsewhere it says why not, ends with 0, and those tests skip themselves.
set -euo pipefail

for program in chromium chromium-browser google-chrome google-chrome-stable; do
    ! command -v "$program" > /dev/null || exit 0
done
why=""
[ "$(id -u)" = 0 ] || why="not root"
command -v apt-get > /dev/null || why="no apt-get"
if [ -n "$why" ]; then
    echo "Chromium is not installed ($why): the tests in a browser are skipped"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
log="$(mktemp)"
install() { timeout 300 apt-get update -qq && timeout 600 apt-get install -y -qq --no-install-recommends "$@"; }
if ! install chromium > "$log" 2>&1; then
    tail -n 3 "$log"
    echo "Chromium cannot be installed here: the tests in a browser are skipped"
fi
rm -f "$log"
