#!/usr/bin/env bash
# The demo with a small model, and the quick part of the tests, each with a Python and a torch of its own:
#   scripts/test_versions.sh                       the pairs of scripts/README.md
#   scripts/test_versions.sh 3.12:2.11.0 ...       these; Python is a version, the start of one, or a path
# Each pair gets a fresh environment, 3 to 5 GB for most, which is removed afterwards. What came out is added to
# scripts/results/versions.json, and the table of it is printed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
pairs=("$@")
if [ ${#pairs[@]} = 0 ]; then
    pairs=(3.11.2:2.13.0 3.10:2.6.0 3.12:2.8.0 3.12:2.11.0 3.13:2.14.1 3.13:2.15.0)
fi

interpreter() { # of a version, or of a path or name
    local candidate version
    for candidate in "$1" "python$1" python3 /usr/bin/python3 ~/.pyenv/versions/"$1"*/bin/python3; do
        version=$("$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null) || continue
        if [ "$candidate" = "$1" ] || [[ "$version." = "$1".* ]]; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0
for pair in "${pairs[@]}"; do
    if [[ ! "$pair" =~ ^.+:[0-9]+\.[0-9.]+$ ]]; then
        echo "$pair: expected PYTHON:TORCH, such as 3.12:2.11.0" >&2
        exit 2
    fi
done
for pair in "${pairs[@]}"; do
    if ! PYTHON=$(interpreter "${pair%:*}"); then
        echo "$pair: there is no Python ${pair%:*} here" >&2
        status=1
        continue
    fi
    export PYTHON TORCH=${pair##*:} VENV="$work/venv" DEMO_OUTPUT="$work/demo"
    export DEMO_FLAGS="--layers 1 --heads 2 --width 32 --context 32 --data-bytes 300000"
    echo "== $("$PYTHON" --version), torch $TORCH"
    rm -rf "$VENV"
    scripts/demo.sh >"$work/demo.log" 2>&1
    demo=$?
    [ $demo = 0 ] || tail -n 40 "$work/demo.log"
    scripts/test.sh --quick -p no:cacheprovider >"$work/test.log" 2>&1
    [ $? = 0 ] || { status=1; grep -E '^(E  |FAILED|ERROR)' "$work/test.log" | tail -n 40; }
    tail -n 1 "$work/test.log"
    "$VENV/bin/python" scripts/versions_table.py add "$demo" "$(tail -n 1 "$work/test.log")" || status=1
    [ $demo = 0 ] || status=1
done
rm -rf "$work/venv"
[ -f scripts/results/versions.json ] && python3 scripts/versions_table.py
exit $status
