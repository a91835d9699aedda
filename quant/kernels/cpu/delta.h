// The gated delta rule (arXiv 2412.06464) in float32, one token after the other, and the convolution before it. There is
// no other form of it, so a token has the same bits alone and in a prompt.
//
// Of a head: queries q and keys k [K], values v [W]. A column of its state S [K, W] depends on one value of each token:
//   m = kᵀ S, p = qᵀ S;  change = beta (v - decay m);  out = decay p + (qᵀ k) change;  S = decay S + k changeᵀ
// Where each row of S decays by itself (arXiv 2510.26692), the k and q of m and p are times that.
namespace slotmoe {
namespace {

// y [n] = SiLU of the sum of rows x [taps, n], `stride` floats apart, times weights [taps, n], `apart` floats apart.
void convolve(const float* x, int64_t stride, const float* weights, int64_t apart, int64_t taps, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * weights[i];
    for (int64_t tap = 1; tap < taps; tap++)
        for (int64_t i = 0; i < n; i++) y[i] += x[tap * stride + i] * weights[tap * apart + i];
    for (int64_t i = 0; i < n; i++) y[i] *= sigmoid(y[i]);
}

void gated(const float* x, const float* gate, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * sigmoid(gate[i]);
}

// y = exp(-rate softplus(x + bias)), by log(1 + t) = 2 artanh(t / (2 + t)) of a t from 0 to 1.
void decays(const float* x, const float* bias, float rate, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i++) {
        const float step = x[i] + bias[i], t = exp_float(step > 0.0f ? -step : step), z = t / (2.0f + t);
        float sum = 0.0f;
        for (int odd = 13; odd > 0; odd -= 2) sum = sum * (z * z) + 1.0f / float(odd);
        y[i] = exp_float(-rate * ((step > 0.0f ? step : 0.0f) + 2.0f * z * sum));
    }
}

constexpr int kDeltaParts = kDeltaColumns / 16;

// Memory of so many columns; `kWhole`: of all of a block.
template <bool kWhole>
struct Columns {
    int64_t count;

    F load(const float* p, int part) const {
        if (kWhole) return Lanes::load(p + 16 * part);
        alignas(64) float few[16] = {};
        for (int64_t i = 0; i < 16 && 16 * part + i < count; i++) few[i] = p[16 * part + i];
        return Lanes::load(few);
    }
    void store(float* p, int part, const F& v) const {
        if (kWhole) return Lanes::store(p + 16 * part, v);
        alignas(64) float few[16];
        Lanes::store(few, v);
        for (int64_t i = 0; i < 16 && 16 * part + i < count; i++) p[16 * part + i] = few[i];
    }
};

// Each token's change of the state is made while the next one's products with it are.
template <bool kWhole, bool kChannels>
SLOTMOE_NOINLINE void delta_columns(const DeltaBlock d) {  // its own copy: stores can't change that
    const Columns<kWhole> columns{d.columns};
    const int64_t apart = kWhole ? kDeltaColumns : d.columns;
    const float* state = d.before;
    F m[kDeltaParts], p[kDeltaParts], change[kDeltaParts];
    const auto see = [&](int part, const F& s, F k, F q) {
        m[part] = Lanes::fma(k, s, m[part]), p[part] = Lanes::fma(q, s, p[part]);
    };
    const auto none = [&] {
        for (int part = 0; part < kDeltaParts; part++) m[part] = p[part] = Lanes::zero();
    };
    const auto key = [](const float* k, const float* gates, int64_t i) {
        return Lanes::broadcast(kChannels ? k[i] * gates[2 + i] : k[i]);
    };
    none();
    for (int64_t i = 0; i < d.keys; i++)
        for (int part = 0; part < kDeltaParts; part++)
            see(part, columns.load(state + i * apart, part), key(d.k, d.gates, i), Lanes::broadcast(d.q[i]));
    for (int64_t token = 0; token < d.t; token++, state = d.after) {
        const float *k = d.k + token * d.stride, *q = d.q + token * d.stride, *gates = d.gates + token * d.stride;
        const float all = kChannels ? 1.0f : gates[2];
        const F decay = Lanes::broadcast(all), beta = Lanes::broadcast(gates[0]), less = Lanes::broadcast(-all);
        for (int part = 0; part < kDeltaParts; part++) {
            const F missing = Lanes::fma(less, m[part], columns.load(d.v + token * d.stride, part));
            change[part] = Lanes::mul(beta, missing);
            const F own = Lanes::mul(Lanes::broadcast(gates[1]), change[part]);
            columns.store(d.out + token * d.out_stride, part, Lanes::fma(decay, p[part], own));
        }
        const auto changed = [&](int64_t i, int part, F of_key) {
            const F less = kChannels ? Lanes::broadcast(gates[2 + i]) : decay;
            const F s = Lanes::mul(less, columns.load(state + i * apart, part));
            const F sum = Lanes::fma(of_key, change[part], s);
            columns.store(d.after + i * apart, part, sum);
            return sum;
        };
        if (token + 1 == d.t) {
            for (int64_t i = 0; i < d.keys; i++)
                for (int part = 0; part < kDeltaParts; part++) changed(i, part, Lanes::broadcast(k[i]));
            return;
        }
        none();
        for (int64_t i = 0; i < d.keys; i++) {
            const F of_key = Lanes::broadcast(k[i]), next_k = key(k + d.stride, gates + d.stride, i);
            const F next_q = Lanes::broadcast(q[d.stride + i]);
            for (int part = 0; part < kDeltaParts; part++) see(part, changed(i, part, of_key), next_k, next_q);
        }
    }
}

void delta_block(const DeltaBlock& d) {
    if (d.channels) return (d.columns == kDeltaColumns ? delta_columns<true, true> : delta_columns<false, true>)(d);
    (d.columns == kDeltaColumns ? delta_columns<true, false> : delta_columns<false, false>)(d);
}

}  // namespace
}  // namespace slotmoe
