// The router, and one token through a model's layers in one job: between two jobs lie Python, cold caches and a wake-up.
#include <chrono>
#include <cmath>
#include <cstring>

#include "api.h"

using namespace slotmoe;

namespace {

constexpr double kTaken = -1.0;  // a score that was chosen already; others are 0 to 1, or NaN

int64_t best_of(const double* scores, int64_t n) {  // the first where several are, or where all are NaN
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++)
        if (scores[i] != kTaken && (best < 0 || scores[i] > scores[best])) best = i;
    return best;
}

// One token: logits [e] -> weights and indices [top_k], best first. scores [e + groups] is working memory.
// Group-limited greedy (DeepSeek-V2, section 2.2.2): softmax, then only the groups with the best experts, then the best experts.
void choose(const Router& router, const float* logits, int64_t e, double* scores, float* weights, int64_t* indices) {
    double largest = logits[0], total = 0;
    for (int64_t i = 1; i < e; i++) largest = logits[i] > largest ? logits[i] : largest;
    for (int64_t i = 0; i < e; i++) total += scores[i] = std::exp(logits[i] - largest);
    for (int64_t i = 0; i < e; i++) scores[i] = float(scores[i] / total);

    if (router.kept < router.groups) {
        const int64_t each = e / router.groups;
        double* best = scores + e;
        for (int64_t g = 0; g < router.groups; g++) {
            best[g] = scores[g * each];
            for (int64_t i = 1; i < each; i++) best[g] = scores[g * each + i] > best[g] ? scores[g * each + i] : best[g];
        }
        for (int64_t i = 0; i < router.kept; i++) best[best_of(best, router.groups)] = kTaken;
        for (int64_t i = 0; i < e; i++)
            if (best[i / each] != kTaken) scores[i] = 0;
    }

    double sum = 0;
    for (int64_t i = 0; i < router.top_k; i++) {
        indices[i] = best_of(scores, e);
        weights[i] = float(scores[indices[i]]);
        sum += weights[i];
        scores[indices[i]] = kTaken;
    }
    for (int64_t i = 0; i < router.top_k; i++) weights[i] = float(router.renormalize ? weights[i] / (sum + 1e-20) : weights[i] * router.factor);
}

}  // namespace

// logits [t, e] -> weights, indices [t, top_k].
EXPORT int slotmoe_route(const Router* router, const float* logits, int64_t t, int64_t e, float* weights, int64_t* indices) {
    if (t < 0 || !router->valid(e)) return kBadArgument;
    return guarded([&](Job& job, const Isa&) {
        double* scores = job.scratch<double>(kScores, job.threads() * (e + router->groups));
        job.parallel(t, [&](int thread, int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++)
                choose(*router, logits + i * e, e, scores + thread * (e + router->groups), weights + i * router->top_k, indices + i * router->top_k);
        });
        return kOk;
    });
}

// One token at `position` through the layers from `first` on: the residual stream h [hidden] -> y [hidden], bitwise as by
// slotmoe_attention, slotmoe_route, slotmoe_experts_decode and slotmoe_mlp. caches are the layers' latent rows, layer_stride bytes
// apart. slots [MoE layers, e] says where in the slab (`size` records, `record_stride` bytes apart, coded by `levels`) an expert is,
// negative if nowhere: the first layer that wants such a one is `reached` with only its choice made, y before its feed-forward,
// x [hidden] the norm of that, weights [top_k] its router's. Otherwise all layers are done. indices [MoE layers, top_k] are what the
// routers chose. seconds [4]: added up, of attention, routers, experts, and MLPs.
EXPORT int slotmoe_decode(const Model* m, int64_t first, const float* h, const float* table, uint8_t* caches, int64_t layer_stride, int64_t stride,
                          int64_t position, const int32_t* slots, const uint8_t* slab, int64_t size, int64_t record_stride,
                          const float* levels, float* y, float* x, float* weights, int64_t* indices, int64_t* reached, double* seconds) {
    const int64_t hidden = m->hidden, e = m->experts, top_k = m->router.top_k;
    if (first < 0 || first >= m->layers || position < 0 || !m->router.valid(e) || m->intermediate < 1 || !finite(levels)) return kBadArgument;
    for (int64_t l = 0; l < m->layers; l++) {
        const Layer& layer = m->layer[l];
        if (!layer.attention->valid(stride) || (layer.mlp && !layer.mlp->valid())) return kBadArgument;
    }
    return guarded([&](Job& job, const Isa& isa) {
        float* logits = job.scratch<float>(kLogits, e);
        double* scores = job.scratch<double>(kScores, e + m->router.groups);
        float* streams = job.scratch<float>(kStreams, 3 * hidden);
        float *residual = streams, *attended = streams + hidden, *routed = streams + 2 * hidden;
        const uint8_t** records = job.scratch<const uint8_t*>(kRecords, top_k);
        auto then = std::chrono::steady_clock::now();
        const auto spent = [&](int part) {
            const auto now = std::chrono::steady_clock::now();
            seconds[part] += std::chrono::duration<double>(now - then).count();
            then = now;
        };
        int64_t row = 0;  // of the MoE layers
        for (int64_t l = 0; l < first; l++) row += m->layer[l].attention->gate.n > 0;
        memcpy(residual, h, size_t(hidden) * 4);
        for (int64_t l = first; l < m->layers; l++) {
            const Layer& layer = m->layer[l];
            const bool moe = layer.attention->gate.n > 0;
            uint8_t* cache = caches + l * layer_stride;
            attention(job, isa, *layer.attention, 1, residual, table, &cache, stride, &position, attended, x, logits);
            spent(0);
            if (moe) {
                int64_t* chosen = indices + row * top_k;
                choose(m->router, logits, e, scores, weights, chosen);
                bool here = true;
                for (int64_t i = 0; i < top_k; i++) {
                    const int32_t slot = slots[row * e + chosen[i]];
                    if (slot >= size) return kBadArgument;
                    here = here && slot >= 0;
                    records[i] = slab + (slot < 0 ? 0 : slot) * record_stride;
                }
                spent(1);
                if (!here) {
                    memcpy(y, attended, size_t(hidden) * 4);
                    *reached = l;
                    return kOk;
                }
                experts_of_one(job, isa, x, records, top_k, weights, hidden, m->intermediate, levels, routed);
                spent(2);
                row++;
            }
            if (layer.mlp)
                mlp(job, isa, x, 1, layer.mlp, attended, moe ? routed : nullptr, residual);
            else
                for (int64_t i = 0; i < hidden; i++) residual[i] = moe ? attended[i] + routed[i] : attended[i];
            spent(3);
        }
        memcpy(y, residual, size_t(hidden) * 4);
        *reached = m->layers;
        return kOk;
    });
}
