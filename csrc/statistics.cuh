// A statistic of tiles of dW in accumulators, acc[MT][NT][4] in the layout of fragments.h. Which statistic is a
// run-time value: once a tile all threads branch alike, and each branch is a loop over the accumulators of its own.
#pragma once

#include "common.h"
#include "fragments.h"
#include "kunbr.h"
#if defined(KUNBR_EMULATED)
#include "tests/gpu_emulator.h"
#else
#include "instructions.cuh"
#endif

namespace kunbr {

constexpr unsigned ALL_LANES = ~0u;

// Statistic S of the values x: sums, or the largest as an integer: the order of non-negative floats, with NaN on top,
// where a float maximum would drop it.
template <int S>
__device__ __forceinline__ float term(float x) {
    return S == 0 ? fabsf(x) : S == 1 ? x * x : fabsf(x);
}
template <int S>
__device__ __forceinline__ float join(float a, float b) {
    if (S < 2) return a + b;
    return __int_as_float(max(__float_as_int(a), __float_as_int(b)));
}
__device__ __forceinline__ float join(int s, float a, float b) { return s < 2 ? join<0>(a, b) : join<2>(a, b); }

// Statistic S of one of a thread's rows, over its columns of the tile: acc[mt], upper (h = 0) or lower half.
template <int S, int NT>
__device__ __forceinline__ float row_statistic(const float (&acc)[NT][4], int h) {
    float sum = term<S>(acc[0][2 * h]);
    KUNBR_UNROLL
    for (int i = 1; i < 2 * NT; ++i) sum = join<S>(sum, term<S>(acc[i / 2][2 * h + i % 2]));
    return sum;
}

// The four lanes of a row hold different columns of it: afterwards each has the statistic of all.
__device__ __forceinline__ float join_columns(int s, float x) {
    x = join(s, x, __shfl_xor_sync(ALL_LANES, x, 1));
    return join(s, x, __shfl_xor_sync(ALL_LANES, x, 2));
}

// Over the 32 lanes, in a fixed order.
__device__ __forceinline__ float join_lanes(int s, float x) {
    KUNBR_UNROLL
    for (int distance = 16; distance > 0; distance /= 2) x = join(s, x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

// Statistic S of the thread's two rows of 64 x 128 of dW of Hopper's (upper, lower), joined to `rows`. Four chains of
// additions go side by side, where one by one each addition would wait for the last.
template <int S>
__device__ __forceinline__ void join_rows(float (&rows)[2], const float (&acc)[16][4]) {
    float sums[4];
    KUNBR_UNROLL
    for (int i = 0; i < 4; ++i) sums[i] = term<S>(acc[0][i]);
    KUNBR_UNROLL
    for (int nt = 1; nt < 16; ++nt) {
        KUNBR_UNROLL
        for (int i = 0; i < 4; ++i) sums[i] = join<S>(sums[i], term<S>(acc[nt][i]));
    }
    KUNBR_UNROLL
    for (int h = 0; h < 2; ++h) rows[h] = join<S>(rows[h], join<S>(sums[2 * h], sums[2 * h + 1]));
}
__device__ __forceinline__ void join_rows(int s, float (&rows)[2], const float (&acc)[16][4]) {
    if (s == KUNBR_L1) join_rows<KUNBR_L1>(rows, acc);
    if (s == KUNBR_L2SQ) join_rows<KUNBR_L2SQ>(rows, acc);
    if (s == KUNBR_LINF) join_rows<KUNBR_LINF>(rows, acc);
}

}  // namespace kunbr
