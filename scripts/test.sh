#!/usr/bin/env bash
# Everything that is checked: ruff, mypy --strict, pytest. On a fresh machine it makes .venv first.
# Arguments go to pytest: scripts/test.sh tests/test_plan.py -k drawing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh
make_venv test,hf,lightning,tensorboard
ruff check .
ruff format --check .
mypy
python -m pytest "$@"
