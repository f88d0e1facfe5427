// The words of the last failure, behind qcompile_cuda_error().
#pragma once

#include <string>

namespace qcompile::cuda {

// Keeps `message` for the calling thread; an empty one clears it.
void set_error(const std::string& message);

}  // namespace qcompile::cuda
