// Products whose activations stay fp32: unquantized matrices (the router gate, bf16 weights), and MLA's absorbed
// kv_b_proj, whose weights are row-major as in the export: int8 [heads * (N + V), R], one scale a row; 3% of what a
// token reads. A row's result is computed in one order, alone or among others.
//
// Shapes: x [T, K]; W [N, K]; q [T, heads, N]; latent [T, heads, R]; value [T, heads, V]; head h's rows start at h * (N
// + V).
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

constexpr int kSums = 16;            // vectors of sums that stay in registers
constexpr int64_t kRowsAtOnce = 16;  // whose columns pass in turn, so that memory is read from end to end
// bytes, to L2: a Zen 4 core has too few lines on their way to L1 for so little work on each
constexpr int64_t kAhead = 16384;

// What comes kAhead bytes after row i of a head's n: `gap` bytes lie between these and the next head's.
inline const int8_t* ahead(const int8_t* row, int64_t i, int64_t n, int64_t r, int64_t gap) {
    return row + kAhead + ((n - i) * r > kAhead ? 0 : gap);
}

// Rows first to last of a head's n, 16 * Vectors of their columns, added to out or, where first is 0, from zero.
template <int Tokens, int Vectors>
inline void absorb_columns(const float* x, int64_t ldx, const int8_t* rows, const float* scale, int64_t first,
                           int64_t last, int64_t n, int64_t r, int64_t gap, int64_t column, float* out, int64_t ldo) {
    F sums[Tokens][Vectors];
#pragma GCC unroll 16
    for (int j = 0; j < Tokens * Vectors; j++) {
        const float* sum = out + j / Vectors * ldo + column + j % Vectors * 16;
        sums[j / Vectors][j % Vectors] = first ? Lanes::load(sum) : Lanes::zero();
    }
    for (int64_t i = first; i < last; i++) {
        const int8_t *p = rows + i * r + column, *later = ahead(p, i, n, r, gap);
        F a[Tokens];
#pragma GCC unroll 4
        for (int token = 0; token < Tokens; token++) a[token] = Lanes::broadcast(x[token * ldx + i] * scale[i]);
#pragma GCC unroll 4
        for (int line = 0; line < 16 * Vectors; line += 64) Lanes::prefetch_to_l2(later + line);
#pragma GCC unroll 16
        for (int j = 0; j < Vectors; j++) {
            const F w = Lanes::load_int8(p + 16 * j);
#pragma GCC unroll 4
            for (int token = 0; token < Tokens; token++) sums[token][j] = Lanes::fma(a[token], w, sums[token][j]);
        }
    }
#pragma GCC unroll 16
    for (int j = 0; j < Tokens * Vectors; j++)
        Lanes::store(out + j / Vectors * ldo + column + j % Vectors * 16, sums[j / Vectors][j % Vectors]);
}

// out[h] = sum over n < N of q[h][n] * scale[row] * w[row], head h of `Tokens` tokens, which stand ldx and ldo floats
// apart.
template <int Tokens>
inline void absorb_query_head(const float* x, int64_t ldx, const int8_t* rows, const float* scale, int64_t n, int64_t r,
                              int64_t gap, float* out, int64_t ldo) {
    constexpr int kVectors = kSums / Tokens, kColumns = kVectors * 16;
    const int64_t whole = r / 16 * 16;
    for (int64_t first = 0; first == 0 || first < n; first += kRowsAtOnce) {
        const int64_t last = first + kRowsAtOnce < n ? first + kRowsAtOnce : n;
        int64_t column = 0;
        for (; column + kColumns <= r; column += kColumns)
            absorb_columns<Tokens, kVectors>(x, ldx, rows, scale, first, last, n, r, gap, column, out, ldo);
        for (; column < whole; column += 16)
            absorb_columns<Tokens, 1>(x, ldx, rows, scale, first, last, n, r, gap, column, out, ldo);
    }
    for (int token = 0; token < Tokens; token++)
        for (int64_t c = whole; c < r; c++) {
            // rounded as the vectors above, so that a column does not depend on how many tokens there
            // are
            F sum = Lanes::zero();
            alignas(64) int8_t bytes[16] = {};
            alignas(64) float lanes[16];
            for (int64_t i = 0; i < n; i++) {
                bytes[0] = rows[i * r + c];
                sum = Lanes::fma(Lanes::broadcast(x[token * ldx + i] * scale[i]), Lanes::load_int8(bytes), sum);
            }
            Lanes::store(lanes, sum);
            out[token * ldo + c] = lanes[0];
        }
}

// out[v] = scale[v] * (latent . w[v]), one head's value rows for `Tokens` tokens, which stand ldx and ldo floats apart.
template <int Tokens>
inline void absorb_value_head(const float* x, int64_t ldx, const int8_t* rows, const float* scale, int64_t values,
                              int64_t r, int64_t gap, float* out, int64_t ldo) {
    const int64_t whole = r / 64 * 64;
    for (int64_t first = 0; first < values; first += 16) {  // 16 rows, whose lanes are summed together
        const int64_t count = values - first < 16 ? values - first : 16;
        F parts[Tokens][16];
        alignas(64) float totals[16];
        for (int64_t v = 0; v < 16; v++) {
            const int64_t row = first + (v < count ? v : 0);
            const int8_t *p = rows + row * r, *later = ahead(p, row, values, r, gap);
            F sums[Tokens][4];
#pragma GCC unroll 16
            for (int i = 0; i < 4 * Tokens; i++) sums[i / 4][i % 4] = Lanes::zero();
            for (int64_t j = 0; j < whole; j += 64) {
                Lanes::prefetch_to_l2(later + j);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    const F w = Lanes::load_int8(p + j + 16 * i);
#pragma GCC unroll 4
                    for (int token = 0; token < Tokens; token++)
                        sums[token][i] = Lanes::fma(Lanes::load(x + token * ldx + j + 16 * i), w, sums[token][i]);
                }
            }
#pragma GCC unroll 4
            for (int token = 0; token < Tokens; token++)
                parts[token][v] =
                    Lanes::add(Lanes::add(sums[token][0], sums[token][1]), Lanes::add(sums[token][2], sums[token][3]));
        }
        for (int token = 0; token < Tokens; token++) {
            Lanes::sum_lanes(parts[token], totals);
            for (int64_t v = 0; v < count; v++) {
                float total = totals[v];
                for (int64_t j = whole; j < r; j++) total += x[token * ldx + j] * float(rows[(first + v) * r + j]);
                out[token * ldo + first + v] = total * scale[first + v];
            }
        }
    }
}

template <int N>
struct Count {
    static constexpr int value = N;
};

// Tokens share the conversion of a weight, four or two at a time; each one's arithmetic is that of a token alone.
template <class Run>
inline void by_tokens(int64_t t, Run run) {
    int64_t token = 0;
    for (; token + 4 <= t; token += 4) run(Count<4>(), token);
    for (; token + 2 <= t; token += 2) run(Count<2>(), token);
    for (; token < t; token++) run(Count<1>(), token);
}

void absorb_query(const float* q, int64_t ldq, int64_t t, int64_t heads, const int8_t* w, const float* scale, int64_t n,
                  int64_t per_head, int64_t r, int64_t begin, int64_t end, float* out, int64_t ldo) {
    for (int64_t h = begin; h < end; h++)
        by_tokens(t, [&](auto count, int64_t token) {
            const int64_t at = token * heads + h, row = h * per_head;
            absorb_query_head<decltype(count)::value>(q + at * ldq, heads * ldq, w + row * r, scale + row, n, r,
                                                      (per_head - n) * r, out + at * ldo, heads * ldo);
        });
}

void absorb_value(const float* latent, int64_t t, int64_t heads, const int8_t* w, const float* scale, int64_t n,
                  int64_t per_head, int64_t r, int64_t begin, int64_t end, float* out) {
    const int64_t values = per_head - n;
    for (int64_t h = begin; h < end; h++)
        by_tokens(t, [&](auto count, int64_t token) {
            const int64_t at = token * heads + h, row = h * per_head + n;
            absorb_value_head<decltype(count)::value>(latent + at * r, heads * r, w + row * r, scale + row, values, r,
                                                      n * r, out + at * values, heads * values);
        });
}

}  // namespace
}  // namespace slotmoe
