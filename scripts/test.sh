#!/usr/bin/env bash
# Everything that is checked: ruff, mypy --strict, pytest. On a fresh machine it makes .venv first; scripts/venv.sh says
# which variables choose another Python, torch or environment. Arguments go to pytest:
#   scripts/test.sh tests/test_plan.py -k drawing
#   scripts/test.sh --quick       without ruff and mypy, the tests that are marked quick, at 1, 2 and 3 ranks
# Two files run at once (-n 0: one), since starting processes and waiting for them leaves cores idle.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE # as containers set it: each of hundreds of processes would compile the package, for a second
source scripts/venv.sh
if [[ " $* " == *" --quick "* ]]; then
    make_venv test,train
else
    make_venv test,train,hf,lightning,tensorboard
    if python -m ruff --version >/dev/null 2>&1; then
        python -m ruff check .
        python -m ruff format --check .
    else
        echo "ruff: not run, since it is not installed"
    fi
    if ! python -m mypy --version >/dev/null 2>&1; then
        echo "mypy: not run, since it is not installed"
    elif [ "$(python -c 'import torch; print(torch.__version__.partition("+")[0])')" = "$(sed -n 's/^torch==//p' constraints.txt)" ]; then
        python -m mypy
    else
        echo "mypy: not run, since each release of torch has other types"
    fi
fi
parallel=
if python -c 'import xdist' 2>/dev/null; then parallel="-n 2 --dist loadfile --no-loadscope-reorder"; fi
python -m pytest $parallel "$@"
