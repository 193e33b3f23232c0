// The parameter of hopper_kernel that its compiled code reads, for the test that runs that code on the host.
#include <cstring>

#define KUNBR_EMULATED
#include "../grad_density.h"

using namespace kunbr;

// Bytes of Arguments, which `out` gets. longest_strip: as if there were many samples.
extern "C" int hopper_arguments(void *out, int64_t K, int projections, const int64_t *sizes, int64_t samples,
                                int statistic, int along, int longest_strip, uint64_t partial, int64_t *partials) {
    Arguments a = {};
    a.schedule = Schedule::of(samples, K, projections, sizes, HOPPER_TILING);
    a.schedule.cut(longest_strip);
    a.statistic = statistic;
    a.along = along;
    a.partial = reinterpret_cast<float *>(partial);
    std::memcpy(out, &a, sizeof(a));
    *partials = a.schedule.partials(along);
    return sizeof(a);
}
