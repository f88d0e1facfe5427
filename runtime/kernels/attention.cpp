#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace qcompile {
namespace {

constexpr int64_t kRowsAtOnce = 60;    // of a tile: as many as make turning keys cheap, and stay in the nearest cache
constexpr int64_t kPart = 256;         // positions of a piece of work, where rows are few
constexpr int64_t kFewRows = 16;
constexpr int64_t kSmall = 1 << 18;    // multiply-adds that one thread computes sooner than it finds others
constexpr int64_t kStride = 16;        // widths are rounded up to the longest vector

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Numbers of the calling thread; the last call's are gone.
float* scratch(size_t count) {
  static thread_local std::vector<float> kept;
  if (kept.size() < count + kStride) kept.resize(count + kStride);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(kept.data()) + 63) / 64 * 64);  // whole cache lines
}

struct Run {
  const Attention& own;
  const Kernels& kernels;
  int64_t stride = round_up(own.width, kStride);
  int64_t row_bytes = own.width * bytes_of(own.type);
  int64_t tokens_at_once = std::max<int64_t>(1, kRowsAtOnce / own.sharing());
  int64_t tiles = (own.rows + tokens_at_once - 1) / tokens_at_once;  // of a head of the caches
  int64_t parts = 1;              // of the positions
  float* parted = nullptr;        // (batch groups parts, sharing, stride + 2), where there are several

  void append(int64_t sequence, int64_t row) const;
  void keep_past(int64_t head) const;
  void piece(int64_t index) const;
  void join(int64_t head) const;

  void numbers(const Given& given, int64_t row, int64_t head, float* to) const;
  void turn(int64_t sequence, int64_t row, float* x) const;
  void encode(const float* x, const float* scale, bool channels, int64_t group, uint8_t* to) const;
  void write(const float* sums, float sum, int64_t sequence, int64_t row, int64_t head) const;
  const float* bias_of(int64_t sequence, int64_t head, int64_t row, int64_t count, float* to) const;
};

// (width,) of a row and head as floats.
void Run::numbers(const Given& given, int64_t row, int64_t head, float* to) const {
  const int64_t first = row * given.row + head * own.width;
  if (given.half) {
    kernels.from_half(static_cast<const uint16_t*>(given.data) + first, to, own.width);
  } else {
    std::memcpy(to, static_cast<const float*>(given.data) + first, size_t(own.width) * 4);
  }
}

// Rotates (width,) by the row's position.
void Run::turn(int64_t sequence, int64_t row, float* x) const {
  if (!own.cos) return;
  const int64_t place = own.position ? own.position[sequence * own.rows + row] : own.before(sequence) + row;
  float made[2 * kMaxPairs];
  const float *cos, *sin;
  if (own.tables_half) {
    kernels.from_half(static_cast<const uint16_t*>(own.cos) + place * own.pairs, made, own.pairs);
    kernels.from_half(static_cast<const uint16_t*>(own.sin) + place * own.pairs, made + own.pairs, own.pairs);
    cos = made;
    sin = made + own.pairs;
  } else {
    cos = static_cast<const float*>(own.cos) + place * own.pairs;
    sin = static_cast<const float*>(own.sin) + place * own.pairs;
  }
  const int64_t step = own.interleaved ? 2 : 1, other = own.interleaved ? 1 : own.pairs;
  for (int64_t i = 0; i < own.pairs; ++i) {
    float &a = x[i * step], &b = x[i * step + other];
    const float turned = a * cos[i] - b * sin[i];
    b = a * sin[i] + b * cos[i];
    a = turned;
  }
}

// (width,) into a row of a cache.
void Run::encode(const float* x, const float* scale, bool channels, int64_t group, uint8_t* to) const {
  if (own.type == CacheType::kFloat) {
    std::memcpy(to, x, size_t(own.width) * 4);
  } else if (own.type == CacheType::kHalf) {
    kernels.to_half(x, reinterpret_cast<uint16_t*>(to), own.width);
  } else {
    int8_t* codes = reinterpret_cast<int8_t*>(to);
    constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to an integer
    const float* scales = channels ? scale + group * own.width : scale;
    for (int64_t i = 0; i < own.width; ++i) {
      float code = x[i] / scales[channels ? i : 0];
      code = code > -128 ? (code < 127 ? code : 127) : -128;  // a NaN becomes -128
      codes[i] = int8_t(code + kRounding - kRounding);
    }
  }
}

// The keys and values of a row behind those of the rows before.
void Run::append(int64_t sequence, int64_t row) const {
  float* x = scratch(size_t(own.width));
  const int64_t given = sequence * own.rows + row, place = own.before(sequence) + row;
  for (int64_t group = 0; group < own.groups; ++group) {
    const int64_t to = ((sequence * own.groups + group) * own.room + place) * row_bytes;
    numbers(own.key, given, group, x);
    turn(sequence, row, x);
    encode(x, own.key_scale, own.key_channels, group, own.present_key + to);
    numbers(own.value, given, group, x);
    encode(x, own.value_scale, own.value_channels, group, own.present_value + to);
  }
}

// What a head of the caches holds already, where past and present are two buffers; zeros behind what it will hold.
void Run::keep_past(int64_t head) const {
  const int64_t sequence = head / own.groups, before = own.before(sequence), held = before + own.rows;
  const auto keep = [&](const uint8_t* past, uint8_t* present) {
    if (past == present) return;
    std::memcpy(present + head * own.room * row_bytes, past + head * own.past * row_bytes, size_t(before * row_bytes));
    std::memset(present + (head * own.room + held) * row_bytes, 0, size_t((own.room - held) * row_bytes));
  };
  keep(own.past_key, own.present_key);
  keep(own.past_value, own.present_value);
}

const float* Run::bias_of(int64_t sequence, int64_t head, int64_t row, int64_t count, float* to) const {
  const int64_t plane = (own.bias_batch > 1 ? sequence : 0) * own.bias_heads + (own.bias_heads > 1 ? head : 0);
  const int64_t first = plane * own.rows + row;
  if (!own.bias_half) return static_cast<const float*>(own.bias) + first * own.bias_positions;
  kernels.from_half(static_cast<const uint16_t*>(own.bias) + first * own.bias_positions, to, count);
  return to;
}

// One tile of rows against one part of the positions.
void Run::piece(int64_t index) const {
  const int64_t part = index % parts, tile_index = index / parts % tiles, head = index / parts / tiles;
  const int64_t sequence = head / own.groups, group = head % own.groups, before = own.before(sequence);
  const int64_t token = tile_index * tokens_at_once, tokens = std::min(tokens_at_once, own.rows - token);
  const int64_t rows = own.sharing() * tokens, positions = before + token + tokens;
  AttentionTile tile{};
  tile.rows = rows;
  tile.width = own.width;
  tile.stride = stride;
  tile.keys = own.present_key + head * own.room * row_bytes;
  tile.values = own.present_value + head * own.room * row_bytes;
  tile.type = own.type;
  tile.softcap = own.softcap;
  const int64_t lowest = own.window > 0 ? std::max<int64_t>(0, before + token + 1 - own.window) : 0;
  tile.held = positions;
  tile.begin = std::max(part * kPart, lowest);
  tile.end = parts > 1 ? std::min(positions, (part + 1) * kPart) : positions;

  const int64_t half_bias = own.bias && own.bias_half ? positions : 0;
  float* room = scratch(size_t(attention_scratch(rows, stride) + rows * (2 * stride + 2 + half_bias)));
  tile.scratch = room;
  float* q = room + attention_scratch(rows, stride);
  tile.q = q;
  tile.out = q + rows * stride;
  tile.most = tile.out + rows * stride;
  tile.sum = tile.most + rows;
  float* biases = tile.sum + rows;
  std::memset(q, 0, size_t(2 * rows * stride) * 4);
  std::fill(tile.most, tile.most + rows, -std::numeric_limits<float>::infinity());
  std::fill(tile.sum, tile.sum + rows, 0.0f);
  static thread_local std::vector<int64_t> limits;
  static thread_local std::vector<const float*> bias;
  limits.resize(size_t(2 * rows));
  bias.resize(size_t(rows));
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = token + row % tokens, own_head = group * own.sharing() + row / tokens, last = before + at + 1;
    float* x = q + row * stride;
    numbers(own.query, sequence * own.rows + at, own_head, x);
    turn(sequence, at, x);
    for (int64_t i = 0; i < own.width; ++i) {
      const float code = own.key_scale ? own.key_scale[own.key_channels ? group * own.width + i : 0] : 1.0f;
      x[i] *= own.scale * code;
    }
    limits[size_t(row)] = own.window > 0 ? std::max<int64_t>(0, last - own.window) : 0;
    limits[size_t(rows + row)] = last;
    if (own.bias) bias[size_t(row)] = bias_of(sequence, own_head, at, positions, biases + row * half_bias);
  }
  tile.first = limits.data();
  tile.last = limits.data() + rows;
  if (own.bias) tile.bias = bias.data();
  if (tile.begin < tile.end) kernels.attend(tile);

  for (int64_t row = 0; row < rows; ++row) {
    float* sums = tile.out + row * stride;
    if (parts == 1) {
      write(sums, tile.sum[row], sequence, token + row % tokens, group * own.sharing() + row / tokens);
      continue;
    }
    float* to = parted + ((head * parts + part) * rows + row) * (stride + 2);
    std::memcpy(to, sums, size_t(stride) * 4);
    to[stride] = tile.most[row];
    to[stride + 1] = tile.sum[row];
  }
}

// The parts of a head of the caches, for one row of each head of queries.
void Run::join(int64_t head) const {
  const int64_t rows = own.sharing() * own.rows;
  float* whole = scratch(size_t(stride));
  for (int64_t row = 0; row < rows; ++row) {
    const auto part_of = [&](int64_t part) { return parted + ((head * parts + part) * rows + row) * (stride + 2); };
    float most = -std::numeric_limits<float>::infinity(), sum = 0;
    for (int64_t part = 0; part < parts; ++part) most = std::max(most, part_of(part)[stride]);
    std::fill(whole, whole + stride, 0.0f);
    for (int64_t part = 0; part < parts; ++part) {
      const float* x = part_of(part);
      if (x[stride + 1] == 0) continue;  // it may read none of them
      const float share = std::exp(x[stride] - most);
      sum += share * x[stride + 1];
      for (int64_t i = 0; i < own.width; ++i) whole[i] += share * x[i];
    }
    write(whole, sum, head / own.groups, row % own.rows, head % own.groups * own.sharing() + row / own.rows);
  }
}

void Run::write(const float* sums, float sum, int64_t sequence, int64_t row, int64_t head) const {
  const int64_t group = head / own.sharing(), first = ((sequence * own.rows + row) * own.heads + head) * own.width;
  const float share = sum == 0 ? 0.0f : 1.0f / sum;
  float result[kMaxWidth];
  for (int64_t i = 0; i < own.width; ++i) {
    const float code = own.value_scale ? own.value_scale[own.value_channels ? group * own.width + i : 0] : 1.0f;
    result[i] = sums[i] * share * code;
  }
  if (own.query.half) {
    kernels.to_half(result, static_cast<uint16_t*>(own.out) + first, own.width);
  } else {
    std::memcpy(static_cast<float*>(own.out) + first, result, size_t(own.width) * 4);
  }
}

template <typename Piece>
void for_all(const Parallel& parallel, bool shared, int64_t total, const Piece& piece) {
  if (!shared) {
    for (int64_t i = 0; i < total; ++i) piece(i);
    return;
  }
  const auto run = [](void* data, size_t i) { (*static_cast<const Piece*>(data))(int64_t(i)); };
  parallel.run(parallel.context, +run, size_t(total), const_cast<Piece*>(&piece));
}

}  // namespace

void attend(const Attention& attention, const Kernels& kernels, const Parallel& parallel) {
  Run run{attention, kernels};
  const int64_t heads = attention.batch * attention.groups;
  int64_t longest = 0;
  for (int64_t i = 0; i < attention.batch; ++i) longest = std::max(longest, attention.before(i) + attention.rows);
  const int64_t work = attention.batch * attention.rows * attention.heads * longest * attention.width * 2;
  const int64_t copied = attention.past_key == attention.present_key ? 0 : heads * longest * attention.width;
  for_all(parallel, copied > kSmall, heads, [&](int64_t head) { run.keep_past(head); });
  constexpr int64_t kTokens = 16;
  const int64_t tokens = attention.batch * attention.rows;
  for_all(parallel, tokens >= 2 * kTokens, (tokens + kTokens - 1) / kTokens, [&](int64_t i) {
    const int64_t last = std::min(tokens, (i + 1) * kTokens);
    for (int64_t token = i * kTokens; token < last; ++token) run.append(token / attention.rows, token % attention.rows);
  });
  // Pieces of one tile alone are put together: more rows are several tiles anyhow.
  std::vector<float> parted;
  if (attention.sharing() * attention.rows <= kFewRows && run.tiles == 1 && longest > kPart) {
    run.parts = (longest + kPart - 1) / kPart;
    parted.resize(size_t(heads * run.parts * attention.sharing() * attention.rows * (run.stride + 2)));
    run.parted = parted.data();
  }
  for_all(parallel, work > kSmall, heads * run.tiles * run.parts, [&](int64_t i) { run.piece(i); });
  if (run.parts > 1) for_all(parallel, false, heads, [&](int64_t head) { run.join(head); });
}

}  // namespace qcompile
