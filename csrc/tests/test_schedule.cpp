// The order of work and the places of partial sums, on the host, under sanitizers.
#include <algorithm>
#include <cassert>
#include <initializer_list>
#include <limits>
#include <set>
#include <tuple>
#include <vector>

#include "../schedule.h"

using namespace kunbr;

// Every tile of every sample is in one item, and partial sums fill their places without a gap or a clash.
static void items(int64_t samples, int64_t K, std::vector<int64_t> sizes, int tile_n, int sharers) {
    const Schedule s = Schedule::of(samples, K, static_cast<int>(sizes.size()), sizes.data(), tile_n, sharers);
    std::set<std::tuple<int64_t, int32_t, int32_t>> seen;
    std::vector<int> all(s.partials(ALONG_ALL)), row(s.partials(ALONG_ROW));
    int64_t last_rank = 0;
    for (int64_t i = 0; i < s.items(); ++i) {
        const Item item = s.item(i);
        assert(item.rank >= last_rank && item.rank < samples);  // the longest first
        last_rank = item.rank;
        const int p = s.projection(item.n_tile);
        assert(item.n_tile >= s.first_tile(p) && item.n_tile < s.first_tile(p + 1));
        const int64_t first_n = static_cast<int64_t>(item.n_tile - s.first_tile(p)) * tile_n;
        assert(first_n < sizes[p]);
        const int32_t tiles = s.count_k_tiles(item.strip);
        assert(tiles >= 1 && tiles <= STRIP_TILES);
        for (int32_t t = 0; t < tiles; ++t) {
            const int32_t k_tile = s.first_k_tile(item.strip) + t;
            assert(k_tile < s.k_tiles && seen.insert({item.rank, item.n_tile, k_tile}).second);
        }
        for (int32_t sharer = 0; sharer < sharers; ++sharer) {
            const int32_t part = item.strip * sharers + sharer;
            ++all.at(s.place(ALONG_ALL, item.rank, part, item.n_tile));
            for (int64_t n = first_n; n < std::min<int64_t>(sizes[p], first_n + tile_n); ++n)
                ++row.at(s.place(ALONG_ROW, item.rank, part, s.first_row(p) + n));
        }
    }
    assert(static_cast<int64_t>(seen.size()) == samples * s.n_tiles * s.k_tiles);
    for (const auto *places : {&all, &row})
        for (int count : *places) assert(count == 1);
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
    assert(static_cast<int64_t>(STRIP_TILES) * Steps::blocks(MAX_TOKENS, 16) <= std::numeric_limits<int32_t>::max());
}

int main() {
    for (int sharers : {1, 2}) {
        items(1, 1, {1}, 128, sharers);
        items(3, 300, {150, 20, 128}, 128, sharers);
        items(2, 128 * 17 + 5, {128 * 9 + 1}, 128, sharers);
        items(2, 1024, {64, 65}, 64, sharers);
    }
    ranks();
    steps();
    // far beyond 32 bits: a batch that still is one launch
    const int64_t sizes[] = {1 << 20};
    const Schedule large = Schedule::of(30, 1 << 20, 1, sizes, 128, 2);
    assert(large.parts == 2 * (1 << 20) / TILE_K / STRIP_TILES);
    assert(large.partials(ALONG_ROW) == 30ll * large.parts * (1 << 20) && large.item(large.items() - 1).rank == 29);
    assert(large.place(ALONG_ROW, 29, large.parts - 1, (1 << 20) - 1) == large.partials(ALONG_ROW) - 1);
    const Schedule larger = Schedule::of(3000, 1 << 20, 1, sizes, 128, 2);  // more items than 32 bits count
    const Item last = larger.item(larger.items() - 1), at = larger.item(1ll << 33);
    assert(larger.items() > 1ll << 33 && last.rank == 2999);
    assert(last.n_tile == larger.n_tiles - 1 && last.strip == larger.strips - 1);
    assert(at.rank == (1ll << 33) / (static_cast<int64_t>(larger.n_tiles) * larger.strips));
    return 0;
}
