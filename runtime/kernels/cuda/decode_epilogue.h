// What the decode kernel does with its sums: adds those of warps and of CTAs in a fixed order, and writes y.
#pragma once

#include "decode.h"

namespace qcompile::cuda {

template <Element element, int bits, int MT>
struct Epilogue {
  using Kernel = Decode<element, bits, MT>;
  static constexpr int kColumns = Kernel::kBlocks * kBlockN;
  static constexpr int kRound = MT < 2 ? MT : 2;         // 8-token tiles that pass through shared memory at a time
  static constexpr int kTokenStride = (kBlockN + 4) * 4; // bytes; 4 floats more than the columns: no bank meets twice
  static constexpr int kWarp = 8 * kRound * kTokenStride;
  static_assert(Kernel::kBlocks * kUnitSteps * kWarp <= Kernel::kStage, "sums of warps take at most a stage");

  const DecodeArguments& a;
  const Kernel& kernel;
  typename Kernel::Place own;
  uint32_t shared;
  int column, token;  // of this thread: four columns from here on, tokens 8 apart

  QCOMPILE_DEVICE explicit Epilogue(const Kernel& of) : a(of.a), kernel(of), own(Kernel::place()), shared(of.shared) {
    column = own.thread % (kColumns / 4) * 4;
    token = own.thread / (kColumns / 4);
  }

  QCOMPILE_DEVICE int first_column() const { return block_x() * kColumns + column; }
  QCOMPILE_DEVICE int first_row() const { return block_z() * Kernel::kTokens; }

  // C fragments of tokens of this round: [block][wk][token][64 columns]
  QCOMPILE_DEVICE void store_sums(int round) const {
    const int warp = own.wn * kUnitSteps + own.wk, g = own.lane / 4, t = own.lane % 4;
    const uint32_t to = shared + uint32_t(warp * kWarp + 2 * t * kTokenStride + g * 4);
    QCOMPILE_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      QCOMPILE_UNROLL
      for (int i = 0; i < 4 * kRound; ++i) {
        const int m = i / 4, row = i % 4 / 2 * 8, next = i % 2;
        store_shared(to + uint32_t((m * 8 + next) * kTokenStride + (tile * kTile + row) * 4),
                     as_bits(kernel.sums[tile][round * kRound + m][i % 4]));
      }
    }
  }

  // The sum of the four warps for four columns of a token of this round, in order of k.
  QCOMPILE_DEVICE void add_warps(int round_token, float (&v)[4]) const {
    const uint32_t from = shared + uint32_t(column / kBlockN * kUnitSteps * kWarp + round_token * kTokenStride +
                                            column % kBlockN * 4);
    v[0] = v[1] = v[2] = v[3] = 0;
    QCOMPILE_UNROLL
    for (int wk = 0; wk < kUnitSteps; ++wk) add(load_shared_4(from + uint32_t(wk * kWarp)), v);
  }

  static QCOMPILE_DEVICE void add(const Words4& words, float (&v)[4]) {
    v[0] += as_float(words.x), v[1] += as_float(words.y), v[2] += as_float(words.z), v[3] += as_float(words.w);
  }

  static QCOMPILE_DEVICE uint16_t bits_of(float value) {
    return element == Element::kBfloat16 ? bfloat_bits(value) : half_bits(value);
  }

  // y of four columns: * row_factor + bias, rounded to the element. Columns behind n are never touched.
  QCOMPILE_DEVICE void finish(int row, const float (&v)[4]) const {
    const int first = first_column();
    const float factor = a.row_factor ? load_global(a.row_factor + row) : 1.0f;
    float out[4];
    QCOMPILE_UNROLL
    for (int i = 0; i < 4; ++i) {
      out[i] = v[i] * factor;
      if (a.bias && first + i < a.n) out[i] += bias(first + i);
    }
    const int64_t at = int64_t(row) * a.n + first;
    constexpr uintptr_t width = element == Element::kFloat ? 4 : 2;
    if (a.n % 4 == 0 && reinterpret_cast<uintptr_t>(a.y) % (4 * width) == 0) {  // so are then all groups of four
      if (first < a.n) store_four(at, out);
      return;
    }
    QCOMPILE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (first + i < a.n) store_one(at + i, out[i]);
    }
  }

  QCOMPILE_DEVICE float bias(int n) const {
    if constexpr (element == Element::kFloat) {
      return load_global(static_cast<const float*>(a.bias) + n);
    } else {
      const uint16_t value = load_global(static_cast<const uint16_t*>(a.bias) + n);
      return element == Element::kBfloat16 ? bfloat_number(value) : half_number(value);
    }
  }

  QCOMPILE_DEVICE void store_four(int64_t at, const float (&out)[4]) const {
    if constexpr (element == Element::kFloat) {
      store_global(reinterpret_cast<Words4*>(static_cast<float*>(a.y) + at),
                   Words4{as_bits(out[0]), as_bits(out[1]), as_bits(out[2]), as_bits(out[3])});
    } else {
      const Words2 words = {bits_of(out[0]) | uint32_t(bits_of(out[1])) << 16,
                            bits_of(out[2]) | uint32_t(bits_of(out[3])) << 16};
      store_global(reinterpret_cast<Words2*>(static_cast<uint16_t*>(a.y) + at), words);
    }
  }

  QCOMPILE_DEVICE void store_one(int64_t at, float out) const {
    if constexpr (element == Element::kFloat) store_global(static_cast<float*>(a.y) + at, out);
    else store_global(static_cast<uint16_t*>(a.y) + at, bits_of(out));
  }

  // ---- Sums that CTAs share

  QCOMPILE_DEVICE float* partial(int share, int row) const {
    const int64_t rows = int64_t(grid_z()) * Kernel::kTokens;
    return a.partials + (share * rows + row) * a.padded_n + first_column();
  }

  QCOMPILE_DEVICE void store_partial(int row, const float (&v)[4]) const {
    if (first_column() >= a.padded_n) return;
    store_global(reinterpret_cast<Words4*>(partial(block_y(), row)),
                 Words4{as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3])});
  }

  // Whether this CTA is the last of those that share its tile; all threads get the same answer.
  QCOMPILE_DEVICE bool is_last() const {
    thread_fence();  // what this thread stored is seen before the counter is
    block_barrier();
    if (own.thread == 0) {
      uint32_t* counter = a.counters + block_z() * grid_x() + block_x();
      const bool last = atomic_increment(counter) == uint32_t(grid_y() - 1);
      if (last) store_global(counter, 0u);  // for the next product; nobody else will come
      store_shared(shared, last);
      thread_fence();
    }
    block_barrier();
    return load_shared(shared) != 0;
  }

  // All shares in order of k, whoever finished when: the same bits every time.
  QCOMPILE_DEVICE void add_shares() const {
    if (first_column() >= a.padded_n) return;
    float v[MT][4] = {};
    for (int share = 0; share < grid_y(); ++share) {
      QCOMPILE_UNROLL
      for (int m = 0; m < MT; ++m) {
        const int row = first_row() + m * 8 + token;
        if (row < a.m) add(load_global_written(partial(share, row)), v[m]);
      }
    }
    QCOMPILE_UNROLL
    for (int m = 0; m < MT; ++m) {
      const int row = first_row() + m * 8 + token;
      if (row < a.m) finish(row, v[m]);
    }
  }

  QCOMPILE_DEVICE void run() const {
    const bool shared_sum = grid_y() > 1;
    QCOMPILE_UNROLL
    for (int round = 0; round < MT / kRound; ++round) {
      if (round) block_barrier();  // the sums of the round before have been read
      store_sums(round);
      block_barrier();
      QCOMPILE_UNROLL
      for (int i = 0; i < kRound; ++i) {
        const int row = first_row() + (round * kRound + i) * 8 + token;
        float v[4];
        add_warps(i * 8 + token, v);
        if (row >= a.m) continue;
        if (shared_sum) store_partial(row, v);
        else finish(row, v);
      }
    }
    if (shared_sum && is_last()) add_shares();
  }
};

// The kernel.
template <Element element, int bits, int MT>
QCOMPILE_DEVICE void decode(const DecodeArguments& arguments) {
  Decode<element, bits, MT> kernel(arguments);
  kernel.multiply();
  Epilogue<element, bits, MT>(kernel).run();
}

}  // namespace qcompile::cuda
