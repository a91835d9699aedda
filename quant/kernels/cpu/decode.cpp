// The router, and tokens through a model's layers in one job: between two jobs lie Python, cold caches and a wake-up.
#include <algorithm>
#include <cfloat>
#include <chrono>
#include <cmath>
#include <cstring>

#include "api.h"

using namespace slotmoe;

namespace {

constexpr size_t kTrimmedBytes = 1 << 20;  // a long pass leaves no larger buffer: its experts need the memory

constexpr float kTaken = -INFINITY;  // what is chosen already, or may not be; the others are finite

int64_t best_of(const float* choice, int64_t n) {  // the first where several are
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (choice[i] > choice[best]) best = i;
    return best;
}

// One token: logits [e] -> weights and indices [top_k], best first. scores [e] and choice [e + groups] are working
// memory. Scores plus bias [e], unless that is null, are compared; weights are made of scores alone. Group-limited greedy
// (DeepSeek-V2, section 2.2.2; DeepSeek-V3, section 2.1.2): the groups with the best experts, of these the best experts.
// Nothing is compared if indices are `given`.
void choose(const Router& router, const float* logits, const float* bias, const int64_t* given, int64_t e,
            double* scores, float* choice, float* weights, int64_t* indices) {
    double largest = logits[0], total = 0;
    for (int64_t i = 1; i < e; i++) largest = logits[i] > largest ? logits[i] : largest;
    for (int64_t i = 0; router.scoring == kSoftmax && i < e; i++) total += scores[i] = std::exp(logits[i] - largest);
    for (int64_t i = 0; i < e; i++) {
        const double logit = logits[i];
        if (router.scoring == kSoftmax) scores[i] /= total;
        if (router.scoring == kSigmoid) scores[i] = 1 / (1 + std::exp(-logit));
        if (router.scoring == kSqrtSoftplus)
            scores[i] = std::sqrt((logit > 0 ? logit : 0) + std::log1p(std::exp(-std::fabs(logit))));
        scores[i] = float(scores[i]);
        choice[i] = bias ? float(scores[i]) + bias[i] : float(scores[i]);
        if (!(choice[i] >= -FLT_MAX)) choice[i] = -FLT_MAX;  // NaN too
    }

    if (!given && router.kept < router.groups) {
        const int64_t group_size = e / router.groups;
        float* groups = choice + e;
        for (int64_t g = 0; g < router.groups; g++) {
            const float* group = choice + g * group_size;
            float first = group[0], second = kTaken;
            for (int64_t i = 1; i < group_size; i++) {
                second = group[i] > first ? first : group[i] > second ? group[i] : second;
                first = group[i] > first ? group[i] : first;
            }
            groups[g] = router.group_best == 1 ? first : first + second;
        }
        for (int64_t i = 0; i < router.kept; i++) groups[best_of(groups, router.groups)] = kTaken;
        for (int64_t i = 0; i < e; i++)
            if (groups[i / group_size] != kTaken) choice[i] = kTaken;
    }

    double sum = 0;
    for (int64_t i = 0; i < router.top_k; i++) {
        indices[i] = given ? given[i] : best_of(choice, e);
        weights[i] = float(scores[indices[i]]);
        sum += weights[i];
        choice[indices[i]] = kTaken;
    }
    for (int64_t i = 0; i < router.top_k; i++)
        weights[i] = float(router.normalized ? weights[i] / (sum + 1e-20) * router.factor : weights[i] * router.factor);
}

// logits [t, e] -> weights, indices [t, top_k], those that are `given` unless that is null.
void route(Job& job, const Router& router, const float* logits, const float* bias, const int64_t* given, int64_t t,
           int64_t e, float* weights, int64_t* indices) {
    const int64_t size = e + router.groups, top_k = router.top_k;
    double* scores = job.scratch<double>(kScores, job.threads() * e);
    float* choices = job.scratch<float>(kChoices, job.threads() * size);
    job.each(t, [&](int thread, int64_t i) {
        choose(router, logits + i * e, bias, given ? given + i * top_k : nullptr, e, scores + thread * e,
               choices + thread * size, weights + i * top_k, indices + i * top_k);
    });
}

// The feed-forward of a layer behind its routed experts, whose sum is null in a dense layer -> y [t, hidden], or the
// streams, which post and comb mix it into.
void finish(Job& job, const Isa& isa, const Layer& layer, const float* x, int64_t t, int64_t hidden, const float* h,
            const float* experts, const float* post, const float* comb, float* y) {
    if (layer.compressed) {
        float* block = job.scratch<float>(kBlockOut, t * hidden);
        if (layer.mlp) mlp(job, isa, x, t, layer.mlp, nullptr, nullptr, block);
        for (int64_t i = 0; i < t * hidden; i++) block[i] = layer.mlp ? experts[i] + block[i] : experts[i];
        return hyper_out(job, isa, block, h, post, comb, t, layer.mlp_mixing->m, hidden, y);
    }
    if (layer.mlp) return mlp(job, isa, x, t, layer.mlp, h, experts, y);
    job.each(t, [&](int, int64_t token) {
        for (int64_t i = token * hidden; i < (token + 1) * hidden; i++) y[i] = experts ? h[i] + experts[i] : h[i];
    });
}

constexpr int64_t kRows = kBf16 + 1;  // a matrix in int8, row by row

// Rows ids [t] of a table -> y [t, streams, hidden]; false where it has none, or is of another shape.
bool embed(const Isa& isa, const Model& m, const int64_t* ids, int64_t t, float* y) {
    const Matrix& w = m.embedding;
    const int64_t k = m.hidden, blocks = up_to(k, kBlock);
    const float one = 1.0f, *scale = static_cast<const float*>(w.scale);
    const auto* codes = static_cast<const int8_t*>(w.data);
    const auto* wide = static_cast<const uint16_t*>(w.data);
    if (!ids || w.k != k || is_coded(w.kind)) return false;
    for (int64_t i = 0; i < t; i++, y += m.streams * k) {
        const int64_t id = ids[i];
        if (id < 0 || id >= w.n) return false;
        const int8_t* tile = codes + id / kTile * blocks * kTile * kBlock + id % kTile * 4;
        if (w.kind == kF32) memcpy(y, static_cast<const float*>(w.data) + id * k, size_t(k) * 4);
        if (w.kind == kF16) isa.linear_dense(&one, 1, 1, wide + id * k, Source::f16, 0, k, y, 0);
        for (int64_t j = 0; w.kind == kBf16 && j < k; j++) {
            const uint32_t bits = uint32_t(wide[id * k + j]) << 16;
            memcpy(y + j, &bits, 4);
        }
        for (int64_t j = 0; w.kind == kRows && j < k; j++) y[j] = float(codes[id * k + j]) * scale[id];
        for (int64_t j = 0; w.kind == kInt8 && j < k; j++) y[j] = float(tile[j / 4 * 64 + j % 4]) * scale[id];
        for (int64_t s = 1; s < m.streams; s++) memcpy(y + s * k, y, size_t(k) * 4);
    }
    return true;
}

}  // namespace

// logits [t, e], bias [e] or null, given [t, top_k] or null -> weights, indices [t, top_k].
EXPORT int slotmoe_route(const Router* router, const float* logits, const float* bias, const int64_t* given, int64_t t,
                         int64_t e, float* weights, int64_t* indices) {
    if (t < 0 || !router->valid(e)) return kBadArgument;
    for (int64_t i = 0; given && i < t * router->top_k; i++)
        if (given[i] < 0 || given[i] >= e) return kBadArgument;
    return guarded([&](Job& job, const Isa&) {
        route(job, *router, logits, bias, given, t, e, weights, indices);
    });
}

// One token of each of t sequences through the layers from `first` on: the residual stream h [t, hidden], by the
// tokens' ids where that is null -> y [t, hidden], which may be h, bitwise as by the separate entries, up to the layer
// `end`, and behind the last layer, unless that is null, logits `out` [t, vocabulary]. With `experts` [t, hidden], the weighted sum of the first layer's, that
// layer only lacks its feed-forward: h is the stream behind its attention and x_in [t, hidden] the norm of that.
//
// slots [MoE layers, e] says where in the slab (`size` records, `record_stride` bytes apart) an expert is,
// negative if nowhere: the first layer that wants such an expert is `reached` with only its choice made, y before its
// feed-forward, weights [t, top_k] its router's. Otherwise all layers are done. indices [n, t, top_k] are what the routers
// have chosen that were asked, at most one for each MoE layer from `first` on, and x [n + 1, t, hidden] their inputs, the
// norms of the streams, and one more that means nothing.
// DeepSeek-V4 has several residual streams: h and y are [t, streams, hidden], and post [t, streams] and comb [t,
// streams, streams] say how a layer that waits for its experts mixes their sum in. seconds [4] is added to: attention,
// routers, experts, and MLPs.
EXPORT int slotmoe_decode(const Model* m, int64_t first, int64_t end, int64_t t, const float* h, const Tokens* tokens,
                          const int32_t* slots, const uint8_t* slab, int64_t size, int64_t record_stride,
                          const Record* record, const float* x_in, const float* experts, float* post, float* comb,
                          float* y, float* x, float* weights, int64_t* indices, int64_t* reached, float* out,
                          double* seconds) {
    const int64_t hidden = m->hidden, e = m->experts, top_k = m->router.top_k, wide = m->streams * hidden;
    if (first < 0 || first >= end || end > m->layers || t < 1 || !m->router.valid(e) || record->hidden != hidden || !record->valid())
        return kBadArgument;
    for (int64_t token = 0; token < t; token++)
        if (tokens->positions[token] < 0) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        float* logits = job.scratch<float>(kLogits, t * e);
        float* streams = job.scratch<float>(kStreams, t * (2 * wide + hidden + 2 * m->pairs));
        float *residual = streams, *attended = streams + t * wide, *routed = streams + 2 * t * wide;
        float* table = routed + t * hidden;
        Tokens at = *tokens;
        at.table = table;
        for (int64_t token = 0; token < t; token++, table += 2 * m->pairs)
            rotations(float(at.positions[token]), m->frequencies, m->pairs, m->factor, table);
        int64_t* given = job.scratch<int64_t>(kGiven, t * top_k);
        std::fill(seconds, seconds + 5, 0.0);
        auto marked = std::chrono::steady_clock::now();
        const auto mark = [&](int part) {
            const auto now = std::chrono::steady_clock::now();
            seconds[part] += std::chrono::duration<double>(now - marked).count();
            marked = now;
        };
        int64_t moe_layer = 0;
        for (int64_t l = 0; l < first; l++) moe_layer += m->layer[l].gate().n > 0;
        const float* stream = h ? h : residual;  // the input of the next layer's attention
        if (!h && !(first == 0 && !experts && embed(isa, *m, at.ids, t, residual))) return kBadArgument;
        if (out && (m->streams > 1 || m->head.k != hidden || !m->head.valid())) return kBadArgument;
        for (int64_t l = first; l < end; l++) {
            const Layer& layer = m->layer[l];
            const bool moe = layer.gate().n > 0;
            if (layer.mlp && !layer.mlp->valid()) return kBadArgument;
            if (l == first && experts) {
                finish(job, isa, layer, x_in, t, hidden, h, experts, post, comb, residual);
                moe_layer += moe;
                stream = residual;
                mark(3);
                continue;
            }
            if (!layer.valid(at)) return kBadArgument;
            if (layer.attention)
                attention(job, isa, *layer.attention, t, stream, at, attended, x, logits);
            else if (layer.grouped)
                grouped_layer(job, isa, *layer.grouped, t, stream, at, attended, x, logits);
            else if (layer.delta)
                delta_layer(job, isa, *layer.delta, t, stream, at, attended, x, logits);
            else
                compressed_layer(job, isa, layer, l, t, stream, at, attended, x, post, comb, logits);
            for (int64_t i = 0; moe && layer.logit_bias && i < t * e; i++) logits[i] += layer.logit_bias[i % e];
            mark(0);
            if (moe) {
                for (int64_t i = 0; layer.experts_of && i < t * top_k; i++) {
                    const int64_t id = at.ids[i / top_k];
                    if (id < 0 || id >= m->vocabulary) return kBadArgument;
                    given[i] = layer.experts_of[id * top_k + i % top_k];
                    if (given[i] < 0 || given[i] >= e) return kBadArgument;
                }
                route(job, m->router, logits, layer.gate_bias(), layer.experts_of ? given : nullptr, t, e, weights,
                      indices);
                const int32_t* layer_slots = slots + moe_layer * e;
                bool present = true;
                for (int64_t i = 0; i < t * top_k; i++) {
                    const int32_t slot = layer_slots[indices[i]];
                    if (slot >= size) return kBadArgument;
                    present = present && slot >= 0;
                }
                mark(1);
                if (!present) {
                    memcpy(y, attended, size_t(t * wide) * 4);
                    *reached = l;
                    if (t > kFewTokens) job.trim(kTrimmedBytes);
                    return kOk;
                }
                float* outs = job.scratch<float>(kTokenOuts, t * top_k * hidden);
                experts_by_slot(job, isa, x, t, top_k, indices, layer_slots, slab, record_stride, *record, outs);
                weighted_sum(job, isa, outs, weights, t, top_k, hidden, routed);
                mark(2);
                moe_layer++;
                indices += t * top_k;
            }
            finish(job, isa, layer, x, t, hidden, attended, moe ? routed : nullptr, post, comb, residual);
            x += moe ? t * hidden : 0;
            stream = residual;
            mark(3);
        }
        memcpy(y, residual, size_t(t * wide) * 4);
        *reached = end;
        if (t > kFewTokens) job.trim(kTrimmedBytes);
        if (out) {
            norm_rows(job, isa, y, m->norm, t, hidden, m->eps, routed);
            multiply(job, isa, m->head, routed, t, out);
            mark(4);
        }
        return kOk;
    });
}
