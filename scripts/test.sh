#!/usr/bin/env bash
# Everything that is checked: ruff, mypy --strict, pytest. On a fresh machine it makes .venv first.
# Arguments go to pytest: scripts/test.sh tests/test_plan.py -k drawing. Two files run at a time, since starting processes
# and waiting for them leaves cores idle; -n 0 runs one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh
make_venv test,train,hf,lightning,tensorboard
ruff check .
ruff format --check .
mypy
python -m pytest -n 2 --dist loadfile "$@"
