// Attention by groups (arXiv 2305.13245): some heads of queries share one of keys and values. A row of a group's cache
// is a value and the key, each rounded as a part of a latent is.
#include <cstring>

#include "attend.h"

using namespace slotmoe;

// The last t of the positions whose rows [groups, rows], of values [z] and keys [z] and `group_bytes` apart, are here
// from position `first` on. Each over those up to its own, the last `window` of them unless that is 0: q [t, heads, z]
// -> out [t, heads, z]. sinks [heads]: as of slotmoe_attend.
EXPORT int slotmoe_grouped(const float* q, int64_t t, int64_t heads, const uint8_t* cache, int64_t groups,
                           int64_t group_bytes, int64_t rows, int64_t stride, int64_t first, int64_t z, float scale,
                           int64_t window, const float* sinks, float* out) {
    if (t < 1 || groups < 1 || heads < groups || heads % groups || z < 1 || rows < t || stride < latent_bytes(z, z))
        return kBadArgument;
    const int64_t earliest = first + rows - t + 1 - window;
    if (first < 0 || window < 0 || (first && (!window || earliest < first))) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        attend(job, isa, t * groups, t == 1, [&](int64_t i) {
            const int64_t group = i / t, row = rows - t + i % t, of_group = heads / groups;
            const int64_t head = i % t * heads + group * of_group;
            Mla m = mla_for_group(q + head * z, out + head * z, cache + group * group_bytes + row * stride, of_group,
                                  first + row, window, stride, z, scale);
            m.sinks = sinks ? sinks + group * of_group : nullptr;
            return m;
        });
    });
}

bool Grouped::valid(const Tokens& tokens) const {
    const auto fits = [&](int64_t normed, int64_t count) {
        return !normed || normed == z || (normed == count * z && !norm_last);
    };
    if (heads < 1 || groups < 1 || heads % groups || z < 1 || p < 0 || p % 2 || p > z || window < 0) return false;
    if (rows(tokens).row_bytes < latent_bytes(z, z) || !fits(query_normed, heads) || !fits(key_normed, groups))
        return false;
    if (!query.valid() || !key.valid() || !value.valid() || !out.valid() || (gate.n && !gate.valid())) return false;
    if (query_gate.n && (!query_gate.valid() || query_gate.n != query.n)) return false;
    return query.n == heads * z && key.n == groups * z && value.n == groups * z && out.k == heads * z;
}

void slotmoe::grouped_layer(Job& job, const Isa& isa, const Grouped& a, int64_t t, const float* h,
                            const Tokens& tokens, float* y, float* x, float* logits) {
    const int64_t groups = a.groups, z = a.z, each = a.heads / groups, count = t * groups;
    const int64_t* positions = tokens.positions;
    const Store& store = a.rows(tokens);
    float* q = job.scratch<float>(kQuery, t * a.heads * z);
    float *keys = job.scratch<float>(kRow, 2 * count * z), *values = keys + count * z;
    norm_rows(job, isa, h, a.input_norm, t, a.query.k, a.eps, x);
    multiply(job, {{job, isa, a.query, x, t, q, a.query_bias},
                   {job, isa, a.key, x, t, keys, a.key_bias, kAct, kActFactor},
                   {job, isa, a.value, x, t, values, a.value_bias, kGate, kUp}});
    float* gates = a.query_gate.n ? job.scratch<float>(kValues, t * a.heads * z) : nullptr;
    if (gates) multiply(job, isa, a.query_gate, x, t, gates);
    if (a.query_normed > z) norm_rows(job, isa, q, a.query_norm, t, a.query_normed, a.eps, q);
    if (a.key_normed > z) norm_rows(job, isa, keys, a.key_norm, t, a.key_normed, a.eps, keys);

    float* attended = job.scratch<float>(kLatentOut, t * a.heads * z);
    const auto row_of = [&](int64_t i) { return store.at(i / groups, a.row + i % groups, positions[i / groups]); };
    const auto mla_of = [&](int64_t i) {
        Mla mla = mla_for_group(q + i * each * z, attended + i * each * z, row_of(i), each, positions[i / groups],
                                a.window, store.row_bytes, z, a.scale);
        if (a.sinks) mla.sinks = a.sinks + i % groups * each;
        return mla;
    };
    const bool few = t <= kFewTokens;  // then queries and sums go along with what is around them
    Mla* mlas = few ? job.scratch<Mla>(kMlas, count) : nullptr;
    for (int64_t i = 0; few && i < count; i++) mlas[i] = mla_of(i);
    if (few) give_buffers(job, mlas, count);
    const auto turn = [&](float* head, int64_t normed, const float* weight, int64_t token) {
        if (normed == z && !a.norm_last) isa.rms_norm(head, weight, z, a.eps, head);
        rotate(head, tokens.table + token * a.p, a.p / 2, a.halves, head);
        if (normed == z && a.norm_last) isa.rms_norm(head, weight, z, a.eps, head);
    };
    float* rows = job.scratch<float>(kQueryFull, 2 * z * job.threads());
    job.each(count, [&](int thread, int64_t i) {
        float* row = rows + 2 * z * thread;
        turn(keys + i * z, a.key_normed, a.key_norm, i / groups);
        memcpy(row, values + i * z, size_t(z) * 4), memcpy(row + z, keys + i * z, size_t(z) * 4);
        isa.store_latent(row, z, z, row_of(i));
        for (int64_t head = i * each; head < (i + 1) * each; head++)
            turn(q + head * z, a.query_normed, a.query_norm, i / groups);
        if (few) isa.mla_queries(mlas[i], 0, each);
    });
    if (few)
        attend_by_spans(job, isa, mlas, count);
    else  // group by group, so that neighbours read the same rows
        attend(job, isa, count, false, [&](int64_t i) { return mla_of(i % t * groups + i / t); });
    job.each(count * each, [&](int, int64_t i) {
        if (few) isa.mla_merge(mlas[i / each], i % each, i % each + 1);
        if (gates) isa.gated(attended + i * z, gates + i * z, z, attended + i * z);
    });
    leave(job, isa, a, a.out_bias, attended, t, h, y, x, logits);
}
