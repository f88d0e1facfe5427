// Attention over caches against float64, every buffer ending at a page that may not be touched.
#pragma once

#include <memory>

#include "attention.h"
#include "check_data.h"

namespace check {

using namespace qcompile;

// One run, and what it is to give. lengths: positions that each sequence will have.
struct AttentionCase {
  std::vector<int64_t> lengths;
  int64_t rows, groups, sharing, width;
  CacheType type;
  bool half;
  int64_t window;
  float softcap;

  int64_t room() const { return *std::max_element(lengths.begin(), lengths.end()) + 2; }
  int64_t past() const { return room() - 2 - rows; }
  std::string name() const {
    return "attention of " + std::to_string(lengths.size()) + " x " + std::to_string(rows) + " rows behind " +
           std::to_string(past()) + ", " + std::to_string(groups) + " x " + std::to_string(sharing) + " heads of " +
           std::to_string(width) + ", caches " + std::to_string(int(type));
  }
};

class AttentionRun {
 public:
  AttentionRun(const AttentionCase& own, uint64_t seed)
      : own_(own),
        batch_(int64_t(own.lengths.size())),
        heads_(own.groups * own.sharing),
        given_(own.half ? 0 : batch_ * own.rows * (heads_ + 2 * own.groups) * own.width),
        halves_(own.half ? batch_ * own.rows * (heads_ + 2 * own.groups) * own.width : 0),
        out_(batch_ * own.rows * heads_ * own.width * (own.half ? 2 : 4)),
        scale_(own.groups * own.width),
        last_(batch_) {
    Random random(seed);
    numbers_.resize(size_t(batch_ * own.rows * (heads_ + 2 * own.groups) * own.width));
    for (size_t i = 0; i < numbers_.size(); ++i) {
      const float x = float(random.normal());
      if (own.half) halves_[int64_t(i)] = float_to_half(x);
      else given_[int64_t(i)] = x;
      numbers_[i] = own.half ? half_to_float(halves_[int64_t(i)]) : x;
    }
    for (int64_t i = 0; i < scale_.size(); ++i) scale_[i] = 0.01f + 0.02f * float(random.uniform());
    for (auto* cache : {&past_[0], &past_[1]}) {
      cache->reset(new Guarded<uint8_t>(batch_ * own.groups * own.past() * own.width * bytes_of(own.type)));
      for (int64_t i = 0; i < (*cache)->size() / bytes_of(own.type); ++i) put((*cache)->data(), i, float(random.normal()));
    }
    for (auto* cache : {&present_[0], &present_[1]}) {
      cache->reset(new Guarded<uint8_t>(batch_ * own.groups * own.room() * own.width * bytes_of(own.type)));
    }
    for (int64_t i = 0; i < batch_; ++i) last_[i] = int32_t(own.lengths[size_t(i)] - 1);
  }

  void run(const Kernels* kernels, const Parallel& parallel) {
    const int64_t wide = (heads_ + 2 * own_.groups) * own_.width;
    const uint8_t* first = own_.half ? reinterpret_cast<const uint8_t*>(halves_.data()) : reinterpret_cast<const uint8_t*>(given_.data());
    const int64_t bytes = own_.half ? 2 : 4;
    Attention a{};
    a.batch = batch_;
    a.rows = own_.rows;
    a.heads = heads_;
    a.groups = own_.groups;
    a.width = own_.width;
    a.query = {first, wide, own_.half};
    a.key = {first + heads_ * own_.width * bytes, wide, own_.half};
    a.value = {first + (heads_ + own_.groups) * own_.width * bytes, wide, own_.half};
    a.type = own_.type;
    a.past_key = past_[0]->data();
    a.past_value = past_[1]->data();
    a.present_key = present_[0]->data();
    a.present_value = present_[1]->data();
    a.past = own_.past();
    a.room = own_.room();
    a.last = last_.data();
    a.prompt = own_.past() == 0;
    a.scale = 0.2f;
    a.softcap = own_.softcap;
    a.window = own_.window;
    if (own_.type == CacheType::kInt8) {
      a.key_scale = a.value_scale = scale_.data();
      a.key_channels = a.value_channels = true;
    }
    a.out = out_.data();
    attend(a, *kernels, parallel);
  }

  // One number of a cache, which the first sequence reads, is not what it was.
  void sabotage() {
    const int64_t bytes = bytes_of(own_.type);
    past_[1]->data()[past_[1]->size() / 8 / bytes * bytes + bytes - 1] ^= 0x40;
  }

  // The largest errors of what is appended, in steps of its type, and of the result.
  double worst_appended() const {
    double worst = 0;
    each_row([&](int64_t sequence, int64_t row, int64_t before) {
      for (int64_t group = 0; group < own_.groups; ++group) {
        for (int64_t i = 0; i < own_.width; ++i) {
          for (int which : {0, 1}) {
            const double x = given(sequence, row, heads_ + which * own_.groups + group, i);
            const double step = own_.type == CacheType::kFloat  ? 1e-30
                                : own_.type == CacheType::kHalf ? std::fabs(x) / 1024 + 1e-7
                                                                : scale_[group * own_.width + i];
            const double limit = own_.type == CacheType::kInt8 ? std::fmin(std::fmax(x, -128 * step), 127 * step) : x;
            worst = std::fmax(worst, std::fabs(cached(which, sequence, group, before + row, i) - limit) / step);
          }
        }
      }
    });
    return worst;
  }

  double worst_result() const {
    double worst = 0;
    each_row([&](int64_t sequence, int64_t row, int64_t before) {
      for (int64_t head = 0; head < heads_; ++head) {
        const std::vector<double> wanted = expected(sequence, row, before, head);
        for (int64_t i = 0; i < own_.width; ++i) {
          worst = std::fmax(worst, std::fabs(result(sequence, row, head, i) - wanted[size_t(i)]));
        }
      }
    });
    return worst;
  }

 private:
  template <typename Row>
  void each_row(const Row& row) const {
    for (int64_t sequence = 0; sequence < batch_; ++sequence) {
      const int64_t before = own_.past() == 0 ? 0 : own_.lengths[size_t(sequence)] - own_.rows;
      for (int64_t r = 0; r < std::min(own_.rows, own_.lengths[size_t(sequence)] - before); ++r) row(sequence, r, before);
    }
  }
  double given(int64_t sequence, int64_t row, int64_t head, int64_t i) const {
    return numbers_[size_t(((sequence * own_.rows + row) * (heads_ + 2 * own_.groups) + head) * own_.width + i)];
  }
  double result(int64_t sequence, int64_t row, int64_t head, int64_t i) const {
    const int64_t at = ((sequence * own_.rows + row) * heads_ + head) * own_.width + i;
    return own_.half ? half_to_float(reinterpret_cast<const uint16_t*>(out_.data())[at])
                     : reinterpret_cast<const float*>(out_.data())[at];
  }
  void put(uint8_t* cache, int64_t i, float x) const {
    if (own_.type == CacheType::kFloat) std::memcpy(cache + 4 * i, &x, 4);
    if (own_.type == CacheType::kHalf) reinterpret_cast<uint16_t*>(cache)[i] = float_to_half(x);
    if (own_.type == CacheType::kInt8) reinterpret_cast<int8_t*>(cache)[i] = int8_t(std::fmax(-128, std::fmin(127, x * 40)));
  }
  double cached(int which, int64_t sequence, int64_t group, int64_t position, int64_t i) const {
    const int64_t at = ((sequence * own_.groups + group) * own_.room() + position) * own_.width + i;
    const uint8_t* cache = present_[which]->data();
    if (own_.type == CacheType::kFloat) return reinterpret_cast<const float*>(cache)[at];
    if (own_.type == CacheType::kHalf) return half_to_float(reinterpret_cast<const uint16_t*>(cache)[at]);
    return reinterpret_cast<const int8_t*>(cache)[at] * double(scale_[group * own_.width + i]);
  }
  // By the past as it was given, whatever was copied.
  double held(int which, int64_t sequence, int64_t group, int64_t position, int64_t before, int64_t i) const {
    if (position >= before) return cached(which, sequence, group, position, i);
    const int64_t at = ((sequence * own_.groups + group) * own_.past() + position) * own_.width + i;
    const double code = own_.type == CacheType::kInt8 ? scale_[group * own_.width + i] : 1.0;
    return kept_[size_t(which)][size_t(at)] * code;
  }
  std::vector<double> expected(int64_t sequence, int64_t row, int64_t before, int64_t head) const {
    const int64_t last = before + row + 1, first = own_.window > 0 ? std::max<int64_t>(0, last - own_.window) : 0;
    const int64_t group = head / own_.sharing;
    std::vector<double> scores, sums(size_t(own_.width), 0.0);
    for (int64_t position = first; position < last; ++position) {
      double score = 0;
      for (int64_t i = 0; i < own_.width; ++i) score += given(sequence, row, head, i) * held(0, sequence, group, position, before, i);
      score *= 0.2f;
      scores.push_back(own_.softcap > 0 ? own_.softcap * std::tanh(score / own_.softcap) : score);
    }
    const double most = *std::max_element(scores.begin(), scores.end());
    double total = 0;
    for (double& score : scores) total += score = std::exp(score - most);
    for (int64_t position = first; position < last; ++position) {
      for (int64_t i = 0; i < own_.width; ++i) {
        sums[size_t(i)] += scores[size_t(position - first)] / total * held(1, sequence, group, position, before, i);
      }
    }
    return sums;
  }

 public:
  // The past as floats, before anything runs or is sabotaged.
  void keep() {
    for (size_t which : {size_t(0), size_t(1)}) {
      const int64_t count = past_[which]->size() / bytes_of(own_.type);
      kept_[which].resize(size_t(count));
      for (int64_t i = 0; i < count; ++i) {
        const uint8_t* cache = past_[which]->data();
        kept_[which][size_t(i)] = own_.type == CacheType::kFloat  ? reinterpret_cast<const float*>(cache)[i]
                                  : own_.type == CacheType::kHalf ? half_to_float(reinterpret_cast<const uint16_t*>(cache)[i])
                                                                  : reinterpret_cast<const int8_t*>(cache)[i];
      }
    }
  }

 private:
  const AttentionCase& own_;
  int64_t batch_, heads_;
  Guarded<float> given_;
  Guarded<uint16_t> halves_;
  Guarded<uint8_t> out_;
  Guarded<float> scale_;
  Guarded<int32_t> last_;
  std::unique_ptr<Guarded<uint8_t>> past_[2], present_[2];
  std::vector<float> numbers_;
  std::vector<double> kept_[2];
};

// Prompts of padded sequences, steps behind others of any length, rows behind cached ones; every width, in and out of vectors.
inline std::vector<AttentionCase> attentions() {
  std::vector<AttentionCase> all;
  for (CacheType type : {CacheType::kFloat, CacheType::kHalf, CacheType::kInt8}) {
    for (int64_t width : {8, 24, 64, 80}) {
      for (bool half : {false, true}) {
        all.push_back({{70, 33}, 70, 2, 3, width, type, half, 0, 0});
        all.push_back({{300, 2, 65}, 1, 1, width == 64 ? 7 : 2, width, type, half, width == 24 ? 20 : 0, 0});
        all.push_back({{90}, 21, 2, 1, width, type, half, 0, width == 80 ? 4.0f : 0});
      }
    }
  }
  return all;
}

}  // namespace check
