// Which tile of which sample a block works on, and where its partial sums go: on the host and on the device.
//
// An item is one sample, one tile along N and one strip of tiles along K. Items are numbered by the sample's rank
// (longest first, so that the long ones do not begin when all else has ended), then in groups of GROUP tiles along N
// that take turns at each strip: panels of dy and x that are in use together stay in the L2 cache. How K is cut into
// strips depends on K, N and the number of samples alone, so partial sums have the same bits on every GPU.
#pragma once

#include "common.h"

namespace kunbr {

constexpr int MAX_PROJECTIONS = 3;
constexpr int TILE_K = 128;  // columns of a tile of dW
// Strips are as long as leaves this many items, which is six for each of 132 multiprocessors: a long strip pays an
// item's beginning less often, a short one lets all end together. On an H200, 14336 x 4096, 2048 tokens, TFLOP/s with
// items of 128 x 8, 16, 32 tiles: T=64 451, 515, 547; T=512 677, 710, 642; T=2048 619, 634, 513.
constexpr int MIN_ITEMS = 768;
constexpr int GROUP = 8;
constexpr int64_t MAX_TOKENS = 1 << 30;
constexpr int MAX_SORTED = 8192;  // samples; ranks take the square of their number in comparisons

enum Along { ALONG_ALL = 0, ALONG_ROW = 1 };

struct Item {
    int32_t rank, n_tile, strip;  // rank: of the sample
};

// How a kernel cuts dW: rows of a tile, tiles in its longest strip, partial sums that an item leaves for ALONG_ALL.
struct Tiling {
    int32_t rows, longest_strip, sums;
};

struct Schedule {
    int64_t samples, K, sizes[MAX_PROJECTIONS];
    int64_t first_rows[MAX_PROJECTIONS + 1];  // of each projection, where their rows, or tiles, follow one another
    int32_t first_tiles[MAX_PROJECTIONS + 1];
    int32_t projections, sums, k_tiles, strip_tiles, strips, n_tiles;

    static Schedule of(int64_t samples, int64_t K, int projections, const int64_t *sizes, const Tiling &tiling) {
        Schedule s = {};
        s.samples = samples;
        s.K = K;
        s.projections = projections;
        s.sums = tiling.sums;
        for (int p = 0; p < projections; ++p) {
            s.sizes[p] = sizes[p];
            s.n_tiles += static_cast<int32_t>(ceil_div(sizes[p], tiling.rows));
            s.first_rows[p + 1] = s.first_rows[p] + sizes[p];
            s.first_tiles[p + 1] = s.n_tiles;
        }
        s.k_tiles = static_cast<int32_t>(ceil_div(K, TILE_K));
        int32_t longest = tiling.longest_strip;
        s.cut(longest);
        // in floating point: the product may not fit an int64
        while (longest > 2 && static_cast<double>(samples) * s.n_tiles * s.strips < MIN_ITEMS) s.cut(longest /= 2);
        return s;
    }

    // Strips of at most `longest` tiles, as even as can be.
    void cut(int32_t longest) {
        strips = static_cast<int32_t>(ceil_div(k_tiles, longest));
        strip_tiles = static_cast<int32_t>(ceil_div(k_tiles, strips));
    }

    KUNBR_HD int64_t items() const { return samples * n_tiles * strips; }

    // The host sees to it that there are no more items than an int32 counts: on a GPU a division of 64 bits is a
    // hundred instructions and more.
    KUNBR_HD Item item(uint32_t index) const {
        const uint32_t tiles = static_cast<uint32_t>(n_tiles), of_group = GROUP * static_cast<uint32_t>(strips);
        const uint32_t each = tiles * static_cast<uint32_t>(strips);  // sample's items
        const uint32_t rest = index % each, within = rest % of_group, first = rest / of_group * GROUP;
        const uint32_t size = first + GROUP <= tiles ? GROUP : tiles - first;
        return {static_cast<int32_t>(index / each), static_cast<int32_t>(first + within % size),
                static_cast<int32_t>(within / size)};
    }

    // Tiles along K of a strip: [first, first + count).
    KUNBR_HD int32_t first_k_tile(int32_t strip) const { return strip * strip_tiles; }
    KUNBR_HD int32_t count_k_tiles(int32_t strip) const {
        return static_cast<int32_t>(smaller(strip_tiles, k_tiles - first_k_tile(strip)));
    }

    KUNBR_HD int32_t first_tile(int p) const { return first_tiles[p]; }
    KUNBR_HD int64_t first_row(int p) const { return first_rows[p]; }
    KUNBR_HD int projection(int32_t n_tile) const {
        int p = 0;
        while (p + 1 < projections && n_tile >= first_tile(p + 1)) ++p;
        return p;
    }

    // Partial sums: (samples, tiles along N, strips, sums) for ALONG_ALL, (samples, strips, rows) for ALONG_ROW, tiles
    // and rows being those of the projections one after the other. For ALONG_ALL what makes one result lies together.
    KUNBR_HD int64_t of_sample(int along) const {
        return strips * (along == ALONG_ROW ? first_row(projections) : int64_t{n_tiles} * sums);
    }
    KUNBR_HD int64_t partials(int along) const { return samples * of_sample(along); }
    KUNBR_HD int64_t place_of_sum(int64_t sample, int32_t strip, int32_t n_tile, int32_t which) const {
        return ((sample * n_tiles + n_tile) * strips + strip) * sums + which;
    }
    KUNBR_HD int64_t place_of_row(int64_t sample, int32_t strip, int64_t row) const {
        return (sample * strips + strip) * first_row(projections) + row;
    }
};

// Position in an array of int32 or int64 offsets.
KUNBR_HD int64_t offset_at(const void *offsets, bool wide, int64_t i) {
    return wide ? static_cast<const int64_t *>(offsets)[i] : static_cast<const int32_t *>(offsets)[i];
}

// How many samples go before sample i: the longer ones, and of equal ones those that come first.
KUNBR_HD int64_t rank_of(const void *offsets, bool wide, int64_t samples, int64_t i) {
    const int64_t mine = offset_at(offsets, wide, i + 1) - offset_at(offsets, wide, i);
    int64_t rank = 0, start = offset_at(offsets, wide, 0);
    for (int64_t j = 0; j < samples; ++j) {
        const int64_t end = offset_at(offsets, wide, j + 1), length = end - start;
        start = end;
        rank += length > mine || (length == mine && j < i);
    }
    return rank;
}

// Steps through what an item loads and multiplies: each tile along K, token block by token block. A sample without
// tokens has one block, all of it masked.
struct Steps {
    int32_t count;  // token blocks
    int32_t tile = 0, block = 0;

    KUNBR_HD static int32_t blocks(int64_t length, int tokens) {
        return length <= 0 ? 1 : static_cast<int32_t>(ceil_div(length, tokens));
    }
    KUNBR_HD void advance() {
        if (++block < count) return;
        block = 0;
        ++tile;
    }
};

}  // namespace kunbr
