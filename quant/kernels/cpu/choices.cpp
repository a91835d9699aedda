// What is chosen: which tokens may be drawn, and for each layer of a token which experts stay: `Learned` of
// offload/policy/cache.py. Serial: to wake a thread takes longer.
//
// Shapes: T tokens; D hidden_size; F features; G the same, a constant, and zeros; M layers; E experts of a layer; N of
// all layers; K experts a token.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "api.h"

using namespace slotmoe;

namespace {

constexpr int64_t kFeatures = 256, kInputs = 272, kLikely = 32768, kSteps = 512;
constexpr float kConstant = 3.0f;             // it learns faster than a feature, whose mean square is 1
constexpr float kRate = 0.05f / kFeatures;    // 0.03 and 0.05 hit the same within 0.3 points, 0.15 a point less
constexpr double kShort = 0.9, kLong = 0.99;  // decay a token of the two averages
// Of the newest token and of both: near a least-squares fit to the sample's routing; one point of hits less without
// the first.
constexpr double kNewest = 0.1, kOfShort = 0.3, kOfLong = 0.6;

struct Policy {
    int64_t layers, experts, layer;            // the one visited last; -1: all, so each comes in a token's time
    double *recent, *lasting, *chance, *wait;  // [N]: both averages, as of the layer's last visit; what is estimated
    int64_t *last, *visited;                   // [N], [M]: the newest token that used it, or was there
    double *lowest, *longest, *bounds;         // [M]: at most, at least, the chance and wait of what is cached; room
    float* forecasts;                          // [M, (E + 1) G + E]: see `learn`
    const bool *cached, *held;                 // [N]
};

// Inputs x [D] as features of mean square 1, by signs [pieces, F], and a constant; whether they are finite.
bool fold(const float* x, int64_t d, const float* signs, float* folded) {
    float square = 0.0f;
    memset(folded, 0, kInputs * sizeof *folded);
    for (int64_t from = 0; from < d; from += kFeatures)
        for (int64_t i = from; i < from + kFeatures && i < d; i++) folded[i - from] += x[i] * signs[i];
    for (int64_t f = 0; f < kFeatures; f++) square += folded[f] * folded[f];
    const float norm = std::sqrt(square / float(kFeatures) + 1e-12f);
    for (int64_t f = 0; f < kFeatures; f++) folded[f] /= norm;
    folded[kFeatures] = kConstant;
    return std::all_of(folded, folded + kFeatures, [](float value) { return std::isfinite(value); });
}

// A layer's weights [E, G] learn, by least mean squares, from what each of T tokens used, ids [T, K], and the
// features of the one before; x [T, D] are its inputs. Behind the weights are the newest token's features and the chances
// [E] that both give of what comes next, which are returned; null where an input is not finite.
const float* learn(const Policy& p, int64_t layer, const int64_t* used, int64_t t, int64_t k, const float* x, int64_t d,
                   const float* signs) {
    const int64_t e = p.experts;
    float *weights = p.forecasts + layer * (kInputs * e + kInputs + e), *last = weights + kInputs * e;
    float *next = last + kInputs, folded[kInputs];
    for (; t > 0; t--, x += d, used += k) {
        if (!fold(x, d, signs, folded)) return nullptr;
        for (int64_t i = 0; i < k; i++) next[used[i] - layer * e] -= 1.0f;
        best_isa().learn(last, kRate, folded, kInputs, e, weights, next);
        memcpy(last, folded, sizeof folded);
    }
    return next;
}

// An expert's chance of use when its layer's turn comes, or `next`'s, and how many layers more it waits else; both
// averages have faded by so much since the layer was visited.
void estimate(const Policy& p, int64_t id, int64_t now, double faded, double faded_long, const float* next) {
    const double often = faded_long * p.lasting[id];
    double chance = kOfShort * (faded * p.recent[id]) + kOfLong * often + kNewest * (p.last[id] == now);
    if (next) chance = *next < 0.0f ? 0.0f : *next > 1.0f ? 1.0f : *next;
    p.chance[id] = chance;
    p.wait[id] = (1.0 - chance) / (often > 1e-9 ? often : 1e-9) * double(p.layers);
}

double far_of(const Policy& p, int64_t layer) {
    return double(p.layer < 0 ? p.layers : layer > p.layer ? layer - p.layer : layer - p.layer + p.layers);
}

double worth_of(double far, double chance, double wait) {
    const double now = chance / far, later = 1.0 / (far + wait);
    return now > later ? now : later;
}

double worth_of(const Policy& p, int64_t layer, double chance, double wait) {
    return worth_of(far_of(p, layer), chance, wait);
}

}  // namespace

// T tokens, the newest of them `now`, used ids [M, T, K], each M of one layer; x [M, followed, D] are the newest's inputs,
// or null.
EXPORT int slotmoe_judge(Policy* policy, const int64_t* used, int64_t m, int64_t t, int64_t k, int64_t now, const float* x,
                         int64_t followed, int64_t d, const float* signs) {
    Policy& p = *policy;
    if (t < 1 || k < 1) return kBadArgument;
    const bool all = m == p.layers && m > 1;
    for (; m > 0; m--, used += t * k, x += x ? followed * d : 0) {
        const int64_t layer = *used / p.experts, first = layer * p.experts, end = first + p.experts;
        const auto outside = [&](int64_t id) { return id < first || id >= end; };
        if (*used < 0 || layer >= p.layers || std::any_of(used, used + t * k, outside)) return kBadArgument;
        const float* next = x ? learn(p, layer, used + (t - followed) * k, followed, k, x, d, signs) : nullptr;
        const int64_t passed = now - p.visited[layer];
        const double faded = std::pow(kShort, passed), faded_long = std::pow(kLong, passed);
        for (int64_t i = first; i < end; i++) p.recent[i] *= faded, p.lasting[i] *= faded_long;
        for (int64_t i = 0; i < t * k; i++) {
            const int64_t age = t - 1 - i / k;
            p.recent[used[i]] += (1 - kShort) * (age ? std::pow(kShort, age) : 1.0);
            p.lasting[used[i]] += (1 - kLong) * (age ? std::pow(kLong, age) : 1.0);
            if (age == 0) p.last[used[i]] = now;
        }
        if (next) {
            for (int64_t i = first; i < end; i++) estimate(p, i, now, 1.0, 1.0, next + (i - first));
        } else {
            for (int64_t i = first; i < end; i++) estimate(p, i, now, 1.0, 1.0, nullptr);
        }
        p.layer = all ? -1 : layer, p.visited[layer] = now, p.lowest[layer] = 0.0, p.longest[layer] = INFINITY;
    }
    return kOk;
}

// To `found` [3]: of what is cached and not held that of least worth, of equals the lowest id, or -1; that worth; and a
// newcomer's, who is estimated anew unless this pass was at his layer. A layer's are worth no less than its bounds, as
// quotients and sums are rounded in order: few layers are gone through.
EXPORT int slotmoe_least(const Policy* policy, int64_t newcomer, int64_t now, double* found) {
    const Policy& p = *policy;
    const int64_t passed = now - p.visited[newcomer / p.experts];
    if (passed) estimate(p, newcomer, now, std::pow(kShort, passed), std::pow(kLong, passed), nullptr);
    found[2] = worth_of(p, newcomer / p.experts, p.chance[newcomer], p.wait[newcomer]);
    for (int64_t l = 0; l < p.layers; l++) p.bounds[l] = worth_of(p, l, p.lowest[l], p.longest[l]);
    for (found[0] = -1, found[1] = INFINITY;;) {
        const int64_t l = std::min_element(p.bounds, p.bounds + p.layers) - p.bounds;
        if (p.bounds[l] == INFINITY || p.bounds[l] > found[1]) return kOk;
        double lowest = p.bounds[l] = INFINITY, longest = 0.0;
        for (int64_t i = l * p.experts; i < (l + 1) * p.experts; i++) {
            if (!p.cached[i]) continue;
            const double chance = p.chance[i], wait = p.wait[i], worth = worth_of(p, l, chance, wait);
            lowest = chance < lowest ? chance : lowest, longest = wait > longest ? wait : longest;
            if (!p.held[i] && (worth < found[1] || (worth == found[1] && i < found[0])))
                found[0] = double(i), found[1] = worth;
        }
        p.lowest[l] = lowest, p.longest[l] = longest;
    }
}

// Which of the absent ids [n], the best first, take the slots of others: each is worth more than `factor` of what is
// `gone` for it [most], of which at most that many are, of equals the lowest id first. To `count` how many.
EXPORT int slotmoe_exchange(Policy* policy, int64_t* ids, int64_t n, double factor, int64_t most, int64_t* gone,
                            int64_t* count) {
    Policy& p = *policy;
    constexpr int64_t kAtOnce = 64;
    const auto worth = [&](int64_t id) { return worth_of(p, id / p.experts, p.chance[id], p.wait[id]); };
    double cut = 0.0, worths[kAtOnce];
    for (int64_t i = 0; i < n; i++) cut = std::max(cut, worth(ids[i]) / factor);
    int64_t found = 0;
    most = std::min(most, n);
    for (int64_t l = 0, first = 0; most > 0 && l < p.layers; l++, first += p.experts) {
        const double far = far_of(p, l);
        for (int64_t from = first; from < first + p.experts; from += kAtOnce) {
            const int64_t these = std::min(kAtOnce, first + p.experts - from);
            for (int64_t i = 0; i < these; i++) worths[i] = worth_of(far, p.chance[from + i], p.wait[from + i]);
            for (int64_t i = 0; i < these; i++) {
                if (!(worths[i] < cut) || !p.cached[from + i] || p.held[from + i]) continue;
                int64_t at = found < most ? found++ : most - 1;
                for (; at > 0 && worth(gone[at - 1]) > worths[i]; at--) gone[at] = gone[at - 1];
                gone[at] = from + i;
                if (found == most) cut = worth(gone[most - 1]);
            }
        }
    }
    const auto pays = [&](int64_t id) { return found && worth(id) > factor * worth(gone[0]); };
    const auto better = [&](int64_t a, int64_t b) {
        const double x = worth(a), y = worth(b);
        return x > y || (x == y && a > b);
    };
    std::sort(ids, std::partition(ids, ids + n, pays), better);
    for (*count = 0; *count < std::min(n, found) && worth(ids[*count]) > factor * worth(gone[*count]); ++*count) {
        const int64_t layer = ids[*count] / p.experts;
        p.lowest[layer] = 0.0, p.longest[layer] = INFINITY;
    }
    return kOk;
}

// The id that `sample` of model/generate.py gives by a `number` from 0 to 1, for limits by top-k or top-p; -1 where sums
// in another order, or in the precision of those of unlikely ids, could give another one, or likely ids are very many.
static int64_t draw(Job& job, const Isa& isa, const float* x, int64_t v, double temperature, double top_p, int64_t top_k,
                    double min_p, double number) {
    const bool counts = top_k > 0 && top_k < v;
    int64_t *ids = job.scratch<int64_t>(kOrder, kLikely), *places = job.scratch<int64_t>(kLists, kLikely), n = 0;
    double *w = job.scratch<double>(kScores, kLikely), masses[kSteps], others, sum = 0.0, start = 0.0, goal = 1.0;
    float top;
    bool all = false;
    const auto likelier = [&](int64_t a, int64_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); };
    const auto step = [&](int64_t id) {
        return int64_t(std::min(double(top - x[id]) / temperature * (kSteps / 16), double(kSteps - 1)));
    };
    if (!(counts || top_p < 1)) return -1;
    // e^-reach is the least of what is likely, or all are.
    for (double reach = 6; sum <= goal; reach = reach < 15 ? reach + 3 : INFINITY) {
        if (all) return -1;
        all = std::isinf(reach);
        others = isa.survey(x, v, float(1 / temperature), float(reach * temperature), kLikely, ids, &n, &top);
        if (n < 1 || n > kLikely || std::isnan(others)) return -1;
        if (counts && n < top_k) continue;
        if (counts) std::partial_sort(ids, ids + top_k, ids + n, likelier), n = top_k, others = 0.0;
        std::fill(masses, masses + kSteps, sum = 0.0);
        for (int64_t i = 0; i < n; i++) {
            sum += w[i] = std::exp(double(x[ids[i]] - top) / temperature);
            masses[step(ids[i])] += w[i];
        }
        goal = top_p < 1 ? top_p * (sum + others) : 0.0;
    }
    const auto passes = [&](double mark) {  // where the sum of the likeliest does; `start` is without that one
        int64_t s = 0, count = 0;
        for (start = 0.0; s < kSteps - 1 && start + masses[s] <= mark; s++) start += masses[s];
        for (int64_t i = 0; i < n; i++)
            if (step(ids[i]) == s) places[count++] = i;
        std::sort(places, places + count, [&](int64_t a, int64_t b) { return likelier(ids[a], ids[b]); });
        for (int64_t i = 0; i < count; start += w[places[i++]])
            if (start + w[places[i]] > mark) return places[i];
        return int64_t(-1);
    };
    double mass = sum, doubt = 1e-5 * others + 1e-9 * sum, likely = 0.0;
    if (top_p < 1) {
        const int64_t last = passes(goal);
        mass = last < 0 ? 0.0 : start + w[last];
        if (mass - goal < doubt || (start > 0 && goal - start < doubt)) return -1;
    }
    for (int64_t i = 0; i < n; i++) {
        if (min_p > 0 && std::fabs(w[i] - min_p) < 1e-12) return -1;
        likely += w[i] > min_p ? w[i] : 0.0;
    }
    mass = std::min(mass, likely), doubt = 1e-9 * mass;
    const int64_t drawn = passes(number * mass);
    const double over = number * mass - start;
    return drawn >= 0 && (start == 0 || over > doubt) && w[drawn] - over > doubt ? ids[drawn] : -1;
}

// To chosen [3], unless the first is an id already, the likeliest of logits x [v] at temperature 0, else what is drawn by a
// `number` from 0 to 1, or -1; the logarithm of its probability and of the sum of all exps, rounded to floats. Where a
// logit is NaN, or the largest infinite, both are NaN and nothing is chosen.
EXPORT int slotmoe_choose(const float* x, int64_t v, double temperature, double top_p, int64_t top_k, double min_p,
                          double number, double* chosen) {
    int64_t id = int64_t(*chosen);
    if (v < 1 || id >= v) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        int64_t likeliest[1], n = 0;
        float top;
        const double others = isa.survey(x, v, 1.0f, 0.0f, 1, likeliest, &n, &top);
        const bool sound = n > 0 && std::isfinite(top) && !std::isnan(others);
        if (sound && id < 0 && temperature == 0) id = likeliest[0];
        if (sound && id < 0 && temperature > 0) id = draw(job, isa, x, v, temperature, top_p, top_k, min_p, number);
        const float total = sound ? float(std::log(double(n) + others) + top) : NAN;
        chosen[0] = double(id), chosen[1] = id < 0 ? NAN : x[id] - total, chosen[2] = total;
    });
}
