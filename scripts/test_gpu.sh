#!/usr/bin/env bash
# Shows on a machine with one GPU that the optimizer works there, and measures its step: in less than ten minutes, with
# what is installed (torch 2.11 or newer, pytest), without a network.
#   scripts/test_gpu.sh                  on the GPU; without one it says so, runs nothing, and exits with status 2
#   scripts/test_gpu.sh --device cpu     what of it a CPU can; says what was skipped
#   --output FILE                        for the figures: scripts/results/gpu_NAME.json, or runs/gpu_cpu.json
#   --bench "--shapes gpt2"              arguments of scripts/bench_gpu.py, which measures
# Other arguments go to pytest, which runs tests/gpu. PYTHON is the interpreter. The exit status is 1 if a test fails, or
# a row of ours cannot be measured.
set -uo pipefail
here=$PWD command="scripts/test_gpu.sh $*"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE
device=cuda output='' bench=() others=()
while [ $# -gt 0 ]; do
    if [[ "$1" =~ ^--(device|output|bench)$ ]] && [ $# -lt 2 ]; then
        echo "$1: expected a value after it" >&2
        exit 2
    fi
    case $1 in
    --device) device=$2; shift ;;
    --output) output=$2; shift ;;
    --bench) read -ra bench <<<"$2"; shift ;;
    *) others+=("$1") ;;
    esac
    shift
done
if [[ "$output" ]] && [[ "$output" != /* ]]; then output=$here/$output; fi

source scripts/venv.sh
python=$(usable_python) || exit 2
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TEST_DEVICE=$device
name=$("$python" - "$device" <<'END'
import importlib.util
import re
import sys

hint = "Set PYTHON to one that has it, such as PYTHON=.venv/bin/python after scripts/test.sh has made that"
for package in ("torch", "pytest"):
    if importlib.util.find_spec(package) is None:
        sys.exit(f"{sys.executable} has no {package}. {hint}")
import torch

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    sys.exit(f"{sys.executable} has torch {torch.__version__}, and 2.11 or newer is needed. {hint}")
if sys.argv[1] not in ("cpu", "cuda"):
    sys.exit(f"--device {sys.argv[1]}: expected cuda or cpu")
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit(
        f"torch {torch.__version__} finds no GPU here. So nothing was run, and nothing is shown: no engine on CUDA, no\n"
        "CUDA graph, no NCCL, no stream, no sanitizer, no benchmark. Run it on a machine with a GPU and torch for CUDA.\n"
        "scripts/test_gpu.sh --device cpu runs what of it a CPU can, and says what it skips."
    )
device = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "cpu"
print(re.sub(r"\W+", "_", device.lower()))
END
) || exit 2
if [ "$device" = cuda ]; then folder=scripts/results; else folder=runs; fi
output=${output:-$folder/gpu_$name.json}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p runs

status=0
echo "== tests/gpu on: $name"
# The time is a limit for what hangs; the tests take about five minutes.
timeout --kill-after=10 1200 "$python" -m pytest tests/gpu -p no:cacheprovider -q -rfE -o addopts=--strict-markers \
    --durations=5 --junit-xml="$work/tests.xml" "${others[@]}" 2>&1 | tee "runs/gpu_$name.log"
[ "${PIPESTATUS[0]}" = 0 ] || status=1
echo "== one step on: $name"
"$python" scripts/bench_gpu.py --device "$device" --json "$output" --tests "$work/tests.xml" --command "$command" \
    "${bench[@]}" || status=1
echo
echo "figures: $output; output of the tests: runs/gpu_$name.log; $SECONDS s"
[ $status = 0 ] || echo "FAILED: see above" >&2
exit $status
