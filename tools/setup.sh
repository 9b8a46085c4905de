# Sourced by quickstart.sh and test.sh: goes to the repository's root and puts its .venv, with requirements.txt and the
# package itself installed, first on the PATH. Does nothing twice: stamps in .venv say what is in it.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

say() { printf '\033[1m== %s\033[0m\n' "$*"; }
stop() { printf 'error: %s\n' "$*" >&2; exit 1; }

new_enough() { [ -n "$1" ] && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; }

if ! { [ -x .venv/bin/python ] && .venv/bin/python -m pip --version > /dev/null 2>&1; }; then
    candidates=(python3 python3.13 python3.12 python3.11)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for python in "${candidates[@]}" ""; do new_enough "$python" && break; done  # "" at the end: none
    [ -n "$python" ] || stop "no Python 3.11 or newer among ${candidates[*]}; install one, or name it: PYTHON=PATH $0"
    say "making .venv with $("$python" --version)"
    "$python" -m venv .venv || stop "cannot make .venv (on Debian and Ubuntu: apt-get install python3-venv)"
fi
new_enough .venv/bin/python || stop ".venv has $(.venv/bin/python --version); remove .venv to have it made anew"

# installed WHAT FILE...: whether the environment has what these files say, as last stamped
installed() { [ "$(cat ".venv/$1.sha256" 2> /dev/null)" = "$(cat "${@:2}" | sha256sum)" ]; }
stamp() { cat "${@:2}" | sha256sum > ".venv/$1.sha256"; }
# Of pip's many lines: what it downloads, counted, and whatever goes wrong.
how_far() {
    local line rest commas count=0
    while IFS= read -r line || [ -n "$line" ]; do  # each line at once; an awk may wait for kilobytes
        read -r _ rest <<< "$line"
        case $line in
            "Collecting "*) count=$((count + 1)); echo "  $count: ${rest%% *}" ;;
            *" Downloading "*" MB)"*) echo "     downloading $rest" ;;
            "Installing collected packages"*)
                commas=${line//[^,]/}
                echo "  unpacking $((${#commas} + 1)) packages, which may take minutes" ;;
            ERROR* | error* | "  error"* | WARNING* | *"No space left"* | *[Tt]"imed out"*) echo "$line" ;;
        esac
    done
}
into_venv() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

if installed requirements requirements.txt; then
    say "requirements.txt is installed in .venv"
else
    say "installing requirements.txt into .venv: about 135 packages, some minutes"
    (set -o pipefail; into_venv install --progress-bar off -r requirements.txt 2>&1 | how_far) \
        || stop "pip could not install requirements.txt (see above); the same command tries again"
    stamp requirements requirements.txt
fi
# Editable: the command rcmae, and `import rcmae` from any folder, are this checkout's. Nothing else is installed or
# built: requirements.txt brought the dependencies, and setuptools with torch.
if ! installed package requirements.txt pyproject.toml setup.py; then
    say "installing rcmae itself into .venv (editable)"
    into_venv install -qq --no-deps --no-build-isolation -e . \
        || stop "pip could not install this package (see above); the same command tries again"
    stamp package requirements.txt pyproject.toml setup.py
fi

export PATH="$PWD/.venv/bin:$PATH"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}"  # what DeepSpeed builds, once
unset VIRTUAL_ENV PYTHONHOME  # of another environment that may be active
gpus="$(python -c 'import torch; print(torch.cuda.device_count())')" \
    || stop "torch does not import; remove .venv to have it made anew"
python - << 'EOF' || true
from rcmae.process import extensions

if extensions.guard_torchvision():
    print("note: torchvision does not fit this torch. rcmae works; `import timm` alone fails here.")
    print(f"      To mend it: {extensions.remedy()}")
EOF
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu  # DeepSpeed would find that out itself, with a warning
