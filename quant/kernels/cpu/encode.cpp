// The C ABI of the encoder; see encode.h.
#include "api.h"

using namespace slotmoe;

namespace {

// Runs `body(encoder, begin, end)` over `tiles` of 16 rows in the calling thread: encoders work on a matrix each, and
// would wait for their turn in the pool.
template <class Body>
int encoding(int64_t l, int64_t block, int64_t n, int64_t k, const float* levels, Body body) {
    int of = 0;  // log2(l) - 2
    while (of < 4 && 4 << of < l) of++;
    bool valid = l == 4 << of && (block == 32 || block == 64) && n >= 1 && k >= 1;
    for (int64_t i = 0; valid && i < l; i++) valid = levels[i] - levels[i] == 0.0f;
    if (!valid) return kBadArgument;
    std::fenv_t environment;
    std::fegetenv(&environment);
    std::fesetenv(FE_DFL_ENV);
    body(best_isa().encoders[of], 0, up_to(n, kTile));
    std::fesetenv(&environment);
    return kOk;
}

}  // namespace

EXPORT int slotmoe_fit_rows(const void* src, int type, int64_t n, int64_t k, const float* weights, const float* levels,
                            int64_t l, const float* starts, int64_t count, int64_t block, float* scales) {
    if (type < 0 || type > 2) return kBadArgument;
    return encoding(l, block, n, k, levels, [&](const Encoder& e, int64_t begin, int64_t end) {
        e.fit_rows(src, Source(type), n, k, weights, levels, starts, count, block, begin, end, scales);
    });
}

EXPORT int slotmoe_code_rows(const void* src, int type, int64_t n, int64_t k, const float* scales, const float* levels,
                             int64_t l, int64_t block, uint8_t* codes) {
    if (type < 0 || type > 2) return kBadArgument;
    return encoding(l, block, n, k, levels, [&](const Encoder& e, int64_t begin, int64_t end) {
        e.code_rows(src, Source(type), n, k, scales, levels, block, begin, end, codes);
    });
}

EXPORT int slotmoe_feed_back(const float* x, int64_t s, int64_t n, const float* u, const float* factors, int64_t most,
                             const float* levels, int64_t l, const float* starts, int64_t count, int64_t block,
                             float* scales, int64_t blocks, float* q) {
    if (n % kTile || s > 128 || s != blocks * block) return kBadArgument;
    return encoding(l, block, n, s, levels, [&](const Encoder& e, int64_t begin, int64_t end) {
        e.feed_back(x, s, n, u, factors, most, levels, starts, count, block, begin, end, scales, q);
    });
}

EXPORT int slotmoe_descend(const float* gradient, int64_t s, int64_t n, const float* h, const float* factors,
                           int64_t most, const float* levels, int64_t l, int64_t block, float* scales, int64_t blocks,
                           float* q) {
    if (n % kTile || s > 128 || s != blocks * block) return kBadArgument;
    return encoding(l, block, n, s, levels, [&](const Encoder& e, int64_t begin, int64_t end) {
        e.descend(gradient, s, n, h, factors, most, levels, block, begin, end, scales, q);
    });
}
