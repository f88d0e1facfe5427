#include "matmul.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "half.h"

namespace qcompile {
namespace {

constexpr int64_t kChunk = 512;           // rows quantized at a time: bounds the scratch, costs one more read of the weight
constexpr int64_t kSmallQuantize = 32768; // elements below which quantizing rows is not worth waking threads
constexpr int64_t kSmallMultiply = 1 << 20;  // multiply-adds below which the product is not
constexpr float kSmallRow = 8.470329472543003e-22f;  // 2^-70: rows below are computed in floats

// Memory that grows to what its thread has needed and is freed with the thread.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  uint8_t* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      memory_ = nullptr;
      size_ = 0;
      if (posix_memalign(&memory_, 64, bytes) != 0) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<uint8_t*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

size_t align(size_t bytes) { return (bytes + 63) & ~size_t(63); }

// Runs work(0) … work(total - 1), each once, on as many threads as the pool has: a thread that is late takes less.
template <typename Work>
void for_each(const Parallel& parallel, int64_t total, bool worthwhile, const Work& work) {
  if (!worthwhile || total < 2) {
    for (int64_t i = 0; i < total; ++i) work(i);
    return;
  }
  struct Shared {
    const Work& work;
    int64_t total;
    std::atomic<int64_t> next{0};
  } shared{work, total};
  constexpr int64_t kThreads = 256;  // more than a pool has; those that come late find nothing left
  parallel.run(
      parallel.context,
      [](void* data, size_t) {
        Shared& mine = *static_cast<Shared*>(data);
        for (int64_t i; (i = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.total;) mine.work(i);
      },
      size_t(std::min(total, kThreads)), &shared);
}

// Activations from the order of rows k into that of `Layout::place`. codes: (depth / 4, rows, 4)
void separate(int8_t* codes, int64_t depth, int rows) {
  for (int64_t k = 0; k < depth; k += 8, codes += 8 * rows) {
    for (int r = 0; r < rows; ++r) {
      int8_t *low = codes + 4 * r, *high = low + 4 * rows;
      const int8_t even[4] = {low[0], low[2], high[0], high[2]}, odd[4] = {low[1], low[3], high[1], high[3]};
      std::memcpy(low, even, 4);
      std::memcpy(high, odd, 4);
    }
  }
}

}  // namespace

Parallel serial() {
  return {[](void*, void (*piece)(void*, size_t), size_t total, void* data) {
            for (size_t i = 0; i < total; ++i) piece(data, i);
          },
          nullptr};
}

// One product of at most kChunk rows, and where its pieces lie in the scratch.
struct PackedWeight::Job {
  const uint8_t* x;      // (m, K)
  uint8_t* y;            // (m, N)
  const uint8_t* bias;   // (N,) or nullptr
  bool half;             // of x, y and bias
  bool wide;             // of the panels: all take activations alike
  const std::vector<int64_t>* panels;
  int64_t m;
  int64_t tile_rows;     // rows of the model in a full tile
  int64_t row_units, panel_units;  // the product is cut into row_units * panel_units pieces
  int8_t* codes;         // tiles one after another
  float* scale;          // (m, groups)
  int32_t* sum;          // (m, 1 or 2, groups)
  uint8_t* in_floats;    // (m,) 1: this row is computed in floats

  int64_t element_bytes() const { return half ? 2 : 4; }
  int step() const { return wide ? 2 : 1; }
  int64_t tiles() const { return div_up(m, tile_rows); }
  int64_t rows_of(int64_t tile) const { return std::min(tile_rows, m - tile * tile_rows); }
  float x_at(int64_t index) const { return half ? half_to_float(reinterpret_cast<const uint16_t*>(x)[index])
                                                : reinterpret_cast<const float*>(x)[index]; }
};

PackedWeight::PackedWeight(const Layout& layout, const Source& source, const Kernels* kernels)
    : layout_(layout.of().pairs > kernels->pairs ? layout.expanded() : layout),
      expanded_(layout_.in_fields() ? layout_.expanded() : layout_), kernels_(kernels),
      finite_(scales_are_finite(layout, source)), packed_(weight_memory(size_t(layout_.bytes()))) {
  if (layout_.format == layout.format) {
    pack(layout_, source, packed_.get());
    return;
  }
  std::vector<uint8_t> codes(size_t(layout.bytes()));
  pack(layout, source, codes.data());
  for (int64_t panel = 0; panel < layout.panels(); ++panel) {
    kernels->expand(layout, layout_, codes.data() + panel * layout.panel_bytes(), packed_.get() + panel * layout_.panel_bytes());
  }
}

void PackedWeight::unpack(float* w) const {
  Scratch scratch;
  float* column = reinterpret_cast<float*>(scratch.reserve(size_t(layout_.k) * 4));
  for (int64_t n = 0; n < layout_.n; ++n) {
    unpack_column(layout_, packed_.get(), n, column);
    for (int64_t k = 0; k < layout_.k; ++k) w[k * layout_.n + n] = column[k];
  }
}

PanelBits::PanelBits(const Layout& layout, int activation_bits, const std::vector<int64_t>& columns_at_8) {
  std::vector<bool> wide(size_t(layout.n), activation_bits == 16);
  for (size_t i = 0; i + 1 < columns_at_8.size(); i += 2) {
    std::fill(wide.begin() + columns_at_8[i], wide.begin() + columns_at_8[i + 1], false);
  }
  for (int64_t panel = 0; panel < layout.panels(); ++panel) {
    const auto begin = wide.begin() + panel * kPanel, end = wide.begin() + std::min((panel + 1) * kPanel, layout.n);
    (std::find(begin, end, true) != end ? at_16 : at_8).push_back(panel);
  }
}

void PackedWeight::multiply(const void* x, Element element, int64_t m, void* y, const void* bias, const PanelBits& bits,
                            const Parallel& parallel) const {
  Job job{};
  job.x = static_cast<const uint8_t*>(x);
  job.y = static_cast<uint8_t*>(y);
  job.half = element == Element::kHalf;
  job.bias = static_cast<const uint8_t*>(bias);
  for (const bool wide : {false, true}) {
    job.wide = wide;
    job.panels = wide ? &bits.at_16 : &bits.at_8;
    if (!job.panels->empty()) multiply_panels(job, m, parallel);
  }
}

// All rows, a chunk at a time.
void PackedWeight::multiply_panels(const Job& whole, int64_t m, const Parallel& parallel) const {
  thread_local Scratch scratch;
  Job job = whole;
  const Product& product = kernels_->products.of[layout_.format];
  job.tile_rows = (m * job.step() < kManyRows ? product.few : product.rows) / job.step();
  const int64_t rows = std::min(m, kChunk), groups = layout_.groups();
  const size_t codes = align(size_t(rows * job.step() * layout_.padded_k())), scale = align(size_t(rows * groups) * 4),
               sum = align(size_t(rows * job.step() * groups) * 4), flags = align(size_t(rows));
  uint8_t* memory = scratch.reserve(codes + scale + sum + flags);
  job.codes = reinterpret_cast<int8_t*>(memory);
  job.scale = reinterpret_cast<float*>(memory + codes);
  job.sum = reinterpret_cast<int32_t*>(memory + codes + scale);
  job.in_floats = memory + codes + scale + sum;
  for (int64_t begin = 0; begin < m; begin += kChunk) {
    job.m = std::min(m - begin, kChunk);
    job.x = whole.x + begin * layout_.k * job.element_bytes();
    job.y = whole.y + begin * layout_.n * job.element_bytes();
    multiply_rows(job, parallel);
  }
}

void PackedWeight::multiply_rows(const Job& cut, const Parallel& parallel) const {
  Job job = cut;
  const int64_t panels = int64_t(job.panels->size()), tiles = job.tiles();
  for_each(parallel, tiles, job.m * layout_.k >= kSmallQuantize, [&](int64_t tile) { quantize_tile(job, tile); });

  // Few rows: runs of neighbouring panels, each a linear stream. Many: one panel, which stays in the cache, times all rows.
  constexpr int64_t kUnits = 16;
  job.panel_units = tiles <= 4 ? std::min(panels, kUnits) : panels;
  job.row_units = std::min(tiles, div_up(kUnits, job.panel_units));
  const bool worthwhile = job.m * layout_.k * std::min(panels * kPanel, layout_.n) >= kSmallMultiply;
  for_each(parallel, job.panel_units * job.row_units, worthwhile, [&](int64_t unit) { multiply_unit(job, unit); });

  bool any = !finite_;
  for (int64_t row = 0; row < job.m; ++row) any |= job.in_floats[row] != 0;
  if (any) for_each(parallel, panels, true, [&](int64_t i) { multiply_floats(job, (*job.panels)[size_t(i)]); });
}

void PackedWeight::quantize_tile(const Job& job, int64_t tile) const {
  thread_local Scratch scratch;
  const int64_t first = tile * job.tile_rows, count = job.rows_of(tile), groups = layout_.groups();
  const int rows = int(count) * job.step();
  int8_t* codes = job.codes + first * job.step() * layout_.padded_k();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = first + i;
    const float* x = reinterpret_cast<const float*>(job.x) + row * layout_.k;
    if (job.half) {
      float* converted = reinterpret_cast<float*>(scratch.reserve(size_t(layout_.k) * 4));
      kernels_->from_half(reinterpret_cast<const uint16_t*>(job.x) + row * layout_.k, converted, layout_.k);
      x = converted;
    }
    const float largest = kernels_->quantize(layout_, x, job.wide, int(i) * job.step(), rows, codes,
                                             job.scale + row * groups, job.sum + row * job.step() * groups);
    job.in_floats[row] = !std::isfinite(largest) || (largest < kSmallRow && largest > 0);
    if (!std::isfinite(largest)) {  // left half done
      std::memset(job.scale + row * groups, 0, size_t(groups) * 4);
      std::memset(job.sum + row * job.step() * groups, 0, size_t(job.step() * groups) * 4);
    }
  }
  if (layout_.separated()) separate(codes, layout_.padded_k(), rows);
}

void PackedWeight::multiply_unit(const Job& job, int64_t unit) const {
  thread_local Scratch scratch;
  alignas(64) float out[kMaxRows * kPanel];
  const int64_t panels = int64_t(job.panels->size()), tiles = job.tiles(), groups = layout_.groups();
  const int64_t panel_unit = unit / job.row_units, row_unit = unit % job.row_units;
  const int64_t panel_end = panels * (panel_unit + 1) / job.panel_units, tile_end = tiles * (row_unit + 1) / job.row_units;
  for (int64_t at = panels * panel_unit / job.panel_units; at < panel_end; ++at) {
    const int64_t panel = (*job.panels)[size_t(at)], column = panel * kPanel;
    const int columns = int(std::min<int64_t>(kPanel, layout_.n - column));
    float bias[kPanel] = {};
    if (job.bias && job.half) kernels_->from_half(reinterpret_cast<const uint16_t*>(job.bias) + column, bias, columns);
    if (job.bias && !job.half) std::memcpy(bias, job.bias + column * 4, size_t(columns) * 4);
    const int64_t tile_begin = tiles * row_unit / job.row_units;
    const Layout* shape = &layout_;
    const uint8_t* packed = packed_.get() + panel * layout_.panel_bytes();
    if (layout_.in_fields() && tile_end - tile_begin > 1) {  // once for all tiles
      uint8_t* expanded = scratch.reserve(size_t(expanded_.panel_bytes()));
      kernels_->expand(layout_, expanded_, packed, expanded);
      shape = &expanded_;
      packed = expanded;
    }
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const int64_t first = tile * job.tile_rows, count = job.rows_of(tile);
      const Tile activations = {job.codes + first * job.step() * layout_.padded_k(), job.scale + first * groups,
                                job.sum + first * job.step() * groups, int(count) * job.step(), job.wide,
                                tile == tile_begin && shape == &layout_};
      kernels_->products.of[shape->format].multiply(*shape, packed, activations, out);
      for (int64_t i = 0; i < count; ++i) {
        float* row = out + i * kPanel;
        if (job.bias) {
          for (int c = 0; c < columns; ++c) row[c] += bias[c];
        }
        uint8_t* y = job.y + ((first + i) * layout_.n + column) * job.element_bytes();
        if (job.half) {
          kernels_->to_half(row, reinterpret_cast<uint16_t*>(y), columns);
        } else {
          std::memcpy(y, row, size_t(columns) * 4);
        }
      }
    }
  }
}

// Rows that integers cannot hold, as the ONNX body would compute them. One panel of columns.
void PackedWeight::multiply_floats(const Job& job, int64_t panel) const {
  thread_local Scratch scratch;
  float* w = reinterpret_cast<float*>(scratch.reserve(size_t(layout_.k) * 4));
  const int64_t end = std::min(layout_.n, (panel + 1) * kPanel);
  for (int64_t n = panel * kPanel; n < end; ++n) {
    unpack_column(layout_, packed_.get(), n, w);
    for (int64_t row = 0; row < job.m; ++row) {
      if (finite_ && !job.in_floats[row]) continue;
      float total = 0.0f;
      for (int64_t k = 0; k < layout_.k && !std::isnan(total); ++k) total += job.x_at(row * layout_.k + k) * w[k];
      if (job.bias) {
        const auto* half = reinterpret_cast<const uint16_t*>(job.bias);
        total += job.half ? half_to_float(half[n]) : reinterpret_cast<const float*>(job.bias)[n];
      }
      const int64_t at = row * layout_.n + n;
      if (job.half) {
        reinterpret_cast<uint16_t*>(job.y)[at] = float_to_half(total);
      } else {
        reinterpret_cast<float*>(job.y)[at] = total;
      }
    }
  }
}

}  // namespace qcompile
