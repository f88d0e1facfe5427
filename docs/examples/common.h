// What the examples share: a session with qcompile's native kernels, tensors of tokens, the likeliest next one.
#pragma once

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

inline const OrtApi* api = OrtGetApiBase()->GetApi(ORT_API_VERSION);

inline void check(OrtStatus* status) {
  if (!status) return;
  std::fprintf(stderr, "ONNX Runtime: %s\n", api->GetErrorMessage(status));
  api->ReleaseStatus(status);
  std::exit(1);
}

inline OrtSession* open_session(OrtEnv* env, const char* model, const char* library) {
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

inline OrtValue* tensor(std::vector<int64_t>& values) {
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
inline int64_t likeliest(OrtValue* logits) {
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
