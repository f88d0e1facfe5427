#include <exception>
#include <stdexcept>
#include <string>

#include "c_api.h"
#include "error.h"
#include "weight.h"

using namespace qcompile::cuda;

namespace {

constexpr size_t kAlignment = 256;

const DeviceWeight& self(const void* weight) { return *static_cast<const DeviceWeight*>(weight); }

int fail(const std::string& message) {
  set_error(message);
  return 1;
}

bool bad_product(const void* weight, int64_t m, int route) {
  if (!weight) return fail("weight is null");
  if (m < 0) return fail("m is negative");
  return (route < -1 || route > int(Route::kHopper)) && fail("route must be -1 to 2");
}

// Memory that was given in one piece, handed out from its beginning.
class Given {
 public:
  Given(void* memory, int64_t bytes) : next_(static_cast<uint8_t*>(memory)), left_(size_t(bytes)) {}

  void* take(size_t bytes) {
    const size_t whole = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (!next_ || whole > left_) throw std::runtime_error("scratch_bytes is less than the product needs");
    uint8_t* taken = next_;
    next_ += whole;
    left_ -= whole;
    return taken;
  }

 private:
  uint8_t* next_;
  size_t left_;
};

}  // namespace

int qcompile_cuda_devices() { return device_count(); }

const char* qcompile_cuda_architectures() { return QCOMPILE_CUDA_ARCHITECTURES; }

void* qcompile_cuda_weight_create(int64_t k, int64_t n, int64_t block_size, int bits, int element, int is_signed,
                                  const void* codes, const void* scale, const void* zero_point) {
  int64_t checked[8];
  if (qcompile_cuda_layout(k, n, block_size, bits, element, checked)) return nullptr;
  if (!codes || !scale) return fail("codes or scale is null"), nullptr;
  const Layout layout = make_layout(k, n, block_size, bits, Element(element));
  const qcompile::Source source = {static_cast<const uint8_t*>(codes), scale, layout.element != Element::kFloat,
                                   static_cast<const uint8_t*>(zero_point), is_signed != 0};
  try {
    return new DeviceWeight(layout, source);
  } catch (const std::exception& exception) {
    return fail(exception.what()), nullptr;
  }
}

void qcompile_cuda_weight_destroy(void* weight) { delete static_cast<DeviceWeight*>(weight); }

int64_t qcompile_cuda_weight_bytes(const void* weight) { return self(weight).layout().bytes(); }

int64_t qcompile_cuda_weight_scratch(const void* weight, int64_t m, int route, int64_t plan[12]) {
  if (bad_product(weight, m, route)) return -1;
  try {
    const Plan made = m > 0 ? self(weight).plan(m, route) : Plan{};  // no rows, no kernel
    const int64_t values[12] = {int64_t(made.route), made.tokens, made.block_n, made.stages,
                                made.threads,        made.split,  made.grid_n,  made.grid_m,
                                made.shared_bytes,   made.chunk,  made.scratch_bytes, made.counters};
    for (int i = 0; plan && i < 12; ++i) plan[i] = values[i];
    return int64_t(self(weight).scratch_bytes(m, route));
  } catch (const std::exception& exception) {
    return fail(exception.what()), -1;
  }
}

int qcompile_cuda_weight_multiply(const void* weight, const void* x, int64_t m, void* y, const void* bias, void* stream,
                                  void* scratch, int64_t scratch_bytes, int route) {
  if (bad_product(weight, m, route)) return 1;
  if (m == 0) return 0;
  if (!x || !y) return fail("x or y is null");
  if (scratch_bytes < 0 || uintptr_t(scratch) % kAlignment) return fail("scratch must be 256-byte aligned");
  try {
    Given given(scratch, scratch_bytes);
    self(weight).multiply(x, m, y, bias, {cudaStream_t(stream), [&](size_t bytes) { return given.take(bytes); }},
                          route);
  } catch (const std::exception& exception) {
    return fail(exception.what());
  }
  return 0;
}
