# shellcheck shell=bash
# Sourced. install_by_apt WHAT SKIPPED PACKAGE ...: installs packages where that is possible, as root on Debian or
# Ubuntu. Elsewhere it says why not, and which tests skip themselves; it never fails.
install_by_apt() {
    local what=$1 skipped=$2 why="" log
    shift 2
    [ "$(id -u)" = 0 ] || why="not root"
    command -v apt-get > /dev/null || why="no apt-get"
    if [ -n "$why" ]; then
        echo "$what is not installed ($why): $skipped are skipped"
        return
    fi
    log="$(mktemp)"
    if ! {
        timeout 300 env DEBIAN_FRONTEND=noninteractive apt-get update -qq &&
            timeout 600 env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
    } > "$log" 2>&1; then
        tail -n 3 "$log"
        echo "$what cannot be installed here: $skipped are skipped"
    fi
    rm -f "$log"
}
