#!/usr/bin/env bash
# Installs what some tests want, where that is possible (tests/apt.sh) and it is not there already: Chromium, in which
# the page of a run is opened, and jpegtran, which adds restart markers to JPEGs.
set -euo pipefail
# shellcheck source=tests/apt.sh
source "$(dirname "${BASH_SOURCE[0]}")/apt.sh"

has_one_of() {
    local program
    for program in "$@"; do
        ! command -v "$program" > /dev/null || return 0
    done
    return 1
}

has_one_of chromium chromium-browser google-chrome google-chrome-stable ||
    install_by_apt Chromium "the tests in a browser" chromium
has_one_of jpegtran || install_by_apt jpegtran "its tests" libjpeg-turbo-progs
