// Multi-head latent attention: its parts one by one, for any number of tokens, and a layer's whole attention of one
// token.
#include <cstring>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include "api.h"

using namespace slotmoe;

namespace {

constexpr int64_t kMostSpans = 16;
constexpr int64_t kMostScores = 1 << 20;  // of the indexer that are held at once, if one token has no more
constexpr int64_t kMostIndexed = 64;      // tokens

// Of a core's first-level data cache; 0 where the system does not say.
int64_t first_level_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    static const int64_t bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
    return bytes;
#else
    return 0;
#endif
}

// What a query over `context` rows needs; the split into spans follows from the context alone.
Mla mla_for(const uint8_t* cache, int64_t heads, int64_t context, int64_t stride, int64_t r, int64_t p, float scale) {
    Mla m{};
    m.cache = cache, m.heads = heads, m.context = context, m.stride = stride, m.r = r, m.p = p, m.scale = scale;
    m.split = INT64_MAX;
    m.span_chunks = context ? up_to(up_to(context, kChunkRows), kMostSpans) : 1, m.tiles = up_to(heads, kTile);
    m.near = kChunkRows * stride < first_level_bytes();
    m.r4 = up_to(r, 4) * 4, m.k = m.r4 + up_to(p, 4) * 4, m.r_padded = up_to(r, 64) * 64;
    return m;
}

int64_t mla_span_count(const Mla& m) { return up_to(up_to(m.context, kChunkRows), m.span_chunks); }

// Bytes that a query needs while it is computed, wherever in the context: base, if given, is where m finds them.
int64_t mla_buffers(Mla& m, uint8_t* base, int64_t spans = kMostSpans) {
    int64_t used = 0;
    const auto take = [&](int64_t bytes) {
        uint8_t* p = base ? base + used : nullptr;
        used += up_to(bytes, 64) * 64;
        return p;
    };
    const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(4 * count)); };
    const int64_t padded = m.tiles * kTile;
    m.q_mixed = floats(m.heads * (m.r + m.p)), m.q_scale = floats(2 * padded);
    m.q_rows = take(m.heads * 2 * m.k), m.q_digits = take(padded * 2 * m.k);
    m.span_max = floats(spans * padded), m.span_sum = floats(spans * padded);
    m.span_out = floats(spans * m.heads * m.r_padded);
    return used;
}

// Queries of t tokens -> out [t, heads, r]; mla_of(token) has what it attends to. One token splits its context over the
// threads, several tokens are split over them; the arithmetic is the same.
template <class MlaOf>
void attend(Job& job, const Isa& isa, int64_t t, MlaOf mla_of, float* out) {
    Mla one = mla_of(0);
    const int64_t heads = one.heads, r = one.r;
    const int64_t bytes = mla_buffers(one, nullptr), thread_bytes = int64_t(isa.mla_scratch(one));  // the same for all
    uint8_t* buffers = job.scratch<uint8_t>(kMlaBuffers, bytes * (t > 1 ? job.threads() : 1));
    uint8_t* scratch = job.scratch<uint8_t>(kMlaThreads, thread_bytes * job.threads());
    if (t == 1) {
        mla_buffers(one, buffers);
        job.parallel(heads, [&](int, int64_t begin, int64_t end) { isa.mla_queries(one, begin, end); });
        job.parallel(one.tiles, [&](int, int64_t begin, int64_t end) { isa.mla_pack(one, begin, end); });
        job.parallel(mla_span_count(one), [&](int thread, int64_t begin, int64_t end) {
            isa.mla_spans(one, begin, end, scratch + thread * thread_bytes);
        });
        job.parallel(heads, [&](int, int64_t begin, int64_t end) { isa.mla_merge(one, begin, end, out); });
        return;
    }
    job.parallel(t, [&](int thread, int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; token++) {
            Mla m = mla_of(token);
            mla_buffers(m, buffers + thread * bytes);
            isa.mla_queries(m, 0, heads);
            isa.mla_pack(m, 0, m.tiles);
            isa.mla_spans(m, 0, mla_span_count(m), scratch + thread * thread_bytes);
            isa.mla_merge(m, 0, heads, out + token * heads * r);
        }
    });
}

}  // namespace

// The last t of `context` positions, each over the rows up to its own: q [t, heads, r + p] -> out [t, heads, r].
EXPORT int slotmoe_mla(const float* q, int64_t t, int64_t heads, const uint8_t* cache, int64_t context, int64_t stride,
                       int64_t r, int64_t p, float scale, float* out) {
    if (t < 1 || heads < 1 || context < t || r < 1 || p < 0 || stride < latent_bytes(r, p)) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        attend(job, isa, t, [&](int64_t token) {
            Mla m = mla_for(cache, heads, context - t + token + 1, stride, r, p, scale);
            m.q = q + token * heads * (r + p);
            return m;
        }, out);
        return kOk;
    });
}

// Each of t tokens over the rows that its list [n] names, in that order and up to the first entry below 0: an entry
// below `count` is a row of `cache`, others are of `others` [others_count]. sinks [heads], unless null, are a logit a
// head that has no value.
EXPORT int slotmoe_attend(const float* q, int64_t t, int64_t heads, const uint8_t* cache, int64_t count, int64_t stride,
                          const uint8_t* others, int64_t others_count, int64_t others_stride, const int32_t* lists,
                          int64_t n, int64_t r, int64_t p, float scale, const float* sinks, float* out) {
    const int64_t least = latent_bytes(r, p);
    if (t < 1 || heads < 1 || r < 1 || p < 0 || n < 0 || count < 0 || others_count < 0) return kBadArgument;
    if ((count && stride < least) || (others_count && others_stride < least)) return kBadArgument;
    for (int64_t i = 0; i < t * n; i++)
        if (lists[i] >= count + others_count) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        attend(job, isa, t, [&](int64_t token) {
            const int32_t* list = lists + token * n;
            int64_t context = 0;
            while (context < n && list[context] >= 0) context++;
            Mla m = mla_for(cache, heads, context, stride, r, p, scale);
            m.q = q + token * heads * (r + p);
            m.list = list, m.split = count, m.others = others, m.others_stride = others_stride, m.sinks = sinks;
            return m;
        }, out);
        return kOk;
    });
}

namespace {

// An integer that orders as the score does; NaN is the lowest.
inline uint32_t order_of(float score) {
    const float positive = score + 0.0f;  // of -0 too
    uint32_t bits;
    memcpy(&bits, &positive, 4);
    return score != score ? 0 : bits >> 31 ? ~bits : bits | 1u << 31;
}

// The k best of n > k scores, the lower of equals first -> their places, ascending. order [n] is working memory.
void best(const float* scores, int64_t n, int64_t k, uint32_t* order, int32_t* out) {
    constexpr int kBits = 11;
    for (int64_t i = 0; i < n; i++) order[i] = order_of(scores[i]);
    // The k-th best, digit by digit: how many have the digits so far and a larger one next.
    uint32_t least = 0, known = 0;
    int64_t wanted = k;  // of those that have the digits so far
    for (int shift = 32 - kBits; known != ~0u; shift = shift > kBits ? shift - kBits : 0) {
        const uint32_t digit = (~0u >> shift << shift) & ~known;
        int32_t counts[1 << kBits] = {};
        for (int64_t i = 0; i < n; i++) counts[(order[i] & digit) >> shift] += (order[i] & known) == least;
        uint32_t at = digit >> shift;
        while (counts[at] < wanted) wanted -= counts[at--];
        least |= at << shift, known |= digit;
    }
    for (int64_t i = 0, taken = 0; taken < k; i++) {  // without a branch that nobody could predict
        const bool equal = order[i] == least;
        out[taken] = int32_t(i);
        taken += (order[i] > least) | (equal & (wanted > 0));
        wanted -= equal;
    }
}

}  // namespace

// Of the first counts[t] of `keys`, rows of latents of r columns, the k that score best, ascending, then -1: q [t,
// heads, r], weights [t, heads] -> out [t, k].
EXPORT int slotmoe_index(const float* q, const float* weights, int64_t t, int64_t heads, int64_t r, const uint8_t* keys,
                         int64_t rows, int64_t stride, const int32_t* counts, int64_t k, int32_t* out) {
    if (t < 0 || heads < 1 || r < 1 || k < 1 || (rows && stride < latent_bytes(r, 0))) return kBadArgument;
    int64_t most = 1;
    for (int64_t token = 0; token < t; token++) {
        if (counts[token] < 0 || counts[token] > rows) return kBadArgument;
        most = counts[token] > most ? counts[token] : most;
        for (int64_t i = 0; i < k; i++) out[token * k + i] = i < counts[token] ? int32_t(i) : -1;
    }
    if (most <= k) return kOk;
    return guarded([&](Job& job, const Isa& isa) {
        const int64_t at_once = most > kMostScores / kMostIndexed ? up_to(kMostScores, most) : kMostIndexed;
        Mla* mlas = job.scratch<Mla>(kMlas, at_once);
        Mla& any = mlas[0] = mla_for(keys, heads, most, stride, r, 0, 1.0f);
        const int64_t bytes = mla_buffers(any, nullptr, 0), thread_bytes = int64_t(isa.mla_scratch(any));
        const int64_t tiles = any.tiles, chunks = up_to(most, kChunkRows);
        uint8_t* buffers = job.scratch<uint8_t>(kMlaBuffers, bytes * at_once);
        uint8_t* scratch = job.scratch<uint8_t>(kMlaThreads, thread_bytes * job.threads());
        float* scores = job.scratch<float>(kIndexScores, most * at_once);
        uint32_t* order = job.scratch<uint32_t>(kOrder, most * at_once);
        for (int64_t first = 0; first < t; first += at_once) {
            const int64_t n = t - first < at_once ? t - first : at_once;
            for (int64_t i = 0; i < n; i++) {
                mlas[i] = mla_for(keys, heads, counts[first + i], stride, r, 0, 1.0f);
                mlas[i].q = q + (first + i) * heads * r;
                mla_buffers(mlas[i], buffers + i * bytes, 0);
            }
            job.parallel(n * heads, [&](int, int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; i++) isa.mla_queries(mlas[i / heads], i % heads, i % heads + 1);
            });
            job.parallel(n * tiles, [&](int, int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; i++) isa.mla_pack(mlas[i / tiles], i % tiles, i % tiles + 1);
            });
            job.parallel(n * chunks, [&](int thread, int64_t begin, int64_t end) {
                for (int64_t i = begin / chunks; i * chunks < end; i++) {
                    const int64_t from = begin > i * chunks ? begin - i * chunks : 0;
                    const int64_t to = end - i * chunks < chunks ? end - i * chunks : chunks;
                    if (mlas[i].context > k)
                        isa.index_scores(mlas[i], weights + (first + i) * heads, from, to,
                                         scratch + thread * thread_bytes, scores + i * most);
                }
            });
            job.parallel(n, [&](int, int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; i++)
                    if (mlas[i].context > k) best(scores + i * most, mlas[i].context, k, order + i * most, out + (first + i) * k);
            });
        }
        return kOk;
    });
}

// rows [t, r + p] -> t cache rows, `stride` bytes apart.
EXPORT int slotmoe_store_latents(const float* rows, int64_t t, int64_t r, int64_t p, uint8_t* cache, int64_t stride) {
    if (t < 0 || r < 1 || p < 0 || stride < latent_bytes(r, p)) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        float* copies = job.scratch<float>(kRow, (r + p) * job.threads());
        job.parallel(t, [&](int thread, int64_t begin, int64_t end) {
            float* row = copies + thread * (r + p);
            for (int64_t i = begin; i < end; i++) {
                memcpy(row, rows + i * (r + p), size_t(r + p) * 4);
                isa.store_latent(row, r, p, cache + i * stride);
            }
        });
        return kOk;
    });
}

// Queries through their heads' first n rows of kv_b: q [t, heads, n] -> out [t, heads, r]. kv_b int8 [heads * per_head,
// r].
EXPORT int slotmoe_absorb_query(const float* q, int64_t t, int64_t heads, const int8_t* kv_b, const float* scale,
                                int64_t n, int64_t per_head, int64_t r, float* out) {
    if (t < 0 || heads < 1 || n < 0 || n > per_head || r < 1) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        job.parallel(heads, [&](int, int64_t begin, int64_t end) {
            isa.absorb_query(q, n, t, heads, kv_b, scale, n, per_head, r, begin, end, out, r);
        });
        return kOk;
    });
}

// Latent outputs through their heads' rows of kv_b past the first n: latent [t, heads, r] -> out [t, heads, per_head -
// n].
EXPORT int slotmoe_absorb_value(const float* latent, int64_t t, int64_t heads, const int8_t* kv_b, const float* scale,
                                int64_t n, int64_t per_head, int64_t r, float* out) {
    if (t < 0 || heads < 1 || n < 0 || n > per_head || r < 1) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        job.parallel(heads, [&](int, int64_t begin, int64_t end) {
            isa.absorb_value(latent, t, heads, kv_b, scale, n, per_head, r, begin, end, out);
        });
        return kOk;
    });
}

namespace {

// Complex pairs, which stand side by side or in two halves, times the table, each product and sum rounded once. out may
// be x.
void rotate(const float* x, const float* table, int64_t pairs, bool halves, float* out) {
    const int64_t step = halves ? 1 : 2, apart = halves ? pairs : 1;
    for (int64_t i = 0; i < pairs; i++) {
        const int64_t first = i * step, second = first + apart;
        const float a = x[first], b = x[second], c = table[2 * i], s = table[2 * i + 1];
        out[first] = a * c - b * s;
        out[second] = a * s + b * c;
    }
}

}  // namespace

// x [t, heads, p] by one table [p / 2] of complex numbers a token -> out, the same shape.
EXPORT int slotmoe_rotate(const float* x, const float* table, int64_t halves, int64_t t, int64_t heads, int64_t p,
                          float* out) {
    if (t < 0 || heads < 0 || p < 0 || p % 2) return kBadArgument;
    return guarded([&](Job& job, const Isa&) {
        job.parallel(t, [&](int, int64_t begin, int64_t end) {
            for (int64_t row = begin * heads; row < end * heads; row++)
                rotate(x + row * p, table + row / heads * p, p / 2, halves, out + row * p);
        });
        return kOk;
    });
}

// --- all of it

bool Attention::valid(int64_t stride) const {
    if (heads < 1 || n < 0 || p < 0 || p % 2 || r < 1 || v < 1 || stride < latent_bytes(r, p)) return false;
    if (!query.valid() || !latent.valid() || !out.valid() || (query_norm && !query_b.valid())) return false;
    return !gate.n || gate.valid();
}

void slotmoe::attention(Job& job, const Isa& isa, const Attention& a, int64_t t, const float* h, const float* table,
                        const float* query_scale, uint8_t* const* caches, int64_t stride, const int64_t* positions, float* y, float* x,
                        float* logits) {
    const int64_t heads = a.heads, n = a.n, p = a.p, r = a.r, v = a.v, width = r + p, hidden = a.latent.k;
    const auto norm = [&](const float* in, const float* weight, int64_t columns, float eps, float* out) {
        job.parallel(t, [&](int, int64_t begin, int64_t end) {
            for (int64_t token = begin; token < end; token++)
                isa.rms_norm(in + token * columns, weight, columns, eps, out + token * columns);
        });
    };
    const int64_t q_columns = heads * (n + p);
    float* q = job.scratch<float>(kQuery, t * q_columns);
    float* q_in = a.query_norm ? job.scratch<float>(kQueryLatent, t * a.query.n) : q;
    float* rows = job.scratch<float>(kRow, t * width);
    norm(h, a.input_norm, hidden, a.eps, x);
    const Product query(job, isa, a.query, x, t, q_in), latent(job, isa, a.latent, x, t, rows, kAct, kActFactor);
    job.parallel(query.tiles() + latent.tiles(), [&](int, int64_t begin, int64_t end) {
        const int64_t split = query.tiles();
        if (begin < split) query.run(begin, end < split ? end : split);
        if (end > split) latent.run(begin > split ? begin - split : 0, end - split);
    });
    if (a.query_norm) {
        norm(q_in, a.query_norm, a.query.n, a.latent_eps, q_in);
        const Product query_b(job, isa, a.query_b, q_in, t, q);
        job.parallel(query_b.tiles(), [&](int, int64_t begin, int64_t end) { query_b.run(begin, end); });
    }

    float* q_full = job.scratch<float>(kQueryFull, t * heads * width);  // in the cache's columns
    Mla* mlas = job.scratch<Mla>(kMlas, t);
    int64_t spans = 0;
    for (int64_t token = 0; token < t; token++) {
        mlas[token] = mla_for(caches[token], heads, positions[token] + 1, stride, r, p, a.scale);
        mlas[token].q = q_full + token * heads * width;
        spans += mla_span_count(mlas[token]);
    }
    const int64_t bytes = mla_buffers(mlas[0], nullptr), thread_bytes = int64_t(isa.mla_scratch(mlas[0]));  // the same for all
    uint8_t* buffers = job.scratch<uint8_t>(kMlaBuffers, bytes * t);
    for (int64_t token = 0; token < t; token++) mla_buffers(mlas[token], buffers + token * bytes);
    uint8_t* scratch = job.scratch<uint8_t>(kMlaThreads, thread_bytes * job.threads());
    float* latent_out = job.scratch<float>(kLatentOut, t * heads * r);
    float* values = job.scratch<float>(kValues, t * heads * v);

    job.parallel(t, [&](int, int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; token++) {
            float* row = rows + token * width;
            isa.rms_norm(row, a.latent_norm, r, a.latent_eps, row);
            rotate(row + r, table + token * p, p / 2, a.halves, row + r);
            isa.store_latent(row, r, p, caches[token] + positions[token] * stride);
        }
    });
    job.parallel(heads, [&](int, int64_t begin, int64_t end) {
        for (int64_t token = 0; query_scale && token < t; token++)
            for (int64_t i = begin * (n + p); i < end * (n + p); i++) q[token * q_columns + i] *= query_scale[token];
        isa.absorb_query(q, n + p, t, heads, a.kv_b, a.kv_b_scale, n, n + v, r, begin, end, q_full, width);
        for (int64_t token = 0; token < t; token++) {
            for (int64_t head = begin; head < end; head++)
                rotate(q + token * q_columns + head * (n + p) + n, table + token * p, p / 2, a.halves,
                       q_full + (token * heads + head) * width + r);
            isa.mla_queries(mlas[token], begin, end);
        }
    });
    const int64_t tiles = mlas[0].tiles;
    job.parallel(t * tiles, [&](int, int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; at++) isa.mla_pack(mlas[at / tiles], at % tiles, at % tiles + 1);
    });
    job.parallel(spans, [&](int thread, int64_t begin, int64_t end) {
        for (int64_t token = 0, first = 0; token < t && first < end; token++) {
            const int64_t count = mla_span_count(mlas[token]);
            const int64_t from = begin > first ? begin - first : 0, to = end - first < count ? end - first : count;
            if (from < to) isa.mla_spans(mlas[token], from, to, scratch + thread * thread_bytes);
            first += count;
        }
    });
    job.parallel(heads, [&](int, int64_t begin, int64_t end) {
        for (int64_t token = 0; token < t; token++)
            isa.mla_merge(mlas[token], begin, end, latent_out + token * heads * r);
        isa.absorb_value(latent_out, t, heads, a.kv_b, a.kv_b_scale, n, n + v, r, begin, end, values);
    });
    const Product out(job, isa, a.out, values, t, y);
    job.parallel(out.tiles(), [&](int, int64_t begin, int64_t end) {
        out.run(begin, end);
        for (int64_t token = 0; token < t; token++)
            for (int64_t i = begin * kTile; i < (end * kTile < hidden ? end * kTile : hidden); i++)
                y[token * hidden + i] = h[token * hidden + i] + y[token * hidden + i];
    });
    norm(y, a.next_norm, hidden, a.eps, x);
    if (!a.gate.n) return;
    const Product gate(job, isa, a.gate, x, t, logits);
    job.parallel(gate.tiles(), [&](int, int64_t begin, int64_t end) { gate.run(begin, end); });
}

// One token of each of t sequences: h [t, hidden] -> y = h + attention(rms_norm(h)). A token's latent row is written to
// its sequence's cache at its position, then it attends to the rows up to its own. table [t, p / 2] complex; query_scale
// [t], unless null, multiplies its queries. Then what the feed-forward starts with: x = next_norm(y), logits = x gate^T. Every element is computed as by the separate
// entries, one after the other, and so as for a token alone. Only tests call it: the oracle of slotmoe_decode.
EXPORT int slotmoe_attention(const Attention* a, int64_t t, const float* h, const float* table,
                             const float* query_scale, uint8_t* const* caches, int64_t stride, const int64_t* positions,
                             float* y, float* x, float* logits) {
    if (t < 1 || !a->valid(stride)) return kBadArgument;
    for (int64_t token = 0; token < t; token++)
        if (positions[token] < 0) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        attention(job, isa, *a, t, h, table, query_scale, caches, stride, positions, y, x, logits);
        return kOk;
    });
}
