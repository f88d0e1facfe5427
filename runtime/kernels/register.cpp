// The library's entry point for ONNX Runtime.

#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "c_api.h"
#include "kernels.h"
#include "operators.h"

#if defined(QCOMPILE_CUDA)
#include "cuda/c_api.h"
#include "cuda/operators.h"
#endif

namespace qcompile {
namespace {

using namespace ort;

constexpr const char* kDomain = "qcompile";

// The domain of one ONNX Runtime. Sessions point into it, so it lives as long as the library.
struct Registration {
  const OrtApi* api;
  std::vector<Operator> operators;
  std::vector<LightOperator> light;
  OrtCustomOpDomain* domain;
};

// Of every provider that the library was built for. ONNX Runtime leaves those of providers that a session lacks alone.
std::vector<Operator> operators_of_all_providers(const OrtApi& api) {
  std::vector<Operator> all = operators(api);
#if defined(QCOMPILE_CUDA)
  for (const Operator& op : cuda::cuda_operators(api)) all.push_back(op);
#endif
  return all;
}

// They have no kernel on a GPU, where their bodies run: one on the CPU in the midst of a graph would have its input and output
// copied. A library does not know which provider a session will ask for.
std::vector<LightOperator> light_operators_here(const OrtApi& api) {
#if defined(QCOMPILE_CUDA)
  if (qcompile_cuda_devices() > 0) return {};
#endif
  std::vector<LightOperator> all = light_operators(api);
  for (const LightOperator& op : attention_operators(api)) all.push_back(op);
  return all;
}

// Finds or makes the domain for this ONNX Runtime (a process may have more than one).
OrtStatus* domain_for(const OrtApi& api, OrtCustomOpDomain** out) {
  static std::mutex mutex;
  static auto& known = *new std::vector<std::unique_ptr<Registration>>;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& registration : known) {
    if (registration->api == &api) {
      *out = registration->domain;
      return nullptr;
    }
  }
  auto made = std::make_unique<Registration>(Registration{
      &api, operators_of_all_providers(api), light_operators_here(api), nullptr});
  if (OrtStatus* status = api.call<CreateCustomOpDomain>(kDomain, &made->domain)) return status;
  for (const Operator& op : made->operators) {
    if (OrtStatus* status = api.call<CustomOpDomain_Add>(made->domain, &op)) return status;
  }
  for (const LightOperator& op : made->light) {
    if (OrtStatus* status = api.call<CustomOpDomain_Add>(made->domain, &op)) return status;
  }
  *out = made->domain;
  known.push_back(std::move(made));
  return nullptr;
}

OrtStatus* register_operators(OrtSessionOptions* options, const OrtApi& api) {
  if (!chosen_kernels()) {
    const std::string message = std::string("QCOMPILE_KERNEL names no instruction set of this library and machine; ") +
                                "it may be " + kernel_names() + ", or unset for the fastest";
    return api.call<CreateStatus>(ORT_INVALID_ARGUMENT, message.c_str());
  }
  OrtCustomOpDomain* domain;
  if (OrtStatus* status = domain_for(api, &domain)) return status;
  return api.call<AddCustomOpDomain>(options, domain);
}

}  // namespace
}  // namespace qcompile

QCOMPILE_EXPORT qcompile::ort::OrtStatus* RegisterCustomOps(qcompile::ort::OrtSessionOptions* options,
                                                             const qcompile::ort::OrtApiBase* base) {
  using namespace qcompile::ort;
  const OrtApi* api = base->GetApi(kApiVersion);
  if (!api) {
    return base->GetApi(1)->call<CreateStatus>(ORT_FAIL, "qcompile needs ONNX Runtime 1.24.4 or newer");
  }
  try {
    return qcompile::register_operators(options, *api);
  } catch (const std::bad_alloc&) {
    return api->call<CreateStatus>(ORT_FAIL, "qcompile: out of memory");
  }
}
