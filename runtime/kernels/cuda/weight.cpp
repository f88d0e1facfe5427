#include "weight.h"

#include <algorithm>
#include <cmath>
#include <future>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../half.h"
#include "counters.h"
#include "cublas.h"
#include "cuda_error.h"
#include "launch.h"
#include "pack.h"

namespace qcompile::cuda {
namespace {

constexpr int64_t kAlignment = 256;         // of every buffer
constexpr int64_t kStagingBytes = 64 << 20; // packed on the host at a time
constexpr int kMaxThreads = 8;              // that pack: memory gives no more

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "no CUDA device");
  return device;
}

int64_t aligned(int64_t bytes) { return round_up(bytes, kAlignment); }

// ---- The weight on the host

// A host array, copied where the source lies on a device.
class OnHost {
 public:
  OnHost(const void* data, int64_t bytes) : data_(data) {
    cudaPointerAttributes attributes{};
    if (!data) return;
    check(cudaPointerGetAttributes(&attributes, data), "cannot ask where a weight lies");
    if (attributes.type != cudaMemoryTypeDevice) return;
    copy_.resize(size_t(bytes));
    check(cudaMemcpy(copy_.data(), data, size_t(bytes), cudaMemcpyDeviceToHost), "cannot read a weight");
    data_ = copy_.data();
  }
  const void* data() const { return data_; }

 private:
  const void* data_;
  std::vector<uint8_t> copy_;
};

// Whether every weight that is not 0 is a normal number of fp16: routes that round weights to it need that. Only fp32
// scales can say otherwise; those of the other types are what the model itself computes with.
bool fits_half(const Layout& layout, const float* scales, int64_t count) {
  if (layout.element != Element::kFloat) return true;
  const float largest = 65504.0f / float((1 << layout.bits) - 1), least = std::ldexp(1.0f, -14);
  return std::all_of(scales, scales + count, [&](float scale) {
    return scale == 0 || (std::fabs(scale) >= least && std::fabs(scale) <= largest);  // false for NaN
  });
}

// Blocks [begin, end) into buffers that begin with block `begin`, by several threads.
void pack_parallel(const Layout& layout, const Source& source, int64_t begin, int64_t end, const Packed& out) {
  const int64_t threads = std::max(1, std::min<int>(kMaxThreads, int(std::thread::hardware_concurrency())));
  const int64_t each = (end - begin + threads - 1) / threads;
  std::vector<std::future<void>> parts;  // whose destructors wait
  for (int64_t first = begin; first < end; first += each) {
    parts.push_back(std::async(std::launch::async, [&layout, &source, &out, first, each, end] {
      pack_blocks(layout, source, first, std::min(end, first + each), out);
    }));
  }
  for (std::future<void>& part : parts) part.get();
}

// Whether the Hopper kernels are there and can be launched; asked before any capture.
bool hopper_ready([[maybe_unused]] const Machine& machine) {
#if defined(QCOMPILE_CUDA_HOPPER)
  return machine.architecture == 90 && allow_hopper() == cudaSuccess;
#else
  return false;
#endif
}

}  // namespace

// ---- Making a weight

DeviceWeight::DeviceWeight(const Layout& layout, const Source& source)
    : layout_(layout), device_(current_device()), machine_(this_machine()) {
  plan(1);  // throws where no kernel computes it
  check(load_row_kernels(), "cannot load kernels");
  check(allow_shared_memory(), "cannot raise the shared memory of a kernel");
  available_.hopper = hopper_ready(machine_);
  check(Counters::of_device(device_).prepare(), "cannot make counters");
  const int64_t bytes = aligned(layout.codes_bytes()) + aligned(layout.scales_bytes()) + aligned(layout.zeros_bytes());
  void* memory = nullptr;
  check(cudaMalloc(&memory, size_t(bytes)), "cannot allocate a weight");
  memory_ = static_cast<uint8_t*>(memory);
  try {
    upload(source);
  } catch (...) {
    cudaFree(memory_);
    throw;
  }
}

DeviceWeight::~DeviceWeight() { cudaFree(memory_); }

void DeviceWeight::upload(const Source& source) {
  const int64_t groups = (layout_.k + layout_.block_size - 1) / layout_.block_size, count = groups * layout_.n;
  const OnHost codes(source.codes, (layout_.k * layout_.n * layout_.bits + 7) / 8);
  const OnHost scale(source.scale, count * layout_.scale_bytes());
  const OnHost zero_point(source.zero_point, (count * layout_.bits + 7) / 8);
  const Source here = {static_cast<const uint8_t*>(codes.data()), scale.data(), source.scale_is_half,
                       static_cast<const uint8_t*>(zero_point.data()), source.is_signed};
  available_.cublas = fits_half(layout_, static_cast<const float*>(here.scale), count) && cublas_ready(device_);

  // Slices of blocks: the host never holds the whole packed weight.
  const int64_t parts[3] = {layout_.codes_bytes(), layout_.scales_bytes(), layout_.zeros_bytes()};
  const int64_t block_bytes = layout_.bytes() / layout_.blocks();
  const int64_t slice = std::min(layout_.blocks(), std::max<int64_t>(1, kStagingBytes / block_bytes));
  std::vector<uint8_t> staging(size_t(slice * block_bytes));
  for (int64_t begin = 0; begin < layout_.blocks(); begin += slice) {
    const int64_t end = std::min(layout_.blocks(), begin + slice);
    uint8_t* host[3];
    uint8_t *next = staging.data(), *device = memory_;
    for (int i = 0; i < 3; next += parts[i] / layout_.blocks() * slice, ++i) host[i] = next;
    pack_parallel(layout_, here, begin, end, {host[0], host[1], host[2], begin});
    for (int i = 0; i < 3; device += aligned(parts[i]), ++i) {
      const int64_t each = parts[i] / layout_.blocks();
      check(cudaMemcpy(device + begin * each, host[i], size_t((end - begin) * each), cudaMemcpyHostToDevice),
            "cannot copy a weight to the device");
    }
  }
  check(cudaDeviceSynchronize(), "cannot copy a weight to the device");  // copies may outlast their calls
}

// ---- Products

namespace {

// Memory for the time of one product: made, or only counted where there is no call.
class Scratch {
 public:
  explicit Scratch(const Call* call) : call_(call) {}

  void* take(int64_t bytes) {
    if (bytes == 0) return nullptr;
    total_ += aligned(bytes);
    return call_ ? call_->allocate(size_t(aligned(bytes))) : nullptr;
  }
  int64_t total() const { return total_; }

 private:
  const Call* call_;
  int64_t total_ = 0;
};

struct Buffers {
  void *prepared, *row_factor;  // of x, where it cannot be read as it lies
  void* partials;               // or the dequantized chunk
  void* workspace;              // of cuBLAS
};

Buffers take_buffers(const Layout& layout, const Plan& plan, int64_t m, bool prepares, int architecture,
                     Scratch& scratch) {
  Buffers buffers{};
  if (prepares) buffers.prepared = scratch.take(m * layout.padded_k * 2);
  if (layout.element == Element::kFloat) buffers.row_factor = scratch.take(m * 4);
  buffers.partials = scratch.take(plan.scratch_bytes);
  if (plan.route == Route::kDequantize) buffers.workspace = scratch.take(int64_t(cublas_workspace_bytes(architecture)));
  return buffers;
}

// Zeros for the CTAs that share a sum: the stream's own, or scratch that is cleared in the stream's order.
uint32_t* take_counters(const Plan& plan, int device, cudaStream_t stream, Scratch& scratch) {
  if (plan.counters == 0) return nullptr;
  if (uint32_t* own = Counters::of_device(device).of_stream(stream, plan.counters)) return own;
  void* counters = scratch.take(plan.counters * 4);
  check(cudaMemsetAsync(counters, 0, size_t(plan.counters) * 4, stream), "cannot clear counters");
  return static_cast<uint32_t*>(counters);
}

void multiply_dequantized(const Plan& plan, const Product& product, const Buffers& buffers, int device,
                          int architecture, cudaStream_t stream) {
  const Layout& layout = product.layout;
  const int64_t element = layout.element == Element::kFloat ? 4 : 2;
  for (int64_t first = 0; first < layout.n; first += plan.chunk) {
    const int64_t count = std::min(plan.chunk, layout.n - first);
    check(launch_dequantize(layout, product.codes, product.scales, product.zeros, first, count, buffers.partials,
                            stream),
          "dequantize");
    cublas_multiply(device,
                    {layout.element, product.m, count, layout.padded_k, product.x, product.x_stride, buffers.partials,
                     static_cast<uint8_t*>(product.y) + first * element, layout.n},
                    buffers.workspace, cublas_workspace_bytes(architecture), stream);
  }
  if (product.bias || product.row_factor) check(launch_finish(product, stream), "finish");
}

}  // namespace

Plan DeviceWeight::plan(int64_t m, int forced) const { return make_plan(layout_, m, machine_, available_, forced); }

size_t DeviceWeight::scratch_bytes(int64_t m, int forced) const {
  Scratch scratch(nullptr);
  for (int64_t row = 0; row < m; row += kMaxRows) {
    const int64_t rows = std::min(kMaxRows, m - row);
    const Plan made = plan(rows, forced);
    take_buffers(layout_, made, rows, !layout_.takes_x_as_it_is(), machine_.architecture, scratch);
    scratch.take(made.counters * 4);
  }
  return size_t(scratch.total());
}

void DeviceWeight::multiply(const void* x, int64_t m, void* y, const void* bias, const Call& call, int forced) const {
  if (current_device() != device_) throw std::runtime_error("the weight lies on another device than the current one");
  const int64_t element = layout_.element == Element::kFloat ? 4 : 2;
  for (int64_t row = 0; row < m; row += kMaxRows) {
    multiply_rows(static_cast<const uint8_t*>(x) + row * layout_.k * element, std::min(kMaxRows, m - row),
                  static_cast<uint8_t*>(y) + row * layout_.n * element, bias, call, forced);
  }
}

// m: at most kMaxRows
void DeviceWeight::multiply_rows(const void* x, int64_t m, void* y, const void* bias, const Call& call,
                                 int forced) const {
  const bool prepares = !layout_.takes_x_as_it_is() || reinterpret_cast<uintptr_t>(x) % 16 != 0;
  const Plan made = plan(m, forced);
  Scratch scratch(&call);
  const Buffers buffers = take_buffers(layout_, made, m, prepares, machine_.architecture, scratch);
  float* const row_factor = static_cast<float*>(buffers.row_factor);
  if (prepares) check(launch_prepare(layout_, x, m, buffers.prepared, row_factor, call.stream), "prepare");

  Product product{};
  product.layout = layout_;
  product.codes = memory_;
  product.scales = memory_ + aligned(layout_.codes_bytes());
  product.zeros = memory_ + aligned(layout_.codes_bytes()) + aligned(layout_.scales_bytes());
  product.x = prepares ? buffers.prepared : x;
  product.x_stride = layout_.padded_k;
  product.m = m;
  product.y = y;
  product.bias = bias;
  product.row_factor = row_factor;
  if (made.route == Route::kDequantize) {
    return multiply_dequantized(made, product, buffers, device_, machine_.architecture, call.stream);
  }
  product.partials = static_cast<float*>(buffers.partials);
  product.counters = take_counters(made, device_, call.stream, scratch);
  if (made.route == Route::kHopper) check(launch_hopper(made, product, call.stream), "hopper");
  else check(launch_decode(made, product, call.stream), "decode");
}

}  // namespace qcompile::cuda
