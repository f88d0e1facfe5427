// One quantized weight and its products, whatever the instruction set: y = x W + bias.
#pragma once

#include <vector>

#include "kernels.h"
#include "packing.h"
#include "weight_memory.h"

namespace qcompile {

enum class Element { kFloat, kHalf };

// How to run `total` independent pieces; ORT's intra-op pool in the operator, a loop elsewhere.
struct Parallel {
  void (*run)(void* context, void (*piece)(void* data, size_t index), size_t total, void* data);
  void* context;
};
Parallel serial();

// Panels by the bits that their products take activations at, each in one list, ascending.
struct PanelBits {
  std::vector<int64_t> at_8, at_16;

  // activation_bits: 8 or 16, of all columns; but 8 of those in `columns_at_8`, begin and end of ranges one after another.
  // A panel with a column at 16 takes 16.
  PanelBits(const Layout& layout, int activation_bits, const std::vector<int64_t>& columns_at_8 = {});
};

class PackedWeight {
 public:
  // Throws std::bad_alloc. `kernels` must outlive the object, and have products of the layout's format.
  PackedWeight(const Layout& layout, const Source& source, const Kernels* kernels);
  PackedWeight(const PackedWeight&) = delete;
  PackedWeight& operator=(const PackedWeight&) = delete;

  // y (m, N) = x (m, K) W + bias (N,) or nullptr; all of one element type. bits: of this layout. A panel's columns are the
  // same bit for bit whatever others take.
  // Rows with a NaN, an infinity, or nothing above 2^-70 are computed in floats, as the ONNX body would.
  // Safe to call from several threads at once; scratch is kept by the calling thread.
  void multiply(const void* x, Element element, int64_t m, void* y, const void* bias, const PanelBits& bits,
                const Parallel& parallel) const;

  // w (K, N), decoded from the packed codes.
  void unpack(float* w) const;

  const Layout& layout() const { return layout_; }

 private:
  struct Job;
  void quantize_tile(const Job& job, int64_t tile) const;
  void multiply_unit(const Job& job, int64_t unit) const;
  void multiply_floats(const Job& job, int64_t panel) const;
  void multiply_panels(const Job& job, int64_t m, const Parallel& parallel) const;
  void multiply_rows(const Job& job, const Parallel& parallel) const;

  Layout layout_, expanded_;  // as packed; with codes in fields of bits expanded, else the same
  const Kernels* kernels_;
  bool finite_;
  std::shared_ptr<uint8_t> packed_;
};

}  // namespace qcompile
