// Swizzles, fragments and descriptors, on the host, under sanitizers.
#include <cassert>
#include <initializer_list>
#include <set>

#include "../fragments.h"

using namespace kunbr;

static int bank_group(int byte) { return byte / CHUNK_BYTES % 8; }  // 8 groups of 16 bytes are all banks

static void swizzle() {
    for (int chunks : {8, 16, 32})
        for (bool swizzled : {false, true}) {
            std::set<int> seen;
            for (int token = 0; token < 32; ++token)
                for (int chunk = 0; chunk < chunks; ++chunk) seen.insert(tile_byte(token, chunk, chunks, swizzled));
            assert(static_cast<int>(seen.size()) == 32 * chunks);
            assert(*seen.begin() == 0 && *seen.rbegin() == (32 * chunks - 1) * CHUNK_BYTES);
        }
    // what eight lanes of ldmatrix read at once, and what eight lanes of cp.async write, is in all banks
    for (int chunks : {8, 16})
        for (int first_token = 0; first_token < 32; first_token += 16)
            for (int first = 0; first < chunks * 8; first += 16)
                for (int matrix = 0; matrix < 4; ++matrix) {
                    std::set<int> a, b;
                    for (int lane = matrix * 8; lane < matrix * 8 + 8; ++lane) {
                        const TokenChunk x = a_source(lane, first_token, first), y = b_source(lane, first_token, first);
                        assert(x.token < 32 && x.chunk < chunks && y.token < 32 && y.chunk < chunks);
                        a.insert(bank_group(tile_byte(x.token, x.chunk, chunks, true)));
                        b.insert(bank_group(tile_byte(y.token, y.chunk, chunks, true)));
                    }
                    assert(a.size() == 8 && b.size() == 8);
                }
    for (int token = 0; token < 32; ++token) {
        std::set<int> groups;
        for (int chunk = 8; chunk < 16; ++chunk) groups.insert(bank_group(tile_byte(token, chunk, 16, true)));
        assert(groups.size() == 8);
    }
}

static void accumulators() {
    std::set<int> seen;
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) seen.insert(accumulator_row(lane, i) * 8 + accumulator_column(lane, i));
    assert(seen.size() == 128 && *seen.begin() == 0 && *seen.rbegin() == 127);
}

static void descriptors() {
    // what Triton 3.7.1 puts into its kernel for (64 tokens, 256 columns) in boxes of 64: offset 8192, stride 1024
    assert(wgmma_descriptor(0) == 4611686293338849280ull);
    assert(DESCRIPTOR_STEP == 4611686293338849408ull - 4611686293338849280ull);
    assert((wgmma_descriptor(0x23400) & 0x3FFF) == 0x2340);
    assert(wgmma_descriptor(0x23400) >> 16 == wgmma_descriptor(0) >> 16);
    // the last chunk of the rings does not carry into the next field
    assert((wgmma_descriptor(227 * 1024 - BOX_BYTES) + 3 * DESCRIPTOR_STEP) >> 16 == wgmma_descriptor(0) >> 16);
    // the box's swizzle is one of address bits: bits 4 to 6 by bits 7 to 9
    std::set<int> seen;
    for (int token = 0; token < HOPPER_TOKENS; ++token)
        for (int column = 0; column < BOX_COLUMNS; ++column) {
            const int linear = token * 128 + column * 2;
            assert(box_byte(token, column) == (linear ^ (linear >> 7 & 7) << 4));
            seen.insert(box_byte(token, column));
        }
    assert(seen.size() == HOPPER_TOKENS * BOX_COLUMNS && *seen.rbegin() == BOX_BYTES - 2);
}

int main() {
    swizzle();
    accumulators();
    descriptors();
    return 0;
}
