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

"$python" icportrait/deploy/libpython.py

echo "setting up $venv with Python $version (a few minutes the first time)"
started=$(date +%s)
"$python" -m venv --clear "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"
# uv takes half the time or less; where it can't be had, pip does the same. It knows pip's settings by other names.
if $pip install --quiet --constraint constraints.txt uv; then
    install="$venv/bin/uv pip install --compile-bytecode --python $venv/bin/python"
    export UV_FIND_LINKS="${UV_FIND_LINKS-${PIP_FIND_LINKS-}}"
    if [ -n "${PIP_INDEX_URL-}" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX-$PIP_INDEX_URL}"; fi
    if [ -n "${PIP_EXTRA_INDEX_URL-}" ]; then export UV_INDEX="${UV_INDEX-$PIP_EXTRA_INDEX_URL}"; fi
else
    echo "uv can't be had: pip installs, which takes longer"
    install="$pip install"
fi
$install --constraint constraints.txt --editable '.[dev]' --editable client
# The wheel pins numpy<2 and a web framework of its own; only its server binary is used.
$install --constraint constraints.txt --no-deps nvidia-pytriton
# For perf_analyzer, the binary, of that server's release; the package beside it must not be the environment's own.
$install --no-deps --target "$venv/perf_analyzer" tritonclient==2.51.0
echo "set-up took $(($(date +%s) - started)) s"
