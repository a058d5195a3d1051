#!/usr/bin/env bash
# Builds for the GPUs of this machine, tests and checks the kernels on one, and measures them: one
# command, no network, about eight minutes. A failure stops nothing; a short table comes last, and
# the exit status is 1 if anything failed.
#
# More is measured in two calls, each of at most ten minutes:
#
#   STEPS="build tests compare sanitize" tests/gpu.sh; STEPS="profile time" MINUTES=9 tests/gpu.sh
#
# A third, STEPS=tune MINUTES=9, tries the planner's constants one at a time and writes the fastest to
# $OUT/tuning.txt, for RESNEST_FUSED_CUDA_TUNING.
#
#   STEPS    what to do, of "build tests compare sanitize profile time" (all) and tune; a build
#            stays, in build/gpu, as what torch.compile made does, in build/inductor
#   OUT      the folder for logs, summary.txt and gpu.json (benchmarks/results)
#   KERNELS  whose kernels to test and to call fused in the timings, native or triton (native);
#            beside the native ones Triton's are timed too
#   MINUTES  what it may take; timings get what the others leave (8)
#
# It needs a python3 with torch for CUDA, setuptools, ninja, numpy, hypothesis, pytest and
# pytest-timeout, and nvcc; with pytest-xdist the tests run side by side; typer and Pillow are for
# the command line.
set -uo pipefail
shopt -s inherit_errexit

root=$(cd "$(dirname "$0")/.." && pwd)
known=" build tests compare sanitize profile time "
steps=" ${STEPS:-$known} "
for step in $steps; do
    [[ "$known tune " == *" $step "* ]] && continue
    echo "tests/gpu.sh: STEPS: expected some of${known}tune, got $step" >&2
    exit 2
done
out=${OUT:-$root/benchmarks/results}
end=$((${MINUTES:-8} * 60))
kernels=${KERNELS:-native}
site=$root/build/gpu
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit
work=$(mktemp -d)
trap 'pkill -P "$(jobs -p | paste -sd ,)" 2>/dev/null; wait; rm -rf "$work"' EXIT

unset RESNEST_FUSED_BACKEND RESNEST_FUSED_SKIP_NATIVE
given_path=${PYTHONPATH:-}
# What is built, and not the checkout, which has no compiled module: all commands run in $work.
export PYTHONPATH=$site${given_path:+:$given_path}
export TRITON_INTERPRET=0
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export TORCHINDUCTOR_CACHE_DIR=$root/build/inductor
tests=("$root"/tests/test_{cuda,op,autograd,cpu_kernels,modules,compile,fuse,models,memory}.py)
tests+=("$root"/tests/test_{errors,reference}.py)
case $kernels in
    native) ;;
    triton) tests=("$root"/tests/test_{triton,autograd,modules,compile,fuse,models}.py) ;;
    *) echo "tests/gpu.sh: KERNELS: expected native or triton, got $kernels" >&2; exit 2 ;;
esac
pytest=(python3 -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider)
pytest+=(--device cuda --kernels "$kernels" -m "not peers and not cpu")
pytest+=(--timeout 120 --timeout-method thread -q --tb short --durations 8)
sanitizer=(compute-sanitizer --target-processes all --kernel-regex kns=resnest_fused)
sanitizer+=(--error-exitcode 9)

report=()
failed=0
wanted() { [[ $steps == *" $1 "* ]]; }

# A line of the table: what, the verdict, its seconds, and a word on it.
note() {
    report+=("$(printf '%-11s %-10s %4s s  %s' "$1" "$2" "$3" "$4")")
    echo "${report[-1]}"
}

# verdict STATUS: in a word.
verdict() {
    case $1 in
        0) echo passed ;;
        124 | 137) echo "TIMED OUT" ;;
        *) echo FAILED ;;
    esac
}

# limited SECONDS LOG COMMAND...
limited() {
    local seconds=$1 log=$2
    shift 2
    (cd "$work" && exec timeout -s INT -k 15 "$seconds" "$@") >"$log" 2>&1
}

# judge NAME STATUS SECONDS WORD
judge() {
    note "$1" "$(verdict "$2")" "$3" "$4"
    [[ $2 == 0 ]] || failed=1
}

nvidia-smi || { echo "tests/gpu.sh: no GPU that nvidia-smi can see" >&2; exit 1; }
python3 -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)'
nvcc --version | tail -n 2
capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | paste -sd ';')

if wanted build; then
    started=$SECONDS
    # What torch.compile needs of the reference is ready when it is timed, by this call or the next.
    PYTHONPATH=$root${given_path:+:$given_path} limited 200 "$work/compile.log" \
        python3 "$root/benchmarks/gpu.py" --compile-only &
    rm -rf "$site"
    RESNEST_FUSED_CUDA=1 TORCH_CUDA_ARCH_LIST=$capabilities MAX_JOBS=$(nproc) \
        limited 180 "$out/build.log" python3 -m pip install -v --no-build-isolation --no-deps \
        --target "$site" "$root"
    status=$?
    judge build $status $((SECONDS - started)) "for $capabilities"
    if ((status != 0)); then
        grep -E "error|resnest_fused:" "$out/build.log" | tail -n 15
        echo "Nothing was built to go on with; all of it is in $out/build.log"
        exit 1
    fi
elif [[ ! -d $site ]]; then
    echo "tests/gpu.sh: nothing is built in $site; STEPS has to begin with build" >&2
    exit 1
fi

# Beside the tests, on cores that those leave.
declare -A watched
sanitizers_started=$SECONDS
if wanted sanitize; then
    tiny='import torch; torch.ones(1, device="cuda").cpu()'
    if ! command -v compute-sanitizer >/dev/null; then
        note sanitize "NOT RUN" 0 "compute-sanitizer is not on this machine"
    elif ! limited 60 "$out/sanitize.log" compute-sanitizer --report-api-errors no \
        python3 -c "$tiny"; then
        # As in some containers, which shield the device.
        note sanitize "NOT RUN" 0 "$(grep . "$out/sanitize.log" | tail -n 1)"
    else
        for tool in memcheck racecheck synccheck; do
            options=(--tool $tool)
            # Calls that torch makes to try what works are no errors of the kernels.
            [[ $tool == memcheck ]] && options+=(--report-api-errors no)
            # Each tensor in an allocation of its own, so that what is beyond it is nobody's.
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited 200 "$work/$tool.log" \
                "${sanitizer[@]}" "${options[@]}" python3 "$root/tests/every_kernel.py" &
            watched[$tool]=$!
        done
    fi
fi

if wanted tests; then
    started=$SECONDS
    if python3 -c 'import xdist' 2>/dev/null; then
        workers=$(nproc)
        pytest+=(-n $((workers < 12 ? workers : 12)) --dist worksteal)
        # Many processes of one thread each.
        export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
    fi
    limited 280 "$out/tests.log" "${pytest[@]}" "${tests[@]}"
    status=$?
    unset OMP_NUM_THREADS TORCHINDUCTOR_COMPILE_THREADS
    judge tests $status $((SECONDS - started)) "$(grep . "$out/tests.log" | tail -n 1)"
    # How many of each test function failed.
    mapfile -t lines < <(sed -nE 's#^(FAILED|ERROR) .*/tests/([^[ ]+).*#\1 \2#p' "$out/tests.log" |
        sort | uniq -c | sort -rn)
    report+=("${lines[@]:0:12}")
    ((${#lines[@]} > 12)) && report+=("  and $((${#lines[@]} - 12)) other functions, in tests.log")
fi

for tool in "${!watched[@]}"; do
    wait "${watched[$tool]}"
    status=$?
    cat "$work/$tool.log" >>"$out/sanitize.log"
    judge "$tool" $status $((SECONDS - sanitizers_started)) \
        "$(grep . "$work/$tool.log" | tail -n 1)"
done

if wanted compare; then
    if ! python3 -c 'import PIL, typer' 2>/dev/null; then
        note compare "NOT RUN" 0 "typer and Pillow are not on this machine"
    else
        : >"$out/compare.log"
        # Batch 8, as with one image the launches take longer than the kernels.
        for options in "--backend native --batch 8" "--backend triton --batch 8" \
            "--backend $kernels --batch 8 --dtype bf16 --channels-last --train"; do
            [[ $kernels == triton && $options == *native* ]] && continue
            started=$SECONDS
            read -ra words <<<"$options"
            limited 100 "$work/compare.log" python3 -m resnest_fused compare --device cuda "${words[@]}"
            status=$?
            { echo "compare $options" && cat "$work/compare.log"; } >>"$out/compare.log"
            judge compare $status $((SECONDS - started)) \
                "$options: $(grep . "$work/compare.log" | tail -n 1)"
        done
    fi
fi

# Whether a second read of x comes from L2, which no time tells.
if wanted profile; then
    if ! command -v ncu >/dev/null; then
        note profile "NOT RUN" 0 "ncu is not on this machine"
    else
        started=$SECONDS
        limited 120 "$work/ncu.log" ncu --target-processes all --clock-control none --csv \
            --log-file "$out/ncu.csv" --kernel-name-base demangled \
            --kernel-name regex:resnest_fused \
            --metrics gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum \
            python3 "$root/benchmarks/gpu.py" --once --backend "$kernels"
        status=$?
        judge profile $status $((SECONDS - started)) "$(grep . "$work/ncu.log" | tail -n 1)"
    fi
fi

if wanted time; then
    wait # for torch.compile
    started=$SECONDS
    left=$((end - SECONDS))
    left=$((left > 60 ? left : 60))
    limited $((left + 20)) "$out/time.log" \
        python3 "$root/benchmarks/gpu.py" --seconds $((left - 15)) --backend "$kernels" \
        --out "$out/gpu.json"
    status=$?
    judge "time" $status $((SECONDS - started)) ""
    [[ -f $work/compile.log ]] && cat "$work/compile.log" >>"$out/build.log"
    # The table begins where the progress ends.
    mapfile -t lines < <(sed -n '/^=== /,$p' "$out/time.log")
    report+=("${lines[@]}")
fi

if wanted tune; then
    started=$SECONDS
    left=$((end - SECONDS))
    left=$((left > 60 ? left : 60))
    limited $((left + 20)) "$out/tune.log" \
        python3 "$root/benchmarks/tune.py" --seconds $((left - 40)) --out "$out/tuning.txt"
    judge tune $? $((SECONDS - started)) "$(grep . "$out/tune.log" | tail -n 1)"
fi

# Of a log that grew too long the end, where its summary is.
find "$out" -name '*.log' -size +15M -exec sh -c 'tail -c 15M "$1" >"$1.end" && mv "$1.end" "$1"' _ {} \;
printf '\n%s\n' "================ $SECONDS s"
printf '%s\n' "${report[@]}" | tee "$out/summary.txt"
exit $failed
