// Multi-head latent attention: its parts one by one, for any number of tokens, and a layer's whole attention of one
// token.
#include <cstring>

#include "attend.h"

using namespace slotmoe;

constexpr float kIndexEps = 1e-6f;  // of the norm of an indexer's keys

// The last t of `context` positions, each over the rows up to its own: q [t, heads, r + p] -> out [t, heads, r].
EXPORT int slotmoe_mla(const float* q, int64_t t, int64_t heads, const uint8_t* cache, int64_t context, int64_t stride,
                       int64_t r, int64_t p, float scale, float* out) {
    if (t < 1 || heads < 1 || context < t || r < 1 || p < 0 || stride < latent_bytes(r, p)) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        attend(job, isa, t, t == 1, [&](int64_t token) {
            return mla_for(q + token * heads * (r + p), out + token * heads * r, cache, heads, context - t + token + 1,
                           stride, r, p, scale);
        });
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
        attend(job, isa, t, t == 1, [&](int64_t token) {
            const int32_t* list = lists + token * n;
            int64_t context = 0;
            while (context < n && list[context] >= 0) context++;
            Mla m = mla_for(q + token * heads * (r + p), out + token * heads * r, cache, heads, context, stride, r, p,
                            scale);
            m.list = list, m.split = count, m.others = others, m.others_stride = others_stride, m.sinks = sinks;
            return m;
        });
    });
}

namespace {

constexpr int64_t kMostScores = 1 << 20;  // of the indexer that are held at once, if one token has no more
constexpr int64_t kMostIndexed = 64;      // tokens

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

// mla_of(token) has a token's queries and keys; its weights [heads] and its k [k] of out stand where those of t tokens
// do. out is left as it is where there are at most k.
template <class MlaOf>
void choose_rows(Job& job, const Isa& isa, int64_t t, MlaOf mla_of, const float* weights, int64_t k, int32_t* out) {
    int64_t most = 1;
    for (int64_t token = 0; token < t; token++) {
        const int64_t count = mla_of(token).context;
        most = count > most ? count : most;
    }
    if (most <= k) return;
    const int64_t at_once = most > kMostScores / kMostIndexed ? up_to(kMostScores, most) : kMostIndexed;
    const Mla any = mla_of(0);
    const int64_t heads = any.heads, tiles = any.tiles, chunks = up_to(most, kChunkRows);
    const int64_t thread_bytes = int64_t(isa.mla_scratch(any));
    Mla* mlas = job.scratch<Mla>(kMlas, at_once);
    uint8_t* scratch = job.scratch<uint8_t>(kMlaThreads, thread_bytes * job.threads());
    float* scores = job.scratch<float>(kIndexScores, most * at_once);
    uint32_t* order = job.scratch<uint32_t>(kOrder, most * at_once);
    for (int64_t first = 0; first < t; first += at_once) {
        const int64_t n = t - first < at_once ? t - first : at_once;
        for (int64_t i = 0; i < n; i++) mlas[i] = mla_of(first + i);
        give_buffers(job, mlas, n, 0);
        job.each(n * heads, [&](int, int64_t i) { isa.mla_queries(mlas[i / heads], i % heads, i % heads + 1); });
        job.each(n * tiles, [&](int, int64_t i) { isa.mla_pack(mlas[i / tiles], i % tiles, i % tiles + 1); });
        job.each_part(n, chunks, [&](int thread, int64_t i, int64_t begin, int64_t end) {
            if (mlas[i].context > k)
                isa.index_scores(mlas[i], weights + (first + i) * heads, begin, end, scratch + thread * thread_bytes,
                                 scores + i * most);
        });
        job.each(n, [&](int, int64_t i) {
            if (mlas[i].context > k)
                best(scores + i * most, mlas[i].context, k, order + i * most, out + (first + i) * k);
        });
    }
}

}  // namespace

// Of the first counts[t] of `keys`, rows of latents of r columns, the k that score best, ascending, then -1: q [t,
// heads, r], weights [t, heads] -> out [t, k].
EXPORT int slotmoe_index(const float* q, const float* weights, int64_t t, int64_t heads, int64_t r, const uint8_t* keys,
                         int64_t rows, int64_t stride, const int32_t* counts, int64_t k, int32_t* out) {
    if (t < 0 || heads < 1 || r < 1 || k < 1 || (rows && stride < latent_bytes(r, 0))) return kBadArgument;
    for (int64_t token = 0; token < t; token++) {
        if (counts[token] < 0 || counts[token] > rows) return kBadArgument;
        for (int64_t i = 0; i < k; i++) out[token * k + i] = i < counts[token] ? int32_t(i) : -1;
    }
    return guarded([&](Job& job, const Isa& isa) {
        choose_rows(job, isa, t, [&](int64_t token) {
            return mla_for(q + token * heads * r, nullptr, keys, heads, counts[token], stride, r, 0, 1.0f);
        }, weights, k, out);
    });
}

void slotmoe::choose(Job& job, const Isa& isa, const Indexer& indexer, int64_t t, const float* x, const float* low,
                     const float* table, int64_t p, int64_t start, const uint8_t* const* keys, int64_t bytes,
                     const int64_t* counts, int32_t* lists) {
    int64_t most = 0;
    for (int64_t token = 0; token < t; token++) most = counts[token] > most ? counts[token] : most;
    if (most <= indexer.topk) return;
    const int64_t heads = indexer.heads, width = indexer.width;
    float* q = job.scratch<float>(kIndexQuery, t * heads * width);
    float* weights = job.scratch<float>(kIndexWeights, t * heads);
    multiply(job, isa, indexer.query, low, t, q);
    multiply(job, isa, indexer.weights, x, t, weights);
    job.each(t * heads, [&](int, int64_t i) {
        float* rotated = q + i * width + start;
        rotate(rotated, table + i / heads * p, p / 2, indexer.halves, rotated);
        weights[i] *= indexer.scale;
    });
    choose_rows(job, isa, t, [&](int64_t token) {
        return mla_for(q + token * heads * width, nullptr, keys[token], heads, counts[token], bytes, width, 0, 1.0f);
    }, weights, indexer.topk, lists);
}

// rows [t, r + p] -> t cache rows, `stride` bytes apart.
EXPORT int slotmoe_store_latents(const float* rows, int64_t t, int64_t r, int64_t p, uint8_t* cache, int64_t stride) {
    if (t < 0 || r < 1 || p < 0 || stride < latent_bytes(r, p)) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        float* copies = job.scratch<float>(kRow, (r + p) * job.threads());
        job.each(t, [&](int thread, int64_t i) {
            float* row = copies + thread * (r + p);
            memcpy(row, rows + i * (r + p), size_t(r + p) * 4);
            isa.store_latent(row, r, p, cache + i * stride);
        });
    });
}

namespace {

constexpr int64_t kTogether = 32;  // tokens whose rows are quantized before they are multiplied

// Each head's rows of x [t, heads, ..] times its part of kv_b: queries [n] -> [r], or latents [r] -> values [v]. Heads
// of x and of out stand ldx and ldo floats apart.
struct Absorption {
    Job& job;
    const Isa& isa;
    const Absorbed& w;
    bool values;
    const float* x;
    int64_t ldx, t;
    float* out;
    int64_t ldo;
    int64_t k = values ? w.r : w.n, n = values ? w.v : w.r, blocks = up_to(k, kBlock), tiles = up_to(n, kTile);
    int64_t groups = up_to(t, kTogether);  // the parts of a head
    FineBlock* fine = job.scratch<FineBlock>(kX, blocks * kTogether * job.threads());  // each thread's
    double* factor = job.scratch<double>(kXFactor, kTogether * job.threads());
    const int64_t held = w.kind == kInt8 ? 1 : kTogether;  // rows of x that a thread copies
    float* scaled = job.scratch<float>(kAct, held * k * job.threads());

    // Weights [n, k] that are not quantized times the head's rows of `count` tokens, which are copied side by side.
    void multiply_dense(const void* weights, int64_t head, int64_t first, int64_t count, int thread, float* y) const {
        float* rows = scaled + thread * held * k;
        for (int64_t i = 0; i < count; i++)
            memcpy(rows + i * k, x + ((first + i) * w.heads + head) * ldx, size_t(k) * 4);
        const int64_t bytes = w.kind == kF32 ? 4 : 2;
        const uint8_t* own = static_cast<const uint8_t*>(weights) + head * n * k * bytes;
        isa.linear_dense(rows, count, k, own, Source(w.kind - kF32), 0, n, y, w.heads * ldo);
    }

    void run(int thread, int64_t begin, int64_t end) const {  // parts begin..end
        FineBlock* rows = fine + thread * blocks * kTogether;
        double* factors = factor + thread * kTogether;
        float* row = scaled + thread * held * k;
        for (int64_t part = begin; part < end; part++) {
            const int64_t head = part / groups, first = part % groups * kTogether;
            const int64_t count = t - first < kTogether ? t - first : kTogether;
            const float* columns = values || w.kind != kInt8 ? nullptr : w.query_scale + head * k;
            float* y = out + (first * w.heads + head) * ldo;
            const void* weights = values ? w.value : w.query;
            if (w.kind != kInt8) {
                multiply_dense(weights, head, first, count, thread, y);
                continue;
            }
            for (int64_t i = 0; i < count; i++) {
                const float* in = x + ((first + i) * w.heads + head) * ldx;
                for (int64_t j = 0; columns && j < k; j++) row[j] = in[j] * columns[j];
                isa.fine.quantize_rows(columns ? row : in, k, 0, 1, count, 0.0f, rows + i, factors + i);
            }
            const int8_t* packed = static_cast<const int8_t*>(weights) + head * tiles * blocks * kTile * kBlock;
            const float* scale = values ? w.value_scale + head * n : w.ones;
            isa.fine.int8_tiles({packed, scale, n, blocks}, rows, factors, count, 0, tiles, y, w.heads * ldo);
        }
    }
};

int absorb(const Absorbed& w, bool values, const float* x, int64_t t, float* out) {
    if (t < 0 || !w.valid()) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        const Absorption product{job, isa, w, values, x, values ? w.r : w.n, t, out, values ? w.v : w.r};
        job.parallel(w.heads * product.groups,
                     [&](int thread, int64_t begin, int64_t end) { product.run(thread, begin, end); });
    });
}

// The tokens' keys, and what is chosen of them and those before.
void index_tokens(Job& job, const Isa& isa, const Attention& a, int64_t t, const float* x, const float* low,
                  const Tokens& tokens) {
    const Indexer& indexer = *a.indexer;
    const int64_t width = indexer.width;
    float* key = job.scratch<float>(kIndexKey, t * width);
    const uint8_t** keys = job.scratch<const uint8_t*>(kCaches, t);
    int64_t* counts = job.scratch<int64_t>(kIndexCounts, t);
    multiply(job, isa, indexer.key, x, t, key);
    job.each(t, [&](int, int64_t token) {
        float* row = key + token * width;
        isa.layer_norm(row, indexer.key_norm, indexer.key_bias, width, kIndexEps, row);
        rotate(row, tokens.table + token * a.p, a.p / 2, indexer.halves, row);
        isa.store_latent(row, width, 0, tokens.keys.at(token, a.keys, tokens.positions[token]));
        keys[token] = tokens.keys.at(token, a.keys, 0), counts[token] = tokens.positions[token] + 1;
    });
    choose(job, isa, indexer, t, x, low, tokens.table, a.p, 0, keys, tokens.keys.row_bytes, counts, tokens.lists);
}

}  // namespace

// q [t, heads, n] -> out [t, heads, r].
EXPORT int slotmoe_absorb_query(const Absorbed* w, const float* q, int64_t t, float* out) {
    return absorb(*w, false, q, t, out);
}

// latent [t, heads, r] -> out [t, heads, v].
EXPORT int slotmoe_absorb_value(const Absorbed* w, const float* latent, int64_t t, float* out) {
    return absorb(*w, true, latent, t, out);
}

// x [t, heads, p] by one table [p / 2] of complex numbers a token -> out, the same shape.
EXPORT int slotmoe_rotate(const float* x, const float* table, int64_t halves, int64_t t, int64_t heads, int64_t p,
                          float* out) {
    if (t < 0 || heads < 0 || p < 0 || p % 2) return kBadArgument;
    return guarded([&](Job& job, const Isa&) {
        job.each(t * heads, [&](int, int64_t row) {
            rotate(x + row * p, table + row / heads * p, p / 2, halves, out + row * p);
        });
    });
}

// --- all of it

bool Attention::valid(const Tokens& tokens) const {
    if (!kv_b->valid() || kv_b->heads != heads || kv_b->n != n || kv_b->r != r || kv_b->v != v) return false;
    if (p < 0 || p % 2 || tokens.rows.row_bytes < latent_bytes(r, p)) return false;
    if (topk && !tokens.lists) return false;
    if (indexer && (!indexer->valid() || !indexer->key.valid() || p > indexer->width || !query_norm ||
                    indexer->topk != topk || tokens.keys.row_bytes < latent_bytes(indexer->width, 0)))
        return false;
    if (!query.valid() || !latent.valid() || !out.valid() || (query_norm && !query_b.valid())) return false;
    return !gate.n || gate.valid();
}

namespace {

constexpr int64_t kAbsorbedTokens = 128;  // whose queries are in the cache's columns at once

// `count` tokens from `first` on: q [count, heads, n + p], which is overwritten -> values [count, heads, v].
void attend_absorbed(Job& job, const Isa& isa, const Attention& a, const Tokens& tokens, int64_t first, int64_t count,
                     float* q, float* values) {
    const int64_t *positions = tokens.positions + first, heads = a.heads, n = a.n, p = a.p, r = a.r;
    const float *table = tokens.table + first * p, *query_scale = tokens.query_scale;
    const int64_t width = r + p, q_columns = heads * (n + p);
    float* q_full = job.scratch<float>(kQueryFull, count * heads * width);
    float* latent_out = job.scratch<float>(kLatentOut, count * heads * r);
    const auto mla_of = [&](int64_t token) {
        const bool chosen = a.topk && positions[token] + 1 > a.topk;
        const int64_t context = chosen ? a.topk : positions[token] + 1;
        Mla mla = mla_for(q_full + token * heads * width, latent_out + token * heads * r,
                          tokens.rows.at(first + token, a.row, 0), heads, context, tokens.rows.row_bytes, r, p, a.scale);
        if (chosen) mla.list = tokens.lists + (first + token) * a.topk;
        return mla;
    };
    const bool few = count <= kFewTokens;  // then queries and sums go along with the heads' products
    Mla* mlas = few ? job.scratch<Mla>(kMlas, count) : nullptr;
    for (int64_t token = 0; few && token < count; token++) mlas[token] = mla_of(token);
    if (few) give_buffers(job, mlas, count);
    const Absorption absorbed{job, isa, *a.kv_b, false, q, n + p, count, q_full, width};
    job.parallel(heads, [&](int thread, int64_t begin, int64_t end) {
        for (int64_t token = 0; query_scale && token < count; token++)
            for (int64_t i = begin * (n + p); i < end * (n + p); i++)
                q[token * q_columns + i] *= query_scale[first + token];
        absorbed.run(thread, begin * absorbed.groups, end * absorbed.groups);
        for (int64_t token = 0; token < count; token++) {
            for (int64_t head = begin; head < end; head++)
                rotate(q + token * q_columns + head * (n + p) + n, table + token * p, p / 2, a.halves,
                       q_full + (token * heads + head) * width + r);
            if (few) isa.mla_queries(mlas[token], begin, end);
        }
    });
    few ? attend_by_spans(job, isa, mlas, count) : attend(job, isa, count, false, mla_of);
    const Absorption of_values{job, isa, *a.kv_b, true, latent_out, r, count, values, a.v};
    job.parallel(heads, [&](int thread, int64_t begin, int64_t end) {
        for (int64_t token = 0; few && token < count; token++) isa.mla_merge(mlas[token], begin, end);
        of_values.run(thread, begin * of_values.groups, end * of_values.groups);
    });
}

}  // namespace

void slotmoe::attention(Job& job, const Isa& isa, const Attention& a, int64_t t, const float* h,
                        const Tokens& tokens, float* y, float* x, float* logits) {
    const int64_t* positions = tokens.positions;
    const float* table = tokens.table;
    const int64_t heads = a.heads, n = a.n, p = a.p, r = a.r, v = a.v, width = r + p;
    const int64_t q_columns = heads * (n + p);
    float* q = job.scratch<float>(kQuery, t * q_columns);
    float* q_in = a.query_norm ? job.scratch<float>(kQueryLatent, t * a.query.n) : q;
    float* rows = job.scratch<float>(kRow, t * width);
    norm_rows(job, isa, h, a.input_norm, t, a.latent.k, a.eps, x);
    multiply(job, {{job, isa, a.query, x, t, q_in}, {job, isa, a.latent, x, t, rows, nullptr, kAct, kActFactor}});
    if (a.query_norm) {
        norm_rows(job, isa, q_in, a.query_norm, t, a.query.n, a.latent_eps, q_in);
        multiply(job, isa, a.query_b, q_in, t, q);
    }
    if (a.indexer) index_tokens(job, isa, a, t, x, q_in, tokens);

    float* values = job.scratch<float>(kValues, t * heads * v);
    job.each(t, [&](int, int64_t token) {
        float* row = rows + token * width;
        isa.rms_norm(row, a.latent_norm, r, a.latent_eps, row);
        rotate(row + r, table + token * p, p / 2, a.halves, row + r);
        isa.store_latent(row, r, p, tokens.rows.at(token, a.row, positions[token]));
    });
    for (int64_t first = 0; first < t; first += kAbsorbedTokens) {
        const int64_t count = t - first < kAbsorbedTokens ? t - first : kAbsorbedTokens;
        attend_absorbed(job, isa, a, tokens, first, count, q + first * q_columns, values + first * heads * v);
    }
    leave(job, isa, a, nullptr, values, t, h, y, x, logits);
}
