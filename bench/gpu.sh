#!/usr/bin/env bash
# Proves and measures fastft on a GPU machine: bare Linux with python3, torch (CUDA), triton and nvcc; no network needed.
set -euo pipefail

ALL="build info test bench sanitize graph ops tune collect"
MEASURED="calibration lora inference grouped dora partial sparse selection step s2ft spiel serve peft qlora"

TUNED_FAMILIES="lora grouped dora partial sparse selection"

usage() {
    cat <<TEXT
usage: bench/gpu.sh OUT [STAGE...]

Stages, in order (default: all):
  build     a virtual environment OUT/venv over this python3's packages, with fastft built and installed in it
  info      fastft info: versions, and which backend each op has here
  test      tests/ops on every backend of the GPU; writes OUT/proof.json, OUT/test.txt and OUT/test-failures.txt. Then what
            serving asks of streams, graphs and pinned memory; writes OUT/test-serving.txt
  bench     fastft bench of every family in \$FAMILIES on the GPU; rows in OUT/results/<device>.csv
  sanitize  compute-sanitizer memcheck, racecheck, synccheck on the tests marked "sanitize"
  graph     captured in a CUDA graph and replayed: a LoRA layer gives fresh dropout masks and eager's results, a layer that
            serves gives eager's results for every number of adapters
  ops       microseconds of each op on each backend; OUT/op-times.csv
  tune      fastft tune --quick of \$TUNED: what is surely faster than the configurations in use goes to OUT/configs
  collect   OUT/summary.json from what the stages left

Each stage is meant to fit \$LIMIT seconds (default 580) and is stopped there. A finished stage leaves OUT/STAGE.done and
is skipped next time; remove that file to repeat it. bench, sanitize and tune also keep what they had when stopped.
A failing stage does not stop the others, save build. Exit status: 0 if every stage asked for succeeded.

environment:
  DRY=1     print each stage's commands and run nothing
  PYTHON    use this Python, in which fastft is installed, instead of OUT/venv (then build is not needed)
  FASTFT_COMMIT  what the rows call the source, where the tree came without its .git. Without either they don't tell what was
            measured, and a bench stage that was stopped begins anew
  LIMIT     seconds a stage may take
  FAMILIES  what bench measures (default: $MEASURED)
  TUNED     whose configurations tune searches (default: $TUNED_FAMILIES)
  TESTS     what test runs, an expression for pytest -k (default: on_gpu, the backends of the GPU)
TEXT
}

say() { printf 'gpu.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 2; }

case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    "") usage >&2; exit 2 ;;
esac
[[ $1 != -* ]] || die "unknown option $1 (see --help)"

DRY=${DRY:-0}
LIMIT=${LIMIT:-580}
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
[[ $DRY == 1 ]] || mkdir -p -- "$1"
OUT=$(realpath -m -- "$1")
shift
for stage in "$@"; do
    [[ " $ALL " == *" $stage "* ]] || die "unknown stage $stage; stages: $ALL"
done
# shellcheck disable=SC2086  # a list of words
[[ $# -gt 0 ]] || set -- $ALL

PY=$OUT/venv/bin/python
if [[ -n ${PYTHON:-} ]]; then
    PY=$(command -v -- "$PYTHON") || die "PYTHON=$PYTHON is no command"
    # Absolute, since stages run elsewhere, but not resolved: a link is what makes a Python its environment's.
    [[ $PY == /* ]] || PY=$PWD/$PY
fi
# CUDA's own folder is often not on the PATH.
command -v nvcc >/dev/null || PATH="$PATH:/usr/local/cuda/bin"

# run COMMAND...: print it, and run it unless DRY.
run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    [[ $DRY == 1 ]] || "$@"
}

# run_into FILE COMMAND...: the same, with the command's output in FILE.
run_into() {
    local file=$1
    shift
    printf '+'
    printf ' %q' "$@"
    printf ' >%q 2>&1\n' "$file"
    [[ $DRY == 1 ]] || "$@" >"$file" 2>&1
}

need() { [[ $DRY == 1 ]] || command -v "$1" >/dev/null || die "build needs $1 on the PATH: $2"; }

# About 60 s: nvcc compiles each source for three architectures.
stage_build() {
    if [[ -n ${PYTHON:-} ]]; then
        say "PYTHON is set: using $PYTHON as it is"
        return
    fi
    need python3 "install Python 3.10 or newer with torch and triton"
    need nvcc "install the CUDA toolkit, or add its bin folder to PATH"
    need cmake "install it, or pip install cmake"
    need ninja "install it, or pip install ninja"
    if [[ $DRY != 1 ]]; then
        python3 -c 'import torch, triton, setuptools' || die "python3 needs torch, triton and setuptools"
    fi
    # Bare, then linked to every package folder of python3 in its order: --system-site-packages would leave out an
    # environment that python3 itself lives in, and both it and an own pip and setuptools would hide python3's newer ones.
    run python3 -m venv --without-pip "$OUT/venv"
    local folders
    mapfile -t folders < <(python3 -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")')
    run "$PY" "$ROOT/bench/gpu_checks.py" link-packages "${folders[@]}"
    [[ $DRY == 1 ]] || "$PY" -m pip --version >/dev/null 2>&1 || run "$PY" -m ensurepip
    run env FASTFT_NATIVE=1 FASTFT_CUDA=1 "$PY" -m pip install --no-build-isolation --no-deps -e "$ROOT"
}

# About 10 s.
stage_info() {
    run "$PY" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"; print(torch.cuda.get_device_name())'
    run "$(dirname -- "$PY")/fastft" info
}

# 2 to 4 minutes, nearly all of it Triton compiling some hundred small kernels: eight processes at a time.
stage_test() {
    local workers=() status=0
    if [[ $DRY == 1 ]] || "$PY" -c 'import xdist, pytest_timeout' 2>/dev/null; then
        local cores
        cores=$(nproc)
        workers=(-n $((cores < 8 ? cores : 8)) --dist worksteal --timeout=300)
    fi
    # Interrupted before the stage's limit, so that what passed until then is still written.
    run_into "$OUT/test.txt" env COLUMNS=250 timeout --signal=INT --kill-after=20 $((LIMIT > 60 ? LIMIT - 40 : LIMIT)) \
        "$PY" -m pytest "$ROOT/tests/ops" -q -k "${TESTS:-on_gpu}" -rfE --maxfail=200 "${workers[@]}" -p no:cacheprovider \
        -p no:benchmark --write-proof "$OUT/proof.json" --failures "$OUT/test-failures.txt" || status=$?
    local serving=0
    run_into "$OUT/test-serving.txt" "$PY" -m pytest "$ROOT/tests/modules/test_routed.py" "$ROOT/tests/serving/test_memory.py" \
        -q -k "streams or cuda" -rfEs -p no:cacheprovider -p no:benchmark || serving=$?
    [[ $DRY == 1 ]] || summarise_tests
    # 5: none were collected, where transformers is missing.
    [[ $status != 0 || $serving == 5 ]] || status=$serving
    return "$status"
}

summarise_tests() {
    local failures=$OUT/test-failures.txt
    if [[ -s $failures ]]; then
        printf '%s failures; the first of each test (all in %s, tracebacks in test.txt):\n' "$(wc -l <"$failures")" "$failures"
        awk '{ test = $1; sub(/\[.*/, "", test); if (!seen[test]++ && n++ < 40) print substr($0, 1, 400) }' "$failures"
    fi
    local said
    for said in "$OUT/test.txt" "$OUT/test-serving.txt"; do
        [[ ! -e $said ]] || tail -n 1 "$said"
    done
}

# What a GPU is measured with: without TF32 a float32 layer takes twenty times as long, and nobody trains so on a GPU. The
# deltas of slices and entries are float32, so that these have no "bf16"; scores are one tensor, and adapters are served as the
# model is, so that these have no other.
dtypes_of() {
    case $1 in
        calibration | step | peft | qlora) ;; # their own choice
        s2ft | sparse | spiel) echo --dtype bf16+fp32 ;;
        grouped | selection | serve) echo --dtype bf16 ;;
        *) echo --dtype bf16 --dtype bf16+fp32 ;;
    esac
}

# On an H100 about 60 s for lora (5 implementations of 4 layers, 2 dtypes, with and without dropout), less for dora. On an
# H200 2 to 8 s for each of 21 cases of sparse, and some 120 s for selection, of which an exact SVD takes 1.1 s.
stage_bench() {
    local family dtypes failed=0 status
    if [[ -z ${FASTFT_COMMIT:-} && ! -e $ROOT/.git ]]; then
        say "bench: FASTFT_COMMIT is unset and $ROOT has no .git, so rows don't tell what was measured, and no case counts as" \
            "measured before; set it to the commit's hash"
    fi
    for family in ${FAMILIES:-$MEASURED}; do
        read -ra dtypes < <(dtypes_of "$family" && echo)
        # A family that fails does not keep the others from being measured. 3: all is right, but ours is behind somewhere;
        # the rows say where.
        status=0
        run "$PY" -m fastft.bench.run "$family" --device cuda "${dtypes[@]}" --resume --out "$OUT/results" || status=$?
        [[ $status == 0 || $status == 3 ]] || failed=1
    done
    return "$failed"
}

# Minutes for each of the three tools, which slow a kernel down tenfold and more.
stage_sanitize() {
    if [[ $DRY != 1 ]] && ! command -v compute-sanitizer >/dev/null; then
        run "$PY" -m fastft.bench.gpu_checks no-sanitizer --out "$OUT"
        return
    fi
    local tool log status failed=0
    for tool in memcheck racecheck synccheck; do
        log=$OUT/sanitize-$tool
        if [[ -e $log.json ]] && ! grep -q '"verdict": "failed"' "$log.json"; then
            say "sanitize: $tool done before, skipped"
            continue
        fi
        status=0
        # Without torch's caching allocator, which would hide an access past a tensor's end.
        run_into "$log.txt" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
            --target-processes application-only --report-api-errors no --error-exitcode 9 --log-file "$log.log" \
            "$PY" -m pytest "$ROOT/tests/ops" -q -p no:cacheprovider -m sanitize || status=$?
        run "$PY" -m fastft.bench.gpu_checks sanitizer "$tool" --out "$OUT" --status "$status" || failed=1
    done
    return "$failed"
}

# About 20 s.
stage_graph() {
    run "$PY" -m fastft.bench.gpu_checks graph --out "$OUT"
}

stage_ops() {
    run "$PY" -m fastft.bench.op_times --out "$OUT"
}

# Some ten candidates of each op, a second of Triton's compiler each. Found configurations are not in use until they are
# copied to kernels/configs, for which the table of compiled kernels is to be made anew.
stage_tune() {
    local family
    for family in ${TUNED:-$TUNED_FAMILIES}; do
        [[ ! -e $OUT/tune-$family.done ]] || continue
        run "$PY" -m fastft.tune "$family" --quick --out "$OUT/configs"
        run touch "$OUT/tune-$family.done"
    done
}

stage_collect() {
    run "$PY" -m fastft.bench.gpu_checks collect --out "$OUT"
}

# One stage in a shell of its own, so that its limit and its failure stay its own. GPU_SH_STAGE names it in that shell.
if [[ -n ${GPU_SH_STAGE:-} ]]; then
    cd -- "$ROOT"
    "stage_$GPU_SH_STAGE"
    exit
fi

failures=()
for stage in "$@"; do
    if [[ $DRY == 1 ]]; then
        printf '# %s\n' "$stage"
        (cd -- "$ROOT" && "stage_$stage")
        continue
    fi
    if [[ -e $OUT/$stage.done ]]; then
        say "$stage: done before, skipped"
        continue
    fi
    if [[ $stage != build && ! -x $PY ]]; then
        die "$stage: no Python at $PY; run the build stage first, or set PYTHON"
    fi
    say "$stage ..."
    start=$SECONDS status=0
    GPU_SH_STAGE=$stage timeout --kill-after=10 "$LIMIT" "${BASH_SOURCE[0]}" "$OUT" 2>&1 | tee "$OUT/$stage.log" || status=${PIPESTATUS[0]}
    if [[ $status == 0 ]]; then
        rm -f -- "$OUT/$stage.failed"
        # The summary is made anew each time: it is of what the other stages left.
        [[ $stage == collect ]] || printf '%s s\n' $((SECONDS - start)) >"$OUT/$stage.done"
        say "$stage: done in $((SECONDS - start)) s"
        continue
    fi
    [[ $status != 124 && $status != 137 ]] || say "$stage: stopped after $LIMIT s; call again to go on"
    printf 'exit status %s after %s s\n' "$status" $((SECONDS - start)) >"$OUT/$stage.failed"
    say "$stage: FAILED with exit status $status, see $OUT/$stage.log"
    failures+=("$stage")
    [[ $stage != build ]] || break
done
[[ ${#failures[@]} == 0 ]] || { say "failed: ${failures[*]}"; exit 1; }
