// What becomes of CUDA's errors, with a runtime of our own in stub/.
#include <cassert>
#include <cstring>

#include "../check.h"

using namespace kunbr;

char *kunbr::detail() {
    static char text[DETAIL_BYTES] = "";
    return text;
}

static int call() {
    KUNBR_TRY(cuda_failure("call", fails()));
    return launched("call");
}

int main() {
    assert(call() == KUNBR_CUDA + cudaErrorInvalidValue);
    assert(std::strcmp(detail(), "call: invalid argument (CUDA error 1)") == 0);
    assert(launched("the next launch") == KUNBR_OK);  // that error is not its own
    fails();
    assert(launched("a launch that failed") == KUNBR_CUDA + cudaErrorInvalidValue);
    assert(launched("the next launch") == KUNBR_OK);
    return 0;
}
