// Layers of a gated delta rule (arXiv 2412.06464); delta.h has the arithmetic.
#include <cmath>
#include <cstring>

#include "attend.h"

using namespace slotmoe;

namespace {

constexpr int64_t kPiece = 64;    // rows that go through at once: what they become stays in the second-level cache
constexpr float kSmall = 1e-6f;  // beside the squares of a query's or a key's length

// Columns of a row as the rule reads it: q, k and v convolved, and of each head its beta, q k and decays.
int64_t rule_columns(const DeltaRule& r) { return r.columns() + (2 + r.decays()) * r.heads; }

// One head of keys of one row of inputs, with its heads of values. x has `taps` rows, the last of them its own.
void prepare(const Isa& isa, const DeltaRule& r, const float* x, int64_t stride, int64_t taps, int64_t head, float* y) {
    const int64_t columns = r.columns(), of_head = r.heads / r.key_heads, keys = r.key_heads * r.k;
    const float *weights = r.convolution + (kTaps - taps) * columns, *own = x + (taps - 1) * stride;
    float *q = y + head * r.k, *k = q + keys;
    const auto convolve = [&](int64_t first, int64_t n) {
        isa.convolve(x + first, stride, weights + first, columns, taps, n, y + first);
    };
    convolve(head * r.k, r.k), convolve(keys + head * r.k, r.k);
    convolve(2 * keys + head * of_head * r.v, of_head * r.v);
    // A norm by the mean of the squares is one by their sum, times the root of how many there are.
    const float less = 1.0f / float(r.k), root = std::sqrt(less);
    isa.rms_norm(q, nullptr, r.k, kSmall / float(r.k), q), isa.rms_norm(k, nullptr, r.k, kSmall / float(r.k), k);
    for (int64_t i = 0; i < r.k; i++) q[i] *= less, k[i] *= root;
    float both;
    isa.linear_dense(q, 1, r.k, k, Source::f32, 0, 1, &both, 1);
    for (int64_t i = head * of_head; i < (head + 1) * of_head; i++) {
        const int64_t decays = r.decays();
        const double b = own[columns + i], rate = std::exp(double(r.decay[i]));
        const float *steps = own + columns + r.heads + i * decays, *bias = r.bias + i * decays;
        float* gates = y + columns + (2 + decays) * i;
        gates[0] = float(1 / (1 + std::exp(-b))), gates[1] = both;
        if (r.by_channel) {
            isa.decays(steps, bias, float(rate), decays, gates + 2);
            for (int64_t j = 0; j < decays; j++) q[j] *= gates[2 + j];
        } else {
            const double step = double(*steps) + *bias;
            const double softplus = (step > 0 ? step : 0) + std::log1p(std::exp(-std::fabs(step)));
            gates[2] = float(std::exp(-rate * softplus));
        }
    }
}

}  // namespace

void slotmoe::delta_rule(Job& job, const Isa& isa, const DeltaRule& r, const DeltaSpan* spans, int64_t count,
                         const float* z, float* y) {
    const int64_t wide = rule_columns(r), columns = r.columns(), inputs = r.inputs(), of_head = r.heads / r.key_heads;
    const int64_t blocks = up_to(r.v, kDeltaColumns), block_floats = r.k * kDeltaColumns, values = r.heads * r.v;
    int64_t rows = 0, outs = 0;
    for (int64_t i = 0; i < count; i++) rows += spans[i].rows - spans[i].past, outs += spans[i].outs;
    float* x = job.scratch<float>(kDelta, rows * (wide + values) + job.threads() * block_floats);
    float *out = x + rows * wide, *rest = out + rows * values;  // of the state behind rows that are not folded
    const auto span_of = [&](int64_t& i, auto size) {  // and i is in it
        const DeltaSpan* span = spans;
        for (; i >= size(*span); span++) i -= size(*span);
        return span;
    };
    const auto own = [](const DeltaSpan& span) { return span.rows - span.past; };
    job.each(rows * r.key_heads, [&](int, int64_t i) {
        int64_t row = i / r.key_heads;
        float* to = x + row * wide;
        const DeltaSpan* span = span_of(row, own);
        const int64_t at = span->past + row, taps = at + 1 < kTaps ? at + 1 : kTaps;
        prepare(isa, r, span->inputs + (at + 1 - taps) * inputs, inputs, taps, i % r.key_heads, to);
    });
    job.each(count * r.heads * blocks, [&](int thread, int64_t i) {
        const DeltaSpan& span = spans[i / (r.heads * blocks)];
        const int64_t head = i / blocks % r.heads, column = i % blocks * kDeltaColumns;
        int64_t first = 0;
        for (const DeltaSpan* before = spans; before != &span; before++) first += own(*before);
        const float *own_x = x + first * wide, *q = own_x + head / of_head * r.k;
        const float* gates = own_x + columns + (2 + r.decays()) * head;
        const float* v = own_x + 2 * r.key_heads * r.k + head * r.v + column;
        const int64_t state = head * r.k * r.v + r.k * column;
        float* to = out + first * values + head * r.v + column;
        DeltaBlock d{r.k, r.v - column < kDeltaColumns ? r.v - column : kDeltaColumns, span.folded, wide, q,
                     q + r.key_heads * r.k, v, gates, span.before + state, span.after + state, to, values,
                     r.by_channel != 0};
        if (span.folded) isa.delta_block(d), d.before = d.after;
        const int64_t behind = own(span) - span.folded, apart = span.folded * wide;
        if (!behind) return;
        d.after = rest + thread * block_floats;
        d.t = behind, d.q += apart, d.k += apart, d.v += apart, d.gates += apart, d.out += span.folded * values;
        isa.delta_block(d);
    });
    job.each(outs * r.heads, [&](int, int64_t i) {
        int64_t token = i / r.heads, first = 0;
        const DeltaSpan* span = span_of(token, [](const DeltaSpan& span) { return span.outs; });
        for (const DeltaSpan* before = spans; before != span; before++) first += own(*before);
        float* o = out + (first + own(*span) - span->outs + token) * values + i % r.heads * r.v;
        isa.rms_norm(o, r.norm, r.v, r.eps, o);
        if (r.by_channel) return isa.gated(o, z + i * r.v, r.v, y + i * r.v);
        isa.activate(z + i * r.v, o, {}, y + i * r.v, r.v);
    });
}

bool Delta::valid(const Tokens& tokens) const {
    const int64_t values = heads * v, floats = sizeof(float);
    if (!DeltaRule::valid() || !qkv.valid() || !z.valid() || !b.valid() || !a.valid() || !out.valid()) return false;
    if (qkv.n != columns() || z.n != values || b.n != heads || a.n != heads * decays() || out.k != values) return false;
    if (z.k != (z_latent.n ? z_latent.n : qkv.k) || a.k != (a_latent.n ? a_latent.n : qkv.k)) return false;
    if (!z_latent.n != !a_latent.n || (z_latent.n && !(z_latent.valid() && a_latent.valid()))) return false;
    return tokens.folds && tokens.inputs.row_bytes == inputs() * floats &&
           tokens.states.row_bytes == values * k * floats && (!gate.n || gate.valid());
}

void slotmoe::delta_layer(Job& job, const Isa& isa, const Delta& a, int64_t t, const float* h, const Tokens& tokens,
                          float* y, float* x, float* logits) {
    const int64_t columns = a.columns(), heads = a.heads, values = heads * a.v, decays = heads * a.decays();
    const auto row = [&](const Store& store, int64_t token, int64_t at) {
        return reinterpret_cast<float*>(store.at(token, a.layer, at));
    };
    float *qkv = job.scratch<float>(kQuery, t * columns), *z = job.scratch<float>(kQueryFull, t * values);
    float *b = job.scratch<float>(kRow, t * (heads + decays)), *steps = b + t * heads;
    const bool by_latents = a.z_latent.n > 0;
    float *of_z = job.scratch<float>(kQueryLatent, t * (a.z_latent.n + a.a_latent.n)), *of_a = of_z + t * a.z_latent.n;
    norm_rows(job, isa, h, a.input_norm, t, a.qkv.k, a.eps, x);
    multiply(job, {{job, isa, a.qkv, x, t, qkv},
                   {job, isa, by_latents ? a.z_latent : a.z, x, t, by_latents ? of_z : z, nullptr, kAct, kActFactor},
                   {job, isa, a.b, x, t, b, nullptr, kGate, kUp},
                   {job, isa, by_latents ? a.a_latent : a.a, x, t, by_latents ? of_a : steps, nullptr, kOuts, kParts}});
    if (by_latents)
        multiply(job, {{job, isa, a.z, of_z, t, z}, {job, isa, a.a, of_a, t, steps, nullptr, kAct, kActFactor}});
    for (int64_t i = 0; i < t; i++) {
        float* to = row(tokens.inputs, i, tokens.positions[i]);
        memcpy(to, qkv + i * columns, size_t(columns) * 4);
        memcpy(to + columns, b + i * heads, size_t(heads) * 4);
        memcpy(to + columns + heads, steps + i * decays, size_t(decays) * 4);
    }
    float* out = job.scratch<float>(kLatentOut, t * values);
    for (int64_t first = 0; first < t; first += kPiece) {
        DeltaSpan* spans = job.scratch<DeltaSpan>(kDeltaSpans, kPiece);
        const int64_t last = t - first < kPiece ? t : first + kPiece;
        int64_t count = 0;
        for (int64_t i = first; i < last; i++) {
            const int64_t position = tokens.positions[i];
            const bool follows = i && tokens.states.start[i] == tokens.states.start[i - 1];
            if (!follows || i == first) {
                Fold fold = tokens.folds[i];
                if (follows) fold = {position, fold.write, fold.write, fold.end};  // behind the piece before
                const int64_t past = fold.at < kTaps - 1 ? fold.at : kTaps - 1;
                spans[count++] = {past + position - fold.at, past, fold.end - fold.at, 0,
                                  row(tokens.inputs, i, fold.at - past), row(tokens.states, i, fold.read),
                                  row(tokens.states, i, fold.write)};
            }
            spans[count - 1].rows++, spans[count - 1].outs++;
        }
        for (int64_t i = 0; i < count; i++) {
            const int64_t own = spans[i].rows - spans[i].past;
            spans[i].folded = spans[i].folded < own ? spans[i].folded : own;
        }
        delta_rule(job, isa, a, spans, count, z + first * values, out + first * values);
    }
    leave(job, isa, a, nullptr, out, t, h, y, x, logits);
}

// Inputs of consecutive tokens, [rows, width], see DeltaSpan, -> y [t, heads, v] of the last t; z alike.
EXPORT int slotmoe_delta(const float* inputs, const float* z, const float* convolution, const float* decay,
                         const float* bias, const float* norm, const float* before, float* after, int64_t rows,
                         int64_t width, int64_t columns, int64_t t, int64_t key_heads, int64_t heads, int64_t k,
                         int64_t v, int64_t decays, int64_t past, int64_t folded, int64_t by_channel, float eps,
                         float* y) {
    const DeltaRule rule{key_heads, heads, k, v, by_channel, eps, 0.0f, convolution, decay, bias, norm};
    if (!rule.valid() || columns != rule.columns() || decays != heads * rule.decays() || width != rule.inputs() ||
        past < 0 || past >= kTaps || t < 1 || t > rows - past || folded < 0 || folded > rows - past)
        return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        const auto part = [&](int64_t count, int64_t first) {  // of so many, those of a piece of rows
            const int64_t left = count - first;
            return left < 0 ? 0 : left < kPiece ? left : kPiece;
        };
        for (int64_t at = past, first = 0; at < rows; at += kPiece, first += kPiece) {
            const int64_t own = part(rows - past, first), back = at < kTaps - 1 ? at : kTaps - 1;
            const int64_t silent = part(rows - past - t, first), outs = own - silent;
            const DeltaSpan span{back + own, back, part(folded, first), outs, inputs + (at - back) * width,
                                 first ? after : before, after};
            delta_rule(job, isa, rule, &span, 1, z, y);
            z += outs * heads * v, y += outs * heads * v;
        }
    });
}

// x, gate [n] -> y [n].
EXPORT int slotmoe_gated(const float* x, const float* gate, int64_t t, int64_t n, float* y) {
    return guarded([&](Job& job, const Isa& isa) {
        job.each(t, [&](int, int64_t i) { isa.gated(x + i * n, gate + i * n, n, y + i * n); });
    });
}
