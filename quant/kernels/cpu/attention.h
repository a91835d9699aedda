// MLA decode: one query per head against the latent cache, which all heads share.
//
// A cache row is kept as what is multiplied: 8-bit integers, with one scale for the latent columns and one for the rope
// columns, since either may be much larger. Before it is rounded each part is mixed: random signs, then a
// Walsh-Hadamard transform (arXiv 2404.00456). That is orthogonal, so queries that are mixed too give the same scores,
// and the weighted sum of rows is mixed back at the end; it spreads outliers over the part, so that one scale serves
// any row as well as a Gaussian one. A query is two unsigned digits, so that its products are of bytes: of 7 bits where
// the sum of two products must fit 16 (AVX2, portable), else of 8. With the latter every other four columns are coarse,
// without the low digit: after mixing all columns weigh alike, so that this saves a quarter of the products and keeps
// half of what the low digits are for. Softmax is fp32. A row's weight, which is its probability times its scale, is a
// byte relative to the largest of a chunk of 64 rows; where the largest is far above the next, beside which the others
// may be small and many, it is multiplied in fp32.
//
// A query's context is the first rows of a cache, or those that a list names, in its order. Chunks are grouped into
// spans by the context's length alone, so that the result does not depend on the threads. Queries of neighbouring
// tokens go through their chunks together, so that rows are interleaved once for all of them.
//
// Shapes: q [heads, R + P]; out [heads, R]; R4, P4 = R, P padded to 4; K = R4 + P4; Rp = R padded to 64; heads come in
// tiles of 16, one lane each, Hp of them. A cache row is int8 [R4], int8 [P4], float [2] scales, int32 [2] sums of the
// integers.
namespace slotmoe {
namespace {

constexpr int kQuads = kChunkRows / 4;  // four rows of one column are neighbours when rows are summed
constexpr int kSumColumns = 64;         // that are summed together
constexpr uint32_t kNaN = 0x7fc00000;
constexpr float kNoScore = -3.4e38f;
// where scores have grown by more since a span began, what has been summed is scaled down
constexpr float kGrowth = 32.0f;
constexpr bool kWide = Lanes::kWeightOffset != 0;  // whether dots take unsigned bytes of 8 bits, or of 7
// A query is kDigit * high + low - kZero; of its columns every other four, which are coarse if kWide, have no low digit.
constexpr int kDigit = kWide ? 256 : 128, kZero = kDigit / 2 * kDigit, kQueryMax = kZero - kDigit;
constexpr float kMostWeight = kWide ? 255.0f : 127.0f;  // of a row
constexpr float kAlone = kWide ? 2.0f : 1.0f;  // a weight of more than this times the next one is no byte

#ifdef SLOTMOE_AMX
constexpr int kScoreRows = 2 * kTileRows;  // that are scored together
#else
constexpr int kScoreRows = Lanes::kScoreRows;
#endif

// Of the next chunk, whose rows stand one stride apart. They come nearer bit by bit: what fetches them holds no more lines
// than a core waits for.
struct Ahead {
    const uint8_t *at, *end;
    int64_t quarter;  // bytes

    void come(int64_t parts) {  // one of so many parts of a quarter
        const int64_t bytes = quarter / parts;
        const uint8_t* stop = end - at < bytes ? end : at + bytes;
        for (; at < stop; at += kBlock) Lanes::prefetch_to_l2(at);
    }
};

struct Chunk {
    int8_t* copies;     // [kScoreRows, padded_columns]: of rows that no tile can be loaded of
    int8_t* quads;      // [16, 64, 4]: the columns being summed
    float* scales;      // [64]: the rows', of their latent columns
    int8_t* keys;       // [4, P / 4, 16, 4]: of tiles of rows, where keys are apart
    float* key_scales;  // [64]
    int32_t* zeros;     // [64]: what the sums of a row's products begin at
    Ahead* ahead;
    float* scores;      // [tiles, 64, 16]: scores, then weights
    float* largest;     // [Hp]: score
    float* correction;  // [Hp]: of what the chunks before have summed
    // Of each query
    int32_t* weights;   // [tiles, 16, 16]: four rows' bytes
    float* step;        // [Hp]: what 1 is worth in a byte
    uint32_t* alone;    // [tiles]: the heads, a bit each, whose largest weight is in no byte
    float* top;         // [Hp]: that weight
    int32_t* top_row;   // [Hp]: its row
    int64_t n;          // rows that it attends to
    bool first;         // of the span
    float* out;         // [heads, Rp]: the span's sums
};

constexpr int64_t up_to_block(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

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

// x [Count, 16] -> each one's transform times `scale`.
template <int Count>
inline void walsh_vectors(float* x, F scale) {
    F sums[Count];
#pragma GCC unroll 4
    for (int k = 0; k < Count; k++) sums[k] = Lanes::zero();
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++)
#pragma GCC unroll 4
        for (int k = 0; k < Count; k++)
            sums[k] = Lanes::fma(Lanes::broadcast(x[16 * k + j]), Lanes::load(kSigns.at[j]), sums[k]);
#pragma GCC unroll 4
    for (int k = 0; k < Count; k++) Lanes::store(x + 16 * k, Lanes::mul(sums[k], scale));
}

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
    int64_t half = 16;
    for (; 4 * half <= n; half *= 4)  // two steps at once
        for (int64_t i = 0; i < n; i += 4 * half)
            for (float* at = x + i; at < x + i + half; at += 16) {
                const auto a = Lanes::load(at), b = Lanes::load(at + half), c = Lanes::load(at + 2 * half),
                           d = Lanes::load(at + 3 * half);
                const auto ab = Lanes::add(a, b), cd = Lanes::add(c, d), a_b = Lanes::fma(b, minus, a),
                           c_d = Lanes::fma(d, minus, c);
                Lanes::store(at, Lanes::add(ab, cd)), Lanes::store(at + half, Lanes::add(a_b, c_d));
                Lanes::store(at + 2 * half, Lanes::fma(cd, minus, ab));
                Lanes::store(at + 3 * half, Lanes::fma(c_d, minus, a_b));
            }
    for (float* at = x; half < n && at < x + half; at += 16) {
        const auto a = Lanes::load(at), b = Lanes::load(at + half);
        Lanes::store(at, Lanes::add(a, b)), Lanes::store(at + half, Lanes::fma(b, minus, a));
    }
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) walsh_vectors<4>(x + i, scale);
    for (; i < n; i += 16) walsh_vectors<1>(x + i, scale);
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

// Whether the four columns from `column` of a part on have a low digit.
inline bool fine(int64_t column) { return !kWide || column % 8 == 0; }

// A part of one head -> its digits; returns what 1 is worth.
float store_query(float* q, int64_t n, uint8_t* high, uint8_t* low) {
    float scale;
    mix(q, n);
    const float inverse = part_inverse(q, n, kQueryMax, scale);
    const int32_t half = kWide ? kDigit / 2 : 0;
    for (int64_t i = 0; i < n; i++) {
        // coarse ones are rounded
        const int32_t digits = int32_t(round_even(q[i] * inverse)) + kZero + half * int32_t(i >> 2 & 1);
        high[i] = uint8_t(digits / kDigit), low[i] = uint8_t(digits % kDigit);
    }
    return scale;
}

// Heads begin..end: q -> q_rows, q_scale.
void mla_queries(const Mla& m, int64_t begin, int64_t end) {
    const int64_t width = query_columns(m), latent = width - m.p, padded = m.tiles * kTile;
    for (int64_t h = begin; h < end; h++) {
        float* q = m.q_mixed + h * width;
        uint8_t* digits = m.q_rows + h * 2 * m.k;
        memcpy(q, m.q + h * width, size_t(width) * 4);
        memset(digits, 0, size_t(2 * m.k));
        m.q_scale[h] = m.scale * store_query(q, latent, digits, digits + m.k);
        m.q_scale[padded + h] = m.scale * store_query(q + latent, m.p, digits + m.r4, digits + m.k + m.r4);
    }
}

// Tiles begin..end: q_rows -> q_digits. Lanes that no head has repeat the first, with a scale of 0.
void mla_pack(const Mla& m, int64_t begin, int64_t end) {
    const int64_t padded = m.tiles * kTile, k = m.k, r4 = m.r4, columns = padded_columns(m);
    for (int64_t lane = m.heads; lane < end * kTile; lane++) m.q_scale[lane] = m.q_scale[padded + lane] = 0.0f;
    if (m.apart) return;  // rows are side by side, not heads
    const auto digits_of = [&](int64_t lane) { return m.q_rows + (lane < m.heads ? lane : 0) * 2 * k; };
#ifdef SLOTMOE_AMX
    for (int64_t i = begin * columns; i < end * columns; i += kBlock) {
        const int64_t column = i % columns, in = column < m.r_padded ? column : r4 + column - m.r_padded,
                      left = (column < m.r_padded ? r4 : k) - in;
        for (int64_t digit = 0; digit < 2; digit++) {
            int32_t* out = reinterpret_cast<int32_t*>(m.q_digits + (2 * i + digit * kBlock) * kTile);
            if (left < kBlock) memset(out, 0, kBlock * kTile);
            for (int64_t lane = 0; lane < kTile; lane++) {
                const uint8_t* from = digits_of(i / columns * kTile + lane) + digit * k + in;
                int32_t* to = out + lane * kTile;
                left < kBlock ? memcpy(to, from, size_t(left)) : memcpy(to, from, kBlock);
            }
            Lanes::turn(out, 4 * kTile, kTile, out);
            for (int64_t quad = 1; digit && quad < kTile; quad += 2) memset(out + quad * kTile, 0, 4 * kTile);
        }
    }
#else
    for (int64_t h = begin * kTile; h < end * kTile; h++) {
        const uint8_t *high = digits_of(h), *low = high + k;
        uint8_t* out = m.q_digits + h / kTile * 2 * columns * kTile + h % kTile * 4;
        for (int64_t i = 0; i < k; i += 4, out += 4 * kTile) {
            memcpy(out, high + i, 4);
            if (fine(i < r4 ? i : i - r4)) memcpy(out += 4 * kTile, low + i, 4);
        }
    }
#endif
}

// The rows of the chunk that begins at `first`; what is missing to 64 repeats the last.
void chunk_rows(const Mla& m, int64_t first, const uint8_t** rows) {
    for (int64_t i = 0; i < kChunkRows; i++) {
        const int64_t at = first + i < m.context ? first + i : m.context - 1, row = m.list ? m.list[at] : at;
        rows[i] = row < m.split ? m.cache + row * m.stride : m.others + (row - m.split) * m.others_stride;
    }
}

// Of m.shared queries.
size_t mla_layout(const Mla& m, uint8_t* base, Chunk* chunks) {
    size_t used = 0;
    const auto take = [&](int64_t count) {  // of 4 bytes each
        float* p = base ? reinterpret_cast<float*>(base + used) : nullptr;
        used += (size_t(count) * 4 + 63) / 64 * 64;
        return p;
    };
    const int64_t padded = m.tiles * kTile;
    Chunk c{};
#ifdef SLOTMOE_AMX
    c.copies = reinterpret_cast<int8_t*>(take(kScoreRows * padded_columns(m) / 4));
#endif
    if (m.apart) c.keys = reinterpret_cast<int8_t*>(take(kChunkRows * up_to_block(m.p) / 4));
    c.key_scales = take(kChunkRows), c.zeros = reinterpret_cast<int32_t*>(take(kChunkRows));
    c.quads = reinterpret_cast<int8_t*>(take(kQuads * kSumColumns));
    c.scales = take(kChunkRows), c.scores = take(padded * kChunkRows), c.largest = take(padded);
    c.correction = take(padded);
    for (int64_t i = 0; i < m.shared; i++) {
        c.weights = reinterpret_cast<int32_t*>(take(padded * kQuads)), c.step = take(padded), c.top = take(padded);
        c.top_row = reinterpret_cast<int32_t*>(take(padded)), c.alone = reinterpret_cast<uint32_t*>(take(m.tiles));
        chunks[i] = c;
    }
    return used;
}

size_t mla_scratch(const Mla& m) {
    Chunk chunks[kShared];
    return mla_layout(m, nullptr, chunks);
}

// --- scores

#ifdef SLOTMOE_AMX

struct WholeTiles {
    WholeTiles() {
        TileShapes shapes;
        for (int tile = 0; tile < 8; tile++) shapes.set(tile, kTileRows, kTileBytes);
        tile_shapes(shapes);
    }
    ~WholeTiles() { tile_release(); }
};

// Rows that stand apart by one stride and have whole blocks of columns stay where they are; others are copied.
void line_up(const Mla& m, const int8_t** rows, int8_t* copies) {
    bool whole = m.k == padded_columns(m);
    for (int j = 2; j < kScoreRows; j++) whole = whole && rows[j] - rows[j - 1] == rows[1] - rows[0];
    for (int j = 0; j < kScoreRows && !whole; j++) {
        int8_t* copy = copies + j * padded_columns(m);
        memcpy(copy, rows[j], size_t(m.r4)), memcpy(copy + m.r_padded, rows[j] + m.r4, size_t(m.k - m.r4));
        rows[j] = copy;
    }
}

// Of 16 heads by kScoreRows rows, which line_up has seen -> dots [kScoreRows, 2 digits, 16]. Returns where the queries
// go on.
inline const uint8_t* dot_part(const Mla& m, int part, const uint8_t* q, const int8_t* const* rows, int32_t* dots) {
    const int64_t end = part ? padded_columns(m) : m.r_padded, stride = rows[1] - rows[0];
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t c = part ? m.r_padded : 0; c < end; c += kBlock, q += 2 * kBlock * kTile) {
        tile_load<4>(rows[0] + c, stride), tile_load<6>(q, 4 * kTile), tile_dot<int8_t, uint8_t, 0, 4, 6>();
        tile_load<7>(q + kBlock * kTile, 4 * kTile), tile_dot<int8_t, uint8_t, 1, 4, 7>();
        tile_load<5>(rows[kTileRows] + c, stride), tile_dot<int8_t, uint8_t, 2, 5, 6>();
        tile_dot<int8_t, uint8_t, 3, 5, 7>();
    }
    constexpr int64_t kRow = 8 * kTile;
    tile_store<0>(dots, kRow), tile_store<1>(dots + kTile, kRow);
    dots += kTileRows * 2 * kTile;
    tile_store<2>(dots, kRow), tile_store<3>(dots + kTile, kRow);
    return q;
}

#else

// Four columns of 16 heads by kScoreRows rows; a row is broadcast. Returns where the queries go on.
template <bool Fine>
inline const uint8_t* dot_rows(const uint8_t* q, const int8_t* const* rows, int64_t column, Lanes::I (*dots)[2]) {
    const auto high = Lanes::load_bytes(q), low = Lanes::load_bytes(q + (Fine ? 4 * kTile : 0));
#pragma GCC unroll 16
    for (int j = 0; j < kScoreRows; j++) {
        const auto row = Lanes::broadcast_bytes(rows[j] + column);
        dots[j][0] = Lanes::dot_bytes(dots[j][0], high, row);
        if (Fine) dots[j][1] = Lanes::dot_bytes(dots[j][1], low, row);
    }
    return q + (Fine ? 8 : 4) * kTile;
}

#endif

// One part, 0 latent or 1 rope, of one tile of heads by kScoreRows rows, added to `scores` [kScoreRows, 16]. Returns
// where the queries go on.
SLOTMOE_NOINLINE const uint8_t* score_part(const Mla& m, int64_t tile, int part, const uint8_t* q,
                                           const int8_t* const* rows, const Tail* tails, float* scores) {
    const auto scale = Lanes::load(m.q_scale + (part * m.tiles + tile) * kTile),
               digit = Lanes::broadcast(float(kDigit));
    const auto zeros = [&](int j) { return Lanes::start(-kZero / kDigit * tails[j].sum[part]); };
#ifdef SLOTMOE_AMX
    alignas(64) uint8_t sums[kScoreRows][2][4 * kTile];
    q = dot_part(m, part, q, rows, reinterpret_cast<int32_t*>(sums));
    const auto dot = [&](int j, int digit) {
        return Lanes::add_bytes(digit ? Lanes::start(0) : zeros(j), sums[j][digit]);
    };
#else
    Lanes::I dots[kScoreRows][2];
    const auto dot = [&](int j, int digit) { return dots[j][digit]; };
#pragma GCC unroll 16
    for (int j = 0; j < kScoreRows; j++) dots[j][0] = zeros(j), dots[j][1] = Lanes::start(0);
    const int64_t end = part ? m.k : m.r4;
    int64_t c = part ? m.r4 : 0;
#pragma GCC unroll 4
    for (; c + 8 <= end; c += 8) {
        q = dot_rows<true>(q, rows, c, dots);
        q = dot_rows<!kWide>(q, rows, c + 4, dots);
    }
    if (c < end) q = dot_rows<true>(q, rows, c, dots);
#endif
#pragma GCC unroll 16
    for (int j = 0; j < kScoreRows; j++) {
        const auto sum = Lanes::fma(Lanes::to_float(dot(j, 0)), digit, Lanes::to_float(dot(j, 1)));
        const auto before = part ? Lanes::load(scores + j * kTile) : Lanes::zero();
        Lanes::store(scores + j * kTile,
                     Lanes::fma(sum, Lanes::mul(Lanes::broadcast(tails[j].scale[part]), scale), before));
    }
    return q;
}

// The scores of n rows, for all heads.
void score_chunk(const Mla& m, const uint8_t* const* rows, int64_t n, const Chunk& c) {
    const int64_t columns = padded_columns(m);
    for (int64_t first = 0; first < n; first += kScoreRows) {
        const int8_t* row[kScoreRows];
        Tail tails[kScoreRows];
        for (int64_t j = 0; j < kScoreRows; j++) {
            row[j] = reinterpret_cast<const int8_t*>(rows[first + j]), tails[j] = tail_of(m, rows[first + j]);
            c.scales[first + j] = tails[j].scale[0];
        }
#ifdef SLOTMOE_AMX
        line_up(m, row, c.copies);
#endif
        for (int64_t tile = 0; tile < m.tiles; tile++) {
            float* scores = c.scores + (tile * kChunkRows + first) * kTile;
            const uint8_t* q = score_part(m, tile, 0, m.q_digits + tile * 2 * columns * kTile, row, tails, scores);
            if (m.p > 0) score_part(m, tile, 1, q, row, tails, scores);
            auto largest = first ? Lanes::load(c.largest + tile * kTile) : Lanes::broadcast(kNoScore);
            for (int j = 0; j < kScoreRows; j++) largest = Lanes::max(Lanes::load(scores + j * kTile), largest);
            Lanes::store(c.largest + tile * kTile, largest);
        }
    }
}

// --- scores where keys are apart from values: rows are side by side, since a group may have few heads

#ifndef SLOTMOE_TURN
typedef int32_t Four __attribute__((vector_size(16)));
#define SLOTMOE_TURN turn_tile
#if defined(__clang__)
#define SLOTMOE_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SLOTMOE_PICK(a, b, ...) __builtin_shuffle(a, b, Four{__VA_ARGS__})
#endif

// n rows of 16 words, the last in place of those behind it, -> their columns.
inline void turn_tile(const uint8_t* rows, int64_t stride, int64_t n, int8_t* columns) {
    for (int64_t row = 0; row < kTile; row += 4)
        for (int64_t column = 0; column < kTile; column += 4) {
            const auto in = [&](int64_t i) {
                Four words;
                memcpy(&words, rows + (row + i < n ? row + i : n - 1) * stride + 4 * column, 16);
                return words;
            };
            const auto out = [&](int64_t i, Four words) { memcpy(columns + (column + i) * 4 * kTile + 4 * row, &words, 16); };
            const Four r = in(0), s = in(1), t = in(2), u = in(3);
            const Four a = SLOTMOE_PICK(r, s, 0, 4, 1, 5), b = SLOTMOE_PICK(t, u, 0, 4, 1, 5);
            const Four c = SLOTMOE_PICK(r, s, 2, 6, 3, 7), d = SLOTMOE_PICK(t, u, 2, 6, 3, 7);
            out(0, SLOTMOE_PICK(a, b, 0, 1, 4, 5)), out(1, SLOTMOE_PICK(a, b, 2, 3, 6, 7));
            out(2, SLOTMOE_PICK(c, d, 0, 1, 4, 5)), out(3, SLOTMOE_PICK(c, d, 2, 3, 6, 7));
        }
}
#endif

// The keys of n rows, one stride apart, and what else a row holds.
void turn_keys(const Mla& m, const uint8_t* const* rows, int64_t n, const Chunk& c) {
    for (int64_t i = 0; i < n; i++) {
        const Tail tail = tail_of(m, rows[i]);
        c.scales[i] = tail.scale[0], c.zeros[i] = -kZero / kDigit * tail.sum[1];
        c.key_scales[i] = tail.scale[1] + (tail.scale[0] - tail.scale[0]);  // NaN of a value shows in the score
    }
    for (int64_t i = n; i < kChunkRows; i++) c.scales[i] = 0.0f;
    const int64_t p4 = m.k - m.r4;
    uint8_t part[kTile][kBlock];
    for (int64_t first = 0; first < n; first += kTile) {
        c.ahead->come(kChunkRows / kTile);
        for (int64_t column = 0, count = n - first < kTile ? n - first : kTile; column < p4; column += kBlock) {
            const uint8_t* in = rows[first] + m.r4 + column;
            const bool whole = p4 - column >= kBlock;
            for (int64_t i = 0; i < count && !whole; i++) memcpy(part[i], in + i * m.stride, size_t(p4 - column));
            SLOTMOE_TURN(whole ? in : part[0], whole ? m.stride : kBlock, count,
                      c.keys + first * up_to_block(m.p) + column * kTile);
        }
    }
}

// Heads by tiles of rows -> scores [heads, 64].
template <int Heads, int Tiles>
SLOTMOE_NOINLINE void score_rows(const Mla& m, int64_t head, int64_t tile, const Chunk& c) {
    const int64_t p4 = m.k - m.r4, columns = up_to_block(m.p);
    const uint8_t* q = m.q_rows + head * 2 * m.k + m.r4;
    const int8_t* keys = c.keys + tile * kTile * columns;
    Lanes::I dots[Heads][Tiles][2];
    const auto quad = [&](int64_t column, bool low) {
        Lanes::W rows[Tiles];
#pragma GCC unroll 2
        for (int t = 0; t < Tiles; t++) rows[t] = Lanes::load_bytes(keys + (t * columns + column) * kTile);
#pragma GCC unroll 4
        for (int h = 0; h < Heads; h++)
#pragma GCC unroll 2
            for (int digit = 0; digit < 1 + low; digit++) {
                const auto four = Lanes::broadcast_bytes(q + (2 * h + digit) * m.k + column);
#pragma GCC unroll 2
                for (int t = 0; t < Tiles; t++) dots[h][t][digit] = Lanes::dot_bytes(dots[h][t][digit], four, rows[t]);
            }
    };
#pragma GCC unroll 4
    for (int h = 0; h < Heads; h++)
#pragma GCC unroll 2
        for (int t = 0; t < Tiles; t++) {
            dots[h][t][0] = Lanes::add_bytes(Lanes::start(0), reinterpret_cast<uint8_t*>(c.zeros + (tile + t) * kTile));
            dots[h][t][1] = Lanes::start(0);
        }
    int64_t column = 0;
    for (; column + 8 <= p4; column += 8) quad(column, true), quad(column + 4, !kWide);
    if (column < p4) quad(column, true);
    const auto digit = Lanes::broadcast(float(kDigit));
#pragma GCC unroll 4
    for (int h = 0; h < Heads; h++)
#pragma GCC unroll 2
        for (int t = 0; t < Tiles; t++) {
            const auto sum = Lanes::fma(Lanes::to_float(dots[h][t][0]), digit, Lanes::to_float(dots[h][t][1]));
            const auto scale = Lanes::mul(Lanes::load(c.key_scales + (tile + t) * kTile),
                                          Lanes::broadcast(m.q_scale[m.tiles * kTile + head + h]));
            Lanes::store(c.scores + (head + h) * kChunkRows + (tile + t) * kTile, Lanes::mul(sum, scale));
        }
}

// As score_chunk, of keys that have been turned: scores [heads, 64].
void score_keys(const Mla& m, int64_t n, const Chunk& c) {
    constexpr int kHeads = Lanes::kTokensAtOnce, kTiles = Lanes::kTilesAtOnce;
    for (int64_t rows = 0; rows * kTile < n; rows += kTiles) {
        int64_t h = 0;
        for (; h + kHeads <= m.heads; h += kHeads) {
            c.ahead->come(kChunkRows / kTile / kTiles * m.heads / kHeads);
            score_rows<kHeads, kTiles>(m, h, rows, c);
        }
        for (; h < m.heads; h++) score_rows<1, kTiles>(m, h, rows, c);
    }
    for (int64_t h = 0; h < m.heads; h++)
        for (int64_t i = n; i < kChunkRows; i++) c.scores[h * kChunkRows + i] = kNoScore;
}

// --- softmax, the heads of a tile side by side

// e^x for -87 <= x <= 87, and for x beyond that of the nearer bound; NaN for NaN.
inline Lanes::F exp_lanes(Lanes::F x) {
    const auto shift = Lanes::broadcast(12582912.0f);  // 1.5 * 2^23: the nearest integer stands in the sum's last bits
    x = Lanes::min(Lanes::broadcast(87.0f), Lanes::max(Lanes::broadcast(-87.0f), x));
    const auto shifted = Lanes::fma(x, Lanes::broadcast(1.44269504f), shift),
               n = Lanes::add(shifted, Lanes::broadcast(-12582912.0f));
    const auto r = Lanes::fma(n, Lanes::broadcast(2.12194440e-4f), Lanes::fma(n, Lanes::broadcast(-0.693359375f), x));
    constexpr float kTerms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                5.0000001201e-1f};
    auto p = Lanes::broadcast(1.9875691500e-4f);
#pragma GCC unroll 5
    for (const float term : kTerms) p = Lanes::fma(p, r, Lanes::broadcast(term));
    p = Lanes::fma(Lanes::mul(p, r), r, Lanes::add(r, Lanes::broadcast(1.0f)));
    return Lanes::mul(p, Lanes::power_of_two(shifted));
}

// -1 times what the scores of a tile of heads are relative to, which `maxima` keep. What has been summed before must be
// multiplied by `correction` unless it is `steady`; the sums have been.
inline Lanes::F refer(int64_t lane, Lanes::F largest, bool first, const Chunk& c, float* maxima, float* sums,
                      bool& steady) {
    const auto before = first ? Lanes::broadcast(kNoScore) : Lanes::load(maxima + lane);
    const auto limit = Lanes::add(before, Lanes::broadcast(kGrowth)), minus = Lanes::broadcast(-1.0f);
    const auto reference = Lanes::mul(Lanes::where_greater(largest, limit, largest, before), minus);
    steady = first || !Lanes::greater(largest, limit);
    Lanes::store(maxima + lane, Lanes::mul(reference, minus));
    if (first) Lanes::store(sums + lane, Lanes::zero());
    if (!steady) {
        const auto correction = exp_lanes(Lanes::add(before, reference));
        Lanes::store(c.correction + lane, correction);
        Lanes::store(sums + lane, Lanes::mul(Lanes::load(sums + lane), correction));
    }
    return reference;
}

// Scores of n rows -> weights and what goes with them; updates what they are relative to, and the sums. False if what
// has been summed so far must be multiplied by `correction`.
SLOTMOE_NOINLINE bool softmax_tile(const Mla& m, int64_t tile, int64_t n, bool first, const Chunk& c, float* maxima,
                                   float* sums) {
    float (*s)[kTile] = reinterpret_cast<float (*)[kTile]>(c.scores + tile * kChunkRows * kTile);
    const int64_t lane = tile * kTile;
    bool steady;
    const auto reference = refer(lane, Lanes::load(c.largest + lane), first, c, maxima, sums, steady);
    auto sum = Lanes::zero(), top = Lanes::zero(), next = Lanes::zero(), row = Lanes::zero();
    for (int64_t i = 0; i < n; i++) {
        const auto p = exp_lanes(Lanes::add(Lanes::load(s[i]), reference)),
                   w = Lanes::mul(p, Lanes::broadcast(c.scales[i]));
        Lanes::store(s[i], w);
        sum = Lanes::add(sum, p);
        next = Lanes::max(Lanes::min(w, top), next);
        row = Lanes::where_greater(w, top, Lanes::broadcast(float(i)), row);
        top = Lanes::max(w, top);
    }
    for (int64_t i = n; i % 4; i++) Lanes::store(s[i], Lanes::zero());
    const auto bytes_to = Lanes::mul(next, Lanes::broadcast(kAlone));
    const auto most = Lanes::max(Lanes::where_greater(top, bytes_to, next, top), Lanes::broadcast(1e-30f));
    alignas(64) float inverse[kTile], alone_row[kTile];
    Lanes::store(sums + lane, Lanes::add(Lanes::load(sums + lane), sum));
    Lanes::store(c.step + lane, Lanes::mul(most, Lanes::broadcast(1.0f / kMostWeight)));
    Lanes::store(c.top + lane, top), Lanes::store(alone_row, row), Lanes::store(inverse, most);
    for (float& v : inverse) v = kMostWeight / v;
    c.alone[tile] = Lanes::greater(top, bytes_to);
    for (uint32_t heads = c.alone[tile]; heads; heads &= heads - 1) {
        const int h = __builtin_ctz(heads);
        c.top_row[lane + h] = int32_t(alone_row[h]);
        s[c.top_row[lane + h]][h] = 0.0f;
    }
    // The nearest integer stands in the last bits of 1.5 * 2^23 + v.
    const auto byte = [&](int64_t i, int h) { return float_bits(s[i][h] * inverse[h] + 12582912.0f) - 0x4b400000u; };
    int32_t* bytes = c.weights + tile * kQuads * kTile;
    for (int64_t i = 0; i < n; i += 4, bytes += kTile)
        for (int h = 0; h < kTile; h++)
            bytes[h] = int32_t(byte(i, h) + (byte(i + 1, h) << 8) + (byte(i + 2, h) << 16) + (byte(i + 3, h) << 24));
    return steady;
}

// The same of scores [heads, 64]: a head's are side by side. A head's weights are 64 bytes.
SLOTMOE_NOINLINE bool softmax_heads(const Mla& m, int64_t tile, bool first, const Chunk& c, float* maxima,
                                    float* sums) {
    constexpr int kVectors = kChunkRows / kTile, kShift = kWide ? 128 : 0;
    const int64_t lane = tile * kTile, heads = m.heads - lane < kTile ? m.heads - lane : kTile;
    float (*s)[kChunkRows] = reinterpret_cast<float (*)[kChunkRows]>(c.scores + lane * kChunkRows);
    F tops[kTile], nexts[kTile], totals[kTile];
    alignas(64) float largest[kTile], reference[kTile], total[kTile], next[kTile];
    for (int h = 0; h < kTile; h++) tops[h] = nexts[h] = totals[h] = Lanes::zero();
    for (int64_t h = 0; h < heads; h++) {
        tops[h] = Lanes::load(s[h]);
        for (int i = 1; i < kVectors; i++) tops[h] = Lanes::max(Lanes::load(s[h] + i * kTile), tops[h]);
    }
    Lanes::max_lanes(tops, largest);
    bool steady;
    Lanes::store(reference, refer(lane, Lanes::load(largest), first, c, maxima, sums, steady));
    for (int64_t h = 0; h < heads; h++) {
        auto sum = Lanes::zero(), top = Lanes::zero(), second = Lanes::zero();
        const auto minus = Lanes::broadcast(reference[h]);
        c.ahead->come(m.heads);
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; i++) {
            const auto p = exp_lanes(Lanes::add(Lanes::load(s[h] + i * kTile), minus)),
                       w = Lanes::mul(p, Lanes::load(c.scales + i * kTile));
            Lanes::store(s[h] + i * kTile, w);
            sum = Lanes::add(sum, p);
            second = Lanes::max(Lanes::min(w, top), second);
            top = Lanes::max(w, top);
        }
        tops[h] = top, nexts[h] = second, totals[h] = sum;
    }
    Lanes::max_lanes(tops, largest), Lanes::sum_lanes(totals, total);
    Lanes::store(sums + lane, Lanes::add(Lanes::load(sums + lane), Lanes::load(total)));
    for (int64_t h = 0; h < heads; h++) {  // the largest but for the one lane that has the largest
        const auto top = Lanes::broadcast(largest[h]);
        const uint32_t below = Lanes::greater(top, tops[h]), at_top = ~below & 0xffff;
        if (at_top & (at_top - 1)) nexts[h] = top;
        nexts[h] = Lanes::where_greater(top, tops[h], tops[h], nexts[h]);
    }
    Lanes::max_lanes(nexts, next);
    c.alone[tile] = 0;
    for (int64_t h = 0; h < heads; h++) {
        const float bytes_to = next[h] * kAlone;
        float most = largest[h];
        if (most > bytes_to) {
            uint64_t row = 0;
            for (int i = 0; i < kVectors; i++)
                row |= uint64_t(Lanes::greater(Lanes::load(s[h] + i * kTile), Lanes::broadcast(bytes_to))) << i * kTile;
            c.top_row[lane + h] = int32_t(__builtin_ctzll(row)), c.top[lane + h] = most, c.alone[tile] |= 1u << h;
            s[h][c.top_row[lane + h]] = 0.0f;
            most = next[h];
        }
        most = most > 1e-30f ? most : 1e-30f;
        c.step[lane + h] = most * (1.0f / kMostWeight);
        const auto inverse = Lanes::broadcast(kMostWeight / most),
                   shift = Lanes::broadcast(12582912.0f), back = Lanes::broadcast(-12582912.0f - kShift),
                   least = Lanes::broadcast(-float(kShift));  // of NaN too
        uint64_t bytes[kQuads / 2];
        for (int i = 0; i < kVectors; i++) {
            const auto rounded = Lanes::fma(Lanes::load(s[h] + i * kTile), inverse, shift);
            Lanes::store_int8(reinterpret_cast<int8_t*>(bytes) + i * kTile, Lanes::max(Lanes::add(rounded, back), least));
        }
        for (uint64_t& eight : bytes) eight ^= uint64_t(kShift) * 0x0101010101010101;
        memcpy(c.weights + (lane + h) * kQuads, bytes, sizeof bytes);
    }
    return steady;
}

void scale_down(const Mla& m, int64_t tile, const Chunk& c, float* out) {
    for (int64_t h = tile * kTile; h < m.heads && h < (tile + 1) * kTile; h++) {
        const auto correction = Lanes::broadcast(c.correction[h]);
        for (float* o = out + h * m.r_padded; o < out + (h + 1) * m.r_padded; o += 16)
            Lanes::store(o, Lanes::mul(Lanes::load(o), correction));
    }
}

// --- sums of rows

// Columns column..column + 64 of n rows -> quads, zeros past R4. The weights of rows past n are 0.
inline void load_quads(const Mla& m, const uint8_t* const* rows, int64_t n, int64_t column, int8_t* quads) {
    const int64_t columns = m.r4 - column < kSumColumns ? m.r4 - column : kSumColumns;
    int8_t tail[4][kSumColumns];
    if (columns < kSumColumns) memset(tail, 0, sizeof tail);
    for (int64_t quad = 0; quad < (n + 3) / 4; quad++) {
        const int8_t* in[4];
        for (int j = 0; j < 4; j++) {
            in[j] = reinterpret_cast<const int8_t*>(rows[quad * 4 + j]) + column;
            if (columns < kSumColumns) in[j] = static_cast<int8_t*>(memcpy(tail[j], in[j], size_t(columns)));
        }
        Lanes::interleave(in[0], in[1], in[2], in[3], quads + quad * 4 * kSumColumns);
    }
}

// out [64 columns] += dots * step, or is that if `first`.
inline void add_dots(const Lanes::I* dots, float step, bool first, float* out) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++, out += 16)
        Lanes::store(out, Lanes::fma(Lanes::to_float(dots[j]), Lanes::broadcast(step),
                                     first ? Lanes::zero() : Lanes::load(out)));
}

#ifdef SLOTMOE_AMX

// Of a tile's heads: weights [16 heads, 64 rows] by quads -> dots [16, 64].
inline void value_tiles(const int32_t* weights, const int8_t* quads, Lanes::I (*dots)[4]) {
    constexpr int64_t kRow = 4 * kSumColumns;
    tile_load<4>(weights, kChunkRows);
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    tile_load<5>(quads, kRow), tile_dot<uint8_t, int8_t, 0, 4, 5>();
    tile_load<6>(quads + 64, kRow), tile_dot<uint8_t, int8_t, 1, 4, 6>();
    tile_load<7>(quads + 128, kRow), tile_dot<uint8_t, int8_t, 2, 4, 7>();
    tile_load<5>(quads + 192, kRow), tile_dot<uint8_t, int8_t, 3, 4, 5>();
    tile_store<0>(dots[0], kRow), tile_store<1>(dots[0] + 1, kRow);
    tile_store<2>(dots[0] + 2, kRow), tile_store<3>(dots[0] + 3, kRow);
}

#else

// Four rows' bytes times the weights of H heads.
template <int H, int64_t OfHead>
inline void value_quad(const int32_t* weights, const int8_t* rows, Lanes::I (*dots)[4]) {
    Lanes::W values[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) values[j] = Lanes::load_bytes(rows + 64 * j);
#pragma GCC unroll 4
    for (int i = 0; i < H; i++) {
        const auto weight = Lanes::broadcast_bytes(weights + i * OfHead);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) dots[i][j] = Lanes::dot_bytes(dots[i][j], weight, values[j]);
    }
}

// 64 columns of H heads' sums += weights x rows.
template <int H, bool Apart>
SLOTMOE_NOINLINE void value_block(const Mla& m, int64_t h, int64_t column, const Chunk& c) {
    const int64_t quads = (c.n + 3) / 4, padded = m.r_padded;
    const bool first = c.first;
    const float* step = c.step + h;
    float* out = c.out + h * padded + column;
    constexpr int64_t kOfHead = Apart ? kQuads : 1, kOfQuad = Apart ? 1 : kTile;
    const int32_t* weights = c.weights + (Apart ? h * kQuads : h / kTile * kQuads * kTile + h % kTile);
    Lanes::I dots[H][4];
#pragma GCC unroll 4
    for (int i = 0; i < H; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) dots[i][j] = Lanes::start(0);
    const int8_t* rows = c.quads;
    int64_t quad = 0;
    for (; quad + 4 <= quads; quad += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            value_quad<H, kOfHead>(weights + (quad + i) * kOfQuad, rows + (quad + i) * 4 * kSumColumns, dots);
    for (; quad < quads; quad++)
        value_quad<H, kOfHead>(weights + quad * kOfQuad, rows + quad * 4 * kSumColumns, dots);
#pragma GCC unroll 4
    for (int i = 0; i < H; i++) add_dots(dots[i], step[i], first, out + i * padded);
}

#endif

// out [Rp] += weight * the latent integers of a row.
void add_row(const Mla& m, const uint8_t* row, float weight, float* out) {
    const int8_t* q = reinterpret_cast<const int8_t*>(row);
    const auto times = Lanes::broadcast(weight);
    int64_t i = 0;
    for (; i + 16 <= m.r; i += 16)
        Lanes::store(out + i, Lanes::fma(Lanes::load_int8(q + i), times, Lanes::load(out + i)));
    for (; i < m.r; i++) out[i] += weight * float(q[i]);
}

// The sums of `queries` += weights x rows, of which the last has n; meanwhile the `count` rows of the next chunk come
// nearer.
void sum_values(const Mla* m, int64_t queries, const Chunk* chunks, const uint8_t* const* rows, int64_t n,
                const uint8_t* const* next, int64_t count) {
    const Mla& any = m[0];
    const int64_t bytes = latent_bytes(any.r, any.p), heads = any.heads, padded = any.r_padded;
    const int64_t a_head = count * bytes * kSumColumns / (padded * heads * queries);
    int64_t row = 0, byte = 0;
    const auto come_nearer = [&](int64_t some) {  // while so many heads' sums of 64 columns are made
        for (int64_t i = 0; i < a_head * some + 64 && row < count; i += 64) {
            Lanes::prefetch_to_l2(next[row] + byte);
            byte += 64;
            if (byte >= bytes) row++, byte = 0;
        }
    };
    int64_t begin = 0;  // queries of a shorter context are through
    while (chunks[begin].n == 0) begin++;
#ifdef SLOTMOE_AMX
    const int64_t tiles = any.tiles, a_column = tiles * (queries - begin), steps = padded / kSumColumns * a_column;
    Lanes::I dots[2][kTile][4];
    for (int64_t i = begin; i < queries && !any.apart; i++)
        for (int32_t* w = chunks[i].weights; w < chunks[i].weights + tiles * kQuads * kTile; w += kQuads * kTile)
            Lanes::turn(w, 4 * kTile, (chunks[i].n + 3) / 4, w);
    for (int64_t step = 0; step <= steps; step++) {  // tiles multiply while the step before is added
        if (step < steps) {
            const Chunk& c = chunks[begin + step % a_column / tiles];
            if (step % a_column == 0) load_quads(any, rows, n, step / a_column * kSumColumns, c.quads);
            come_nearer(kTile);
            value_tiles(c.weights + step % tiles * kQuads * kTile, c.quads, dots[step % 2]);
        }
        if (step == 0) continue;
        const int64_t done = step - 1, column = done / a_column * kSumColumns, head = done % tiles * kTile;
        const Chunk& c = chunks[begin + done % a_column / tiles];
        for (int64_t h = head; h < head + kTile && h < heads; h++)
            add_dots(dots[done % 2][h - head], c.step[h], c.first, c.out + h * padded + column);
    }
#else
    constexpr int kHeads = Lanes::kTokensAtOnce == 4 ? 4 : 1;  // whose sums the registers hold
    for (int64_t column = 0; column < padded; column += kSumColumns) {
        load_quads(any, rows, n, column, chunks[0].quads);
        for (int64_t i = begin; i < queries; i++) {
            int64_t h = 0;
            const auto block = any.apart ? value_block<kHeads, true> : value_block<kHeads, false>;
            const auto one = any.apart ? value_block<1, true> : value_block<1, false>;
            for (; h + kHeads <= heads; h += kHeads) {
                any.apart ? chunks[0].ahead->come(padded / kSumColumns * heads / kHeads) : come_nearer(kHeads);
                block(m[i], h, column, chunks[i]);
            }
            for (; h < heads; h++) one(m[i], h, column, chunks[i]);
        }
    }
#endif
    for (const Chunk* c = chunks + begin; c < chunks + queries; c++)
        for (int64_t tile = 0; tile < any.tiles; tile++)
            for (uint32_t alone = c->alone[tile]; alone; alone &= alone - 1) {
                const int64_t h = tile * kTile + __builtin_ctz(alone);
                if (h < heads) add_row(any, rows[c->top_row[h]], c->top[h], c->out + h * padded);
            }
}

// --- all of it

// What a query's chunk weighs. `rows` are whole where the query has as many.
void weigh(const Mla& m, int64_t chunk, const uint8_t* const* rows, Chunk& c) {
    const int64_t span = chunk / m.span_chunks, place = chunk % m.span_chunks, left = m.context - chunk * kChunkRows;
    const int64_t padded = m.tiles * kTile, floats = m.heads * m.r_padded;
    c.n = left < 0 ? 0 : left < kChunkRows ? left : kChunkRows, c.first = place == 0;
    c.out = m.span_out + span * floats;
    if (c.n == 0) return;
    const uint8_t* own[kChunkRows];
    if (c.n < kChunkRows && !m.apart) chunk_rows(m, chunk * kChunkRows, own), rows = own;
    // Another core may have been the last to read the next span's sums; getting them back for writing takes long.
    const bool last = (span + 1) * m.span_chunks * kChunkRows >= m.context;
    for (int64_t i = floats * place / m.span_chunks; !last && i < floats * (place + 1) / m.span_chunks; i += 16)
        Lanes::prefetch_write(c.out + floats + i);
    m.apart ? score_keys(m, c.n, c) : score_chunk(m, rows, c.n, c);
    float *maxima = m.span_max + span * padded, *sums = m.span_sum + span * padded;
    for (int64_t tile = 0; tile < m.tiles; tile++)
        if (!(m.apart ? softmax_heads(m, tile, c.first, c, maxima, sums)
                      : softmax_tile(m, tile, c.n, c.first, c, maxima, sums)))
            scale_down(m, tile, c, c.out);
}

void mla_chunks(const Mla* m, int64_t queries, int64_t begin, int64_t end, uint8_t* scratch) {
    if (begin == end) return;  // a list may be empty
#ifdef SLOTMOE_AMX
    const WholeTiles tiles;
#endif
    Chunk chunks[kShared];
    Ahead ahead{};
    mla_layout(m[0], scratch, chunks);
    for (int64_t i = 0; i < queries; i++) chunks[i].ahead = &ahead;
    const Mla& longest = m[queries - 1];
    const uint8_t* both[2][kChunkRows];  // this chunk's rows and the next one's
    chunk_rows(longest, begin * kChunkRows, both[begin % 2]);
    for (int64_t chunk = begin; chunk < end; chunk++) {
        const uint8_t **rows = both[chunk % 2], **next = both[(chunk + 1) % 2];
        const int64_t rest = longest.context - chunk * kChunkRows, n = rest < kChunkRows ? rest : kChunkRows;
        const uint8_t* behind = rows[0] + kChunkRows * longest.stride;
        ahead = {behind, behind + (rest - n < kChunkRows ? rest - n : kChunkRows) * longest.stride, kTile * longest.stride};
        if (longest.apart) turn_keys(longest, rows, n, chunks[0]);
        for (int64_t i = 0; i < queries; i++) weigh(m[i], chunk, rows, chunks[i]);
        const int64_t left = rest - n;
        chunk_rows(longest, (chunk + 1) * kChunkRows, next);
        sum_values(m, queries, chunks, rows, n, next, longest.apart ? 0 : left < kChunkRows ? left : kChunkRows);
    }
}

void mla_merge(const Mla& m, int64_t begin, int64_t end) {
    const int64_t chunks = (m.context + kChunkRows - 1) / kChunkRows,
                  spans = (chunks + m.span_chunks - 1) / m.span_chunks;
    const int64_t padded = m.tiles * kTile;
    for (int64_t h = begin; h < end; h++) {
        float top = m.sinks ? m.sinks[h] : spans ? m.span_max[h] : 0.0f, sum = 0.0f;
        for (int64_t s = 0; s < spans; s++) top = m.span_max[s * padded + h] > top ? m.span_max[s * padded + h] : top;
        for (int64_t s = 0; s < spans; s++)
            sum += m.span_sum[s * padded + h] * exp_float(m.span_max[s * padded + h] - top);
        if (m.sinks) sum += exp_float(m.sinks[h] - top);
        float *y = m.out + h * m.r, *in = m.span_out + h * m.r_padded;
        if (spans == 0) memset(y, 0, size_t(m.r) * 4);
        for (int64_t s = 0; s < spans; s++, in += m.heads * m.r_padded) {
            const float weight = exp_float(m.span_max[s * padded + h] - top) / sum;
            for (int64_t i = 0; i < m.r; i++) y[i] = (s ? y[i] : 0.0f) + weight * in[i];
        }
        unmix(y, m.r);
    }
}

// The indexer's scores (DeepSeek-V3.2, arXiv 2512.02556): the sum over the heads of weight [heads] * relu(q . row).
void index_scores(const Mla& m, const float* weights, int64_t begin, int64_t end, uint8_t* scratch, float* scores) {
#ifdef SLOTMOE_AMX
    const WholeTiles tiles;
#endif
    Chunk chunks[kShared];
    mla_layout(m, scratch, chunks);
    const Chunk& c = chunks[0];
    const uint8_t* rows[kChunkRows];
    for (int64_t first = begin * kChunkRows; first < end * kChunkRows && first < m.context; first += kChunkRows) {
        const int64_t n = m.context - first < kChunkRows ? m.context - first : kChunkRows;
        chunk_rows(m, first, rows);
        score_chunk(m, rows, n, c);
        F sums[kChunkRows];
        for (int64_t tile = 0; tile < m.tiles; tile++) {
            alignas(64) float weight[kTile] = {};  // 0 in the lanes that no head has
            const int64_t heads = m.heads - tile * kTile < kTile ? m.heads - tile * kTile : kTile;
            memcpy(weight, weights + tile * kTile, size_t(heads) * 4);
            for (int64_t i = 0; i < kChunkRows; i++) {
                // max gives its second for NaN
                const F score = Lanes::max(Lanes::zero(), Lanes::load(c.scores + (tile * kChunkRows + i) * kTile));
                sums[i] = tile ? Lanes::fma(score, Lanes::load(weight), sums[i]) : Lanes::mul(score, Lanes::load(weight));
            }
        }
        alignas(64) float totals[kChunkRows];
        for (int64_t i = 0; i < kChunkRows; i += 16) Lanes::sum_lanes(sums + i, totals + i);
        memcpy(scores + first, totals, size_t(n) * 4);
    }
}

}  // namespace
}  // namespace slotmoe
