// What a launch of the Hopper kernel is given, for tests/verify: made by the code that launches it.
//
//     arguments SAMPLES K STATISTIC ALONG N [N ...]
//
// prints JSON: the bytes of Arguments as words, where its pointer to the partial sums lies, threads, shared memory, items.
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define KUNBR_EMULATED
#include "../../csrc/grad_density_sm90.cuh"

using namespace kunbr;

int main(int count, char **values) {
    const int projections = count - 5;
    int64_t sizes[MAX_PROJECTIONS];
    for (int p = 0; p < projections; ++p) sizes[p] = atoll(values[5 + p]);
    Arguments arguments = {};
    arguments.schedule = Schedule::of(atoll(values[1]), atoll(values[2]), projections, sizes, HOPPER_TILING);
    arguments.statistic = atoi(values[3]);
    arguments.along = atoi(values[4]);
    printf("{\"threads\": %d, \"shared\": %d, \"items\": %lld, \"rows\": %d, \"partial\": %zu, \"words\": [",
           HOPPER_THREADS, HOPPER_BYTES, static_cast<long long>(arguments.schedule.items()), HOPPER_TILING.rows,
           offsetof(Arguments, partial));
    for (size_t at = 0; at < sizeof arguments; at += 4) {
        uint32_t word;
        memcpy(&word, reinterpret_cast<const char *>(&arguments) + at, 4);
        printf("%s%u", at > 0 ? ", " : "", word);
    }
    printf("]}\n");
}
