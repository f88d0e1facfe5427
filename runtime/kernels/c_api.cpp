#include "c_api.h"

#include <cstring>
#include <new>
#include <string>

#include "matmul.h"

using namespace qcompile;

int qcompile_operator_version() { return kOperatorVersion; }

const char* qcompile_kernels() { return kernel_names(); }

const char* qcompile_chosen_kernel() {
  const Kernels* kernels = chosen_kernels();
  return kernels ? kernels->name : "";
}

const char* qcompile_formats() {
  static thread_local std::string words;
  const Kernels* kernels = chosen_kernels();
  words.clear();
  for (int format = 0; kernels && format < kFormatCount; ++format) {
    if (kernels->products.of[format].multiply) words += std::string(words.empty() ? "" : ",") + kFormats[format].word;
  }
  return words.c_str();
}

void* qcompile_weight_create(const char* kernel, int64_t k, int64_t n, int64_t block_size, const char* format,
                             int is_signed, const void* codes, const void* scale, int scale_is_half,
                             const void* zero_point) {
  constexpr int64_t limit = int64_t(1) << 31;
  const Kernels* kernels = named_kernels(kernel);
  int row = 0;
  while (row < kFormatCount && std::strcmp(kFormats[row].word, format) != 0) ++row;
  if (!kernels || row == kFormatCount || !kernels->products.of[row].multiply || k < 1 || n < 1 || block_size < 1) return nullptr;
  if (!kFormats[row].zeros() && (is_signed || zero_point)) return nullptr;
  if (kFormats[row].base() >= 0 && is_signed) return nullptr;
  if (block_size < k && block_size % kFormats[row].shared()) return nullptr;
  if (k > limit || n > limit || block_size > limit) return nullptr;
  const Source source = {static_cast<const uint8_t*>(codes), scale, scale_is_half != 0,
                         static_cast<const uint8_t*>(zero_point), is_signed != 0};
  try {
    return new PackedWeight(make_layout(k, n, block_size, row, source), source, kernels);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void qcompile_weight_destroy(void* weight) { delete static_cast<PackedWeight*>(weight); }

int64_t qcompile_weight_bytes(const void* weight) { return static_cast<const PackedWeight*>(weight)->layout().bytes(); }

void qcompile_weight_unpack(const void* weight, float* w) { static_cast<const PackedWeight*>(weight)->unpack(w); }

int qcompile_weight_multiply(const void* weight, const void* x, int half, int64_t m, void* y, const void* bias,
                             int activation_bits) {
  if (m < 0 || (activation_bits != 8 && activation_bits != 16)) return 1;
  try {
    const PackedWeight& own = *static_cast<const PackedWeight*>(weight);
    const PanelBits bits(own.layout(), activation_bits);
    own.multiply(x, half ? Element::kHalf : Element::kFloat, m, y, bias, bits, serial());
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
