// What attention is made of, beside its kernels: queries over the rows of a cache, split over threads.
#pragma once
#include "api.h"

namespace slotmoe {

constexpr int64_t kMostSpans = 16;

// What a query q [heads, r + p] over `context` rows needs; the split into spans follows from the context alone.
inline Mla mla_for(const float* q, float* out, const uint8_t* cache, int64_t heads, int64_t context, int64_t stride,
                   int64_t r, int64_t p, float scale) {
    Mla m{};
    m.cache = cache, m.heads = heads, m.context = context, m.stride = stride, m.r = r, m.p = p, m.scale = scale;
    m.q = q, m.out = out, m.split = INT64_MAX;
    m.span_chunks = context ? up_to(up_to(context, kChunkRows), kMostSpans) : 1, m.tiles = up_to(heads, kTile);
    m.r4 = up_to(r, 4) * 4, m.k = m.r4 + up_to(p, 4) * 4, m.r_padded = up_to(r, 64) * 64;
    m.shared = m.tiles < kShared ? kShared / m.tiles : 1;
    return m;
}

// The same of a group's heads, over keys that are apart from the values: those of the last `window` positions, or all
// if that is 0, up to `position`, whose row is given.
inline Mla mla_for_group(const float* q, float* out, const uint8_t* row, int64_t heads, int64_t position,
                         int64_t window, int64_t stride, int64_t z, float scale) {
    const int64_t context = window && window < position + 1 ? window : position + 1;
    Mla m = mla_for(q, out, row - (context - 1) * stride, heads, context, stride, z, z, scale);
    m.apart = true;
    return m;
}

inline int64_t mla_span_count(const Mla& m) { return up_to(up_to(m.context, kChunkRows), m.span_chunks); }

// Bytes that a query needs while it is computed, wherever in the context: base, if given, is where m finds them.
inline int64_t mla_buffers(Mla& m, uint8_t* base, int64_t spans = kMostSpans) {
    int64_t used = 0;
    const auto take = [&](int64_t bytes) {
        uint8_t* p = base ? base + used : nullptr;
        used += up_to(bytes, 64) * 64;
        return p;
    };
    const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(4 * count)); };
    const int64_t padded = m.tiles * kTile;
    m.q_mixed = floats(m.heads * query_columns(m)), m.q_scale = floats(2 * padded);
    m.q_rows = take(m.heads * 2 * m.k), m.q_digits = take(m.apart ? 0 : padded * 2 * padded_columns(m));
    m.span_max = floats(spans * padded), m.span_sum = floats(spans * padded);
    m.span_out = floats(spans * m.heads * m.r_padded);
    return used;
}

// Gives `count` queries, alike, their buffers.
inline void give_buffers(Job& job, Mla* mlas, int64_t count, int64_t spans = kMostSpans) {
    const int64_t bytes = mla_buffers(mlas[0], nullptr, spans);
    uint8_t* buffers = job.scratch<uint8_t>(kMlaBuffers, bytes * count);
    for (int64_t i = 0; i < count; i++) mla_buffers(mlas[i], buffers + i * bytes, spans);
}

// A few queries, alike, whose contexts are split over the threads. Their queries are mixed, and buffers theirs, when
// their spans are computed; what they give is not merged yet.
inline void attend_by_spans(Job& job, const Isa& isa, const Mla* mlas, int64_t count) {
    const int64_t tiles = mlas[0].tiles, thread_bytes = int64_t(isa.mla_scratch(mlas[0]));
    uint8_t* scratch = job.scratch<uint8_t>(kMlaThreads, thread_bytes * job.threads());
    int64_t spans = 0;
    for (int64_t i = 0; i < count; i++) spans += mla_span_count(mlas[i]);
    job.each(count * tiles, [&](int, int64_t i) { isa.mla_pack(mlas[i / tiles], i % tiles, i % tiles + 1); });
    job.parallel(spans, [&](int thread, int64_t begin, int64_t end) {
        for (int64_t i = 0, first = 0; i < count && first < end; i++) {
            const int64_t own = mla_span_count(mlas[i]), each = mlas[i].span_chunks;
            const int64_t from = begin > first ? begin - first : 0;
            const int64_t to = end - first < own ? (end - first) * each : up_to(mlas[i].context, kChunkRows);
            if (from * each < to) isa.mla_chunks(&mlas[i], 1, from * each, to, scratch + thread * thread_bytes);
            first += own;
        }
    });
}

// t queries, alike; mla_of(i) has what one attends to: a list, or the first rows of a cache, one more than the query
// before it on the same cache, and where its result goes. Queries with lists share no chunks. If there are `few`, each splits its context over the threads,
// else they are split over them; the arithmetic is the same.
template <class MlaOf>
void attend(Job& job, const Isa& isa, int64_t t, bool few, MlaOf mla_of) {
    Mla one = mla_of(0);
    const int64_t heads = one.heads;
    if (few) {
        Mla* mlas = job.scratch<Mla>(kMlas, t);
        for (int64_t i = 0; i < t; i++) mlas[i] = mla_of(i);
        give_buffers(job, mlas, t);
        job.each(t * heads, [&](int, int64_t i) { isa.mla_queries(mlas[i / heads], i % heads, i % heads + 1); });
        attend_by_spans(job, isa, mlas, t);
        job.each(t * heads, [&](int, int64_t i) { isa.mla_merge(mlas[i / heads], i % heads, i % heads + 1); });
        return;
    }
    const int64_t bytes = mla_buffers(one, nullptr), thread_bytes = int64_t(isa.mla_scratch(one));  // the same for all
    const int64_t shared = one.shared;
    uint8_t* buffers = job.scratch<uint8_t>(kMlaBuffers, bytes * shared * job.threads());
    uint8_t* scratch = job.scratch<uint8_t>(kMlaThreads, thread_bytes * job.threads());
    job.parallel(t, [&](int thread, int64_t begin, int64_t end) {
        Mla m[kShared];
        for (int64_t first = begin, count; first < end; first += count) {
            for (count = 0; count < shared && first + count < end; count++) {
                m[count] = mla_of(first + count);
                if (count && (m[count].list || m[0].list || m[count].cache != m[0].cache)) break;
            }
            for (int64_t i = 0; i < count; i++) {
                mla_buffers(m[i], buffers + (thread * shared + i) * bytes);
                isa.mla_queries(m[i], 0, heads);
                isa.mla_pack(m[i], 0, m[i].tiles);
            }
            isa.mla_chunks(m, count, 0, up_to(m[count - 1].context, kChunkRows), scratch + thread * thread_bytes);
            for (int64_t i = 0; i < count; i++) isa.mla_merge(m[i], 0, heads);
        }
    });
}

// Complex pairs, which stand side by side or in two halves, times the table, each product and sum rounded once. `back`
// is by the conjugates. out may be x.
inline void rotate(const float* x, const float* table, int64_t pairs, bool halves, float* out, bool back = false) {
    const int64_t step = halves ? 1 : 2, apart = halves ? pairs : 1;
    for (int64_t i = 0; i < pairs; i++) {
        const int64_t first = i * step, second = first + apart;
        const float a = x[first], b = x[second], c = table[2 * i], s = back ? -table[2 * i + 1] : table[2 * i + 1];
        out[first] = a * c - b * s;
        out[second] = a * s + b * c;
    }
}

// Behind the heads: h plus out's product with their values [t, out.k] -> y, its norm -> x, and the logits of the
// router, if the layer has one.
template <class Weights>
void leave(Job& job, const Isa& isa, const Weights& a, const float* bias, const float* values, int64_t t,
           const float* h, float* y, float* x, float* logits) {
    const int64_t hidden = a.out.n;
    const Product out(job, isa, a.out, values, t, y, bias);
    job.parallel(out.tiles(), [&](int, int64_t begin, int64_t end) {
        out.run(begin, end);
        for (int64_t token = 0; token < t; token++)
            for (int64_t i = begin * kTile; i < end * kTile && i < hidden; i++)
                y[token * hidden + i] = h[token * hidden + i] + y[token * hidden + i];
    });
    norm_rows(job, isa, y, a.next_norm, t, hidden, a.eps, x);
    if (a.gate.n) multiply(job, isa, a.gate, x, t, logits);
}

// What an indexer chooses for t tokens: of the first counts[t] rows that begin at keys[t], `bytes` apart, and of no
// others if all tokens have at most topk. x [t, hidden] and low [t, ..] are what weights and queries are made of, p
// columns of a query's head from `start` on are rotated. lists [t, topk] are left as they are where there are no more.
void choose(Job& job, const Isa& isa, const Indexer& indexer, int64_t t, const float* x, const float* low,
            const float* table, int64_t p, int64_t start, const uint8_t* const* keys, int64_t bytes,
            const int64_t* counts, int32_t* lists);

}  // namespace slotmoe
