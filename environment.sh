# Create or repair the virtual environment of the Makefile, and install an extra of this package in it.
#
#     PYTHON=python3 sh environment.sh .venv demo [asked]
#
# With the third argument, the environment must be one of $PYTHON. Otherwise a working environment of any Python is kept.
set -eu
venv=$1 extra=$2 asked=${3-}
python=$venv/bin/python

fail() {
    echo "$*" >&2
    exit 1
}

# Fail unless a command runs a Python that this package supports.
check_version() {  # name, command, advice
    version=$($2 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || fail "$1 cannot be run: $3"
    $2 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$1 is Python $version, expected 3.10 or newer: $3"
}

check_ensurepip() {  # name, command
    $2 -c 'import ensurepip' 2>/dev/null ||
        fail "$1 has no ensurepip: install it, on Debian and Ubuntu by apt install python$version-venv"
}

installation() {  # command
    $1 -c 'import sys; print("%s in %s" % (sys.version.split()[0], sys.base_prefix))'
}

another="name another, as in: make PYTHON=python3.12"
if [ "$asked" ]; then
    check_version "PYTHON=$PYTHON" "$PYTHON" "$another"
fi
if $python -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; then
    check_version "$python" "$python" "make clean removes $venv"
    if [ "$asked" ] && [ "$(installation $python)" != "$(installation "$PYTHON")" ]; then
        fail "$venv has Python $(installation $python), but PYTHON=$PYTHON is $(installation "$PYTHON"): make clean removes $venv"
    fi
    if ! $python -c 'import pip' 2>/dev/null; then
        check_ensurepip "$python" "$python"
        echo "$venv has no pip: installing it"
        # what was installed may be of another Python
        rm -f "$venv"/demo "$venv"/docs "$venv"/test "$venv"/release "$venv"/dev
        $python -m ensurepip >/dev/null
    fi
else
    check_version "$PYTHON" "$PYTHON" "$another"
    check_ensurepip "$PYTHON" "$PYTHON"
    if [ -e "$venv" ]; then
        echo "$venv has no working Python: creating it again"
    fi
    $PYTHON -m venv --clear "$venv"
fi
# The file named after an extra marks it as installed.
if [ ! -e "$venv/$extra" ] || [ pyproject.toml -nt "$venv/$extra" ]; then
    $python -m pip install --quiet --disable-pip-version-check --editable ".[$extra]"
    touch "$venv/$extra"
fi
