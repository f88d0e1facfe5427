#!/bin/sh
# Everything that a machine with a GPU is wanted for, in one call of under 10 minutes:
#
#   OUT=/tmp/out sh benchmarks/gpu_session.sh [build|test|sanitize|bench …]
#
# Needs nvcc, cmake, a Python with torch (CUDA), numpy, ml_dtypes and pytest; installs nothing. Every step writes a file
# under $OUT as it goes (7 in all), and the next one runs even where it failed: a machine that is taken away leaves what
# it has. The steps' limits add up to 9.3 minutes. With QCOMPILE_WHEELS=FOLDER, wheels in it are used, too (onnxruntime-gpu).
out=${OUT:-gpu-session}
build=${BUILD:-/tmp/qcompile-cuda}
architectures=${CUDA_ARCHITECTURES:-90a-real}
mkdir -p "$out" && rm -f "$out"/*.log
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD/.typing:$PWD/tests:$PWD/benchmarks" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export QCOMPILE_LIBRARY="$build/libqcompile_kernels.so" PATH="$PATH:/usr/local/cuda/bin"
failed=0

step() {  # FILE-NAME SECONDS COMMAND…: the end of what it prints is shown, all of it kept in FILE.log
  name=$1
  limit=$2
  shift 2
  echo "== $name" | tee -a "$out/${name%%-*}.log"
  timeout "$limit" "$@" >>"$out/${name%%-*}.log" 2>&1
  code=$?
  tail -n "${TAIL:-25}" "$out/${name%%-*}.log"
  [ $code -eq 0 ] || failed=1
  [ $code -eq 0 ] || echo "== $name: exit code $code"
}

build() {
  TAIL=3 step build-configure 30 cmake -S runtime/kernels -B "$build" -DQCOMPILE_CUDA=ON "-DQCOMPILE_CUDA_ARCHITECTURES=$architectures"
  TAIL=3 step build-compile 100 cmake --build "$build" --target qcompile_kernels --parallel
}

# Without conftest.py, which imports what a compile needs and such a machine may not have.
gpu_tests() {
  step test 140 python3 -m pytest -m gpu --noconftest -p no:cacheprovider -q --maxfail=8 \
    -k "not sanitizer" tests/test_cuda_gpu.py
  step sessions 40 python3 -m pytest -m gpu -p no:cacheprovider -q --maxfail=8 tests/test_cuda_gpu_sessions.py tests/test_cuda_gpu_calibrate.py
}

sanitize() {
  for tool in memcheck racecheck synccheck; do
    TAIL=6 step "sanitize-$tool" 25 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python3 benchmarks/cuda_sanitize.py "$QCOMPILE_LIBRARY"
  done
}

bench() {
  TAIL=80 step bench 170 python3 benchmarks/cuda_kernels.py --library "$QCOMPILE_LIBRARY" --output "$out"
}

if [ -n "$QCOMPILE_WHEELS" ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site "$QCOMPILE_WHEELS"/*.whl &&
    PYTHONPATH="/tmp/site:$PYTHONPATH"
fi
nvidia-smi >"$out/machine.log" 2>&1
nvcc --version >>"$out/machine.log" 2>&1
for wanted in ${*:-build test sanitize bench}; do
  case $wanted in
    build) build ;;
    test) gpu_tests ;;
    sanitize) sanitize ;;
    bench) bench ;;
    *) echo "unknown step $wanted" >&2; exit 2 ;;
  esac
done
exit $failed
