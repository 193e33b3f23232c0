#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most ten minutes: build, tests, benchmarks, ahead-of-time check.
#
#     OUT=out bash benchmarks/device_suite.sh              # or, each with all the time for itself:
#     OUT=out bash benchmarks/device_suite.sh tests | bench | end_to_end
#
# Needs no network: uses the python3 there is, and installs this checkout into it (or, failing that, runs from it).
# Leaves in $OUT (default ./out): log.txt of all parts, results.csv, results.json, report.html, plots.tar.gz. Parts go on
# when one fails; a summary comes last. Exit 0: all passed, 1: a part failed, 2: no GPU. What time does not suffice for is
# skipped, and said; end_to_end, which takes minutes, runs in a call of its own.
# Variables: OUT; PYTHON (python3); BUDGET, seconds for all parts (570); BENCH, what to give `kunbr-fast bench` in place of
# the suites (BENCH="density --tiles"); KUNBR_COMMIT, what the rows say where .git did not travel.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-out}
WHAT=${1:-all}
BENCH=${BENCH:-}
BUDGET=${BUDGET:-570}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset TRITON_INTERPRET # kernels are compiled here, not interpreted

cuda=$("$PYTHON" -c 'import torch; print(torch.cuda.is_available())' 2>&1) || true
if [ "$(tail -n 1 <<<"$cuda")" != True ]; then
    echo "no GPU: torch.cuda.is_available() of $PYTHON says: $(tail -n 1 <<<"$cuda")" >&2
    exit 2
fi

case $WHAT in all | tests | bench | end_to_end) ;; *) echo "no part $WHAT: all, tests, bench or end_to_end" >&2 && exit 1 ;; esac
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
LOGS=$OUT/parts # one file each, until log.txt has all of them
rm -rf "$LOGS" && mkdir "$LOGS"

left() { echo $((BUDGET - SECONDS)); }

SUMMARY=()
FAILED=0

# part NAME SECONDS LINES COMMAND...: runs it with its output in $OUT/NAME.log, shows the last LINES lines of that.
part() {
    local name=$1 limit=$2 lines=$3 begin=$SECONDS code=0 word=PASS
    shift 3
    [ "$limit" -le "$(left)" ] || limit=$(left)
    if [ "$limit" -lt 5 ]; then
        SUMMARY+=("$(printf 'SKIP  %-18s the %d s are over' "$name" "$BUDGET")")
        return
    fi
    echo "== $name (at most $limit s): $*"
    timeout -k 5 "$limit" "$@" >"$LOGS/$name.log" 2>&1 || code=$?
    tail -n "$lines" "$LOGS/$name.log"
    case $code in
    0) ;;
    124 | 137) word="FAIL  (out of time)" ;;
    *) word="FAIL  (exit $code)" ;;
    esac
    [ "$code" -eq 0 ] || FAILED=1
    SUMMARY+=("$(printf '%-4s  %-18s %4d s%s' "${word%% *}" "$name" $((SECONDS - begin)) "${word#"${word%% *}"}")")
}

# shellcheck disable=SC2329 # called by name, through `part`
environment() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
    "$PYTHON" - <<'PY'
import importlib.metadata as m, platform, sys
import torch
print("python", platform.python_version(), sys.executable)
print("GPU", torch.cuda.get_device_name(), "sm_%d%d" % torch.cuda.get_device_capability(), "CUDA", torch.version.cuda)
needed = ["torch", "triton", "transformers", "numpy", "safetensors", "tqdm", "pyyaml", "matplotlib", "pytest"]
missing = []
for name in [*needed, "setuptools", "liger-kernel", "opacus", "cut-cross-entropy", "lion-pytorch"]:
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        missing.append(name)
        print(name, "MISSING")
wanted = [name for name in missing if name in needed]
if wanted:
    sys.exit(f"MISSING: {', '.join(wanted)}; carry them as wheels (device/README.md, Notes)")
PY
}

# Leaves in $LOGS/environment.log which way was taken; PYTHONPATH is exported where pip could not install.
install() {
    echo "== installation"
    if "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --no-index -e . >"$LOGS/pip.tmp" 2>&1 &&
        (cd / && "$PYTHON" -c 'import kunbr_fast.kernels') 2>>"$LOGS/pip.tmp"; then
        echo "pip install -e . (offline)"
    else
        echo "pip could not install it: $(tail -n 1 "$LOGS/pip.tmp")"
        export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
        echo "PYTHONPATH=$PYTHONPATH"
    fi
    rm -f "$LOGS/pip.tmp"
    (cd / && "$PYTHON" -c 'import kunbr_fast; print("kunbr_fast", kunbr_fast.__version__, "from", kunbr_fast.__file__)')
}

# shellcheck disable=SC2329
tests() { # MARKERS FILE...: several processes, where pytest-xdist is there, as most of the time goes to compiling
    local code=0 workers=()
    ! "$PYTHON" -c 'import xdist' 2>/dev/null || workers=(-n 8)
    "$PYTHON" -m pytest -q "${workers[@]}" -p no:cacheprovider -m "$@" || code=$?
    [ "$code" -ne 5 ] || { echo "no such test" && code=0; } # pytest's exit code where nothing was collected
    return "$code"
}

export -f environment tests
export PYTHON
# suite NAME SECONDS OPTION...: a process of its own, so that one that hangs or breaks the device costs itself alone
suite() {
    local name=$1 limit=$2
    shift 2
    part "bench_$name" "$limit" 80 "$PYTHON" -m kunbr_fast bench "$name" "$@" --out "$OUT/bench" --resume --no-report \
        --quiet --budget $((limit * 3 / 4))
}

# The library first: what pip builds, where it is not there, has no time limit.
command -v nvcc >/dev/null && part cuda_build 100 8 "$PYTHON" csrc/build.py
part environment 40 20 bash -c environment
install >>"$LOGS/environment.log" 2>&1 # not in a pipeline, which is a subshell: it may export PYTHONPATH
sed -n '/^== installation/,$p' "$LOGS/environment.log"

# What ran on CPUs only so far comes first, then the numbers, then what takes long or needs no GPU.
case $WHAT in all | tests) part gpu_tests 120 25 bash -c 'tests gpu tests' ;; esac
if [ "$WHAT" != tests ]; then
    rm -rf "$OUT/bench"
    if [ -n "$BENCH" ]; then
        # shellcheck disable=SC2086 # BENCH is words
        part bench $(($(left) - 40)) 80 "$PYTHON" -m kunbr_fast bench $BENCH --out "$OUT/bench" --no-report --quiet
    elif [ "$WHAT" = end_to_end ]; then
        suite end_to_end $(($(left) - 40))
    else
        suite linear_loss 60 --seconds 1
        suite norms 60 --seconds 1
        suite optimizer 60 --seconds 1
        suite cover_layer 50 --seconds 1
        suite step "$([ "$WHAT" = all ] && echo 110 || echo 180)" --seconds 1
        suite density $(($(left) - 30)) --seconds 1
    fi
    part report 60 5 "$PYTHON" -m kunbr_fast bench --report "$OUT/bench/results.csv" --out "$OUT/bench"
    mv "$OUT"/bench/{results.csv,results.json,report.html} "$OUT"
    tar -C "$OUT/bench" -czf "$OUT/plots.tar.gz" . && rm -r "$OUT/bench"
fi
case $WHAT in all | tests)
    part triton_tests 200 25 bash -c 'tests "not gpu" tests/kernels/test_grad_density_triton.py tests/kernels/test_grad_density_op.py \
        tests/kernels/test_norms.py tests/kernels/test_rotary.py tests/kernels/test_gated.py \
        tests/kernels/test_linear_loss_triton.py tests/kernels/test_optimizers_triton.py'
    if command -v compute-sanitizer >/dev/null; then # small shapes: the sanitizer slows kernels down a hundredfold
        for tool in memcheck racecheck; do
            part $tool 60 8 compute-sanitizer --tool $tool --error-exitcode 9 \
                "$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels/test_cuda_kernels.py -m gpu -x
        done
    fi
    part aot 110 8 "$PYTHON" -m kunbr_fast.kernels.aot
    ;;
esac

{
    for log in "$LOGS"/*.log; do echo "== $(basename "$log" .log)" && cat "$log"; done
    echo
    echo "== summary after $SECONDS s"
    printf '%s\n' "${SUMMARY[@]}"
} >"$OUT/log.txt"
rm -r "$LOGS"
tail -n $((${#SUMMARY[@]} + 1)) "$OUT/log.txt"
exit "$FAILED"
