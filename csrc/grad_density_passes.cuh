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

// out[b, e] joins partial[b * sample_stride + first + part * part_stride + i + e] over part and i.
struct Reduction {
    const float *partial;
    double *out;
    int64_t sample_stride, first, part_stride, samples, elements;
    int32_t parts, inner;
    bool largest;  // a maximum, not a sum

    // Of projection p, for what density_kernel or hopper_kernel left.
    static Reduction of(const Schedule &s, int along, int statistic, int p, const float *partial, double *out) {
        Reduction r = {};
        r.partial = partial;
        r.out = out;
        r.samples = s.samples;
        r.largest = statistic == KUNBR_LINF;
        r.parts = s.strips;
        r.part_stride = s.width(along);
        r.sample_stride = s.strips * s.width(along);
        r.elements = along == ALONG_ROW ? s.sizes[p] : 1;
        r.first = along == ALONG_ROW ? s.first_row(p) : int64_t{s.first_tile(p)} * s.sums;
        r.inner = along == ALONG_ROW ? 1 : (s.first_tile(p + 1) - s.first_tile(p)) * s.sums;
        return r;
    }
};

// LANES 32: a warp for each result; 1: a thread.
template <int LANES>
__global__ void __launch_bounds__(HELPER_THREADS) reduce_kernel(const __grid_constant__ Reduction r) {
    const int64_t result = (blockIdx.x * static_cast<int64_t>(HELPER_THREADS) + threadIdx.x) / LANES;
    const int64_t results = r.samples * r.elements;
    const int lane = threadIdx.x % LANES;
    if (result >= results) return;  // a warp as a whole
    const float *from = r.partial + result / r.elements * r.sample_stride + r.first + result % r.elements;
    double sum = 0.0;
    int most = 0;
    for (int64_t i = lane; i < static_cast<int64_t>(r.parts) * r.inner; i += LANES) {
        const float x = from[i / r.inner * r.part_stride + i % r.inner];
        if (r.largest)
            most = max(most, __float_as_int(x));
        else
            sum += x;
    }
    KUNBR_UNROLL
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(ALL_LANES, sum, distance);
        most = max(most, __shfl_xor_sync(ALL_LANES, most, distance));
    }
    if (lane == 0) r.out[result] = r.largest ? static_cast<double>(__int_as_float(most)) : sum;
}

}  // namespace kunbr
