// MLA decode: one query per head against the latent cache, which all heads share.
//
// A cache row is kept as what is multiplied: 8-bit integers, with one scale for the latent columns and one for the rope
// columns, since either may be much larger. Before it is rounded each part is mixed: random signs, then a Walsh-Hadamard
// transform (arXiv 2404.00456). That is orthogonal, so queries that are mixed too give the same scores, and the weighted
// sum of rows is mixed back at the end; it spreads outliers over the part, so that one scale serves any row as well as a
// Gaussian one. Queries have 14 bits, as two unsigned 7-bit digits, so that both products are of bytes (AVX2's sum of two
// products fits 16 bits). A row's weight is a byte relative to the second largest of a chunk of 64
// rows; the largest, beside which the others may be small and many, is multiplied in fp32. Softmax is fp32.
//
// Chunks are grouped into spans by the context's length alone, so that the result does not depend on the threads.
//
// Shapes: q [heads, R + P]; out [heads, R]; R4, P4 = R, P padded to 4; K = R4 + P4; Rp = R padded to 64; heads come in tiles
// of 16, one lane each, Hp of them. A cache row is int8 [R4], int8 [P4], float [2] scales, int32 [2] sums of the integers.
namespace slotmoe {
namespace {

constexpr int kQuads = kChunkRows / 4;  // four rows of one column are neighbours when rows are summed
constexpr int kSumColumns = 64;            // that are summed together
constexpr uint32_t kNaN = 0x7fc00000;
constexpr float kNoScore = -3.4e38f;
constexpr int kDigit = 128, kQueryZero = kDigit / 2 * kDigit, kQueryMax = kQueryZero - 1;  // q + kQueryZero = kDigit * high + low

struct Chunk {
    int8_t* quads;      // [16, 64, 4]: the columns being summed
    float* scores;      // [tiles, 64, 16]: scores, then probabilities relative to the largest, times the row's scale
    int32_t* weights;   // [tiles, 16, 16]: four rows' bytes
    float* step;        // [Hp]: what 1 is worth in a byte
    float* top;         // [Hp]: the largest weight, whose byte is 0
    float* top_row;     // [Hp]: its row
    float* correction;  // [Hp]: of what the chunks before have summed
};

// --- mixing

struct Signs {  // of the Walsh-Hadamard transform of 16 values
    float at[16][16];
    constexpr Signs() : at() {
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 16; j++) {
                const int common = i & j;
                at[i][j] = (common ^ common >> 1 ^ common >> 2 ^ common >> 3) & 1 ? -1.0f : 1.0f;
            }
    }
};
alignas(64) constexpr Signs kSigns;

// x [n] -> its Walsh-Hadamard transform over sqrt(n), its own inverse; n is a power of two.
void walsh(float* x, int64_t n) {
    const float norm = 1.0f / __builtin_sqrtf(float(n));
    if (n < 16) {
        for (int64_t half = 1; half < n; half *= 2)
            for (int64_t i = 0; i < n; i++)
                if (!(i & half)) {
                    const float a = x[i], b = x[i + half];
                    x[i] = a + b, x[i + half] = a - b;
                }
        for (int64_t i = 0; i < n; i++) x[i] *= norm;
        return;
    }
    const auto minus = Lanes::broadcast(-1.0f), scale = Lanes::broadcast(norm);
    for (int64_t half = 16; half < n; half *= 2)
        for (int64_t i = 0; i < n; i += 2 * half)
            for (int64_t j = i; j < i + half; j += 16) {
                const auto a = Lanes::load(x + j), b = Lanes::load(x + j + half);
                Lanes::store(x + j, Lanes::add(a, b));
                Lanes::store(x + j + half, Lanes::fma(b, minus, a));
            }
    for (int64_t i = 0; i < n; i += 16) {
        auto sum = Lanes::zero();
        for (int j = 0; j < 16; j++) sum = Lanes::fma(Lanes::broadcast(x[i + j]), Lanes::load(kSigns.at[j]), sum);
        Lanes::store(x + i, Lanes::mul(sum, scale));
    }
}

// The largest powers of two that make up n, each by itself.
void walsh_parts(float* x, int64_t n) {
    int64_t part = 1;
    while (part * 2 <= n) part *= 2;
    for (; n > 0; part /= 2)
        if (part <= n) walsh(x, part), x += part, n -= part;
}

void flip_signs(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = bits_float(float_bits(x[i]) ^ (uint32_t(i) * 0x9e3779b9u & 0x80000000u));
}

void mix(float* x, int64_t n) { flip_signs(x, n), walsh_parts(x, n); }
void unmix(float* x, int64_t n) { walsh_parts(x, n), flip_signs(x, n); }

// What the values of a part are multiplied by to become integers up to `most`; x is cleared where that is nothing.
float part_inverse(float* x, int64_t n, int most, float& scale) {
    const uint32_t top = max_bits(x, n);
    scale = top < kInfinityBits ? bits_float(top) / float(most) : bits_float(kNaN);
    if (top < kInfinityBits && bits_float(top) > 1e-30f) return float(most) / bits_float(top);
    if (top < kInfinityBits) scale = 0.0f;  // the inverse is beyond a float
    memset(x, 0, size_t(n) * 4);
    return 0.0f;
}

// --- rows and queries as they are multiplied

// What a row holds besides its integers.
struct Tail {
    float scale[2];  // of the latent and of the rope columns
    int32_t sum[2];
};

inline Tail tail_of(const Mla& m, const uint8_t* row) {
    Tail tail;
    memcpy(&tail, row + m.k, sizeof tail);
    return tail;
}

inline int32_t round_to(const float* x, int64_t n, float inverse, int8_t* out) {
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) {
        const int32_t q = int32_t(round_even(x[i] * inverse));
        out[i] = int8_t(q), sum += q;
    }
    return sum;
}

// row [R + P], which is overwritten -> out [latent_bytes].
void store_latent(float* row, int64_t r, int64_t p, uint8_t* out) {
    const int64_t r4 = (r + 3) / 4 * 4, k = r4 + (p + 3) / 4 * 4;
    int8_t* q = reinterpret_cast<int8_t*>(out);
    Tail tail;
    mix(row, r), mix(row + r, p);
    const float latent = part_inverse(row, r, 127, tail.scale[0]), rope = part_inverse(row + r, p, 127, tail.scale[1]);
    memset(q, 0, size_t(k));
    tail.sum[0] = round_to(row, r, latent, q), tail.sum[1] = round_to(row + r, p, rope, q + r4);
    memcpy(out + k, &tail, sizeof tail);
}

// A part of one head -> its lane of the tile.
float store_query(float* q, int64_t n, uint8_t* out) {
    float scale;
    mix(q, n);
    const float inverse = part_inverse(q, n, kQueryMax, scale);
    for (int64_t i = 0; i < n; i++) {
        const int32_t digits = int32_t(round_even(q[i] * inverse)) + kQueryZero;
        uint8_t* to = out + i / 4 * 8 * kTile + i % 4;
        to[0] = uint8_t(digits / kDigit), to[4 * kTile] = uint8_t(digits % kDigit);
    }
    return scale;
}

// Heads begin..end: q -> q_digits, q_scale; whoever has the last also clears the lanes that no head has.
void mla_queries(Mla& m, int64_t begin, int64_t end) {
    const int64_t padded = m.tiles * kTile;
    for (int64_t h = begin; h < (end == m.heads ? padded : end); h++) {
        uint8_t* out = m.q_digits + h / kTile * m.k * 2 * kTile + h % kTile * 4;
        for (int64_t i = 0; i < 2 * m.k; i += 4) memset(out + i * kTile, 0, 4);
        m.q_scale[h] = m.q_scale[padded + h] = 0.0f;
        if (h >= m.heads) continue;
        float* q = m.q_mixed + h * (m.r + m.p);
        memcpy(q, m.q + h * (m.r + m.p), size_t(m.r + m.p) * 4);
        m.q_scale[h] = m.scale * store_query(q, m.r, out);
        m.q_scale[padded + h] = m.scale * store_query(q + m.r, m.p, out + m.r4 * 2 * kTile);
    }
}

size_t mla_layout(const Mla& m, uint8_t* base, Chunk& c) {
    size_t used = 0;
    const auto take = [&](int64_t bytes) {
        uint8_t* p = base ? base + used : nullptr;
        used += (size_t(bytes) + 63) / 64 * 64;
        return p;
    };
    const int64_t padded = m.tiles * kTile;
    c.quads = reinterpret_cast<int8_t*>(take(kChunkRows * kSumColumns));
    c.scores = reinterpret_cast<float*>(take(padded * kChunkRows * 4));
    c.weights = reinterpret_cast<int32_t*>(take(padded * kQuads * 4));
    c.step = reinterpret_cast<float*>(take(padded * 4));
    c.top = reinterpret_cast<float*>(take(padded * 4));
    c.top_row = reinterpret_cast<float*>(take(padded * 4));
    c.correction = reinterpret_cast<float*>(take(padded * 4));
    return used;
}

size_t mla_scratch(const Mla& m) {
    Chunk c;
    return mla_layout(m, nullptr, c);
}

// --- scores

// Columns begin..end of 16 heads by kScoreRows rows, each by both digits; a row is broadcast, four columns at a time.
inline void dot_rows(const uint8_t* q, const int8_t* const* rows, int64_t begin, int64_t end, Lanes::I (*dots)[2]) {
    for (int64_t c = begin; c < end; c += 4) {
        const auto high = Lanes::load_bytes(q + 2 * c * kTile), low = Lanes::load_bytes(q + (2 * c + 4) * kTile);
#pragma GCC unroll 16
        for (int j = 0; j < Lanes::kScoreRows; j++) {
            const auto row = Lanes::broadcast_bytes(rows[j] + c);
            dots[j][0] = Lanes::dot_bytes(dots[j][0], high, row);
            dots[j][1] = Lanes::dot_bytes(dots[j][1], low, row);
        }
    }
}

// One part, 0 latent or 1 rope, of one tile of heads by kScoreRows rows, added to `scores` [kScoreRows, 16].
SLOTMOE_NOINLINE void score_part(const Mla& m, int64_t tile, int part, const int8_t* const* rows, const Tail* tails, float* scores) {
    const auto scale = Lanes::load(m.q_scale + (part * m.tiles + tile) * kTile), digit = Lanes::broadcast(float(kDigit));
    Lanes::I dots[Lanes::kScoreRows][2];
#pragma GCC unroll 16
    for (int j = 0; j < Lanes::kScoreRows; j++)
        dots[j][0] = Lanes::start(-kQueryZero / kDigit * tails[j].sum[part]), dots[j][1] = Lanes::start(0);
    dot_rows(m.q_digits + tile * m.k * 2 * kTile, rows, part ? m.r4 : 0, part ? m.k : m.r4, dots);
#pragma GCC unroll 16
    for (int j = 0; j < Lanes::kScoreRows; j++) {
        const auto sum = Lanes::fma(Lanes::to_float(dots[j][0]), digit, Lanes::to_float(dots[j][1]));
        const auto before = part ? Lanes::load(scores + j * kTile) : Lanes::zero();
        Lanes::store(scores + j * kTile, Lanes::fma(sum, Lanes::mul(Lanes::broadcast(tails[j].scale[part]), scale), before));
    }
}

// The scores of n rows, for all heads; those past n are not read.
void score_chunk(const Mla& m, const uint8_t* rows, int64_t n, const Chunk& c) {
    for (int64_t first = 0; first < n; first += Lanes::kScoreRows) {
        const int8_t* row[Lanes::kScoreRows];
        Tail tails[Lanes::kScoreRows];
        for (int64_t j = 0; j < Lanes::kScoreRows; j++) {
            const uint8_t* bytes = rows + (first + j < n ? first + j : n - 1) * m.stride;
            row[j] = reinterpret_cast<const int8_t*>(bytes), tails[j] = tail_of(m, bytes);
        }
        for (int64_t tile = 0; tile < m.tiles; tile++) {
            float* scores = c.scores + (tile * kChunkRows + first) * kTile;
            score_part(m, tile, 0, row, tails, scores);
            if (m.p > 0) score_part(m, tile, 1, row, tails, scores);
        }
    }
}

// --- softmax, the heads of a tile side by side

// Four rows' weights -> their bytes. What is above `second` is the largest, and no byte; NaN is none either.
inline void weight_bytes(const float (*w)[kTile], const float* second, const float* inverse, int32_t* bytes) {
    const auto byte = [&](int row, int h) {
        const float v = w[row][h] <= second[h] ? w[row][h] * inverse[h] : 0.0f;
        return int32_t(round_even(v));
    };
    for (int h = 0; h < kTile; h++) bytes[h] = byte(0, h) | byte(1, h) << 8 | byte(2, h) << 16 | byte(3, h) << 24;
}

// Scores of n rows -> weights and what goes with them; updates the running maxima and sums.
SLOTMOE_NOINLINE void softmax_tile(const Mla& m, int64_t tile, const uint8_t* rows, int64_t n, bool first, const Chunk& c, float* maxima,
                                   float* sums) {
    float (*s)[kTile] = reinterpret_cast<float (*)[kTile]>(c.scores + tile * kChunkRows * kTile);
    const int64_t lane = tile * kTile;
    auto largest = first ? Lanes::broadcast(kNoScore) : Lanes::load(maxima + lane);
    for (int64_t i = 0; i < n; i++) largest = Lanes::max(Lanes::load(s[i]), largest);
    alignas(64) float maximum[kTile], second[kTile], inverse[kTile];
    Lanes::store(maximum, largest);
    for (int64_t i = 0; i < n; i++)
        for (int h = 0; h < kTile; h++) s[i][h] = exp_float(s[i][h] - maximum[h]);
    auto sum = Lanes::zero(), top = Lanes::zero(), next = Lanes::zero(), top_row = Lanes::zero();
    for (int64_t i = 0; i < n; i++) {
        const auto p = Lanes::load(s[i]), w = Lanes::mul(p, Lanes::broadcast(tail_of(m, rows + i * m.stride).scale[0]));
        sum = Lanes::add(sum, p);
        next = Lanes::max(Lanes::min(w, top), next);
        top_row = Lanes::where_greater(w, top, Lanes::broadcast(float(i)), top_row);
        top = Lanes::max(w, top);
        Lanes::store(s[i], w);
    }
    for (int64_t i = n; i % 4; i++) Lanes::store(s[i], Lanes::zero());
    for (int h = 0; h < kTile; h++) c.correction[lane + h] = first ? 0.0f : exp_float(maxima[lane + h] - maximum[h]);
    Lanes::store(sums + lane, first ? sum : Lanes::fma(Lanes::load(sums + lane), Lanes::load(c.correction + lane), sum));
    Lanes::store(maxima + lane, largest), Lanes::store(c.top_row + lane, top_row), Lanes::store(second, next);
    Lanes::store(c.top + lane, Lanes::where_greater(top, next, top, Lanes::zero()));  // two that are equal are bytes
    for (int h = 0; h < kTile; h++) {
        c.step[lane + h] = second[h] / float(Lanes::kMostWeight);
        inverse[h] = second[h] > 1e-30f ? float(Lanes::kMostWeight) / second[h] : 0.0f;
    }
    for (int64_t i = 0; i < n; i += 4) weight_bytes(s + i, second, inverse, c.weights + (tile * kQuads + i / 4) * kTile);
}

// --- sums of rows

// Columns column..column + 64 of n rows -> quads, zeros past R4. Rows past n repeat the last, whose weights are 0 there.
inline void load_quads(const Mla& m, const uint8_t* rows, int64_t n, int64_t column, int8_t* quads) {
    const int64_t columns = m.r4 - column < kSumColumns ? m.r4 - column : kSumColumns;
    int8_t tail[4][kSumColumns];
    if (columns < kSumColumns) memset(tail, 0, sizeof tail);
    for (int64_t quad = 0; quad < (n + 3) / 4; quad++) {
        const int8_t* in[4];
        for (int j = 0; j < 4; j++) {
            const int64_t row = quad * 4 + j < n ? quad * 4 + j : n - 1;
            in[j] = reinterpret_cast<const int8_t*>(rows + row * m.stride) + column;
            if (columns < kSumColumns) in[j] = static_cast<int8_t*>(memcpy(tail[j], in[j], size_t(columns)));
        }
        Lanes::interleave(in[0], in[1], in[2], in[3], quads + quad * 4 * kSumColumns);
    }
}

// out [H heads, 64 columns] = out * correction + weights x rows.
template <int H>
SLOTMOE_NOINLINE void value_block(const Mla& m, int64_t h, int64_t quads, const Chunk& c, float* out) {
    const int32_t* weights = c.weights + h / kTile * kQuads * kTile + h % kTile;
    Lanes::I dots[H][4];
#pragma GCC unroll 4
    for (int i = 0; i < H; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) dots[i][j] = Lanes::start(0);
    for (int64_t quad = 0; quad < quads; quad++) {
        const int8_t* rows = c.quads + quad * 4 * kSumColumns;
        Lanes::W values[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) values[j] = Lanes::load_bytes(rows + 64 * j);
#pragma GCC unroll 4
        for (int i = 0; i < H; i++) {
            const auto weight = Lanes::broadcast_bytes(weights + quad * kTile + i);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) dots[i][j] = Lanes::dot_bytes(dots[i][j], weight, values[j]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < H; i++) {
        const int64_t top_row = int64_t(c.top_row[h + i]);
        const int8_t* top = c.quads + top_row / 4 * 4 * kSumColumns;
        const auto correction = Lanes::broadcast(c.correction[h + i]), step = Lanes::broadcast(c.step[h + i]);
        const auto largest = Lanes::broadcast(c.top[h + i]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            float* o = out + i * m.r_padded + 16 * j;
            auto sum = Lanes::fma(Lanes::to_float(dots[i][j]), step, Lanes::mul(Lanes::load(o), correction));
            Lanes::store(o, Lanes::fma(Lanes::pick_byte(top + 64 * j, int(top_row % 4)), largest, sum));
        }
    }
}

// out [heads, Rp] = out * correction + weights x rows; meanwhile the rows from `next` to `last` come nearer.
void sum_values(const Mla& m, const uint8_t* rows, int64_t n, const Chunk& c, const uint8_t* next, const uint8_t* last, float* out) {
    const int64_t quads = (n + 3) / 4, four = m.heads / 4 * 4;
    const int64_t slice = (last - next) * 4 * kSumColumns / (m.r_padded * m.heads) + 64;
    for (int64_t column = 0; column < m.r_padded; column += kSumColumns) {
        load_quads(m, rows, n, column, c.quads);
        for (int64_t h = 0; h < four; h += 4) {
            for (const uint8_t* end = next + slice; next < end && next < last; next += 64) Lanes::prefetch_far(next);
            value_block<4>(m, h, quads, c, out + h * m.r_padded + column);
        }
        for (int64_t h = four; h < m.heads; h++) value_block<1>(m, h, quads, c, out + h * m.r_padded + column);
    }
}

// --- all of it

void mla_spans(const Mla& m, int64_t begin, int64_t end, uint8_t* scratch) {
    Chunk c;
    mla_layout(m, scratch, c);
    const int64_t padded = m.tiles * kTile;
    for (int64_t span = begin; span < end; span++) {
        float *maxima = m.span_max + span * padded, *sums = m.span_sum + span * padded;
        float* out = m.span_out + span * m.heads * m.r_padded;
        memset(out, 0, size_t(m.heads * m.r_padded) * 4);
        const int64_t start = span * m.span_chunks * kChunkRows, limit = start + m.span_chunks * kChunkRows;
        const int64_t stop = limit < m.context ? limit : m.context;
        for (int64_t first = start; first < stop; first += kChunkRows) {
            const int64_t n = stop - first < kChunkRows ? stop - first : kChunkRows;
            const uint8_t* rows = m.cache + first * m.stride;
            score_chunk(m, rows, n, c);
            for (int64_t tile = 0; tile < m.tiles; tile++) softmax_tile(m, tile, rows, n, first == start, c, maxima, sums);
            const int64_t next = first + n, after = next + kChunkRows < m.context ? next + kChunkRows : m.context;
            sum_values(m, rows, n, c, m.cache + next * m.stride, m.cache + after * m.stride, out);
        }
    }
}

void mla_merge(const Mla& m, int64_t begin, int64_t end, float* out) {
    const int64_t chunks = (m.context + kChunkRows - 1) / kChunkRows, spans = (chunks + m.span_chunks - 1) / m.span_chunks;
    const int64_t padded = m.tiles * kTile;
    for (int64_t h = begin; h < end; h++) {
        float top = m.span_max[h], sum = 0.0f;
        for (int64_t s = 1; s < spans; s++) top = m.span_max[s * padded + h] > top ? m.span_max[s * padded + h] : top;
        for (int64_t s = 0; s < spans; s++) sum += m.span_sum[s * padded + h] * exp_float(m.span_max[s * padded + h] - top);
        float* y = out + h * m.r;
        for (int64_t i = 0; i < m.r; i++) y[i] = 0.0f;
        for (int64_t s = 0; s < spans; s++) {
            const float weight = exp_float(m.span_max[s * padded + h] - top) / sum;
            const float* in = m.span_out + (s * m.heads + h) * m.r_padded;
            for (int64_t i = 0; i < m.r; i++) y[i] += weight * in[i];
        }
        unmix(y, m.r);
    }
}

}  // namespace
}  // namespace slotmoe
