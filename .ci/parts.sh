# Sourced by run and full, from anywhere: a fresh environment, and `checks`, all that comes before the suite.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

part() { # part NAME SECONDS COMMAND...: run it, say how long it took; a machine three times too slow fails
  local name=$1 budget=$2 start=$SECONDS
  shift 2
  echo "== $name (budget ${budget} s)"
  timeout "$((budget * 3))" "$@"
  local took=$((SECONDS - start))
  echo "== $name: ${took} s$([ "$took" -le "$budget" ] || echo ', OVER its budget')"
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
# shellcheck disable=SC1091
. "$scratch/venv/bin/activate"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PIP_DISABLE_PIP_VERSION_CHECK=1

checks() {
  part "install and build" 180 pip install -q -c .ci/constraints.txt '.[test,dev]'
  part "the installed wheel" 60 pytest -q tests/kernels/test_backend.py tests/kernels/test_segment_scan.py \
    tests/ipvrm/test_steps.py tests/ipvrm/test_objectives.py
  (cd / && python -c 'import ipvrm_kernels; print(ipvrm_kernels.__file__); print(ipvrm_kernels.backends())')
  part "ruff" 30 bash -c 'ruff check . && ruff format --check .'
  part "clang-format" 10 bash -c 'clang-format --dry-run --Werror csrc/*'
  part "mypy" 90 mypy
  part "editable install" 90 pip install -q -c .ci/constraints.txt -e '.[test]'
  part "the regression gate" 60 python -m benchmarks.gate
}
