// What runs before the kernels of gradient density, and after them.
#pragma once

#include "grad_density.h"
#include "statistics.cuh"

namespace kunbr {

constexpr int HELPER_THREADS = 256;

// ---------------------------------------------------------------- before: the order of the samples

__global__ void order_kernel(const void *cu_seqlens, bool wide_index, int samples, int32_t *order) {
    const int sample = blockIdx.x * HELPER_THREADS + threadIdx.x;
    if (sample < samples) order[rank_of(cu_seqlens, wide_index, samples, sample)] = sample;
}

// ---------------------------------------------------------------- after: the sum of the partial sums

// out[b, e] joins partial[b * sample_stride + first + e + i * stride] over i < count.
struct Reduction {
    const float *partial;
    double *out;
    int64_t sample_stride, first, stride, count, samples, elements;
    bool largest;  // a maximum, not a sum

    // Of projection p, for what density_kernel or hopper_kernel left.
    static Reduction of(const Schedule &s, int along, int statistic, int p, const float *partial, double *out) {
        const bool rows = along == ALONG_ROW;
        const int64_t sums = int64_t{s.strips} * s.sums;  // of a tile along N
        Reduction r = {};
        r.partial = partial;
        r.out = out;
        r.samples = s.samples;
        r.largest = statistic == KUNBR_LINF;
        r.sample_stride = s.of_sample(along);
        r.first = rows ? s.first_row(p) : s.first_tile(p) * sums;
        r.stride = rows ? s.first_row(s.projections) : 1;
        r.count = rows ? s.strips : (s.first_tile(p + 1) - s.first_tile(p)) * sums;
        r.elements = rows ? s.sizes[p] : 1;
        return r;
    }
};

// SHARERS threads for each result: a block, or one.
template <int SHARERS>
__global__ void __launch_bounds__(HELPER_THREADS) reduce_kernel(const __grid_constant__ Reduction r) {
    const int64_t result = (blockIdx.x * static_cast<int64_t>(HELPER_THREADS) + threadIdx.x) / SHARERS;
    if (result >= r.samples * r.elements) return;
    const float *from = r.partial + result / r.elements * r.sample_stride + r.first + result % r.elements;
    double sum = 0.0;
    int most = 0;
#pragma unroll 4
    for (int64_t i = threadIdx.x % SHARERS; i < r.count; i += SHARERS) {
        const float x = from[i * r.stride];
        if (r.largest)
            most = max(most, __float_as_int(x));
        else
            sum += x;
    }
    if constexpr (SHARERS > 1) {
        __shared__ double sums[SHARERS / 32];
        __shared__ int mosts[SHARERS / 32];
        KUNBR_UNROLL
        for (int distance = 16; distance > 0; distance /= 2) {
            sum += __shfl_xor_sync(ALL_LANES, sum, distance);
            most = max(most, __shfl_xor_sync(ALL_LANES, most, distance));
        }
        if (threadIdx.x % 32 == 0) {
            sums[threadIdx.x / 32] = sum;
            mosts[threadIdx.x / 32] = most;
        }
        __syncthreads();
        if (threadIdx.x > 0) return;
        for (int warp = 1; warp < SHARERS / 32; ++warp) {
            sum += sums[warp];
            most = max(most, mosts[warp]);
        }
    }
    r.out[result] = r.largest ? static_cast<double>(__int_as_float(most)) : sum;
}

}  // namespace kunbr
