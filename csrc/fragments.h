// Where the elements of a tile lie: in shared memory, in the registers that matrix instructions take and give, and in
// the descriptors of wgmma. On the host and on the device; tests/ emulates the instructions over these.
//
// A tile of an operand is (tokens, columns) in shared memory as in global memory: columns next to each other. The
// product dW = dy^T x sums over tokens, so both operands are "transposed": ldmatrix.trans turns 8 x 8 blocks on their
// way to mma.sync's registers, wgmma reads them so from memory (MN-major).
#pragma once

#include "common.h"

namespace kunbr {

constexpr int CHUNK_BYTES = 16;  // what is copied, and swizzled, as one

// ---------------------------------------------------------------- the portable kernel
//
// mma.sync.m16n8k16: D (16 rows of dW, 8 columns) += A (16 rows, 16 tokens) B (16 tokens, 8 columns).

// Byte of the chunk `chunk` of token `token` in a tile with rows of `chunks` chunks. Half precision: the chunks of 8
// tokens that ldmatrix reads as one lie in 8 different groups of banks. fp32 is read along the columns: no swizzle.
KUNBR_HD int tile_byte(int token, int chunk, int chunks, bool swizzled) {
    return (token * chunks + (swizzled ? chunk ^ (token & 7) : chunk)) * CHUNK_BYTES;
}

// The chunk whose address lane `lane` gives to ldmatrix.x4.trans.
struct TokenChunk {
    int token, chunk;
};
// For A: blocks (rows 0-7, tokens 0-7), (rows 8-15, tokens 0-7), (rows 0-7, tokens 8-15), (rows 8-15, tokens 8-15).
KUNBR_HD TokenChunk a_source(int lane, int first_token, int first_row) {
    return {first_token + (lane & 7) + (lane >> 4) * 8, first_row / 8 + ((lane >> 3) & 1)};
}
// For two B's: blocks (tokens 0-7, columns 0-7), (tokens 8-15, columns 0-7), and both for columns 8-15.
KUNBR_HD TokenChunk b_source(int lane, int first_token, int first_column) {
    return {first_token + (lane & 7) + ((lane >> 3) & 1) * 8, first_column / 8 + (lane >> 4)};
}

// Row and column, within m16 x n8, of accumulator i (0-3) of a lane. wgmma's m64 x n8 is four of these, warp by warp.
KUNBR_HD int accumulator_row(int lane, int i) { return lane / 4 + (i / 2) * 8; }
KUNBR_HD int accumulator_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

// ---------------------------------------------------------------- the kernel for sm_90a
//
// TMA writes a box of 64 columns (128 bytes) x HOPPER_TOKENS tokens with the 128-byte swizzle: 16-byte chunk c of token
// t lies at t * 128 + (c ^ t % 8) * 16. A tile of 128 columns is two such boxes, one after the other.

constexpr int HOPPER_TOKENS = 64;
constexpr int BOX_COLUMNS = 64;
constexpr int BOX_BYTES = HOPPER_TOKENS * BOX_COLUMNS * 2;

KUNBR_HD int box_byte(int token, int column) {
    return token * 128 + (((column / 8) ^ (token & 7)) * CHUNK_BYTES) + column % 8 * 2;
}

// The matrix descriptor of wgmma for an MN-major operand: bits 0-13 address / 16, 16-29 leading offset / 16, 32-45
// stride offset / 16, 62-63 swizzle (1: 128 bytes). MN-major with the 128-byte swizzle, the leading offset steps from
// one box of 64 columns to the next, the stride offset from 8 tokens to the next 8. (PTX ISA, "Shared memory matrix
// layout"; Triton 3.7.1 makes the same numbers of the same boxes.) An instruction takes 16 tokens; the next 16 begin
// 2048 bytes on, a multiple of the swizzle's period of 1024, so the base offset (bits 49-51) is 0.
KUNBR_HD uint64_t wgmma_descriptor(uint32_t shared_address) {
    return static_cast<uint64_t>((shared_address & 0x3FFFF) >> 4) | static_cast<uint64_t>(BOX_BYTES >> 4) << 16 |
           static_cast<uint64_t>(1024 >> 4) << 32 | 1ull << 62;
}
constexpr uint64_t DESCRIPTOR_STEP = (16 * 128) >> 4;  // 16 tokens, in the address field

}  // namespace kunbr
