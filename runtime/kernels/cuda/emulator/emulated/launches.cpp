// The launches of launch.h on the emulator, with the grids and arguments of the .cu files. Over when they return.

#include <functional>
#include <mutex>

#include "../../decode.h"
#include "../../decode_epilogue.h"
#include "../../hopper.h"
#include "../../launch.h"
#include "../../rows.h"

namespace qcompile::cuda {
namespace {

int64_t width(Element element) { return element == Element::kFloat ? 4 : 2; }

void add(emulator::Globals& globals, const void* data, int64_t bytes, const char* name) {
  if (data) globals.add(data, size_t(bytes), name);
}
void add_written(emulator::Globals& globals, void* data, int64_t bytes, const char* name) {
  if (data) globals.add_written(data, size_t(bytes), name);
}
void add_weight(emulator::Globals& globals, const Layout& layout, const void* codes, const void* scales,
                const void* zeros) {
  add(globals, codes, layout.codes_bytes(), "codes");
  add(globals, scales, layout.scales_bytes(), "scales");
  add(globals, zeros, layout.zeros_bytes(), "zeros");
}

// Blocks come in another order each time. Throws emulator::Error.
cudaError_t emulate(emulator::Launch launch, emulator::Globals& globals, const std::function<void()>& kernel) {
  static std::mutex mutex;  // the emulator runs one launch at a time
  static uint64_t launches = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  launch.seed = ++launches;
  sm90::run(launch, globals, kernel);  // what it adds to emulator::run matters to the Hopper kernel alone
  return cudaSuccess;
}

// The kernel of the element type, of the three in their order.
template <typename Kernel>
Kernel of_element(Element element, Kernel half, Kernel bfloat, Kernel single) {
  return element == Element::kHalf ? half : element == Element::kBfloat16 ? bfloat : single;
}

using Decoder = void (*)(const DecodeArguments&);

template <Element element, int bits>
Decoder decoder(int tokens) {
  return tokens == 8    ? decode<element, bits, 1>
         : tokens == 16 ? decode<element, bits, 2>
         : tokens == 32 ? decode<element, bits, 4>
                        : decode<element, bits, 8>;
}

template <int bits>
Decoder decoder(Element element, int tokens) {
  return of_element(element, decoder<Element::kHalf, bits>, decoder<Element::kBfloat16, bits>,
                    decoder<Element::kFloat, bits>)(tokens);
}

using HopperKernel = void (*)(const sm90::TensorMap*, const hopper::Arguments&);

template <Element element>
HopperKernel hopper_kernel(int tokens) {
  return tokens == 64    ? hopper::product<element, 64>
         : tokens == 128 ? hopper::product<element, 128>
                         : hopper::product<element, 256>;
}

emulator::Globals globals_of(const Plan& plan, const Product& p) {
  const Layout& layout = p.layout;
  emulator::Globals globals;
  add_weight(globals, layout, p.codes, p.scales, p.zeros);
  add(globals, p.x, p.m * p.x_stride * 2, "x");
  add(globals, p.bias, layout.n * width(layout.element), "bias");
  add(globals, p.row_factor, p.m * 4, "row_factor");
  add_written(globals, p.y, p.m * layout.n * width(layout.element), "y");
  add_written(globals, p.partials, plan.scratch_bytes, "partials");
  add_written(globals, p.counters, plan.counters * 4, "counters");
  return globals;
}

}  // namespace

cudaError_t allow_shared_memory() { return cudaSuccess; }
cudaError_t allow_hopper() { return cudaSuccess; }
cudaError_t load_row_kernels() { return cudaSuccess; }

cudaError_t launch_decode(const Plan& plan, const Product& p, cudaStream_t) {
  const Layout& layout = p.layout;
  const DecodeArguments arguments = decode_arguments(plan, p);
  emulator::Globals globals = globals_of(plan, p);
  const Decoder kernel = (layout.bits == 4 ? decoder<4> : decoder<8>)(layout.element, plan.tokens);
  const emulator::Index grid = {int(plan.grid_n), plan.split, int(plan.grid_m)};
  return emulate({grid, plan.threads, int(plan.shared_bytes)}, globals, [&] { kernel(arguments); });
}

cudaError_t launch_hopper(const Plan& plan, const Product& p, cudaStream_t) {
  const Layout& layout = p.layout;
  if (!hopper::supports(layout)) return cudaErrorInvalidValue;
  const sm90::TensorMap map = {p.x, layout.padded_k, p.m, p.x_stride * 2, kStepK, plan.tokens};
  const hopper::Arguments arguments = hopper::arguments_of(p);
  emulator::Globals globals = globals_of(plan, p);
  const HopperKernel kernel = layout.element == Element::kHalf ? hopper_kernel<Element::kHalf>(plan.tokens)
                                                               : hopper_kernel<Element::kBfloat16>(plan.tokens);
  const emulator::Index grid = {int(plan.grid_n), plan.split, int(plan.grid_m)};
  return emulate({grid, hopper::kThreads, int(hopper::shared_bytes(plan.tokens))}, globals,
                 [&] { kernel(&map, arguments); });
}

cudaError_t launch_prepare(const Layout& layout, const void* x, int64_t m, void* prepared, float* row_factor,
                           cudaStream_t) {
  emulator::Globals globals;
  add(globals, x, m * layout.k * width(layout.element), "x");
  add_written(globals, prepared, m * layout.padded_k * 2, "prepared");
  add_written(globals, row_factor, m * 4, "row_factor");
  const auto kernel = of_element(layout.element, prepare_row<Element::kHalf>, prepare_row<Element::kBfloat16>,
                                 prepare_row<Element::kFloat>);
  return emulate({{int(m), 1, 1}, kRowThreads, kPrepareShared}, globals,
                 [&] { kernel(layout, x, prepared, row_factor); });
}

cudaError_t launch_dequantize(const Layout& layout, const void* codes, const void* scales, const void* zeros,
                              int64_t first, int64_t count, void* out, cudaStream_t) {
  emulator::Globals globals;
  add_weight(globals, layout, codes, scales, zeros);
  add_written(globals, out, count * layout.padded_k * 2, "out");
  const auto kernel = of_element(layout.element, dequantize_step<Element::kHalf>, dequantize_step<Element::kBfloat16>,
                                 dequantize_step<Element::kFloat>);
  const emulator::Index grid = {int(layout.steps()), int(round_up(count, kBlockN) / kBlockN), 1};
  return emulate({grid, kDequantizeThreads, kDequantizeShared}, globals,
                 [&] { kernel(layout, codes, scales, zeros, first, count, out); });
}

cudaError_t launch_finish(const Product& p, cudaStream_t) {
  const Layout& layout = p.layout;
  emulator::Globals globals;
  add(globals, p.bias, layout.n * width(layout.element), "bias");
  add(globals, p.row_factor, p.m * 4, "row_factor");
  add_written(globals, p.y, p.m * layout.n * width(layout.element), "y");
  const auto kernel = of_element(layout.element, finish_row<Element::kHalf>, finish_row<Element::kBfloat16>,
                                 finish_row<Element::kFloat>);
  return emulate({{int(p.m), 1, 1}, kRowThreads, 0}, globals, [&] { kernel(layout.n, p.y, p.row_factor, p.bias); });
}

}  // namespace qcompile::cuda
