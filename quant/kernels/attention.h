// MLA decode: one query per head against the latent cache, which all heads share.
//
// Plain fp32 would be bound by multiply-adds, not by the cache, so both products run on 16-bit integers: a cache row is
// 14 bits (sign included) of its largest value, a query about as much, probabilities 12 bits of the chunk's largest. That
// is about as exact as the fp16 cache itself. Softmax is fp32. The context is cut into chunks of 64 rows, and chunks
// into spans by the context's length alone, so that the result does not depend on the threads.
//
// Latent and rope columns have scales of their own: either may be much larger than the other.
//
// Shapes: q [heads, R + P]; cache [context, stride]; out [heads, R]; Rp = R padded to 64; Kp = Rp + P padded to 32.
namespace slotmoe {
namespace {

constexpr int kRowMax = 8191;    // 13 bits and a sign
constexpr int kProbMax = 4095;   // 12 bits: 64 rows x 4095 x 8191 < 2^31
constexpr int kGroupRows = 16;
constexpr uint32_t kNaN = 0x7fc00000;
constexpr float kNoScore = -3.4e38f;
constexpr int kHalfInfinity = 0x7c00;
constexpr int kStepColumns = 32;
constexpr int kMaxColumns = 1024;  // that one int32 sum takes; longer rows are summed in pieces

struct Chunk {
    int16_t* rows;       // [16, Kp], the group of rows being scored: it stays in L1
    int32_t* pairs;      // [32, Rp]: columns of rows 2i (low half) and 2i + 1
    float* row_scale;    // [64] of latent columns, 0 past the end
    float* score_scale;  // [64] what a score is in units of: row_scale, or the rope columns' scale where the latent is 0
    float* row_ratio;    // [64] rope columns' scale / score_scale
    float* scores;       // [heads, 64] of the latent columns, then of all
    float* rope_scores;  // [heads, 64]
    int16_t* probs;      // [heads, 64] as integers; two neighbours are the pair of rows that `pairs` holds
    float* prob_scale;   // [heads]
    float* correction;   // [heads]
    int32_t* unused;     // [16] where pairs of rope columns go
};

// A cache row of n floats, as LatentCache.write stores it.
void store_latent(const float* row, int64_t n, uint16_t* out) {
    for (int64_t i = 0; i < n; i += 16) {
        const int64_t left = n - i < 16 ? n - i : 16;
        alignas(64) float v[16] = {};
        alignas(64) uint16_t half[16];
        for (int64_t j = 0; j < left; j++) v[j] = row[i + j] < -65504.0f ? -65504.0f : row[i + j] > 65504.0f ? 65504.0f : row[i + j];
        Lanes::store_half(half, Lanes::load(v));
        memcpy(out + i, half, size_t(left) * 2);
    }
}

size_t mla_layout(const Mla& m, uint8_t* base, Chunk& c) {
    size_t used = 0;
    const auto take = [&](int64_t bytes) {
        uint8_t* p = base + used;
        used += (size_t(bytes) + 63) / 64 * 64;
        return p;
    };
    c.rows = reinterpret_cast<int16_t*>(take(kGroupRows * m.k_padded * 2));
    c.pairs = reinterpret_cast<int32_t*>(take(kChunkRows / 2 * m.r_padded * 4));
    c.row_scale = reinterpret_cast<float*>(take(kChunkRows * 4));
    c.score_scale = reinterpret_cast<float*>(take(kChunkRows * 4));
    c.row_ratio = reinterpret_cast<float*>(take(kChunkRows * 4));
    c.scores = reinterpret_cast<float*>(take(m.heads * kChunkRows * 4));
    c.rope_scores = reinterpret_cast<float*>(take(m.heads * kChunkRows * 4));
    c.probs = reinterpret_cast<int16_t*>(take(kChunkRows * m.heads * 2));
    c.prob_scale = reinterpret_cast<float*>(take(m.heads * 4));
    c.correction = reinterpret_cast<float*>(take(m.heads * 4));
    c.unused = reinterpret_cast<int32_t*>(take(64));
    return used;
}

alignas(64) uint8_t no_bytes[64];

size_t mla_scratch(const Mla& m) {
    Chunk c;
    return mla_layout(m, no_bytes, c);
}

// Two parts' scales -> the scale of their common score and the second's ratio to it.
inline void join_scales(float first, float second, float& scale, float& ratio) {
    scale = first > 0.0f ? first : second;
    ratio = scale > 0.0f ? second / scale : 0.0f;
    if (first != first || second != second) scale = bits_float(kNaN);
}

// n values -> integers up to q_max; returns their scale.
inline float quantize_query(const float* q, int64_t n, int q_max, int16_t* out) {
    const uint32_t top = max_bits(q, n);
    if (top >= kInfinityBits) return bits_float(kNaN);
    if (bits_float(top) < 1e-30f) return 0.0f;  // times a cache of fp16 it is no score
    const float inverse = float(q_max) / bits_float(top);
    for (int64_t i = 0; i < n; i++) out[i] = int16_t(int32_t(round_even(q[i] * inverse)));
    return bits_float(top) / float(q_max);
}

void mla_queries(Mla& m, int64_t begin, int64_t end) {
    memset(m.q_int + begin * m.k_padded, 0, size_t((end - begin) * m.k_padded) * 2);
    for (int64_t h = begin; h < end; h++) {
        const float* q = m.q + h * (m.r + m.p);
        int16_t* out = m.q_int + h * m.k_padded;
        const float latent = quantize_query(q, m.r, m.q_max, out), rope = quantize_query(q + m.r, m.p, m.q_max, out + m.r_padded);
        join_scales(latent, rope, m.q_scale[h], m.q_ratio[h]);
    }
}

// One part of a row: its scale, and what its values are multiplied by.
inline float part_inverse(const uint16_t* in, int64_t n, float& scale) {
    uint16_t top = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint16_t bits = in[i] & 0x7fff;
        top = bits > top ? bits : top;
    }
    if (top == 0 || top >= kHalfInfinity) {
        scale = top ? bits_float(kNaN) : 0.0f;
        return 0.0f;
    }
    const float largest = top < 0x400 ? float(top) * 0x1p-24f : bits_float((uint32_t(top) << 13) + (112u << 23));
    scale = largest / float(kRowMax);
    return float(kRowMax) / largest;
}

// 16 columns of two rows, as integers.
inline void convert(const uint16_t* a, const uint16_t* b, Lanes::F inverse_a, Lanes::F inverse_b, int16_t* out_a, int16_t* out_b,
                    int32_t* pair) {
    const Lanes::I low = Lanes::to_int(Lanes::mul(Lanes::load_half(a), inverse_a));
    const Lanes::I high = Lanes::to_int(Lanes::mul(Lanes::load_half(b), inverse_b));
    Lanes::store_rows(out_a, out_b, low, high);
    Lanes::store_pairs(pair, low, high);
}

// n columns of two rows; `pair` moves on by Step columns for each, and 0 throws the pairs away.
template <int Step>
inline void convert_part(const uint16_t* a, const uint16_t* b, int64_t n, float scale_a, float scale_b, int16_t* out_a, int16_t* out_b,
                         int32_t* pair) {
    const auto inverse_a = Lanes::broadcast(scale_a), inverse_b = Lanes::broadcast(scale_b);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) convert(a + i, b + i, inverse_a, inverse_b, out_a + i, out_b + i, pair + i * Step);
    if (i == n) return;
    alignas(64) uint16_t tail_a[16] = {}, tail_b[16] = {};
    memcpy(tail_a, a + i, size_t(n - i) * 2), memcpy(tail_b, b + i, size_t(n - i) * 2);
    convert(tail_a, tail_b, inverse_a, inverse_b, out_a + i, out_b + i, pair + i * Step);
}

// n <= 16 cache rows from `first` -> c.rows, and from row `group` of the chunk c.pairs and the scales.
void load_rows(const Mla& m, int64_t first, int64_t n, int64_t group, const Chunk& c) {
    if (m.k_padded > m.r + m.p || n < kGroupRows) memset(c.rows, 0, size_t(kGroupRows * m.k_padded) * 2);
    for (int64_t r = 0; r < n; r += 2) {
        const uint16_t* in[2] = {m.cache + (first + r) * m.stride, m.cache + (first + r + 1) * m.stride};
        float latent[2] = {}, rope[2] = {};  // inverses
        if (r + 1 == n) in[1] = in[0];       // times 0
        for (int64_t i = 0; i < 2 && r + i < n; i++) {
            const int64_t row = group + r + i;
            float rope_scale = 0.0f;
            latent[i] = part_inverse(in[i], m.r, c.row_scale[row]);
            rope[i] = part_inverse(in[i] + m.r, m.p, rope_scale);
            join_scales(c.row_scale[row], rope_scale, c.score_scale[row], c.row_ratio[row]);
        }
        int16_t *a = c.rows + r * m.k_padded, *b = a + m.k_padded;
        int32_t* pair = c.pairs + (group + r) / 2 * m.r_padded;
        if (m.r_padded > m.r) memset(pair, 0, size_t(m.r_padded) * 4);
        convert_part<1>(in[0], in[1], m.r, latent[0], latent[1], a, b, pair);
        convert_part<0>(in[0] + m.r, in[1] + m.r, m.p, rope[0], rope[1], a + m.r_padded, b + m.r_padded, c.unused);
    }
}

// Columns begin..end of the products of H queries and R = 16 / H rows: sums[i * R + j] for query i and row j.
template <int H>
SLOTMOE_NOINLINE void dot_block(const int16_t* q, const int16_t* rows, int64_t stride, int64_t begin, int64_t end, float* sums) {
    constexpr int R = 16 / H;
    Lanes::I dots[16];
    Lanes::F floats[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) dots[i] = Lanes::izero();
    for (int64_t c = begin; c < end; c += kStepColumns) {
#pragma GCC unroll 16
        for (int j = 0; j < R; j++) {
            const auto row = Lanes::load16(rows + j * stride + c);
#pragma GCC unroll 4
            for (int i = 0; i < H; i++) dots[i * R + j] = Lanes::dot16(dots[i * R + j], row, Lanes::load16(q + i * stride + c));
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) floats[i] = Lanes::to_float(dots[i]);
    Lanes::sum_lanes(floats, sums);
}

// Both parts' scores of H heads by 16 / H rows, in units of the query's and the row's scales.
template <int H>
void score_block(const Mla& m, int64_t h, int64_t r, const Chunk& c, int64_t group) {
    constexpr int R = 16 / H;
    const int16_t *q = m.q_int + h * m.k_padded, *rows = c.rows + r * m.k_padded;
    alignas(64) float sums[16];
    for (int64_t begin = 0, end; begin < m.k_padded; begin = end) {
        const bool latent = begin < m.r_padded;
        const int64_t part = latent ? m.r_padded : m.k_padded;
        end = begin + kMaxColumns < part ? begin + kMaxColumns : part;
        dot_block<H>(q, rows, m.k_padded, begin, end, sums);
        float* out = (latent ? c.scores : c.rope_scores) + h * kChunkRows + group + r;
        for (int i = 0; i < H; i++, out += kChunkRows)
            if (begin == 0 || begin == m.r_padded)
                memcpy(out, sums + i * R, R * sizeof(float));
            else
                for (int j = 0; j < R; j++) out[j] += sums[i * R + j];
    }
}

// scores -> probabilities relative to the running maximum, as integers; updates the running maximum and sum.
inline void softmax_head(const Mla& m, int64_t h, int64_t n, bool first, const Chunk& c, float& running_max, float& running_sum) {
    float* s = c.scores + h * kChunkRows;
    const float scale = m.q_scale[h] * m.scale, ratio = m.q_ratio[h];
    float tops[16], sums[16] = {}, largests[16] = {}, weighted[kChunkRows];
    const float* rope = c.rope_scores + h * kChunkRows;
    if (m.p > 0)
        for (int i = 0; i < kChunkRows; i++) s[i] += rope[i] * (ratio * c.row_ratio[i]);
    for (int i = 0; i < kChunkRows; i++) s[i] = i < n ? s[i] * scale * c.score_scale[i] : kNoScore;
    for (int j = 0; j < 16; j++) tops[j] = kNoScore;
    for (int i = 0; i < kChunkRows; i += 16)
        for (int j = 0; j < 16; j++) tops[j] = s[i + j] > tops[j] ? s[i + j] : tops[j];
    float top = first ? kNoScore : running_max, sum = 0.0f, largest = 0.0f;
    for (int j = 0; j < 16; j++) top = tops[j] > top ? tops[j] : top;
    for (int i = 0; i < kChunkRows; i += 16)
        for (int j = 0; j < 16; j++) {
            const float p = exp_float(s[i + j] - top), w = p * c.row_scale[i + j];
            sums[j] += p;
            weighted[i + j] = w;
            largests[j] = w > largests[j] ? w : largests[j];
        }
    for (int j = 0; j < 16; j++) {
        sum += sums[j];
        largest = largests[j] > largest ? largests[j] : largest;
    }
    c.correction[h] = first ? 0.0f : exp_float(running_max - top);
    running_sum = first ? sum : running_sum * c.correction[h] + sum;
    running_max = top;
    c.prob_scale[h] = largest / float(kProbMax);
    const float inverse = largest > 1e-30f ? float(kProbMax) / largest : 0.0f;
    int16_t* probs = c.probs + h * kChunkRows;
    for (int i = 0; i < kChunkRows; i++) {
        const float p = weighted[i] * inverse;
        probs[i] = int16_t(int32_t(round_even(p > 0.0f ? p : 0.0f)));  // NaN too: it is in the sum already
    }
}

// out [H heads, 64 columns] = out * correction + probabilities x rows.
template <int H>
SLOTMOE_NOINLINE void value_block(const Mla& m, int64_t h, int64_t column, int64_t n, const Chunk& c, float* out) {
    Lanes::I dots[H][4];
#pragma GCC unroll 4
    for (int i = 0; i < H; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) dots[i][j] = Lanes::izero();
    for (int64_t pair = 0; pair < (n + 1) / 2; pair++) {
        const int16_t* rows = reinterpret_cast<const int16_t*>(c.pairs + pair * m.r_padded + column);
        const int16_t* probs = c.probs + h * kChunkRows + 2 * pair;
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const auto v = Lanes::load16(rows + 32 * j);
#pragma GCC unroll 4
            for (int i = 0; i < H; i++) dots[i][j] = Lanes::dot16(dots[i][j], v, probs + i * kChunkRows);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < H; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            float* o = out + (h + i) * m.r_padded + column + 16 * j;
            const auto kept = Lanes::mul(Lanes::load(o), Lanes::broadcast(c.correction[h + i]));
            Lanes::store(o, Lanes::fma(Lanes::to_float(dots[i][j]), Lanes::broadcast(c.prob_scale[h + i]), kept));
        }
}

void mla_spans(const Mla& m, int64_t begin, int64_t end, uint8_t* scratch) {
    Chunk c;
    mla_layout(m, scratch, c);
    const int64_t four = m.heads / 4 * 4;
    for (int64_t span = begin; span < end; span++) {
        float *maxima = m.span_max + span * m.heads, *sums = m.span_sum + span * m.heads;
        float* out = m.span_out + span * m.heads * m.r_padded;
        memset(out, 0, size_t(m.heads * m.r_padded) * 4);
        const int64_t start = span * m.span_chunks * kChunkRows, limit = start + m.span_chunks * kChunkRows;
        const int64_t stop = limit < m.context ? limit : m.context;
        for (int64_t first = start; first < stop; first += kChunkRows) {
            const int64_t n = stop - first < kChunkRows ? stop - first : kChunkRows;
            memset(c.row_scale, 0, kChunkRows * sizeof(float));
            memset(c.score_scale, 0, kChunkRows * sizeof(float));
            memset(c.row_ratio, 0, kChunkRows * sizeof(float));
            for (int64_t group = 0; group < n; group += kGroupRows) {
                load_rows(m, first + group, n - group < kGroupRows ? n - group : kGroupRows, group, c);
                for (int64_t h = 0; h < four; h += 4)
                    for (int64_t r = 0; r < kGroupRows; r += 4) score_block<4>(m, h, r, c, group);
                for (int64_t h = four; h < m.heads; h++) score_block<1>(m, h, 0, c, group);
            }
            for (int64_t h = 0; h < m.heads; h++) softmax_head(m, h, n, first == start, c, maxima[h], sums[h]);
            const int64_t next_rows = stop - first - n < kChunkRows ? stop - first - n : kChunkRows;
            const uint8_t* next = reinterpret_cast<const uint8_t*>(m.cache + (first + n) * m.stride);
            const int64_t next_bytes = next_rows * m.stride * 2, slice = next_bytes * 64 * 4 / (m.r_padded * m.heads) + 64;
            int64_t fetched = 0;
            for (int64_t h = 0; h < four; h += 4)
                for (int64_t column = 0; column < m.r_padded; column += 64) {
                    for (int64_t until = fetched + slice; fetched < until && fetched < next_bytes; fetched += 64) Lanes::prefetch_far(next + fetched);
                    value_block<4>(m, h, column, n, c, out);
                }
            for (int64_t h = four; h < m.heads; h++)
                for (int64_t column = 0; column < m.r_padded; column += 64) value_block<1>(m, h, column, n, c, out);
        }
    }
}

void mla_merge(const Mla& m, int64_t begin, int64_t end, float* out) {
    const int64_t chunks = (m.context + kChunkRows - 1) / kChunkRows, spans = (chunks + m.span_chunks - 1) / m.span_chunks;
    for (int64_t h = begin; h < end; h++) {
        float top = m.span_max[h], sum = 0.0f;
        for (int64_t s = 1; s < spans; s++) top = m.span_max[s * m.heads + h] > top ? m.span_max[s * m.heads + h] : top;
        for (int64_t s = 0; s < spans; s++) sum += m.span_sum[s * m.heads + h] * exp_float(m.span_max[s * m.heads + h] - top);
        float* y = out + h * m.r;
        for (int64_t i = 0; i < m.r; i++) y[i] = 0.0f;
        for (int64_t s = 0; s < spans; s++) {
            const float weight = exp_float(m.span_max[s * m.heads + h] - top) / sum;
            const float* in = m.span_out + (s * m.heads + h) * m.r_padded;
            for (int64_t i = 0; i < m.r; i++) y[i] += weight * in[i];
        }
    }
}

}  // namespace
}  // namespace slotmoe
