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

// out[s, b, e] joins partial[s * plane + b * sample_stride + first + part * part_stride + i + e] over part and i.
struct Reduction {
    const float *partial;
    double *out;
    int64_t plane, sample_stride, first, part_stride, samples, elements;
    int32_t parts, inner;
    int32_t statistics, kind[STATISTICS];  // kind: 2 is a maximum

    // Of projection p, for what density_kernel or hopper_kernel left.
    static Reduction of(const Schedule &s, int along, int statistics, int p, const float *partial, double *out) {
        Reduction r = {};
        r.partial = partial;
        r.out = out;
        r.plane = s.plane(along);
        r.samples = s.samples;
        for (int kind = 0; kind < STATISTICS; ++kind)
            if (statistics & (1 << kind)) r.kind[r.statistics++] = kind;
        const int32_t tiles = s.first_tile(p + 1) - s.first_tile(p);
        if (along == ALONG_COLUMN) {
            r.elements = r.part_stride = s.K;
            r.sample_stride = s.n_tiles * s.K;
            r.first = s.first_tile(p) * s.K;
            r.parts = tiles;
            r.inner = 1;
        } else {
            r.part_stride = s.width(along);
            r.sample_stride = s.parts * s.width(along);
            r.parts = s.parts;
            r.elements = along == ALONG_ROW ? s.sizes[p] : 1;
            r.first = along == ALONG_ROW ? s.first_row(p) : s.first_tile(p);
            r.inner = along == ALONG_ROW ? 1 : tiles;
        }
        return r;
    }

    // Of a pair of gradients: three sums.
    static Reduction of_pairs(const Schedule &s, const float *partial, double *out) {
        Reduction r = of(s, ALONG_ALL, 7, 0, partial, out);
        r.kind[0] = r.kind[1] = r.kind[2] = 0;
        return r;
    }
};

// LANES 32: a warp for each result; 1: a thread.
template <int LANES>
__global__ void __launch_bounds__(HELPER_THREADS) reduce_kernel(const __grid_constant__ Reduction r) {
    const int64_t result = (blockIdx.x * static_cast<int64_t>(HELPER_THREADS) + threadIdx.x) / LANES;
    const int64_t results = r.statistics * r.samples * r.elements;
    const int lane = threadIdx.x % LANES;
    if (result >= results) return;  // a warp as a whole
    const int64_t statistic = result / (r.samples * r.elements), rest = result % (r.samples * r.elements);
    const float *from = r.partial + statistic * r.plane + rest / r.elements * r.sample_stride + r.first + rest % r.elements;
    const bool largest = r.kind[statistic] == 2;
    double sum = 0.0;
    int most = 0;
    for (int64_t i = lane; i < static_cast<int64_t>(r.parts) * r.inner; i += LANES) {
        const float x = from[i / r.inner * r.part_stride + i % r.inner];
        if (largest)
            most = max(most, __float_as_int(x));
        else
            sum += x;
    }
    KUNBR_UNROLL
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(ALL_LANES, sum, distance);
        most = max(most, __shfl_xor_sync(ALL_LANES, most, distance));
    }
    if (lane == 0) r.out[result] = largest ? static_cast<double>(__int_as_float(most)) : sum;
}

}  // namespace kunbr
