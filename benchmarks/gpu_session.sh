#!/usr/bin/env bash
# Builds recap_fast on a machine with an NVIDIA GPU, tests it there and measures it: one command,
# no network, under ten minutes. Nothing in the checkout changes: it works on a copy.
#
#   benchmarks/gpu_session.sh [--out DIR] [--python PYTHON] [--wheels DIR] [--seconds N]
#
# Needs torch with CUDA, nvcc, cmake, ninja, pybind11, setuptools and pytest. Tests that need another
# package are left out where it is missing, and the summary says so. --wheels is a folder of wheels of
# the missing ones, and of no others, since they go before what is installed:
#
#   schedules on the device: pydantic pydantic-core annotated-types typing-inspection PyYAML
#   random cases: hypothesis sortedcontainers
#   combined optimizers: torchrec fbgemm-gpu tensordict torchmetrics pyre-extensions tqdm and what
#   those need
#
# Writes to --out (default: $OUT, or build/gpu_session): the log of each part, <card>.json and
# <card>.md with the figures, summary.txt. A part that fails or exceeds its time does not stop the
# next. Exit status: 0; 1 if a part failed; 2 if there is no CUDA device.
set -u

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${OUT:-$root/build/gpu_session}
python=${PYTHON:-python3}
wheels=
seconds=570

usage() { sed -n '2,/^set -u/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

while (($#)); do
    case $1 in
        --out) out=${2:?--out needs a folder} ;;
        --python) python=${2:?--python needs a command} ;;
        --wheels) wheels=$(cd "${2:?--wheels needs a folder}" && pwd) || exit 1 ;;
        --seconds) seconds=${2:?--seconds needs a number} ;;
        -h | --help) usage; exit 0 ;;
        *) echo "unknown argument $1" >&2; usage >&2; exit 1 ;;
    esac
    shift 2
done
deadline=$((SECONDS + seconds))

# --- is there a device? ---------------------------------------------------------------------------

capability=$("$python" -c '
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"{sys.executable}: {error}")
if not torch.cuda.is_available():
    sys.exit("this machine has no CUDA device, or its torch was built without CUDA")
print("{}.{}".format(*torch.cuda.get_device_capability()))
') || { echo "nothing built, tested or measured: see above" >&2; exit 2; }

mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

# Where the packages of this Python put their commands, and where CUDA's usual place is.
scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
export PATH="$scripts:$PATH:/usr/local/cuda/bin"
export PYTHONUNBUFFERED=1 TORCH_CUDA_ARCH_LIST=$capability

# --- parts ----------------------------------------------------------------------------------------

failed=0
: >"$out/summary.txt"

say() { echo "$*" | tee -a "$out/summary.txt"; }

# part NAME SECONDS COMMAND...: runs it in the copy, for that long and not beyond the deadline, with
# its output in NAME.log. Returns its status. It is interrupted first: pytest then still reports.
part() {
    local name=$1 limit=$2 begin=$SECONDS status=0 left=$((deadline - SECONDS))
    shift 2
    if ((left < 10)); then
        say "$name: no time left"
        failed=1
        return 1
    fi
    ((limit > left)) && limit=$left
    (cd "$work/tree" && timeout --signal=INT --kill-after=10 "$limit" "$@") >"$out/$name.log" 2>&1 || status=$?
    case $status in
        0) say "$name: ok, $((SECONDS - begin)) s" ;;
        124 | 137) say "$name: ENDED after $((SECONDS - begin)) s, its limit; see $name.log" ;;
        *) say "$name: FAILED with status $status after $((SECONDS - begin)) s; see $name.log" ;;
    esac
    {
        grep -E '^(GPU suite: )?[0-9]+ skipped: ' "$out/$name.log"
        ((status == 0)) || grep -E '^(E  |FAILED|ERROR|[A-Za-z.]*Error)' "$out/$name.log" | head -n 20
        tail -n "$((status == 0 ? 1 : 4))" "$out/$name.log"
    } | tee -a "$out/summary.txt"
    ((status == 0)) || failed=1
    return "$status"
}

build() {
    "$python" setup.py build_ext --inplace &&
        "$python" -c '
from recap_fast import build_info
info = build_info()
print(info)
assert "cuda" in info["engines"], "the CUDA engine was not built: is nvcc on the PATH?"
'
}

has() { "$python" -c "import $1" 2>/dev/null; }

export -f build
export python

mkdir "$work/tree" "$work/site"
tar -C "$root" --exclude=./.git --exclude=./build --exclude=./dist --exclude=./.venv \
    --exclude='*.so' --exclude=_torch_version.py --exclude=__pycache__ -cf - . |
    tar -C "$work/tree" -xf - || exit 1
export PYTHONPATH="$work/tree${PYTHONPATH:+:$PYTHONPATH}"
pytest=("$python" -m pytest -o addopts= -p no:cacheprovider -q --tb=short
    --continue-on-collection-errors)
parallel=()
has xdist && parallel=(-n 8)

say "$("$python" -c '
import torch
print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
')"

if [[ $wheels ]]; then
    PYTHONPATH=$PYTHONPATH:$work/site
    part wheels 60 "$python" -m pip install --quiet --no-index --no-deps --no-compile \
        --target "$work/site" "$wheels"/*.whl
fi
if part build 240 bash -c build; then
    part tests-gpu 130 "${pytest[@]}" tests/gpu --ignore=tests/gpu/test_gpu_sanitizer.py
    measuring=$((deadline - SECONDS - 150))  # keeps the rest for the parts that follow
    ((measuring > 240)) && measuring=240
    ((measuring < 40)) && measuring=40
    part measure "$measuring" "$python" -m benchmarks.report --gpu --out "$out" --seconds "$((measuring - 20))"
    # What the CPU engine steps is tested on any machine.
    part tests-step 120 "${pytest[@]}" "${parallel[@]}" tests/optim -k 'cuda or device_values'
    part sanitizer 150 "${pytest[@]}" tests/gpu/test_gpu_sanitizer.py
else
    say "nothing tested or measured without the build"
fi

for page in "$out"/*.md; do
    [[ -e $page ]] && sed -n '/^## What must be reached/,/^## Side by side/p' "$page"
done
exit "$failed"
