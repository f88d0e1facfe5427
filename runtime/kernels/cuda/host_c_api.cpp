#include <exception>
#include <initializer_list>

#include "c_api.h"
#include "error.h"
#include "pack.h"
#include "plan.h"

using namespace qcompile::cuda;

namespace {

thread_local std::string error;

// Sizes beyond these are refused, so that no product of them overflows: padding makes a weight at most 64 x larger.
constexpr int64_t kMaxSize = int64_t(1) << 31;
constexpr int64_t kMaxElements = int64_t(1) << 48;

int fail(const std::string& message) {
  set_error(message);
  return 1;
}

bool sane_weight(int64_t k, int64_t n, int64_t block_size, int bits, int element) {
  for (const int64_t size : {k, n, block_size}) {
    if (size < 1 || size > kMaxSize) return false;
  }
  return k <= kMaxElements / n && (bits == 4 || bits == 8) && element >= 0 && element <= int(Element::kFloat);
}

bool all(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (!pointer) return false;
  }
  return true;
}

const char* const kBadWeight = "k, n and block_size must be 1 to 2^31, bits 4 or 8, element 0 to 2";

}  // namespace

void qcompile::cuda::set_error(const std::string& message) { error = message; }

const char* qcompile_cuda_error() { return error.c_str(); }

int qcompile_cuda_layout(int64_t k, int64_t n, int64_t block_size, int bits, int element, int64_t layout[8]) {
  if (!sane_weight(k, n, block_size, bits, element)) return fail(kBadWeight);
  if (!layout) return fail("layout is null");
  const Layout made = make_layout(k, n, block_size, bits, Element(element));
  const int64_t values[8] = {made.group,         made.padded_k,       made.padded_n,     made.groups(),
                             made.codes_bytes(), made.scales_bytes(), made.zeros_bytes(), made.takes_x_as_it_is()};
  for (int i = 0; i < 8; ++i) layout[i] = values[i];
  return 0;
}

int qcompile_cuda_pack(int64_t k, int64_t n, int64_t block_size, int bits, int element, int is_signed,
                       const void* codes, const void* scale, const void* zero_point, void* packed_codes,
                       void* packed_scales, void* packed_zeros) {
  if (!sane_weight(k, n, block_size, bits, element)) return fail(kBadWeight);
  if (!all({codes, scale, packed_codes, packed_scales, packed_zeros})) return fail("a pointer is null");
  const Layout layout = make_layout(k, n, block_size, bits, Element(element));
  const qcompile::Source source = {static_cast<const uint8_t*>(codes), scale, layout.element != Element::kFloat,
                                   static_cast<const uint8_t*>(zero_point), is_signed != 0};
  const Packed out = {static_cast<uint8_t*>(packed_codes), static_cast<uint8_t*>(packed_scales),
                      static_cast<uint8_t*>(packed_zeros)};
  try {
    pack_blocks(layout, source, 0, layout.blocks(), out);
  } catch (const std::exception& exception) {
    return fail(exception.what());
  }
  return 0;
}

int qcompile_cuda_unpack(int64_t k, int64_t n, int64_t block_size, int bits, int element, const void* packed_codes,
                         const void* packed_scales, const void* packed_zeros, float* w) {
  if (!sane_weight(k, n, block_size, bits, element)) return fail(kBadWeight);
  if (!all({packed_codes, packed_scales, packed_zeros, w})) return fail("a pointer is null");
  // unpack only reads; Packed is one type for both ways
  const auto bytes = [](const void* part) { return static_cast<uint8_t*>(const_cast<void*>(part)); };
  unpack(make_layout(k, n, block_size, bits, Element(element)),
         {bytes(packed_codes), bytes(packed_scales), bytes(packed_zeros)}, w);
  return 0;
}

int qcompile_cuda_plan(int64_t k, int64_t n, int64_t block_size, int bits, int element, int64_t m,
                       const int64_t machine[4], double bytes_per_second, double half_per_second, int available,
                       int route, int64_t plan[12], double* predicted_seconds) {
  if (!sane_weight(k, n, block_size, bits, element)) return fail(kBadWeight);
  if (!all({machine, plan, predicted_seconds})) return fail("a pointer is null");
  if (m < 1 || m > kMaxSize) return fail("m must be 1 to 2^31");
  if (route < -1 || route > int(Route::kHopper)) return fail("route must be -1 to 2");
  for (int i = 0; i < 4; ++i) {
    if (machine[i] < 1 || machine[i] > (1 << 30)) return fail("no such machine");
  }
  if (!(bytes_per_second > 0) || !(half_per_second > 0)) return fail("no such machine");
  try {
    const Plan made = make_plan(make_layout(k, n, block_size, bits, Element(element)), m,
                                {int(machine[0]), int(machine[1]), machine[2], machine[3], bytes_per_second,
                                 half_per_second},
                                {(available & 1) != 0, (available & 2) != 0}, route);
    const int64_t values[12] = {int64_t(made.route), made.tokens,      made.block_n, made.stages,
                                made.threads,        made.split,       made.grid_n,  made.grid_m,
                                made.shared_bytes,   made.chunk,       made.scratch_bytes, made.counters};
    for (int i = 0; i < 12; ++i) plan[i] = values[i];
    *predicted_seconds = made.predicted_seconds;
  } catch (const std::exception& exception) {
    return fail(exception.what());
  }
  return 0;
}
