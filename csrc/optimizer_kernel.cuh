// Lion and AdamW in place over vectors: the active block's flat buffer, in one pass.
//
// Each element is read and written once, 16 bytes at a time. Bytes an element for Lion: bf16 gradient 2, fp32 momentum
// 4 + 4, fp32 weight 4 + 4, its bf16 copy 2, so 20; AdamW has a second moment, 28. At 4.3 TB/s that is 4.7 and 6.5 ms
// for 10^9 weights. FLOPs: about 10 and 15 an element, which is nothing beside them; random bits are 30 integer
// operations an element, below the 130 that fit into the time of its bytes on an H200.
//
// Types are run-time values: all threads of a launch branch alike, and the kernel is bound by memory. A thread issues
// all its loads before it converts any, so that they are in flight together.
#pragma once

#include "kunbr.h"
#include "optimizer.h"
#if defined(KUNBR_EMULATED)
#include "tests/gpu_emulator.h"
#else
#include "instructions.cuh"
#endif

namespace kunbr {

constexpr int WIDTH = 8;  // elements of a thread: one 16-byte access in bf16, two in fp32
constexpr int OPTIMIZER_THREADS = 256;
constexpr int TURNS = 8;
constexpr int SPAN = WIDTH * OPTIMIZER_THREADS * TURNS;  // elements of a block

struct Vector {
    void *data;
    int type;
};

struct Update {
    Vector param, grad, state[2], half;
    int64_t size;
    uint64_t seed;
    uint32_t step;
    int32_t *bad;  // becomes 1 where a stored value is not finite; nullptr in a kernel that does not look
    bool stochastic, wide;  // wide: all pointers are aligned to 16 bytes
};

struct Raw {
    uint4 words[2];
};

// ---------------------------------------------------------------- elements in memory

__device__ __forceinline__ Raw load_eight(const Vector &v, int64_t first) {
    Raw raw;
    if (opaque(v.type) == KUNBR_FP32) {
        const uint4 *from = reinterpret_cast<const uint4 *>(static_cast<const float *>(v.data) + first);
        raw.words[0] = from[0];
        raw.words[1] = from[1];
    } else {
        raw.words[0] = *reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(v.data) + first);
        raw.words[1] = raw.words[0];
    }
    return raw;
}

__device__ __forceinline__ float widen(uint32_t bits, int type) {
    return type == KUNBR_BF16 ? float_of(bits << 16) : half_bits_to_float(static_cast<uint16_t>(bits));
}

__device__ __forceinline__ uint16_t narrow(float x, int type) {
    return type == KUNBR_BF16 ? to_bf16(x) : float_to_half_bits(x);
}

__device__ __forceinline__ void decode(const Raw &raw, int type, float (&x)[WIDTH]) {
    type = opaque(type);
    const uint32_t words[8] = {raw.words[0].x, raw.words[0].y, raw.words[0].z, raw.words[0].w,
                               raw.words[1].x, raw.words[1].y, raw.words[1].z, raw.words[1].w};
    if (type == KUNBR_FP32) {
        KUNBR_UNROLL
        for (int i = 0; i < WIDTH; ++i) x[i] = float_of(words[i]);
    } else {
        KUNBR_UNROLL
        for (int i = 0; i < WIDTH; ++i) x[i] = widen(words[i / 2] >> (16 * (i % 2)) & 0xFFFF, type);
    }
}

// All exponent bits set: infinite or NaN.
__device__ __forceinline__ bool has_all(uint32_t bits, uint32_t exponent) { return (bits & exponent) == exponent; }
__device__ __forceinline__ uint32_t exponent_of(int type) { return type == KUNBR_BF16 ? 0x7F80u : 0x7C00u; }

// Whether something that it stores is not finite (unused, and so not computed, in a kernel that does not look).
__device__ __forceinline__ bool store_eight(const Vector &v, int64_t first, const float (&x)[WIDTH]) {
    const int type = opaque(v.type);
    bool wrong = false;
    if (type == KUNBR_FP32) {
        KUNBR_UNROLL
        for (int i = 0; i < WIDTH; ++i) wrong |= has_all(bits_of(x[i]), 0x7F800000u);
        uint4 *to = reinterpret_cast<uint4 *>(static_cast<float *>(v.data) + first);
        to[0] = make_uint4(bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3]));
        to[1] = make_uint4(bits_of(x[4]), bits_of(x[5]), bits_of(x[6]), bits_of(x[7]));
    } else {
        uint32_t words[4];
        KUNBR_UNROLL
        for (int i = 0; i < 4; ++i)
            words[i] = narrow(x[2 * i], type) | static_cast<uint32_t>(narrow(x[2 * i + 1], type)) << 16;
        *reinterpret_cast<uint4 *>(static_cast<uint16_t *>(v.data) + first) =
            make_uint4(words[0], words[1], words[2], words[3]);
        const uint32_t exponent = exponent_of(type);
        KUNBR_UNROLL
        for (int i = 0; i < 4; ++i) wrong |= has_all(words[i], exponent) || has_all(words[i], exponent << 16);
    }
    return wrong;
}

__device__ __forceinline__ float load_one(const Vector &v, int64_t i) {
    const int type = opaque(v.type);
    return type == KUNBR_FP32 ? static_cast<const float *>(v.data)[i]
                              : widen(static_cast<const uint16_t *>(v.data)[i], type);
}

__device__ __forceinline__ bool store_one(const Vector &v, int64_t i, float x) {
    const int type = opaque(v.type);
    if (type == KUNBR_FP32) {
        static_cast<float *>(v.data)[i] = x;
        return has_all(bits_of(x), 0x7F800000u);
    }
    const uint16_t word = narrow(x, type);
    static_cast<uint16_t *>(v.data)[i] = word;
    return has_all(word, exponent_of(type));
}

// x as it is stored: a copy in another type is made from this.
__device__ __forceinline__ float stored(float x, int type) {
    type = opaque(type);
    return type == KUNBR_FP32 ? x : widen(narrow(x, type), type);
}

// ---------------------------------------------------------------- the kernel

// CHECKED: whether it looks at what it stores. All threads that see something write the same word.
template <class Step, int STATES, bool CHECKED>
__global__ void __launch_bounds__(OPTIMIZER_THREADS) update_kernel(const Update u, const Step step) {
#pragma unroll 1
    for (int turn = 0; turn < TURNS; ++turn) {
        const int64_t first =
            blockIdx.x * static_cast<int64_t>(SPAN) + (turn * OPTIMIZER_THREADS + threadIdx.x) * WIDTH;
        if (first >= u.size) break;
        bool wrong = false;
        if (u.wide && first + WIDTH <= u.size) {
            const Raw raw_p = load_eight(u.param, first), raw_g = load_eight(u.grad, first);
            const Raw raw_m = load_eight(u.state[0], first), raw_v = STATES > 1 ? load_eight(u.state[1], first) : raw_m;
            float p[WIDTH], g[WIDTH], m[WIDTH], v[WIDTH];
            decode(raw_p, u.param.type, p);
            decode(raw_g, u.grad.type, g);
            decode(raw_m, u.state[0].type, m);
            decode(raw_v, u.state[STATES - 1].type, v);
            Random4 random[2] = {};
            if (u.stochastic) {
                random[0] = random_bits(first / 4, u.seed, u.step);
                random[1] = random_bits(first / 4 + 1, u.seed, u.step);
            }
            KUNBR_UNROLL
            for (int i = 0; i < WIDTH; ++i) {
                step.update(p[i], g[i], m[i], v[i]);
                if (u.stochastic) p[i] = narrow_stochastically(p[i], random[i / 4].word[i % 4]);
            }
            wrong |= store_eight(u.state[0], first, m);
            if (STATES > 1) wrong |= store_eight(u.state[1], first, v);
            wrong |= store_eight(u.param, first, p);
            if (u.half.data != nullptr) {
                KUNBR_UNROLL
                for (int i = 0; i < WIDTH; ++i) p[i] = stored(p[i], u.param.type);
                wrong |= store_eight(u.half, first, p);
            }
        } else {
            // the last elements, or vectors that are not aligned: not fast, and not worth eight copies of the code
#pragma unroll 1
            for (int i = 0; i < WIDTH; ++i) {
                const int64_t place = first + i;
                if (place < u.size) {
                    float p = load_one(u.param, place), m = load_one(u.state[0], place);
                    float v = STATES > 1 ? load_one(u.state[1], place) : 0.0f;
                    const float g = load_one(u.grad, place);
                    step.update(p, g, m, v);
                    if (u.stochastic) p = narrow_stochastically(p, random_bits(place / 4, u.seed, u.step)[place % 4]);
                    wrong |= store_one(u.state[0], place, m);
                    if (STATES > 1) wrong |= store_one(u.state[1], place, v);
                    wrong |= store_one(u.param, place, p);
                    if (u.half.data != nullptr) wrong |= store_one(u.half, place, stored(p, u.param.type));
                }
            }
        }
        if (CHECKED && wrong) *static_cast<volatile int32_t *>(u.bad) = 1;
    }
}

}  // namespace kunbr
