// The optimisers' arithmetic on the host, under sanitizers: prints nothing and returns 0 when all is well.
#include <cassert>
#include <cmath>
#include <initializer_list>
#include <limits>

#include "../optimizer.h"

using namespace kunbr;

static void rounding() {
    const float inf = std::numeric_limits<float>::infinity();
    const uint32_t words[][2] = {{0x3F808000, 0x3F80}, {0x3F818000, 0x3F82}, {0x3F808001, 0x3F81}, {0x3FFFFFFF, 0x4000},
                                 {0x7F7FFFFF, 0x7F80}, {0xFF800000, 0xFF80}, {0x80000001, 0x8000}, {0, 0}};
    for (const auto &pair : words) assert(to_bf16(float_of(pair[0])) == pair[1]);
    for (uint32_t bits : {0x7FC00000u, 0x7FFFFFFFu, 0xFFFFFFFFu, 0x7F800001u}) {  // every NaN stays one
        assert((to_bf16(float_of(bits)) & 0x7FFF) > 0x7F80);
        const float rounded = narrow_stochastically(float_of(bits), 0xFFFF);
        assert(rounded != rounded);
    }
    for (uint32_t random : {0u, 1u, 0x8000u, 0xFFFFu, 0xFFFF0000u}) {
        for (float exact : {1.0f, -2.5f, 0.0f, inf, -inf}) assert(narrow_stochastically(exact, random) == exact);
        const float below = float_of(0x3F800000), above = float_of(0x3F810000);
        const float x = narrow_stochastically(float_of(0x3F804000), random);  // a quarter of the way up
        assert(x == ((random & 0xFFFF) >= 0xC000 ? above : below));
    }
}

static void randomness() {
    // the known answers of Random123 for Philox 4x32-10
    const Random4 zero = random_bits(0, 0, 0);
    assert(zero[0] == 0x6627E8D5 && zero[1] == 0xE169C58D && zero[2] == 0xBC57AC4C && zero[3] == 0x9B00DBD8);
    const Random4 far = random_bits(0xFFFFFFFFFFFFFFFFull, 0xFFFFFFFFFFFFFFFFull, 0xFFFFFFFFu);
    assert(far[0] != zero[0]);
    assert(random_bits(1ull << 32, 0, 0)[0] != zero[0] && random_bits(0, 1ull << 32, 0)[0] != zero[0]);
}

static void steps() {
    const LionStep lion = LionStep::of(0.25, 0.9, 0.99, 0.0);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const float gradients[] = {1e-30f, -1e30f, 0.0f, 3.0f}, expected[] = {-0.25f, 0.25f, 0.0f, -0.25f};
    for (int i = 0; i < 4; ++i) {
        float p = 0, m = 0, unused = 0;
        lion.update(p, gradients[i], m, unused);
        assert(p == expected[i]);
    }
    float p = 0, m = 0, v = 0;
    lion.update(p, nan, m, v);
    assert(p != p && m != m);
    p = 1, m = 0, v = 0;
    AdamWStep::of(1, 0.5, 0.9, 0.999, 0.0, 0.0).update(p, -4.0f, m, v);  // the first step has size lr
    assert(std::fabs(p - 1.5f) < 1e-6f);
}

int main() {
    rounding();
    randomness();
    steps();
    return 0;
}
