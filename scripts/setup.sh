#!/usr/bin/env bash
# Make .venv in the repository root and install requirements.txt into it. If that was done before, only check whether
# requirements.txt or pyproject.toml, which states the dependencies, has changed since.
#
#   bash scripts/setup.sh                     with the first Python of 3.11-3.13 found
#   PYTHON=python3.12 bash scripts/setup.sh   with this one (if there is no .venv yet)

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "setup.sh: error: $1" >&2
    exit 1
}

# A name on PATH may be a shim with no Python behind it, and a Python may lack its venv package, so run it.
is_supported() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11; do
        if is_supported "$name"; then
            command -v "$name"
            return
        fi
    done
    return 1
}

# Two set-ups at once would write to the same folder. The lock is this script's own file, so none is left behind.
if command -v flock >/dev/null; then
    exec 9<scripts/setup.sh
    flock -n 9 || { echo "Waiting for another set-up of this folder ..."; flock 9; }
fi

# --- .venv
if [ ! -e .venv ]; then
    if [ -n "${PYTHON:-}" ]; then
        is_supported "$PYTHON" || fail "PYTHON is '$PYTHON'; Python 3.11, 3.12 or 3.13 with its venv module is needed"
    else
        PYTHON=$(find_python) || fail "no Python 3.11-3.13 with its venv module found on PATH; install one (on Debian \
and Ubuntu: apt install python3 python3-venv), or give one: PYTHON=/path/to/python3.12 bash scripts/setup.sh"
    fi
    echo "Making .venv with $("$PYTHON" --version) ($PYTHON)"
    "$PYTHON" -m venv .venv
fi
is_supported .venv/bin/python || fail ".venv has no working Python 3.11-3.13; move .venv away and run this again"

# --- Requirements. The copy is written last, so that an interrupted installation is repeated.
wanted=$(cat requirements.txt pyproject.toml)
if [ "$wanted" != "$(cat .venv/installed-requirements.txt 2>/dev/null)" ]; then
    echo "Installing requirements.txt (PyTorch among them: a few GB, some minutes)"
    # pip is missing if another tool made .venv, or if making it was interrupted.
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null
    .venv/bin/python -m pip install --progress-bar off --disable-pip-version-check -r requirements.txt |
        while read -r what name _; do
            case $what in
                Collecting) echo "  $name" ;;
                Installing) echo "  unpacking ..." ;;
            esac
        done
    printf '%s\n' "$wanted" >.venv/installed-requirements.txt
    echo "Installed. To use it in this shell: source .venv/bin/activate"
fi
