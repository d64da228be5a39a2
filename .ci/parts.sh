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
# What an isolated build is made of: pip before 25.3 reads the first, newer ones the second. Not exported: the tests and `lowest`
# install other versions.
pinned=(env PIP_CONSTRAINT="$PWD/.ci/constraints.txt" PIP_BUILD_CONSTRAINT="$PWD/.ci/constraints.txt")

checks() {
  part "source distribution" 30 bash -c "pip install -q -c .ci/constraints.txt 'setuptools>=77' 'pybind11>=2.13' &&
    python -c 'import setuptools.build_meta as b; b.build_sdist(\"$scratch/sdist\")' > $scratch/sdist.log"
  # the wheel is built from it: what a checkout has and the sdist lacks is missing here as it is for users
  part "wheel" 120 "${pinned[@]}" pip wheel -q --no-deps -w "$scratch/wheel" "$scratch"/sdist/*.tar.gz
  part "install" 120 pip install -q -c .ci/constraints.txt "$(echo "$scratch"/wheel/*.whl)[test,dev,trl]"
  part "the installed wheel" 60 pytest -q tests/kernels/test_backend.py tests/kernels/test_segment_scan.py \
    tests/ipvrm/test_steps.py tests/ipvrm/test_objectives.py
  (cd / && python -c 'import ipvrm_kernels; print(ipvrm_kernels.__file__); print(ipvrm_kernels.backends())')
  part "ruff" 30 bash -c 'ruff check . && ruff format --check .'
  part "clang-format" 10 bash -c 'clang-format --dry-run --Werror csrc/*'
  part "mypy" 90 mypy
  part "editable install" 90 "${pinned[@]}" pip install -q -e '.[test]'
  part "the regression gate" 60 python -m benchmarks.gate
}

sanitized() { # sanitized SECONDS ARGUMENTS...: pytest under AddressSanitizer and UndefinedBehaviorSanitizer
  local budget=$1
  shift
  part "native tests under sanitizers" "$budget" \
    python -m benchmarks.faults.sanitized "$scratch/sanitized" -m pytest -q -p no:cacheprovider "$@"
}

faults() { # faults SECONDS ARGUMENTS...: kills, disks, hostile files and the rest, the same ones every time
  local budget=$1
  shift
  part "faults" "$budget" python -m benchmarks.faults --seed 16 "$@"
}

lowest() { # lowest SECONDS: the tests that are not slow with the oldest pure-Python dependencies
  python3 -m venv "$scratch/lowest"
  part "lowest versions" "$1" bash -c "'$scratch/lowest/bin/pip' install -q -c .ci/lowest.txt '$(echo "$scratch"/wheel/*.whl)[test]' &&
    '$scratch/lowest/bin/python' -m pytest -q -n 2 --dist loadfile -m 'not slow' -p no:cacheprovider tests/ipvrm"
}
