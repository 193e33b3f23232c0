#!/usr/bin/env bash
# What a rented GPU is for, in one call of at most ten minutes: prove the kernels, time them, test them, run for real.
#
#     OUT=out bash benchmarks/device_suite.sh first          # build, prove, density: under four minutes
#     OUT=out bash benchmarks/device_suite.sh                # all of the table but its last three
#     OUT=out bash benchmarks/device_suite.sh end_to_end     # parts by name, after build, environment and install
#
#     part         seconds  what
#     build             40  csrc/, or the library that was taken along
#     environment       30  wheels of .whl/, if any; the GPU, its driver, versions; what is missing
#     install           30  this checkout, without a network; where pip cannot, PYTHONPATH serves
#     prove            110  `kunbr-fast prove`: every kernel, in processes of its own; density first
#     density           60  what passed: one weight at 32 to 2048 tokens a sample, beside the bare products
#     tests             90  -m gpu, with a time limit for each test, without torch.compile
#     step              80  then linear_loss, optimizer and norms, 25 each: what passed, against rivals
#     evidence        rest  a small run, wider than the demo: teach, forget, attack, table
#     memcheck          45  each kernel once, under compute-sanitizer
#     cover_layer       30  by name only
#     end_to_end      rest  by name only: a whole run takes a call of its own
#     bench           rest  by name only: `kunbr-fast bench $BENCH`
#
# Needs no network: uses the python3 there is. Each part is a process group of its own, ended as a whole when its seconds
# are over; what left the group is ended too. Parts go on when one fails. Leaves in $OUT, written as it comes, so that a
# kill at any time costs the running part alone, six files: log.txt; verdicts.jsonl and proofs/GPU.json (for
# kernels/proofs/); results.csv and results.json (the report: `kunbr-fast bench --report`); evidence.json.
# Exit 0: nothing failed, 1: a part failed, 2: no GPU, 128 + n: ended by signal n. What time does not suffice for is
# skipped, and said.
# Variables: OUT (out); PYTHON (python3); BUDGET, seconds for all parts (570; first: 230); LIMITS="step=120 prove=90",
# seconds of parts in place of the table's; GRACE, seconds from TERM to KILL (3); PROVE, operations to prove (all);
# BENCH; KUNBR_COMMIT, what the rows say where .git did not travel.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
ROOT=$PWD
PYTHON=${PYTHON:-python3}
OUT=${OUT:-out}
GRACE=${GRACE:-3}
BENCH=${BENCH:-}
PROVE=${PROVE:-}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset TRITON_INTERPRET # kernels are compiled here, not interpreted

declare -A LIMIT=([build]=40 [environment]=30 [install]=30 [prove]=110 [density]=60 [tests]=90 [step]=80 [linear_loss]=25
    [optimizer]=25 [norms]=25 [evidence]=rest [memcheck]=45 [cover_layer]=30 [end_to_end]=rest [bench]=rest)
PARTS=()
BUDGET=${BUDGET:-$([ "${1:-all}" = first ] && echo 230 || echo 570)}
for word in "${@:-all}"; do
    case $word in
    first) PARTS+=(prove density) ;;
    all) PARTS+=(prove density tests step linear_loss optimizer norms evidence memcheck) ;;
    build | environment | install) ;; # always
    *)
        [ -n "${LIMIT[$word]:-}" ] || { echo "no part $word: first, all, or some of ${!LIMIT[*]}" >&2 && exit 1; }
        PARTS+=("$word")
        ;;
    esac
done
for word in ${LIMITS:-}; do
    [ -n "${LIMIT[${word%%=*}]:-}" ] || { echo "LIMITS: no part ${word%%=*}: some of ${!LIMIT[*]}" >&2 && exit 1; }
    LIMIT[${word%%=*}]=${word#*=}
done

cuda=$(timeout -k 5 60 "$PYTHON" -c 'import torch; print(torch.cuda.is_available())' 2>&1) || true
if [ "$(tail -n 1 <<<"$cuda")" != True ]; then
    echo "no GPU: torch.cuda.is_available() of $PYTHON says: $(tail -n 1 <<<"$cuda")" >&2
    exit 2
fi

mkdir -p "$OUT/proofs" || exit 1
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/log.txt
rm -f "$OUT"/{results.csv,results.json,verdicts.jsonl,evidence.json} "$OUT"/proofs/* # an earlier call's
: >"$LOG"

# ---------------------------------------------------------------- a part, and its end

MARK=KUNBR_DEVICE_SUITE=$$.$RANDOM # in the environment of all that a part starts
GROUP=                             # of the running part
NAME=
SUMMARY=()
FAILED=0

say() { # to the log, and to whoever still listens
    printf '%s\n' "$@" >>"$LOG"
    printf '%s\n' "$@" 2>/dev/null
}

left() { echo $((BUDGET - SECONDS)); }

seconds_of() { # PART: its limit, or what is left if that is less
    local limit=${LIMIT[$1]} rest
    rest=$(left)
    [ "$1" != evidence ] || [[ " ${PARTS[*]} " != *" memcheck "* ]] || rest=$((rest - LIMIT[memcheck]))
    if [ "$limit" = rest ] || [ "$limit" -gt "$rest" ]; then limit=$rest; fi
    echo "$limit"
}

conclude() { # NAME WORD TEXT
    SUMMARY+=("$(printf '%-4s  %-12s %s' "$2" "$1" "$3")")
    say "${SUMMARY[-1]}" ""
}

sweep() { # all that a part started and that has left its group; twice nobody, as one that starts shows no environment
    local try found nobody=0
    for try in {1..20}; do
        found=$(grep -slzFx "$MARK" /proc/[0-9]*/environ | cut -d / -f 3)
        if [ -n "$found" ]; then
            nobody=0
            # shellcheck disable=SC2086 # words
            kill -KILL $found 2>/dev/null
        elif [ $((++nobody)) = 2 ]; then
            return
        fi
        [ "$try" = 20 ] || sleep 0.05
    done
}

gone() { ! kill -0 -- "$1" 2>/dev/null; }

await() { # PID SECONDS: 0 as soon as it is gone, 1 where it is still there
    local end=$((${EPOCHREALTIME/[^0-9]/} + $2 * 1000000))
    until gone "$1"; do
        [ "${EPOCHREALTIME/[^0-9]/}" -lt "$end" ] || return 1
        sleep 0.05
    done
}

stop() { # the running part: asks, then ends it
    kill -TERM -- "-$GROUP" 2>/dev/null
    await "-$GROUP" "$GRACE"
    kill -KILL -- "-$GROUP" 2>/dev/null
    sweep
    await "$GROUP" 5
}

# part NAME LINES COMMAND...: in a process group, with its output in the log, whose last LINES lines are shown.
part() {
    local lines=$2 limit begin=$SECONDS code=0 over=0 offset
    NAME=$1
    shift 2
    limit=$(seconds_of "$NAME")
    if [ "$limit" -lt 1 ]; then
        conclude "$NAME" SKIP "the $BUDGET s are over"
        return
    fi
    say "== $NAME (at $SECONDS s, at most $limit s): $*"
    offset=$(stat -c %s "$LOG")
    set -m # a group of its own
    (
        trap - TERM INT HUP PIPE
        export "${MARK?}"
        "$@"
    ) </dev/null >>"$LOG" 2>&1 &
    GROUP=$!
    set +m
    if await "$GROUP" "$limit"; then
        kill -KILL -- "-$GROUP" 2>/dev/null # what it left behind
        sweep
    else
        over=1
        stop
    fi
    if gone "$GROUP"; then wait "$GROUP" 2>/dev/null || code=$?; fi
    GROUP=
    rm -f "$OUT"/.*.tmp "$OUT"/proofs/{.*.tmp,*.lock} # of a write that was cut short
    tail -c +$((offset + 1)) "$LOG" | tail -n "$lines" 2>/dev/null
    if [ "$over" = 1 ]; then
        conclude "$NAME" FAIL "$((SECONDS - begin)) s  (out of time)"
    elif [ "$code" -ne 0 ]; then
        conclude "$NAME" FAIL "$((SECONDS - begin)) s  (exit $code)"
    else
        conclude "$NAME" PASS "$((SECONDS - begin)) s"
        return
    fi
    FAILED=1
}

finish() {
    say "== summary after $SECONDS s" "${SUMMARY[@]}"
}

# shellcheck disable=SC2329 # by trap
ended() { # SIGNAL NUMBER
    trap '' TERM INT HUP
    if [ -n "$GROUP" ]; then
        stop
        conclude "$NAME" FAIL "(SIG$1)"
    fi
    finish
    exit $((128 + $2))
}
trap '' PIPE # whoever reads standard output may be gone first
trap 'ended TERM 15' TERM
trap 'ended INT 2' INT
trap 'ended HUP 1' HUP

# ---------------------------------------------------------------- what the parts do

# shellcheck disable=SC2329 # these are called by name, through `part`
environment() {
    if compgen -G '.whl/*.whl' >/dev/null; then # what such a machine lacks: by `pip download --no-deps -d .whl`
        "$PYTHON" -m pip install --quiet --no-index --no-deps .whl/*.whl || echo "the wheels in .whl/ cannot be installed"
    fi
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader || true
    "$PYTHON" - <<'PY'
import importlib.metadata as m, platform, sys
import torch
print("python", platform.python_version(), sys.executable)
print("GPU", torch.cuda.get_device_name(), "sm_%d%d" % torch.cuda.get_device_capability(), "CUDA", torch.version.cuda)
needed = ["torch", "triton", "transformers", "numpy", "safetensors", "tqdm", "pyyaml", "matplotlib", "pytest"]
needed += ["msgspec", "xxhash"]
missing = []
for name in [*needed, "pytest-xdist", "pytest-timeout", "liger-kernel", "opacus", "cut-cross-entropy", "lion-pytorch"]:
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        missing.append(name)
        print(name, "MISSING")
wanted = [name for name in missing if name in needed]
if wanted:
    sys.exit(f"MISSING: {', '.join(wanted)}; carry them as wheels, in .whl/")
PY
}

from_here() { # whether python finds this checkout, and no other one, from anywhere
    (cd / && timeout -k 5 20 "$PYTHON" -c "import kunbr_fast; assert kunbr_fast.__file__.startswith('$ROOT/')")
}

# shellcheck disable=SC2329
install() {
    KUNBR_BUILD_CUDA=0 "$PYTHON" -m pip install --quiet --no-deps --no-build-isolation --no-index -e . && return
    echo "pip could not install it: PYTHONPATH=$ROOT serves" # `from_here` says whether it does
}

# shellcheck disable=SC2329
prove() { # in two calls, so that the second one costs density nothing
    local code=0 words operations=(grad_density "linear_loss lion adamw rms_norm layer_norm swiglu geglu rotary")
    [ -z "$PROVE" ] || operations=("$PROVE")
    : >"$OUT/verdicts.jsonl"
    for words in "${operations[@]}"; do
        # shellcheck disable=SC2086 # words
        "$PYTHON" -m kunbr_fast prove $words --again --json --quiet --limit 45 --out "$OUT/proofs" \
            >>"$OUT/verdicts.jsonl" || code=$?
    done
    return "$code"
}

# shellcheck disable=SC2329
tests() { # SECONDS: of one test
    local files code=0 file run=("$PYTHON" -m pytest -v -p no:cacheprovider -m "gpu and not compiles")
    mapfile -t files < <(grep -rlE 'mark\.gpu\b' tests --include='test_*.py' | sort)
    ! "$PYTHON" -c 'import xdist' 2>/dev/null || run+=(-n 8)
    if "$PYTHON" -c 'import pytest_timeout' 2>/dev/null; then # a thread: who waits for a kernel hears no signal
        "${run[@]}" --timeout "$1" --timeout-method thread "${files[@]}"
        return
    fi
    for file in "${files[@]}"; do
        timeout -k 2 "$1" "${run[@]}" "$file" || code=1
    done
    return "$code"
}

proven() { timeout -k 5 10 "$PYTHON" benchmarks/scripts/proven.py "$OUT/verdicts.jsonl" "$@" 2>>"$LOG"; }

suite() { # NAME OPTION...: what passed, if `prove` ran before
    local name=$1 limit variants
    shift
    limit=$(seconds_of "$name")
    mapfile -t variants < <(proven "$name")
    [ ${#variants[@]} = 0 ] || variants=(--variants "${variants[@]}")
    part "$name" 80 "$PYTHON" -m kunbr_fast bench "$name" "$@" "${variants[@]}" --out "$OUT" --resume --no-report --quiet \
        --budget $((limit * 3 / 4 + 1))
}

part build 8 "$PYTHON" csrc/build.py
part environment 25 environment
part install 3 install
from_here >/dev/null 2>&1 || export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
for name in "${PARTS[@]}"; do
    limit=$(seconds_of "$name")
    case $name in
    prove)
        part prove 20 prove
        proven | tee -a "$LOG"
        ;;
    density) suite density --tokens 32 64 128 512 2048 ragged --seconds 0.5 ;;
    tests) part tests 25 tests $((limit / 2)) ;;
    evidence) part evidence 30 "$PYTHON" benchmarks/scripts/wide_demo.py --out "$OUT/evidence.json" --limit $((limit - 10)) ;;
    memcheck)
        if command -v compute-sanitizer >/dev/null; then
            part memcheck 8 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" benchmarks/scripts/launch_each.py
        else
            conclude memcheck SKIP "there is no compute-sanitizer"
        fi
        ;;
    bench)
        # shellcheck disable=SC2086 # BENCH is words
        part bench 80 "$PYTHON" -m kunbr_fast bench $BENCH --out "$OUT" --resume --no-report --quiet
        ;;
    *) suite "$name" --seconds 0.6 ;;
    esac
done
finish
exit "$FAILED"
