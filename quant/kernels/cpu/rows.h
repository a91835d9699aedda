// Elementwise work on rows of floats: activation quantization, SiLU, exp. Plain loops that the compiler vectorizes;
// no fused multiply-adds (-ffp-contract=off), so a row's result is the same wherever the loop is split.
//
// Shapes: x [T, K]; blocks [B, T] of 64 columns with 4 scales; K may be any length, missing columns are zeros.
namespace slotmoe {
namespace {

using F = Lanes::F;

inline uint32_t float_bits(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return bits;
}
inline float bits_float(uint32_t bits) {
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

// To the nearest integer, halves to even, for |v| < 2^22.
inline float round_even(float v) {
    const float shift = 12582912.0f;  // 1.5 * 2^23
    return (v + shift) - shift;
}

inline float power_of_two(int e) { return bits_float(uint32_t(e + 127) << 23); }  // -126 <= e <= 127

constexpr uint32_t kInfinityBits = 0x7f800000;

// The largest magnitude's bits: integers order like magnitudes, and NaN comes out on top.
inline uint32_t max_bits(const float* x, int64_t n) {
    uint32_t tops[4] = {}, top = 0;  // of the quarters: a single one would wait for itself
    const int64_t quarter = n / 4;
    const auto raise = [&](uint32_t& most, int64_t i) {
        const uint32_t bits = float_bits(x[i]) & 0x7fffffff;
        most = bits > most ? bits : most;
    };
    for (int64_t i = 0; i < quarter; i++)
        for (int j = 0; j < 4; j++) raise(tops[j], j * quarter + i);
    for (int64_t i = 4 * quarter; i < n; i++) raise(top, i);
    for (const uint32_t bits : tops) top = bits > top ? bits : top;
    return top;
}

constexpr int kPartsAtOnce = 16;  // parts of kXBlock columns
constexpr int kColumnsAtOnce = kPartsAtOnce * kXBlock, kBlocksAtOnce = kColumnsAtOnce / kBlock;

// x times both factors, which are powers of two.
struct Scaled {
    F first, second;
    F operator()(const float* x) const { return Lanes::mul(Lanes::mul(Lanes::load(x), first), second); }
};

// body(columns, first, count) for kColumnsAtOnce columns of a row x [k] at a time, of `count` blocks from the first on.
// Columns behind the last, and all of a row without `numbers`, are zeros.
template <class Body>
inline void each_group(const float* x, int64_t k, bool numbers, Body body) {
    float rest[kColumnsAtOnce] = {};
    for (int64_t left = k, first = 0; left > 0; left -= kColumnsAtOnce, first += kBlocksAtOnce, x += kColumnsAtOnce) {
        const bool whole = numbers && left >= kColumnsAtOnce;
        if (numbers && !whole) memcpy(rest, x, size_t(left) * sizeof *rest);
        body(whole ? x : rest, first, left < kColumnsAtOnce ? (left + kBlock - 1) / kBlock : kBlocksAtOnce);
    }
}

// The scale of each part of kColumnsAtOnce values below 2, and what makes integers of them.
inline void scale_parts(const float* x, const Scaled& scaled, float* scale, float* inverse) {
    F parts[kPartsAtOnce];
    alignas(64) float largest[kPartsAtOnce];
    for (int i = 0; i < kPartsAtOnce; i++) {
        const F part = scaled(x + i * kXBlock);
        parts[i] = Lanes::max(part, Lanes::mul(part, Lanes::broadcast(-1.0f)));
    }
    Lanes::max_lanes(parts, largest);
    const F zero = Lanes::zero(), most = Lanes::broadcast(127.0f);
    const F least = Lanes::broadcast(0x1p-100f);  // below it nothing that a float sum could see
    const F top = Lanes::where_greater(least, Lanes::load(largest), zero, Lanes::load(largest));
    Lanes::store(scale, Lanes::div(top, most));
    Lanes::store(inverse, Lanes::where_greater(top, zero, Lanes::div(most, top), zero));
}

// q, scale and bias of `count` <= 4 blocks, the first at `out`, one `t` after the other.
inline void quantize_blocks(const float* x, const Scaled& scaled, const float* scale, const float* inverse,
                            int64_t count, float offset, ActBlock* out, int64_t t) {
    F parts[kPartsAtOnce];
    alignas(64) float sums[kPartsAtOnce];
    alignas(64) int32_t bias[kPartsAtOnce];
    const F shift = Lanes::broadcast(12582912.0f), back = Lanes::broadcast(-12582912.0f);  // as in round_even
    alignas(64) int8_t q[kPartsAtOnce * kXBlock];
    for (int i = 0; i < kPartsAtOnce; i++) {
        const F normal = Lanes::mul(scaled(x + i * kXBlock), Lanes::broadcast(inverse[i]));
        parts[i] = Lanes::add(Lanes::add(normal, shift), back);
        Lanes::store_int8(q + i * kXBlock, parts[i]);
    }
    Lanes::sum_lanes(parts, sums);
    for (int i = 0; i < kPartsAtOnce; i++)
        bias[i] = int32_t(round_even(offset * sums[i])) - Lanes::kWeightOffset * int32_t(sums[i]);
    for (int64_t b = 0; b < count; b++, out += t) {
        memcpy(out->q, q + b * kBlock, sizeof out->q);
        memcpy(out->scale, scale + b * kXScales, sizeof out->scale);
        memcpy(out->bias, bias + b * kXScales, sizeof out->bias);
    }
}

void quantize_rows(const float* x, int64_t k, int64_t begin, int64_t end, int64_t t, float offset, void* blocks,
                   double* factor) {
    for (int64_t row = begin; row < end; row++) {
        const float* in = x + row * k;
        const uint32_t top = max_bits(in, k);
        const bool finite = top < kInfinityBits;
        // The row is scaled by 2^-e to a maximum in [1, 2), in two steps: 2^-e itself may not be a float.
        int e = 0;
        if (top > 0 && finite) {
            e = int(top >> 23) - 127;
            if (e < -126) e = int(float_bits(float(top)) >> 23) - 127 - 149;  // denormal: `top` counts 2^-149
        }
        const Scaled scaled{Lanes::broadcast(power_of_two(-e / 2)), Lanes::broadcast(power_of_two(-e - -e / 2))};
        factor[row] = finite ? __builtin_ldexp(1.0, e) : double(bits_float(0x7fc00000));
        each_group(in, k, finite, [&](const float* columns, int64_t first, int64_t count) {
            alignas(64) float scale[kPartsAtOnce], inverse[kPartsAtOnce];
            scale_parts(columns, scaled, scale, inverse);
            quantize_blocks(columns, scaled, scale, inverse, count, offset,
                            static_cast<ActBlock*>(blocks) + first * t + row, t);
        });
    }
}

// y = x / sqrt(mean(x^2) + eps) * weight, which is 1 if there is none.
void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
    float sums[16] = {}, total = 0.0f;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += x[i + j] * x[i + j];
    for (int j = 0; i < n; i++, j++) sums[j] += x[i] * x[i];
    for (const float sum : sums) total += sum;
    const float scale = 1.0f / __builtin_sqrtf(total / float(n) + eps);
    if (!weight)
        for (i = 0; i < n; i++) y[i] = x[i] * scale;
    else
        for (i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

// y = (x - mean(x)) / sqrt(variance + eps) * weight + bias.
void layer_norm(const float* x, const float* weight, const float* bias, int64_t n, float eps, float* y) {
    const auto sum_of = [&](auto value) {
        float sums[16] = {}, total = 0.0f;
        for (int64_t i = 0; i < n; i++) sums[i % 16] += value(x[i]);
        for (const float sum : sums) total += sum;
        return total;
    };
    const float mean = sum_of([](float v) { return v; }) / float(n);
    const float square = sum_of([&](float v) { return (v - mean) * (v - mean); });
    const float scale = 1.0f / __builtin_sqrtf(square / float(n) + eps);
    for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

// e^x for x <= 88 within 2 units in the last place; 0 below -87, NaN for NaN.
inline float exp_float(float x) {
    const float low = x > -87.0f ? x : -87.0f, clamped = low < 88.0f ? low : 88.0f;
    const float n = round_even(clamped * 1.44269504f);
    const float r = clamped - n * 0.693359375f - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const float scaled = p * bits_float(uint32_t(int32_t(n) + 127) << 23);
    return x < -87.0f ? 0.0f : x == x ? scaled : x;
}

// NaN stays.
void activate(const float* gate, const float* up, const Activation& how, float* out, int64_t n) {
    const float most = how.limit > 0.0f ? how.limit : bits_float(kInfinityBits), alpha = how.alpha, more = how.offset;
    for (int64_t i = 0; i < n; i++) {
        const float g = gate[i] > most ? most : gate[i], a = alpha * g, silu = g / (1.0f + exp_float(-a));
        const float below = up[i] > most ? most : up[i], u = below < -most ? -most : below;
        // Below -87 exp(-a) is clamped; the true value is under 2^-119.
        out[i] = (a < -87.0f ? 0.0f : silu) * (u + more);
    }
}

// y = sum over k in the given order, each product and each sum rounded: what a caller would get step by step.
void weighted_sum(const float* outs, const float* weights, int64_t k, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i++) y[i] = 0.0f;
    for (int64_t e = 0; e < k; e++, outs += n) {
        const float w = weights[e];
        for (int64_t i = 0; i < n; i++) y[i] = y[i] + w * outs[i];
    }
}

uint64_t read_memory(const void* memory, int64_t bytes) {
    const uint8_t* p = static_cast<const uint8_t*>(memory);
    Lanes::I sums[4] = {Lanes::start(0), Lanes::start(0), Lanes::start(0), Lanes::start(0)};
    int64_t i = 0;
    for (; i + 256 <= bytes; i += 256)
        for (int j = 0; j < 4; j++) sums[j] = Lanes::add_bytes(sums[j], p + i + 64 * j);
    uint64_t total = 0;
    for (; i < bytes; i++) total += p[i];
    alignas(64) float lanes[16];
    for (int j = 0; j < 4; j++) {
        Lanes::store(lanes, Lanes::to_float(sums[j]));
        for (float lane : lanes) total += uint64_t(int64_t(lane));
    }
    return total;
}

}  // namespace
}  // namespace slotmoe
