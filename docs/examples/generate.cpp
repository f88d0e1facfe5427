// The likeliest text of a decoder with caches, each of which lies in one buffer: GroupQueryAttention writes the keys
// and values of new tokens behind the others', and nothing is copied.
//
//   g++ -std=c++17 generate.cpp -I HEADERS -L LIBRARIES -lonnxruntime -o generate
//   ./generate small/model.onnx libqcompile_kernels.so 2048 20 504 3575 282
//
// 2048: room in the buffers, in tokens. 20: tokens to generate. The rest as for next_token.cpp.

#include "common.h"

#include <numeric>
#include <string>

namespace {

struct Cache {
  std::string past, present;
  std::vector<float> memory;  // (1, heads, room, width)
  OrtValue* value;            // a view of it
};

// past_key_values.{i}.key and .value, (batch, heads, past, width) -> present.{i}.key and .value, with room
std::vector<Cache> make_caches(OrtSession* session, int64_t room) {
  OrtAllocator* allocator;
  check(api->GetAllocatorWithDefaultOptions(&allocator));
  OrtMemoryInfo* cpu;
  check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &cpu));
  size_t count;
  check(api->SessionGetInputCount(session, &count));
  std::vector<Cache> caches;
  for (size_t i = 0; i < count; ++i) {
    char* name;
    check(api->SessionGetInputName(session, i, allocator, &name));
    const std::string past = name, prefix = "past_key_values.";
    check(api->AllocatorFree(allocator, name));
    if (past.compare(0, prefix.size(), prefix) != 0) continue;
    OrtTypeInfo* type;
    check(api->SessionGetInputTypeInfo(session, i, &type));
    const OrtTensorTypeAndShapeInfo* info;
    check(api->CastTypeInfoToTensorInfo(type, &info));
    std::array<int64_t, 4> shape{};
    check(api->GetDimensions(info, shape.data(), shape.size()));
    api->ReleaseTypeInfo(type);
    shape[0] = 1, shape[2] = room;
    Cache cache{past, "present." + past.substr(prefix.size()), std::vector<float>(shape[1] * room * shape[3]), nullptr};
    check(api->CreateTensorWithDataAsOrtValue(cpu, cache.memory.data(), cache.memory.size() * sizeof(float),
                                              shape.data(), shape.size(), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                                              &cache.value));
    caches.push_back(std::move(cache));
  }
  api->ReleaseMemoryInfo(cpu);
  return caches;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) {
    std::fprintf(stderr, "usage: generate MODEL LIBRARY ROOM COUNT TOKEN…\n");
    return 2;
  }
  OrtEnv* env;
  check(api->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "generate", &env));
  OrtSession* session = open_session(env, argv[1], argv[2]);
  const int64_t room = std::atoll(argv[3]);
  const int count = std::atoi(argv[4]);
  std::vector<int64_t> fresh, mask, positions;  // tokens of the next run; 1 for each so far; where they stand
  for (int i = 5; i < argc; ++i) fresh.push_back(std::atoll(argv[i]));
  if (static_cast<int64_t>(fresh.size()) + count > room) {
    std::fprintf(stderr, "generate: %zu + %d tokens do not fit into room for %s\n", fresh.size(), count, argv[3]);
    return 1;
  }

  std::vector<Cache> caches = make_caches(session, room);
  std::vector<const char*> input_names{"input_ids", "attention_mask", "position_ids"}, output_names{"logits"};
  for (const Cache& cache : caches) {
    input_names.push_back(cache.past.c_str());
    output_names.push_back(cache.present.c_str());
  }
  for (int i = 0; i < count; ++i) {
    mask.resize(mask.size() + fresh.size(), 1);
    positions.resize(fresh.size());
    std::iota(positions.begin(), positions.end(), mask.size() - fresh.size());

    std::vector<const OrtValue*> inputs{tensor(fresh), tensor(mask), tensor(positions)};
    std::vector<OrtValue*> outputs{nullptr};  // ONNX Runtime makes the logits
    for (const Cache& cache : caches) {
      inputs.push_back(cache.value);
      outputs.push_back(cache.value);
    }
    check(api->Run(session, nullptr, input_names.data(), inputs.data(), inputs.size(), output_names.data(),
                   output_names.size(), outputs.data()));

    fresh = {likeliest(outputs[0])};
    std::printf("%lld\n", static_cast<long long>(fresh[0]));
    api->ReleaseValue(outputs[0]);
    for (int own = 0; own < 3; ++own) api->ReleaseValue(const_cast<OrtValue*>(inputs[own]));
  }

  for (const Cache& cache : caches) api->ReleaseValue(cache.value);
  api->ReleaseSession(session);
  api->ReleaseEnv(env);
}
