# Sourced by demo.sh and test.sh. make_venv EXTRAS makes an environment with these extras if there is none, and puts it
# first in PATH. Variables:
#   PYTHON  the interpreter (python3 if it is 3.10 or newer, otherwise the newest in PATH)
#   VENV    the folder of the environment (.venv), or "none": nothing is installed, and PYTHON is used as it is
#   TORCH   the release of torch to install (that of constraints.txt)
# Where PYTHON has torch 2.6 or newer, as in a vendor's image, it is used and not replaced, unless TORCH is set.

usable_python() { # the first one that is new enough
    local candidate found candidates=(python3 python3.{14,13,12,11,10})
    if [[ "${PYTHON:-}" == */* ]] && [[ "$PYTHON" != /* ]]; then PYTHON=${OLDPWD:-$PWD}/$PYTHON; fi # as it was given, before cd
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if ! found=$("$candidate" -c 'import platform; print(platform.python_version())' 2>&1); then
            if [ -n "${PYTHON:-}" ]; then echo "PYTHON=$PYTHON cannot be started: $found" >&2; fi
        elif "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            command -v "$candidate"
            return
        elif [ -n "${PYTHON:-}" ]; then
            echo "PYTHON=$PYTHON is Python $found" >&2
        fi
    done
    echo "Python 3.10 or newer is needed; set PYTHON to one" >&2
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

shopt -s extglob

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
            echo "VENV=none: $python has no torch of 2.6 or newer; set PYTHON to one that has, or leave VENV out" >&2
            return 1
        fi
        if [ -n "${TORCH:-}" ]; then
            echo "VENV=none installs nothing, so TORCH=$TORCH cannot be chosen: leave one of them out" >&2
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
        if [ -n "$(ls -A "$venv" 2>/dev/null)" ] && ! compgen -G "$venv/@(made-of|installed-*)" >/dev/null; then
            echo "$venv is there, and was not made by this script, which would empty it. Set VENV to another folder, or" \
                "use it as it is: VENV=none PYTHON=$venv/bin/python" >&2
            return 1
        fi
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
