// Products with unquantized matrices (the router gate, bf16 weights), whose activations stay fp32. A row's result is
// computed in one order, alone or among others.
//
// Shapes: x [T, K]; W [N, K].
namespace slotmoe {
namespace {

struct LoadFloat {
    using Element = float;
    static F load(const float* p) { return Lanes::load(p); }
    static float one(float v) { return v; }
};
struct LoadHalf {
    using Element = uint16_t;
    static F load(const uint16_t* p) { return Lanes::load_half(p); }
    static float one(uint16_t v) {
        alignas(64) uint16_t bits[16] = {v};
        alignas(64) float lanes[16];
        Lanes::store(lanes, Lanes::load_half(bits));
        return lanes[0];
    }
};
struct LoadBf16 {
    using Element = uint16_t;
    static F load(const uint16_t* p) { return Lanes::load_bf16(p); }
    static float one(uint16_t v) { return bits_float(uint32_t(v) << 16); }
};

inline float lane_sum(const F* sums) {
    alignas(64) float lanes[16];
    Lanes::store(lanes, Lanes::add(Lanes::add(sums[0], sums[1]), Lanes::add(sums[2], sums[3])));
    float total = 0.0f;
    for (const float lane : lanes) total += lane;
    return total;
}

template <class Load>
inline void dense_rows(const float* x, int64_t t, int64_t k, const typename Load::Element* w, int64_t begin,
                       int64_t end, float* y, int64_t ldy) {
    const int64_t whole = k / 64 * 64;
    for (int64_t n = begin; n < end; n++) {
        const typename Load::Element* row = w + n * k;
        for (int64_t token = 0; token < t; token++) {
            const float* in = x + token * k;
            F sums[4] = {Lanes::zero(), Lanes::zero(), Lanes::zero(), Lanes::zero()};
            for (int64_t j = 0; j < whole; j += 64)
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++)
                    sums[i] = Lanes::fma(Lanes::load(in + j + 16 * i), Load::load(row + j + 16 * i), sums[i]);
            float total = lane_sum(sums);
            for (int64_t j = whole; j < k; j++) total += in[j] * Load::one(row[j]);
            y[token * ldy + n] = total;
        }
    }
}

void linear_dense(const float* x, int64_t t, int64_t k, const void* w, Source type, int64_t begin, int64_t end,
                  float* y, int64_t ldy) {
    if (type == Source::f32) dense_rows<LoadFloat>(x, t, k, static_cast<const float*>(w), begin, end, y, ldy);
    if (type == Source::f16) dense_rows<LoadHalf>(x, t, k, static_cast<const uint16_t*>(w), begin, end, y, ldy);
    if (type == Source::bf16) dense_rows<LoadBf16>(x, t, k, static_cast<const uint16_t*>(w), begin, end, y, ldy);
}

}  // namespace
}  // namespace slotmoe
