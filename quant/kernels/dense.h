// Products whose activations stay fp32: unquantized matrices (the router gate, bf16 weights), and MLA's absorbed kv_b_proj,
// whose weights are row-major as in the export: int8 [heads * (N + V), R], one scale a row; 3% of what a token reads.
// A row's result is computed in one order, alone or among others.
//
// Shapes: x [T, K]; W [N, K]; q [T, heads, N]; latent [T, heads, R]; value [T, heads, V]; head h's rows start at h * (N + V).
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
inline void dense_rows(const float* x, int64_t t, int64_t k, const typename Load::Element* w, int64_t begin, int64_t end, float* y,
                       int64_t ldy) {
    const int64_t whole = k / 64 * 64;
    for (int64_t n = begin; n < end; n++) {
        const typename Load::Element* row = w + n * k;
        for (int64_t token = 0; token < t; token++) {
            const float* in = x + token * k;
            F sums[4] = {Lanes::zero(), Lanes::zero(), Lanes::zero(), Lanes::zero()};
            for (int64_t j = 0; j < whole; j += 64)
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) sums[i] = Lanes::fma(Lanes::load(in + j + 16 * i), Load::load(row + j + 16 * i), sums[i]);
            float total = lane_sum(sums);
            for (int64_t j = whole; j < k; j++) total += in[j] * Load::one(row[j]);
            y[token * ldy + n] = total;
        }
    }
}

void linear_dense(const float* x, int64_t t, int64_t k, const void* w, Source type, int64_t begin, int64_t end, float* y, int64_t ldy) {
    if (type == Source::f32) dense_rows<LoadFloat>(x, t, k, static_cast<const float*>(w), begin, end, y, ldy);
    if (type == Source::f16) dense_rows<LoadHalf>(x, t, k, static_cast<const uint16_t*>(w), begin, end, y, ldy);
    if (type == Source::bf16) dense_rows<LoadBf16>(x, t, k, static_cast<const uint16_t*>(w), begin, end, y, ldy);
}

constexpr int64_t kRowsAhead = 12;
constexpr int64_t kColumns = 256;  // columns whose sums stay in registers while all rows pass

// out[h] = sum over n < N of q[h][n] * scale[row] * w[row], one token, head h.
inline void absorb_query_head(const float* x, const int8_t* rows, const float* scale, int64_t n, int64_t r, float* out) {
    constexpr int kSums = kColumns / 16;
    int64_t column = 0;
    for (; column + kColumns <= r; column += kColumns) {
        F sums[kSums];
#pragma GCC unroll 16
        for (int j = 0; j < kSums; j++) sums[j] = Lanes::zero();
        for (int64_t i = 0; i < n; i++) {
            const F a = Lanes::broadcast(x[i] * scale[i]);
            const int8_t* p = rows + i * r + column;
#pragma GCC unroll 4
            for (int line = 0; line < kColumns; line += 64) Lanes::prefetch(p + kRowsAhead * r + line);
#pragma GCC unroll 16
            for (int j = 0; j < kSums; j++) sums[j] = Lanes::fma(a, Lanes::load_int8(p + 16 * j), sums[j]);
        }
#pragma GCC unroll 16
        for (int j = 0; j < kSums; j++) Lanes::store(out + column + 16 * j, sums[j]);
    }
    for (; column < r; column++) {
        float sum = 0.0f;
        for (int64_t i = 0; i < n; i++) sum += x[i] * scale[i] * float(rows[i * r + column]);
        out[column] = sum;
    }
}

// out[v] = scale[v] * (latent . w[v]), one token, one head's value rows.
inline void absorb_value_head(const float* x, const int8_t* rows, const float* scale, int64_t values, int64_t r, float* out) {
    const int64_t whole = r / 64 * 64;
    for (int64_t v = 0; v < values; v++) {
        const int8_t* p = rows + v * r;
        F sums[4] = {Lanes::zero(), Lanes::zero(), Lanes::zero(), Lanes::zero()};
        for (int64_t j = 0; j < whole; j += 64)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) sums[i] = Lanes::fma(Lanes::load(x + j + 16 * i), Lanes::load_int8(p + j + 16 * i), sums[i]);
        float total = lane_sum(sums);
        for (int64_t j = whole; j < r; j++) total += x[j] * float(p[j]);
        out[v] = total * scale[v];
    }
}

void absorb_query(const float* q, int64_t ldq, int64_t t, int64_t heads, const int8_t* w, const float* scale, int64_t n, int64_t per_head,
                  int64_t r, int64_t begin, int64_t end, float* out, int64_t ldo) {
    for (int64_t h = begin; h < end; h++)
        for (int64_t token = 0; token < t; token++) {
            const int64_t at = token * heads + h;
            absorb_query_head(q + at * ldq, w + h * per_head * r, scale + h * per_head, n, r, out + at * ldo);
        }
}

void absorb_value(const float* latent, int64_t t, int64_t heads, const int8_t* w, const float* scale, int64_t n, int64_t per_head,
                  int64_t r, int64_t begin, int64_t end, float* out) {
    const int64_t values = per_head - n;
    for (int64_t h = begin; h < end; h++)
        for (int64_t token = 0; token < t; token++) {
            const int64_t at = token * heads + h, row = h * per_head + n;
            absorb_value_head(latent + at * r, w + row * r, scale + row, values, r, out + at * values);
        }
}

}  // namespace
}  // namespace slotmoe
