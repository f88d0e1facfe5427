// The next token of a decoder without KV cache, computed by qcompile's native kernels, in ONNX Runtime's C API.
//
//   g++ -std=c++17 next_token.cpp -I HEADERS -L LIBRARIES -lonnxruntime -o next_token
//   ./next_token small/model.onnx libqcompile_kernels.so 504 3575 282
//
// HEADERS and LIBRARIES: of an ONNX Runtime release, 1.24.4 or newer. "-" for the library: the model runs all the same,
// through the portable bodies that it carries.

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

const OrtApi* api = OrtGetApiBase()->GetApi(ORT_API_VERSION);

void check(OrtStatus* status) {
  if (!status) return;
  std::fprintf(stderr, "next_token: %s\n", api->GetErrorMessage(status));
  api->ReleaseStatus(status);
  std::exit(1);
}

OrtSession* open_session(OrtEnv* env, const char* model, const char* library) {
  OrtSessionOptions* options;
  check(api->CreateSessionOptions(&options));
  check(api->SetIntraOpNumThreads(options, 2));  // the native kernels share ONNX Runtime's own pool
  if (std::strcmp(library, "-") != 0) {
    // Once for each SessionOptions. ONNX Runtime closes the library with the last session that uses it.
    check(api->RegisterCustomOpsLibrary_V2(options, library));
  } else {
    // The bodies become MatMulNBits, which rounds activations to 8 bits unless it is told not to.
    check(api->AddSessionConfigEntry(options, "session.qdq_matmulnbits_accuracy_level", "0"));
  }
  OrtSession* session;
  check(api->CreateSession(env, model, options, &session));
  api->ReleaseSessionOptions(options);
  return session;
}

OrtValue* tensor(std::vector<int64_t>& values) {
  const std::array<int64_t, 2> shape{1, static_cast<int64_t>(values.size())};
  OrtMemoryInfo* memory;
  check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  OrtValue* value;  // a view of `values`
  check(api->CreateTensorWithDataAsOrtValue(memory, values.data(), values.size() * sizeof(int64_t), shape.data(),
                                            shape.size(), ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &value));
  api->ReleaseMemoryInfo(memory);
  return value;
}

// logits (1, tokens, vocabulary) -> the likeliest token behind the last one
int64_t likeliest(OrtValue* logits) {
  OrtTensorTypeAndShapeInfo* info;
  check(api->GetTensorTypeAndShape(logits, &info));
  std::array<int64_t, 3> shape{};
  check(api->GetDimensions(info, shape.data(), shape.size()));
  api->ReleaseTensorTypeAndShapeInfo(info);
  void* data;
  check(api->GetTensorMutableData(logits, &data));
  const float* last = static_cast<const float*>(data) + (shape[1] - 1) * shape[2];
  return std::max_element(last, last + shape[2]) - last;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: next_token MODEL LIBRARY TOKEN…\n");
    return 2;
  }
  OrtEnv* env;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "next_token", &env));
  OrtSession* session = open_session(env, argv[1], argv[2]);

  std::vector<int64_t> ids;
  for (int i = 3; i < argc; ++i) ids.push_back(std::atoll(argv[i]));
  std::vector<int64_t> mask(ids.size(), 1);
  const std::array<const char*, 2> input_names{"input_ids", "attention_mask"};
  const std::array<const char*, 1> output_names{"logits"};
  const std::array<const OrtValue*, 2> inputs{tensor(ids), tensor(mask)};
  OrtValue* logits = nullptr;
  check(api->Run(session, nullptr, input_names.data(), inputs.data(), inputs.size(), output_names.data(), 1, &logits));
  std::printf("%lld\n", static_cast<long long>(likeliest(logits)));

  api->ReleaseValue(logits);
  for (const OrtValue* input : inputs) api->ReleaseValue(const_cast<OrtValue*>(input));
  api->ReleaseSession(session);
  api->ReleaseEnv(env);
}
