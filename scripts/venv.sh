# Sourced by demo.sh and test.sh: makes .venv with the extras given, and activates it. Needs Python 3.11 or newer.
make_venv() {
    local extras=$1 wanted python= missing= extra
    for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "Python 3.11 or newer is needed; set PYTHON to one" >&2
        return 1
    fi
    wanted=$(cat pyproject.toml constraints.txt; pwd)
    for extra in ${extras//,/ }; do
        [ "$(cat ".venv/installed-$extra" 2>/dev/null)" = "$wanted" ] || missing=yes
    done
    if [ "$missing" ]; then
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        .venv/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[$extras]"
        for extra in ${extras//,/ }; do printf '%s\n' "$wanted" >".venv/installed-$extra"; done
    fi
    export PATH="$PWD/.venv/bin:$PATH"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
}
