// What host and device code share: no CUDA header, so that g++ compiles it for the tests too.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define KUNBR_HD __host__ __device__ __forceinline__
#define KUNBR_UNROLL _Pragma("unroll")
#else
#define KUNBR_HD inline
#define KUNBR_UNROLL
#endif

namespace kunbr {

KUNBR_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
KUNBR_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace kunbr
