// The entry points that need a device, of a library that was built without CUDA: they fail and say so.

#include "c_api.h"
#include "error.h"

namespace {

int fail() {
  qcompile::cuda::set_error("this library was built without CUDA: install nvcc 12 or newer, then build it again");
  return 1;
}

}  // namespace

int qcompile_cuda_devices() { return fail(), 0; }

const char* qcompile_cuda_architectures() { return ""; }

void* qcompile_cuda_weight_create(int64_t, int64_t, int64_t, int, int, int, const void*, const void*, const void*) {
  return fail(), nullptr;
}

void qcompile_cuda_weight_destroy(void*) {}

int64_t qcompile_cuda_weight_bytes(const void*) { return fail(), -1; }

int64_t qcompile_cuda_weight_scratch(const void*, int64_t, int, int64_t[12]) { return fail(), -1; }

int qcompile_cuda_weight_multiply(const void*, const void*, int64_t, void*, const void*, void*, void*, int64_t, int) {
  return fail();
}
