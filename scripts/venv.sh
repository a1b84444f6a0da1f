# Sourced by demo.sh and test.sh. make_venv EXTRAS puts an environment with these extras first in PATH. Variables:
#   PYTHON  the interpreter (the first of 3.10 or newer in PATH)
#   VENV    where the environment is (.venv), or "none": nothing is installed, and PYTHON is used as it is
#   TORCH   the release of torch to install (that of constraints.txt)
# Where PYTHON has a torch that can be used, as in a vendor's image, it is used and not replaced, unless TORCH is set.

usable_python() { # the first one that is new enough
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.{14,13,12,11,10}; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
        if [ -n "${PYTHON:-}" ]; then break; fi # it is that one or none
    done
    echo "Python 3.10 or newer is needed${PYTHON:+, and PYTHON=$PYTHON is not}; set PYTHON to one" >&2
    return 1
}

torch_of() { # the version of the torch that an interpreter has, if sharded_radam can use it
    "$1" -c '
import importlib.metadata
version = importlib.metadata.version("torch")
if tuple(map(int, version.split(".")[:2])) >= (2, 6):
    import torch
    print(version)' 2>/dev/null || true
}

make_venv() {
    local extras=$1 venv=${VENV:-.venv} python torch wanted extra missing= constraints
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    if [ "$venv" != none ]; then venv=$(realpath -m "$venv"); fi
    PATH=${PATH//"$venv/bin:"/} # not the environment that is being made
    python=$(usable_python) || return 1
    if [ -n "${TORCH:-}" ] && ! [[ "$TORCH" =~ ^(2\.([6-9]|[1-9][0-9])(\..*)?)$ ]]; then
        echo "TORCH=$TORCH: expected a release of 2.6 or newer, such as 2.11.0" >&2
        return 1
    fi
    torch=$(torch_of "$python")
    if [ "$venv" = none ]; then
        if [ -z "$torch" ]; then
            echo "VENV=none: $python has no torch of 2.6 or newer" >&2
            return 1
        fi
        mkdir -p .none # some systems have python3 only; a link would leave the environment that PYTHON may be of
        printf '#!/bin/sh\nexec "%s" "$@"\n' "$python" >.none/python
        chmod +x .none/python
        export PATH="$PWD/.none:$PATH" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
        return
    fi
    if [ -n "${TORCH:-}" ]; then torch=; fi
    wanted=$("$python" -c 'import sys; print(sys.version, sys.prefix)'; echo "$torch ${TORCH:-}"; pwd)
    if [ "$(cat "$venv/made-of" 2>/dev/null)" != "$wanted" ]; then
        "$python" -m venv --clear ${torch:+--system-site-packages} "$venv"
        if [ -n "$torch" ] && [ "$(torch_of "$venv/bin/python")" != "$torch" ]; then
            # PYTHON is of an environment itself, so its packages are not the system's.
            "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
                >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"
        fi
        printf '%s\n' "$wanted" >"$venv/made-of"
    fi
    wanted=$(cat pyproject.toml constraints.txt)
    for extra in ${extras//,/ }; do
        [ "$(cat "$venv/installed-$extra" 2>/dev/null)" = "$wanted" ] || missing=yes
    done
    if [ "$missing" ]; then
        constraints="$venv/constraints.txt"
        if [ -n "$torch${TORCH:-}" ]; then # a torch of another release also has other requirements
            { grep -vE '^(torch|setuptools)==' constraints.txt; echo "torch==${TORCH:-$torch}"; } >"$constraints"
        else
            cp constraints.txt "$constraints"
        fi
        "$venv/bin/python" -m pip install --quiet --constraint "$constraints" --editable ".[$extras]"
        for extra in ${extras//,/ }; do printf '%s\n' "$wanted" >"$venv/installed-$extra"; done
    fi
    export PATH="$venv/bin:$PATH"
}
