// The order of work and the places of partial sums, on the host, under sanitizers.
#include <algorithm>
#include <cassert>
#include <initializer_list>
#include <limits>
#include <set>
#include <tuple>
#include <vector>

#define KUNBR_EMULATED  // no CUDA
#include "../grad_density.h"

using namespace kunbr;

// Every tile of every sample is in one item, and partial sums fill their places without a gap or a clash.
static Schedule items(int64_t samples, int64_t K, std::vector<int64_t> sizes, const Tiling &tiling) {
    const Schedule s = Schedule::of(samples, K, static_cast<int>(sizes.size()), sizes.data(), tiling);
    std::set<std::tuple<int32_t, int32_t, int32_t>> seen;
    std::vector<int> all(s.partials(ALONG_ALL)), row(s.partials(ALONG_ROW));
    int32_t last_rank = 0;
    for (uint32_t i = 0; i < s.items(); ++i) {
        const Item item = s.item(i);
        assert(item.rank >= last_rank && item.rank < samples);  // the longest first
        last_rank = item.rank;
        const int p = s.projection(item.n_tile);
        assert(item.n_tile >= s.first_tile(p) && item.n_tile < s.first_tile(p + 1));
        const int64_t first_n = static_cast<int64_t>(item.n_tile - s.first_tile(p)) * tiling.rows;
        assert(first_n < sizes[p]);
        const int32_t tiles = s.count_k_tiles(item.strip);
        assert(tiles >= 1 && tiles <= tiling.longest_strip);
        for (int32_t t = 0; t < tiles; ++t) {
            const int32_t k_tile = s.first_k_tile(item.strip) + t;
            assert(k_tile < s.k_tiles && seen.insert({item.rank, item.n_tile, k_tile}).second);
        }
        for (int32_t which = 0; which < tiling.sums; ++which)
            ++all.at(s.place_of_sum(item.rank, item.strip, item.n_tile, which));
        for (int64_t n = first_n; n < std::min<int64_t>(sizes[p], first_n + tiling.rows); ++n)
            ++row.at(s.place_of_row(item.rank, item.strip, s.first_row(p) + n));
    }
    assert(static_cast<int64_t>(seen.size()) == samples * s.n_tiles * s.k_tiles);
    for (const auto *places : {&all, &row})
        for (int count : *places) assert(count == 1);
    return s;
}

static void ranks() {
    const std::vector<int32_t> ends = {0, 5, 5, 9, 14, 14, 15};  // lengths 5 0 4 5 0 1
    const std::vector<int64_t> wide(ends.begin(), ends.end());
    const int64_t expected[] = {0, 4, 2, 1, 5, 3};
    for (int64_t i = 0; i < 6; ++i) {
        assert(rank_of(ends.data(), false, 6, i) == expected[i]);
        assert(rank_of(wide.data(), true, 6, i) == expected[i]);
    }
    assert(offset_at(wide.data(), true, 3) == 9 && offset_at(ends.data(), false, 3) == 9);
}

static void steps() {
    assert(Steps::blocks(0, 32) == 1 && Steps::blocks(32, 32) == 1 && Steps::blocks(33, 32) == 2);
    assert(Steps::blocks(MAX_TOKENS, 16) == MAX_TOKENS / 16);
    Steps two;
    two.count = 2;
    for (int tile = 0; tile < 3; ++tile)
        for (int block = 0; block < 2; ++block) {
            assert(two.tile == tile && two.block == block);
            two.advance();
        }
    // what an item counts in an int32
    const int64_t most = static_cast<int64_t>(PORTABLE_TILING.longest_strip) * Steps::blocks(MAX_TOKENS, 16);
    assert(most <= std::numeric_limits<int32_t>::max());
}

int main() {
    for (const Tiling &tiling : {PORTABLE_TILING, HOPPER_TILING, Tiling{64, 8, 2}}) {
        items(1, 1, {1}, tiling);
        items(3, 300, {150, 20, 128}, tiling);
        items(2, 128 * 17 + 5, {128 * 9 + 1}, tiling);
        items(2, 1024, {64, 65}, tiling);
    }
    // the fewer samples, the shorter the strips, and as even as can be
    assert(items(1, 4096, {14336}, HOPPER_TILING).strip_tiles == 2);
    assert(items(4, 4096, {14336}, HOPPER_TILING).strip_tiles == 8);
    assert(items(64, 4096, {14336}, HOPPER_TILING).strip_tiles == 32);
    assert(items(16, 128 * 70, {4096}, HOPPER_TILING).strip_tiles == 24);  // 70 tiles in 3 strips
    ranks();
    steps();
    // far beyond 32 bits: a batch that still is one launch
    const int64_t sizes[] = {1 << 20};
    const Schedule large = Schedule::of(30, 1 << 20, 1, sizes, HOPPER_TILING);
    assert(large.strips == (1 << 20) / TILE_K / 32);
    assert(large.partials(ALONG_ROW) == 30ll * large.strips * (1 << 20) && large.item(large.items() - 1).rank == 29);
    assert(large.place_of_row(29, large.strips - 1, (1 << 20) - 1) == large.partials(ALONG_ROW) - 1);
    assert(large.place_of_sum(29, large.strips - 1, large.n_tiles - 1, 7) == large.partials(ALONG_ALL) - 1);
    // as many items as there may be
    const Schedule most = Schedule::of(2047, 1 << 20, 1, sizes, HOPPER_TILING);
    const Item last = most.item(most.items() - 1);
    assert(most.items() == 0x7FFFFFFFll / (4096 * 256) * (4096 * 256) && last.rank == 2046);
    assert(last.n_tile == most.n_tiles - 1 && last.strip == most.strips - 1);
    return 0;
}
