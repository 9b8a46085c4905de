# Sourced by quickstart.sh and test.sh: goes to the repository's root and puts its .venv, with requirements.txt
# installed, first on the PATH. Does nothing twice: a stamp in .venv says which requirements are in it.

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

stamp="$(sha256sum < requirements.txt)"
if [ "$(cat .venv/requirements.sha256 2> /dev/null)" != "$stamp" ]; then
    say "installing requirements.txt into .venv (a minute or more)"
    .venv/bin/python -m pip install --disable-pip-version-check -qq -r requirements.txt \
        || stop "pip could not install requirements.txt (see above); the same command tries again"
    echo "$stamp" > .venv/requirements.sha256
else
    say "requirements.txt is installed in .venv"
fi

export PATH="$PWD/.venv/bin:$PATH"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}"  # what DeepSpeed builds, once
unset VIRTUAL_ENV PYTHONHOME  # of another environment that may be active
gpus="$(python -c 'import torch; print(torch.cuda.device_count())')" \
    || stop "torch does not import; remove .venv to have it made anew"
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu  # DeepSpeed would find that out itself, with a warning
