#!/usr/bin/env bash
# Installs what some tests want, where that is possible (as root on Debian or Ubuntu): Chromium, in which the page of a
# run is opened, and jpegtran, which adds restart markers to JPEGs. Does nothing where they are there already. Elsewhere
# it says why not, ends with 0, and those tests skip themselves.
set -euo pipefail

have() {
    local program
    for program in "$@"; do
        ! command -v "$program" > /dev/null || return 0
    done
    return 1
}

packages=()
have chromium chromium-browser google-chrome google-chrome-stable || packages+=(chromium)
have jpegtran || packages+=(libjpeg-turbo-progs)
[ "${#packages[@]}" -gt 0 ] || exit 0
why=""
[ "$(id -u)" = 0 ] || why="not root"
command -v apt-get > /dev/null || why="no apt-get"
if [ -n "$why" ]; then
    echo "not installed ($why), their tests are skipped: ${packages[*]}"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
log="$(mktemp)"
install() { timeout 600 apt-get install -y -qq --no-install-recommends "$@"; }
timeout 300 apt-get update -qq > "$log" 2>&1 || true
for package in "${packages[@]}"; do
    if ! install "$package" > "$log" 2>&1; then
        tail -n 3 "$log"
        echo "$package cannot be installed here: its tests are skipped"
    fi
done
rm -f "$log"
