// The next token of a decoder without KV cache, computed by qcompile's native kernels, in ONNX Runtime's C API.
//
//   g++ -std=c++17 next_token.cpp -I HEADERS -L LIBRARIES -lonnxruntime -o next_token
//   ./next_token small/model.onnx libqcompile_kernels.so 504 3575 282
//
// HEADERS and LIBRARIES: of an ONNX Runtime release, 1.24.4 or newer. "-" for the library: the model runs all the same,
// through the portable bodies that it carries.

#include "common.h"

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
