// Memory of packed weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace qcompile {

// So many bytes, at a multiple of 4096. Throws std::bad_alloc. Safe to call from several threads at once.
// Where the system has huge pages for those who ask (Linux), weights lie one after another in slabs of them, which go
// with their last weight: a product with few rows streams weights, and took up to 1.3 times as long on ordinary pages,
// by chance of where these lay. Elsewhere, and under AddressSanitizer, which is to see what is read behind a weight's
// end, each has memory of its own.
std::shared_ptr<uint8_t> weight_memory(size_t bytes);

}  // namespace qcompile
