#!/bin/sh
# Make the virtual environment $1 with the project's pinned packages. Called by `make setup`.
set -eu
venv=$1
python=${BOOT_PYTHON:-}

fail() {
    echo "error: $*" >&2
    exit 1
}

[ -n "$python" ] || fail "no Python found; on Debian or Ubuntu: apt-get install python3 python3-venv libpython3.11"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
    3.11 | 3.12) ;;
    *) fail "$python is Python $version, expected 3.11 or 3.12; name another with make BOOT_PYTHON=/path/to/python" ;;
esac
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "Python $version lacks the venv module; on Debian or Ubuntu: apt-get install python$version-venv libpython$version"

"$python" icportrait/libpython.py

echo "setting up $venv with Python $version (a few minutes the first time)"
started=$(date +%s)
"$python" -m venv --clear "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"
$pip install --constraint constraints.txt --editable '.[dev]' --editable client
# The wheel pins numpy<2 and a web framework of its own; only its server binary is used.
$pip install --constraint constraints.txt --no-deps nvidia-pytriton
# For perf_analyzer, the binary, of that server's release; the package beside it must not be the environment's own.
$pip install --no-deps --target "$venv/perf_analyzer" tritonclient==2.51.0
echo "set-up took $(($(date +%s) - started)) s"
