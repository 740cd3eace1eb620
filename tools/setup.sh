#!/usr/bin/env bash
# Usage: tools/setup.sh PYTHON VENV   Makes the virtual environment and installs the project in it.
set -euo pipefail
python=$1 venv=$2
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
    echo "setup: $python is $("$python" -V 2>&1), but Python 3.11 to 3.13 is needed; run: make PYTHON=python3.11 ..." >&2
    exit 3
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }
pip "torch==2.13.0"
pip -e ".[cpu,dev]"
# TensorRT-RTX is optional: its wheel exists for x86-64 Linux and Windows only.
if ! pip -e ".[rtx]"; then
    echo "setup: the TensorRT-RTX wheel does not install here; its backend stays unavailable" >&2
fi
# The torch-free runtime must import on Python 3.10 too; its test runs where one is at hand
# (PYENV_VERSION picks it on machines with pyenv, and means nothing elsewhere).
old=.venv310
make_old() {
    PYENV_VERSION=3.10 python3.10 -m venv "$old" &&
        "$old/bin/python" -m pip --disable-pip-version-check install --quiet numpy msgspec
}
if [ ! -x "$old/bin/python" ] && ! make_old >/dev/null 2>&1; then
    rm -rf "$old" # a half-made one would fail the test that should be skipped
    echo "setup: no usable Python 3.10 here; the runtime's import test on it is skipped" >&2
fi
