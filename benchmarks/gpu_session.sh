#!/bin/sh
# Everything that a machine with a GPU is wanted for, in one call of under 10 minutes:
#
#   OUT=/tmp/out sh benchmarks/gpu_session.sh [build|test|sanitize|bench …]
#
# Needs nvcc, cmake, a Python with torch (CUDA), numpy, ml_dtypes and pytest; installs nothing. Every step writes a file
# under $OUT as it goes (7 in all), and the next one runs even where it failed: a machine that is taken away leaves what
# it has. The steps' limits add up to 9.3 minutes. With QCOMPILE_WHEELS=FOLDER, wheels in it are used, too
# (onnxruntime-gpu; without a CUDA provider the step "sessions" only says so). With BUILD=FOLDER that holds the library
# already, nothing is built. The Hopper kernel runs in processes of its own, and is left out of the benchmark where its
# tests fail: a fault ends the process that it happens in. Set COMMIT: the lent machine has no git folder.
out=${OUT:-gpu-session}
build=${BUILD:-/tmp/qcompile-cuda}
architectures=${CUDA_ARCHITECTURES:-90a-real}
mkdir -p "$out" && rm -f "$out"/*.log
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD/.typing:$PWD/tests:$PWD/benchmarks" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export QCOMPILE_LIBRARY="$build/libqcompile_kernels.so" PATH="$PATH:/usr/local/cuda/bin"
failed=0
without=
export QCOMPILE_BUDGET=warn QCOMPILE_REQUIRE_GPU=1

step() {  # FILE-NAME SECONDS COMMAND…: the end of what it prints is shown, all of it kept in FILE.log
  name=$1
  limit=$2
  shift 2
  echo "== $name" | tee -a "$out/${name%%-*}.log"
  timeout -k 5 "$limit" "$@" >>"$out/${name%%-*}.log" 2>&1
  code=$?
  tail -n "${TAIL:-25}" "$out/${name%%-*}.log"
  [ $code -eq 0 ] || failed=1
  [ $code -eq 0 ] || echo "== $name: exit code $code"
  return $code
}

build() {
  if [ ! -f "$QCOMPILE_LIBRARY" ]; then
    TAIL=3 step build-configure 30 cmake -S runtime/kernels -B "$build" -DQCOMPILE_CUDA=ON \
      "-DQCOMPILE_CUDA_ARCHITECTURES=$architectures"
    TAIL=3 step build-compile 100 cmake --build "$build" --target qcompile_kernels --parallel
  fi
  TAIL=2 step build-device 10 python3 -c "
import ctypes, os, sys
library = ctypes.CDLL(os.environ['QCOMPILE_LIBRARY'])
library.qcompile_cuda_architectures.restype = library.qcompile_cuda_error.restype = ctypes.c_char_p
compiled, devices = library.qcompile_cuda_architectures().decode(), library.qcompile_cuda_devices()
print('kernels for', compiled or 'no architecture', 'and', devices, 'devices', library.qcompile_cuda_error().decode())
sys.exit(not (compiled and devices))"
}

# Without conftest.py, which imports what a compile needs and such a machine may not have.
kernel_tests() {  # NAME SECONDS ROUTES-LEFT-OUT
  QCOMPILE_WITHOUT_ROUTES=$3 step "$1" "$2" python3 -m pytest -m gpu --noconftest -p no:cacheprovider -q --maxfail=8 \
    -k "not sanitizer" tests/runtime/cuda/test_gpu.py
}

gpu_tests() {
  kernel_tests test 110 hopper
  kernel_tests test-hopper 60 decode,dequantize,plan || without=hopper
  QCOMPILE_REQUIRE_GPU=0 step sessions 30 python3 -m pytest -m gpu -p no:cacheprovider -q --maxfail=8 \
    tests/runtime/cuda/test_gpu_sessions.py tests/runtime/cuda/test_gpu_calibrate.py
}

sanitize() {
  for tool in memcheck racecheck synccheck; do
    QCOMPILE_WITHOUT_ROUTES="dequantize,$without" TAIL=6 step "sanitize-$tool" 30 compute-sanitizer --tool "$tool" \
      --error-exitcode 9 python3 benchmarks/cuda_sanitize.py "$QCOMPILE_LIBRARY"
  done
}

bench() {
  QCOMPILE_WITHOUT_ROUTES=$without TAIL=80 step bench 130 python3 benchmarks/cuda_kernels.py \
    --library "$QCOMPILE_LIBRARY" --output "$out"
}

if [ -n "$QCOMPILE_WHEELS" ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site "$QCOMPILE_WHEELS"/*.whl &&
    PYTHONPATH="/tmp/site:$PYTHONPATH"
fi
nvidia-smi >"$out/machine.log" 2>&1
nvcc --version >>"$out/machine.log" 2>&1
for wanted in ${*:-build test bench sanitize}; do
  case $wanted in
    build) build ;;
    test) gpu_tests ;;
    sanitize) sanitize ;;
    bench) bench ;;
    *) echo "unknown step $wanted" >&2; exit 2 ;;
  esac
done
exit $failed
