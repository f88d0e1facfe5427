// Failures of CUDA's runtime as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace qcompile::cuda {

// Throws std::runtime_error("what: CUDA's words").
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the next call must not see it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace qcompile::cuda
