// What is chosen: which tokens may be drawn, and for each layer of a token which experts stay, `Learned` of
// offload/policy/cache.py, by numpy's operations in their order, so to the same bits. Serial: to wake a thread takes
// longer.
//
// Shapes: D hidden_size; F features and, behind them, a constant; M layers; E experts of a layer; N of all layers.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "api.h"

using namespace slotmoe;

namespace {

constexpr int64_t kFeatures = 256, kMostLayers = 1024, kLikely = 32768;

struct Forecast {
    int64_t experts;
    float *weights, *last, *chances;  // [M, F + 1, E]; [M, F + 1], of the newest token; [M, E], what both give
};

struct Policy {
    int64_t layers, experts;
    double *recent, *lasting, *chance, *wait;  // [N], as in `Learned`
    int64_t* last;                             // [N]
    const double *absent, *turns, *shares;     // [N], 0 of what is cached; [2 N]; [3]
    double *lowest, *longest;                  // [M]: at most, at least, the chance and wait of what is cached
};

// numpy's pairwise sum of 128 values.
float sum_of_128(const float* x) {
    float r[8];
    memcpy(r, x, sizeof r);
    for (int i = 8; i < 128; i += 8)
        for (int j = 0; j < 8; j++) r[j] += x[i + j];
    return ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
}

double worth_of(double chance, double wait, double far) {
    const double now = chance / far, later = 1.0 / (far + wait);
    return now > later ? now : later;
}

// The `count` cached experts that are worth least behind a layer, the least first, of equals the lower id; -1 behind the
// last. Those of a layer are worth no less than its bounds, as quotients and sums are rounded in order: few layers are
// gone through.
void least(const Policy& p, int64_t layer, int64_t count, int64_t* ids, double* worths) {
    const double* far = p.turns + (p.layers - 1 - layer) * p.experts;
    double bounds[kMostLayers];
    p.lowest[layer] = 0.0, p.longest[layer] = INFINITY;  // newcomers of this layer may have got a slot, and may yet
    for (int64_t l = 0; l < p.layers; l++) bounds[l] = worth_of(p.lowest[l], p.longest[l], far[l * p.experts]);
    for (int64_t i = 0; i < count; i++) ids[i] = -1, worths[i] = INFINITY;
    for (;;) {
        int64_t next = 0;
        for (int64_t l = 1; l < p.layers; l++) next = bounds[l] < bounds[next] ? l : next;
        if (!(bounds[next] < INFINITY) || bounds[next] > worths[count - 1]) return;
        bounds[next] = INFINITY;
        double lowest = INFINITY, longest = 0.0;
        for (int64_t i = next * p.experts; i < (next + 1) * p.experts; i++) {
            if (p.absent[i] != 0.0) continue;
            lowest = p.chance[i] < lowest ? p.chance[i] : lowest, longest = p.wait[i] > longest ? p.wait[i] : longest;
            const double worth = worth_of(p.chance[i], p.wait[i], far[i]);
            int64_t at = count;
            for (; at > 0 && (worth < worths[at - 1] || (worth == worths[at - 1] && i < ids[at - 1])); at--)
                if (at < count) ids[at] = ids[at - 1], worths[at] = worths[at - 1];
            if (at < count) ids[at] = i, worths[at] = worth;
        }
        if (next != layer) p.lowest[next] = lowest, p.longest[next] = longest;
    }
}

}  // namespace

// x [d] folded by signs [pieces, F], and a constant, take the place of a layer's `last`; before that its weights learn
// from its `chances`, and what the token used, k of E. Where x is not finite nothing changes, and `learned` is 0.
EXPORT int slotmoe_learn(const Forecast* forecast, int64_t layer, const float* x, int64_t d, const float* signs,
                         const int64_t* used, int64_t k, float rate, float constant, int64_t* learned) {
    const int64_t e = forecast->experts;
    float folded[kFeatures] = {}, squares[kFeatures];
    for (int64_t first = 0; first < d; first += kFeatures) {
        const int64_t count = d - first < kFeatures ? d - first : kFeatures;
        for (int64_t f = 0; f < count; f++) folded[f] += x[first + f] * signs[first + f];
    }
    for (int64_t f = 0; f < kFeatures; f++) squares[f] = folded[f] * folded[f];
    const float mean = (sum_of_128(squares) + sum_of_128(squares + 128)) / float(kFeatures);
    const float norm = std::sqrt(mean + 1e-12f);
    *learned = 1;
    for (float& value : folded) {
        value /= norm;
        if (!std::isfinite(value)) *learned = 0;
    }
    for (int64_t i = 0; i < k; i++)
        if (used[i] < 0 || used[i] >= e) return kBadArgument;
    if (!*learned) return kOk;
    float *last = forecast->last + layer * (kFeatures + 1), *error = forecast->chances + layer * e;
    for (int64_t i = 0; i < e; i++) error[i] = 0.0f - error[i];
    for (int64_t i = 0; i < k; i++) error[used[i]] = 1.0f + error[used[i]];
    for (int64_t i = 0; i < e; i++) error[i] *= rate;
    best_isa().add_outer(last, error, kFeatures + 1, e, forecast->weights + layer * (kFeatures + 1) * e);
    memcpy(last, folded, sizeof folded);
    last[kFeatures] = constant;
    return kOk;
}

// The averages of the k experts of a layer that a token uses gain; then what follows of the whole layer: see
// `Learned._estimate`; rates [4] are gains and factors of both averages, `next` [E] is a forecast, or null. Then what
// `least` gives and, behind that, what those k are worth.
EXPORT int slotmoe_judge(const Policy* policy, int64_t layer, const int64_t* used, int64_t k, int64_t now,
                         const double* rates, const float* next, int64_t count, int64_t* ids, double* worths) {
    const Policy& p = *policy;
    const int64_t first = layer * p.experts, end = first + p.experts;
    if (p.layers > kMostLayers) return kBadArgument;
    for (int64_t i = 0; i < k; i++) {
        if (used[i] < 0 || used[i] >= p.experts) return kBadArgument;
        p.recent[first + used[i]] += rates[0], p.lasting[first + used[i]] += rates[1];
        p.last[first + used[i]] = now;
    }
    for (int64_t i = first; i < end; i++) {
        const double often = rates[3] * p.lasting[i];
        double chance = p.shares[1] * (rates[2] * p.recent[i]) + p.shares[2] * often + p.shares[0] * (p.last[i] == now);
        if (next) {
            const float given = next[i - first];
            chance = given < 0.0f ? 0.0f : given > 1.0f ? 1.0f : given;
        }
        p.chance[i] = chance;
        p.wait[i] = (1.0 - chance) / (often > 1e-9 ? often : 1e-9) * double(p.layers);
    }
    p.lowest[layer] = 0.0, p.longest[layer] = INFINITY;
    for (int64_t i = 0; i < k; i++)
        worths[count + i] = worth_of(p.chance[first + used[i]], p.wait[first + used[i]], double(p.layers));
    if (count) least(p, layer, count, ids, worths);
    return kOk;
}

// The id that `sample` of model/generate.py gives by a `number` from 0 to 1, for limits by top-k or top-p; -1 where sums
// in another order, or in the precision of those of unlikely ids, could give another one, or likely ids are very many.
EXPORT int slotmoe_choose(const float* x, int64_t v, double temperature, double top_p, int64_t top_k, double min_p,
                          double number, int64_t* chosen) {
    const bool counts = top_k > 0 && top_k < v;
    *chosen = -1;
    if (!(counts || top_p < 1) || !(temperature > 0)) return kOk;
    return guarded([&](Job& job, const Isa& isa) {
        int64_t* ids = job.scratch<int64_t>(kOrder, kLikely);
        double *w = job.scratch<double>(kScores, kLikely), mass = 0.0;
        int64_t n = 0, kept = 0;
        float lanes[16], top = -INFINITY;
        for (float& lane : lanes) lane = x[0];
        for (int64_t i = 0; i + 16 <= v; i += 16)
            for (int j = 0; j < 16; j++) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
        for (int64_t i = v / 16 * 16; i < v; i++) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
        for (const float lane : lanes) top = lane > top ? lane : top;
        for (double reach = 8; kept == 0 && reach < 16; reach += 3) {  // e^-reach is the least of what is likely
            double others = isa.survey(x, v, top, float(1 / temperature), top - float(reach * temperature), kLikely,
                                       ids, &n);
            if (n < 1 || n > kLikely || std::isnan(others)) return;
            if (counts && n < top_k) continue;
            std::sort(ids, ids + n, [&](int64_t a, int64_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); });
            if (counts) n = top_k, others = 0.0;
            double sum = 0.0;
            for (int64_t i = 0; i < n; i++) sum += w[i] = std::exp(double(x[ids[i]] - top) / temperature);
            const double goal = top_p < 1 ? top_p * (sum + others) : INFINITY, doubt = 1e-5 * others + 1e-9 * sum;
            if (top_p < 1 && !(sum > goal + doubt)) continue;
            for (mass = 0.0; kept < n && mass < goal; kept++) mass += w[kept];
            if (top_p < 1 && (mass - goal < doubt || (kept > 1 && goal - (mass - w[kept - 1]) < doubt))) kept = 0;
        }
        for (; kept > 1 && w[kept - 1] < min_p + 1e-12; kept--) {
            if (w[kept - 1] > min_p - 1e-12) return;
            mass -= w[kept - 1];
        }
        const double mark = number * mass, doubt = 1e-9 * mass;
        double before = 0.0;
        int64_t i = 0;
        for (; i < kept && before + w[i] <= mark; i++) before += w[i];
        if (i < kept && (i == 0 || mark - before > doubt) && before + w[i] - mark > doubt) *chosen = ids[i];
    });
}
