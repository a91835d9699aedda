// What goes on around the layers of DeepSeek-V4; streams.h has the arithmetic.
#include <cstring>

#include "api.h"

using namespace slotmoe;

void slotmoe::hyper_in(Job& job, const Isa& isa, const Hyper& hyper, const float* h, int64_t t, int64_t d, float* x,
                       float* post, float* comb) {
    const int64_t m = hyper.m, columns = m * d, rows = hyper.rows(!post);
    float* mixes = job.scratch<float>(kHyper, t * (rows + 1 + m));
    float *squares = mixes + t * rows, *pre = squares + t;
    job.parallel(rows + t, [&](int, int64_t begin, int64_t end) {
        if (begin < rows)  // each row is read once, for all tokens
            isa.linear_dense(h, t, columns, hyper.fn, Source::f32, begin, end < rows ? end : rows, mixes, rows);
        for (int64_t token = begin < rows ? 0 : begin - rows; token < end - rows; token++)
            isa.linear_dense(h + token * columns, 1, columns, h + token * columns, Source::f32, 0, 1, squares + token, 1);
    });
    job.each(t, [&](int, int64_t token) {
        isa.hyper_coefficients(hyper, mixes + token * rows, squares[token], columns, pre + token * m,
                               post ? post + token * m : nullptr, post ? comb + token * m * m : nullptr);
    });
    weighted_sum(job, isa, h, pre, t, m, d, x);
}

void slotmoe::hyper_out(Job& job, const Isa& isa, const float* y, const float* h, const float* post, const float* comb,
                        int64_t t, int64_t m, int64_t d, float* out) {
    job.each(t, [&](int, int64_t token) {
        const int64_t streams = token * m * d;
        isa.hyper_out(y + token * d, h + streams, post + token * m, comb + token * m * m, m, d, out + streams);
    });
}

EXPORT int slotmoe_hyper_in(const float* h, const float* fn, const float* base, const float* scale, int64_t t,
                            int64_t m, int64_t d, int64_t rows, float eps, int64_t iterations, float hc_eps, float* x,
                            float* post, float* comb) {
    if (t < 0 || m < 1 || d < 1 || rows != (2 + m) * m || iterations < 1) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        hyper_in(job, isa, {fn, base, scale, m, iterations, eps, hc_eps}, h, t, d, x, post, comb);
    });
}

EXPORT int slotmoe_hyper_head(const float* h, const float* fn, const float* base, const float* scale, int64_t t,
                              int64_t m, int64_t d, float eps, float hc_eps, float* x) {
    if (t < 0 || m < 1 || d < 1) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        hyper_in(job, isa, {fn, base, scale, m, 1, eps, hc_eps}, h, t, d, x, nullptr, nullptr);
    });
}

EXPORT int slotmoe_hyper_out(const float* y, const float* h, const float* post, const float* comb, int64_t t, int64_t m,
                             int64_t d, float* out) {
    if (t < 0 || m < 1 || d < 1) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        hyper_out(job, isa, y, h, post, comb, t, m, d, out);
    });
}

// kv, gate [windows, rows, z], bias [rows, z] -> y [windows, z]: the windows' sums, see streams.h, normalized and
// multiplied by `norm`.
EXPORT int slotmoe_compress(const float* kv, const float* gate, const float* bias, const float* norm, int64_t windows,
                            int64_t rows, int64_t z, float eps, float* y) {
    if (windows < 0 || rows < 1 || z < 1) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        job.each(windows, [&](int, int64_t w) {
            isa.compress(kv + w * rows * z, gate + w * rows * z, bias, rows, z, y + w * z);
            isa.rms_norm(y + w * z, norm, z, eps, y + w * z);
        });
    });
}
