// The arithmetic of Lion and AdamW on one element, rounding, and random bits: on the host and on the device.
//
// Products and sums are fused by name (fmaf) or not at all, so both give the same bits. (nvcc fuses what it likes where
// that is left to it: every a * b + c that must not be is written with __fmul_rn's equal, `times`.)
#pragma once

#include <cmath>
#include <cstring>

#include "common.h"

namespace kunbr {

KUNBR_HD uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
#endif
}

KUNBR_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
#endif
}

KUNBR_HD float times(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

// ---------------------------------------------------------------- rounding

// The upper half of fp32 is bf16. To nearest, ties to even; NaN stays NaN (quiet).
KUNBR_HD uint16_t to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// x as one of its two neighbours in bf16, and on average over `random` as x: 16 random bits are added below bf16's last
// place, and what is below it is cut off. Still in fp32. The bits of NaN could carry over into a number.
KUNBR_HD float narrow_stochastically(float x, uint32_t random) {
    return x == x ? float_of((bits_of(x) + (random & 0xFFFF)) & 0xFFFF0000u) : x;
}

// ---------------------------------------------------------------- random bits

struct Random4 {
    uint32_t word[4];

    KUNBR_HD uint32_t operator[](int i) const {  // without an array in memory
        return i == 0 ? word[0] : i == 1 ? word[1] : i == 2 ? word[2] : word[3];
    }
};

// Philox 4x32-10 with key `seed` and counter (quad, step): the words of the places 4 * quad to 4 * quad + 3. The same
// bits as reference.random_bits. Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
KUNBR_HD Random4 random_bits(uint64_t quad, uint64_t seed, uint32_t step) {
    uint32_t a = static_cast<uint32_t>(quad), b = static_cast<uint32_t>(quad >> 32), c = step, d = 0;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    KUNBR_UNROLL
    for (int round = 0; round < 10; ++round) {
        const uint64_t first = static_cast<uint64_t>(0xD2511F53u) * a, second = static_cast<uint64_t>(0xCD9E8D57u) * c;
        a = static_cast<uint32_t>(second >> 32) ^ b ^ key0;
        b = static_cast<uint32_t>(second);
        c = static_cast<uint32_t>(first >> 32) ^ d ^ key1;
        d = static_cast<uint32_t>(first);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return {{a, b, c, d}};
}

// ---------------------------------------------------------------- updates

// A step's numbers, from float64 on the host, as kernels/optimizers/triton_kernel.py's launchers make them.
struct LionStep {
    float lr, beta1, rest1, beta2, rest2, weight_decay;

    static LionStep of(double lr, double beta1, double beta2, double weight_decay) {
        return {static_cast<float>(lr),          static_cast<float>(beta1),
                static_cast<float>(1.0 - beta1), static_cast<float>(beta2),
                static_cast<float>(1.0 - beta2), static_cast<float>(weight_decay)};
    }

    // p and m become their next values
    KUNBR_HD void update(float &p, float g, float &m, float &) const {
        const float c = fmaf(beta1, m, times(rest1, g));
        const float sign = c > 0.0f ? 1.0f : c < 0.0f ? -1.0f : c;  // of zero: zero; of NaN: NaN
        m = fmaf(beta2, m, times(rest2, g));
        p = fmaf(-lr, fmaf(weight_decay, p, sign), p);
    }
};

struct AdamWStep {
    float decay, step_size, beta1, rest1, beta2, rest2, inverse_root, eps;

    static AdamWStep of(uint32_t step, double lr, double beta1, double beta2, double eps, double weight_decay) {
        return {static_cast<float>(lr * weight_decay), static_cast<float>(lr / (1.0 - std::pow(beta1, step))),
                static_cast<float>(beta1),             static_cast<float>(1.0 - beta1),
                static_cast<float>(beta2),             static_cast<float>(1.0 - beta2),
                static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, step))),
                static_cast<float>(eps)};
    }

    KUNBR_HD void update(float &p, float g, float &m, float &v) const {
        m = fmaf(beta1, m, times(rest1, g));
        v = fmaf(beta2, v, times(times(rest2, g), g));
        const float ratio = m / fmaf(sqrtf(v), inverse_root, eps);
        p -= fmaf(step_size, ratio, times(decay, p));
    }
};

}  // namespace kunbr
