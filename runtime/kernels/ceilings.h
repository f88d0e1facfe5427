// The machine's own limits, for the benchmarks to set a kernel's time against: reading memory, and int8 dot products in
// registers alone. No product calls these.
#pragma once

#include <cstdint>

#include "c_api.h"

// Seconds in which `threads` threads, each with a part of its own, read `bytes` bytes once: from the first one's begin to
// the last one's end. streams: 1 reads each part front to back, 4 its four quarters side by side; which is the faster
// depends on the machine. To measure memory, the buffer must be larger than the last level of cache. 0 for bad arguments.
QCOMPILE_EXPORT double qcompile_read_seconds(const void* buffer, int64_t bytes, int threads, int streams);

// Names of the dot-product instructions that this machine has and this build knows, slowest first, separated by commas:
// those of the kernels that use them.
QCOMPILE_EXPORT const char* qcompile_dot_names();

// int8 operations a second of `threads` threads together, measured over about `seconds`; a multiply-add counts as two.
// 0 if the name is not one of qcompile_dot_names().
QCOMPILE_EXPORT double qcompile_dot_rate(const char* name, int threads, double seconds);
