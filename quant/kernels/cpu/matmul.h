// Quantized matrix times rows of activations. The integers are exact; the floats follow one order for one row and for
// many:
//   sum over blocks of scale * (((d0 s0 + d1 s1) + d2 s2) + d3 s3), d = int32 dot of 16 columns, s = x's scale,
// where a block has 64 columns, or 32 with two terms. Scales that are powers of two multiply each d instead, which is
// exact, and a block has 64 columns with the scales of two halves.
//
// Shapes: W tiles of 16 rows; x blocks [B, T]; y [T, ldy].
#ifndef SLOTMOE_DOT_ONCE
#define SLOTMOE_DOT_ONCE Lanes::dot
#endif

namespace slotmoe {
namespace {

using W = Lanes::W;

// tokens that pass over a decoded block: their sums (8 KB a tile) and activations (12 KB) stay near
constexpr int kTokens = 128;
constexpr int kPrefetch = 6144;    // bytes ahead
constexpr int kPages = 16384;      // where lines start the processor's own prefetching of a page,
constexpr int kStarts = 256;       // one of so many bytes (decode is 2 to 5% faster than with one of 1,024)

// Lines kPrefetch ahead. Those of one tile alone, for few tokens, wait for memory: the second-level cache has more of them
// on their way at once than the first.
template <int Bytes, bool Alone = false>
inline void prefetch_lines(const void* p) {
    const char* at = static_cast<const char*>(p);
#pragma GCC unroll 16
    for (int line = 0; line < Bytes; line += 64) {
        Alone ? Lanes::prefetch_to_l2(at + line) : Lanes::prefetch_to_l1(at + line);
        if (Alone && line % kStarts == 0 && Bytes > 64) Lanes::prefetch_to_l2(at + line + kPages - kPrefetch);
    }
}

// Scales of 64 or 32 columns in fp16, or of 32 in 8 bits: kParts of a block's 64 columns.
template <int Parts>
struct HalfScales {
    static constexpr int kParts = Parts, kSums = Parts, kBytes = 2 * kTile * Parts;  // of a block
    static void load(const uint8_t* p, F* out) {
#pragma GCC unroll 2
        for (int part = 0; part < Parts; part++)
            out[part] = Lanes::load_half(reinterpret_cast<const uint16_t*>(p) + kTile * part);
    }
    static constexpr int kRows = 0;  // bytes of factors of rows that come first
};
struct ByteScales {
    static constexpr int kParts = 2, kSums = 2, kBytes = 2 * kTile;
    static void load(const uint8_t* p, F* out) { Lanes::load_int8s(p, out); }
    static constexpr int kRows = 64;
};
struct NibbleScales {  // of 32 in 4 bits: low halves of bytes are of the first 32 columns
    static constexpr int kParts = 2, kSums = 2, kBytes = kTile;
    static void load(const uint8_t* p, F* out) { Lanes::load_int4s(p, out); }
    static constexpr int kRows = 64;
};
// Of 32 in 8 bits that are a float's exponent. One multiplication less than 64 columns with a scale of their own take.
struct ExponentScales {
    static constexpr int kParts = 2, kSums = 1, kBytes = 2 * kTile;
    static void load(const uint8_t* p, F* out) { Lanes::load_exponents(p, out); }
    static constexpr int kRows = 0;
};

template <int Bits, class Scales>
struct CodedTile {
    static constexpr int kBytes = 128 * Bits, kParts = Scales::kParts, kSums = Scales::kSums;
    static constexpr int kLow = Bits == 2 ? 2 : Bits > 4 ? Bits - 4 : 0;  // bits of the plane with fewer than 4
    static constexpr int kAhead = kPrefetch / kBytes, kFew = 4;
    const uint8_t *codes, *scales;
    Lanes::Table table;

    void pair(int t, W& first, W& second) const {
        if constexpr (Bits == 3) return Lanes::lookup3(codes + 192 * (t / 4), t % 4, table, first, second);
        if constexpr (Bits >= 4) Lanes::lookup(codes + 64 * t, table, first, second);
        if constexpr (kLow > 0) {
            constexpr int kEach = 4 / kLow, kMask = (1 << kLow) - 1;
            const uint8_t* plane = codes + (Bits == 2 ? 0 : 512) + 64 * (t / kEach);
            const W low = Lanes::shifted(Lanes::plane(plane), 2 * kLow * (t % kEach)), next = Lanes::shifted(low, kLow);
            if constexpr (Bits == 2)
                first = Lanes::at(table, low), second = Lanes::at(table, next);
            else
                Lanes::add_low(first, low, kMask), Lanes::add_low(second, next, kMask);
        }
    }
    void load_scales(F* out) const { Scales::load(scales, out); }
    static F number(const Lanes::I& dot, F scale) {
        return kSums < kParts ? Lanes::times(dot, scale) : Lanes::to_float(dot);
    }
    static F accumulate(F total, F sum, F scale) {
        return kSums < kParts ? Lanes::add(total, sum) : Lanes::fma(sum, scale, total);
    }
    // The block kAhead after this one, or one `skipped` blocks, of a tile, behind that.
    template <bool Alone = true>
    void prefetch(int64_t skipped = 0) const {
        prefetch_lines<kBytes, Alone>(codes + (kAhead + skipped) * kBytes);
        prefetch_lines<1, Alone>(scales + (kAhead + skipped) * Scales::kBytes + (skipped ? 2 * Scales::kRows : 0));
    }
    void next(int64_t blocks = 1) { codes += blocks * kBytes, scales += blocks * Scales::kBytes; }
};

struct Int8Tile {
    static constexpr int kBytes = 1024, kParts = 1, kSums = 1, kAhead = kPrefetch / kBytes, kFew = 8;
    const int8_t* packed;

    void pair(int t, W& first, W& second) const {
        first = Lanes::weights(packed + 128 * t), second = Lanes::weights(packed + 128 * t + 64);
    }
    void load_scales(F* out) const { *out = Lanes::zero(); }  // its scale is per row, applied at the end
    static F number(const Lanes::I& dot, F) { return Lanes::to_float(dot); }
    static F accumulate(F total, F sum, F) { return Lanes::add(total, sum); }
    template <bool Alone = true>
    void prefetch(int64_t skipped = 0) const {
        prefetch_lines<kBytes, Alone>(packed + (kAhead + skipped) * kBytes);
    }
    void next() { packed += kBytes; }
};

// The parts of kXBlock columns that are summed up before `accumulate`, and those that share a weight's scale.
template <class Tile>
constexpr int kShare = kXScales / Tile::kSums;
template <class Tile>
constexpr int kOfScale = kXScales / Tile::kParts;

// Where the registers hold it, four sums of products go on side by side, and become floats when the next block's first
// weights have been looked up: what waits for a result before it holds an entry of the schedulers.
template <class Tile>
inline F one_token(Tile tile, const ActBlock* x, int64_t blocks) {
    constexpr bool kLater = Lanes::kTokensAtOnce == kXScales;
    constexpr int kChains = kLater ? kXScales : 1;
    F total = Lanes::zero(), scales[Tile::kParts] = {};
    Lanes::I dots[kXScales] = {};
    const auto add = [&](const ActBlock& block) {
#pragma GCC unroll 2
        for (int part = 0; part < Tile::kSums; part++) {
            constexpr int share = kShare<Tile>;
            const auto number = [&](int j) { return Tile::number(dots[j], scales[j / kOfScale<Tile>]); };
            F sum = Lanes::mul(number(part * share), Lanes::broadcast(block.scale[part * share]));
#pragma GCC unroll 4
            for (int j = part * share + 1; j < (part + 1) * share; j++)
                sum = Lanes::fma(number(j), Lanes::broadcast(block.scale[j]), sum);
            total = Tile::accumulate(total, sum, scales[part]);
        }
    };
    for (int64_t b = 0; b < blocks; b++, tile.next()) {
#pragma GCC unroll 4
        for (int first = 0; first < kXScales; first += kChains)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
                for (int j = first; j < first + kChains; j++) {
                    W w[2];
                    tile.pair(2 * j + half, w[0], w[1]);
                    if (kLater && half + j == 0 && b) add(x[b - 1]);
                    if (half == 0 && j == first)
#pragma GCC unroll 4
                        for (int chain = first; chain < first + kChains; chain++)
                            dots[chain] = Lanes::start(x[b].bias[chain]);
#pragma GCC unroll 2
                    for (int i = 0; i < 2; i++)
                        dots[j] = SLOTMOE_DOT_ONCE(dots[j], w[i], x[b].q + 16 * j + 8 * half + 4 * i);
                }
        tile.prefetch();
        tile.load_scales(scales);
        if (!kLater) add(x[b]);
    }
    if (kLater) add(x[blocks - 1]);
    return total;
}

// As one_token, of a few tokens: a weight is looked up for all of them, and memory is read as evenly.
template <class Tile, int Tokens>
SLOTMOE_NOINLINE void few_tokens(Tile tile, const ActBlock* x, int64_t blocks, float* totals) {
    F total[Tokens] = {}, sums[Tokens], scales[Tile::kParts];
    for (int64_t b = 0; b < blocks; b++, tile.next(), x += Tokens) {
        tile.load_scales(scales);
#pragma GCC unroll 4
        for (int j = 0; j < kXScales; j++) {
            W w[4];
            tile.pair(2 * j, w[0], w[1]), tile.pair(2 * j + 1, w[2], w[3]);
#pragma GCC unroll 8
            for (int i = 0; i < Tokens; i++) {
                Lanes::I dot = Lanes::start(x[i].bias[j]);
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++) dot = SLOTMOE_DOT_ONCE(dot, w[c], x[i].q + 16 * j + 4 * c);
                const F d = Tile::number(dot, scales[j / kOfScale<Tile>]), s = Lanes::broadcast(x[i].scale[j]);
                sums[i] = j % kShare<Tile> == 0 ? Lanes::mul(d, s) : Lanes::fma(d, s, sums[i]);
                if ((j + 1) % kShare<Tile> == 0) total[i] = Tile::accumulate(total[i], sums[i], scales[j / kShare<Tile>]);
            }
        }
        tile.prefetch();
    }
#pragma GCC unroll 8
    for (int i = 0; i < Tokens; i++) Lanes::store(totals + i * kTile, total[i]);
}

// What multiplies so many tokens, up to Most.
template <class Tile, int Most>
constexpr decltype(&few_tokens<Tile, 1>) run_of(int64_t tokens) {
    if constexpr (Most > 2)
        if (tokens < Most) return run_of<Tile, Most - 1>(tokens);
    return few_tokens<Tile, Most>;
}

// One block of `Tiles` tiles, decoded, for `Tokens` tokens: each weight that is loaded serves all tokens, each
// activation all tiles.
template <class Tile, int Tiles, int Tokens>
inline void add_block(const W (*w)[16], const F (*scale)[Tile::kParts], const ActBlock* x, float* totals) {
    F sums[Tiles][Tokens];
#pragma GCC unroll 4
    for (int j = 0; j < kXScales; j++) {
        // Two tiles' weights are loaded for each use: where compilers keep some in registers, sums go to memory.
        if (Tiles > 1) asm("" : "+r"(w));
        Lanes::I dots[Tiles][Tokens];
#ifdef SLOTMOE_TWO_TOKENS  // isa_neon.cpp: an instruction multiplies two tokens
        dot_tokens<Tiles, Tokens>(w, x, j, dots);
#else
#pragma GCC unroll 4
        for (int i = 0; i < Tokens; i++)
#pragma GCC unroll 2
            for (int a = 0; a < Tiles; a++) dots[a][i] = Lanes::start(x[i].bias[j]);
#pragma GCC unroll 4
        for (int c = 4 * j; c < 4 * j + 4; c++)
#pragma GCC unroll 4
            for (int i = 0; i < Tokens; i++)
#pragma GCC unroll 2
                for (int a = 0; a < Tiles; a++) dots[a][i] = Lanes::dot(dots[a][i], w[a][c], x[i].q + 4 * c);
#endif
#pragma GCC unroll 4
        for (int i = 0; i < Tokens; i++) {
            const F s = Lanes::broadcast(x[i].scale[j]);
#pragma GCC unroll 2
            for (int a = 0; a < Tiles; a++) {
                const F d = Tile::number(dots[a][i], scale[a][j / kOfScale<Tile>]);
                sums[a][i] = j % kShare<Tile> == 0 ? Lanes::mul(d, s) : Lanes::fma(d, s, sums[a][i]);
            }
        }
        if ((j + 1) % kShare<Tile> != 0) continue;
#pragma GCC unroll 2
        for (int a = 0; a < Tiles; a++)
#pragma GCC unroll 4
            for (int i = 0; i < Tokens; i++) {
                float* total = totals + (a * kTokens + i) * kTile;
                const F of_sum = scale[a][j / kShare<Tile>];
                Lanes::store(total, Tile::accumulate(Lanes::load(total), sums[a][i], of_sum));
            }
    }
}

// `Tiles` neighbouring tiles from the one at index i for n <= kTokens tokens of t: totals [Tiles, kTokens, 16].
template <class Tile, int Tiles, class At>
SLOTMOE_NOINLINE void many_tokens(const At& at, int64_t i, const ActBlock* x, int64_t t, int64_t n, int64_t blocks,
                                  float* totals) {
    constexpr int kAtOnce = Lanes::kTokensAtOnce;
    for (int a = 0; a < Tiles; a++) memset(totals + a * kTokens * kTile, 0, size_t(n) * kTile * sizeof(float));
    Tile first = at(i), second = at(i + Tiles - 1);
    for (int64_t b = 0; b < blocks; b++, first.next(), second.next(), x += t) {
        alignas(64) W w[Tiles][16];
        F scale[Tiles][Tile::kParts];
#pragma GCC unroll 2
        for (int a = 0; a < Tiles; a++) {
            const Tile& tile = a == 0 ? first : second;
#pragma GCC unroll 8
            for (int c = 0; c < 8; c++) tile.pair(c, w[a][2 * c], w[a][2 * c + 1]);
#ifdef SLOTMOE_TWO_TOKENS
            for (int c = 0; c < 8; c++) join_columns(w[a][2 * c], w[a][2 * c + 1]);
#endif
            tile.load_scales(scale[a]);
            // Behind the first tile's end comes the second one, which is being read: the next two lie behind that.
            tile.template prefetch<Tiles == 1>(Tiles > 1 && b + Tile::kAhead >= blocks ? blocks : 0);
        }
        int64_t token = 0;
        for (; token + kAtOnce <= n; token += kAtOnce)
            add_block<Tile, Tiles, kAtOnce>(w, scale, x + token, totals + token * kTile);
        if constexpr (kAtOnce > 2)
            for (; token + 2 <= n; token += 2) add_block<Tile, Tiles, 2>(w, scale, x + token, totals + token * kTile);
        for (; token < n; token++) add_block<Tile, Tiles, 1>(w, scale, x + token, totals + token * kTile);
    }
}

// finish(token, tile, totals[16]) receives each result.
template <class Tile, class At, class Finish>
inline void multiply(At at, const ActBlock* x, int64_t t, int64_t blocks, int64_t begin, int64_t end, Finish finish) {
    constexpr int kTiles = Lanes::kTilesAtOnce;
    constexpr int kFew = kTiles == 1 ? 1 : Tile::kFew;  // others' registers hold too little
    // Where registers pass in halves, multiply-adds bind instead of loads.
    const bool halves = kTiles > 1 && in_halves();
    alignas(64) float totals[kTiles * kTokens * kTile];
    if (t == 1) {
        for (int64_t i = begin; i < end; i++) {
            Lanes::store(totals, one_token(at(i), x, blocks));
            finish(0, i, totals);
        }
        return;
    }
    if constexpr (kFew > 1)
        if (t <= kFew) {
            const auto run = run_of<Tile, kFew>(t);
            for (int64_t i = begin; i < end; i++) {
                run(at(i), x, blocks, totals);
                for (int64_t token = 0; token < t; token++) finish(token, i, totals + token * kTile);
            }
            return;
        }
    for (int64_t first = 0; first < t; first += kTokens) {
        const int64_t n = t - first < kTokens ? t - first : kTokens;
        for (int64_t i = begin, tiles; i < end; i += tiles) {
            tiles = n <= kFew || end - i < kTiles || halves ? 1 : kTiles;
            if (tiles == 1)
                many_tokens<Tile, 1>(at, i, x + first, t, n, blocks, totals);
            else
                many_tokens<Tile, kTiles>(at, i, x + first, t, n, blocks, totals);
            for (int64_t a = 0; a < tiles; a++)
                for (int64_t token = 0; token < n; token++)
                    finish(first + token, i + a, totals + (a * kTokens + token) * kTile);
        }
    }
}

// body(lane) for those of a tile's lanes that are among the `left` rows; so many as a tile has become vectors.
template <class Body>
inline void each_lane(int64_t left, Body body) {
    for (int64_t lane = 0; lane < left && left < kTile; lane++) body(lane);
    for (int64_t lane = 0; lane < kTile && left >= kTile; lane++) body(lane);
}

// The first `left` of a tile's results, times the rows' own factors unless those are null. Doubles, so that no order of
// huge and tiny factors overflows on the way.
inline void write(const float* totals, const float* rows, int64_t left, double factor, float* __restrict y) {
    if (rows) return each_lane(left, [&](int64_t i) { y[i] = float(double(totals[i]) * (double(rows[i]) * factor)); });
    each_lane(left, [&](int64_t i) { y[i] = float(double(totals[i]) * factor); });
}

template <int Bits, class Scales, class Block>
inline void coded_tiles_of(const CodedMatrix& w, const Levels& levels, const Block* x, const double* factor,
                           int64_t t, int64_t begin, int64_t end, float* y, int64_t ldy) {
    using Tile = CodedTile<Bits, Scales>;
    const Lanes::Table table = Lanes::table(levels.q);
    const auto at = [&](int64_t i) { return Tile{w.tile_codes(i), w.tile_scales(i) + Scales::kRows, table}; };
    multiply<Tile>(at, x, t, w.blocks, begin, end, [&](int64_t token, int64_t i, const float* totals) {
        const float* rows = Scales::kRows ? reinterpret_cast<const float*>(w.tile_scales(i)) : nullptr;
        write(totals, rows, w.n - i * kTile, factor[token] * levels.step, y + token * ldy + i * kTile);
    });
}

template <class Block>
void coded_tiles(const CodedMatrix& w, const Levels& levels, const void* blocks, const double* factor, int64_t t,
                 int64_t begin, int64_t end, float* y, int64_t ldy) {
    const Block* x = static_cast<const Block*>(blocks);
    if (w.kind == kNf4) return coded_tiles_of<4, HalfScales<1>>(w, levels, x, factor, t, begin, end, y, ldy);
    if (w.kind == kInt4) return coded_tiles_of<4, HalfScales<2>>(w, levels, x, factor, t, begin, end, y, ldy);
    if (w.kind == kMxfp4) return coded_tiles_of<4, ExponentScales>(w, levels, x, factor, t, begin, end, y, ldy);
    if (w.kind == kLut4) return coded_tiles_of<4, ByteScales>(w, levels, x, factor, t, begin, end, y, ldy);
    if (w.kind == kLut2) return coded_tiles_of<2, NibbleScales>(w, levels, x, factor, t, begin, end, y, ldy);
    if (w.kind == kInt5) return coded_tiles_of<5, ByteScales>(w, levels, x, factor, t, begin, end, y, ldy);
    if (w.kind == kInt6) return coded_tiles_of<6, ByteScales>(w, levels, x, factor, t, begin, end, y, ldy);
    coded_tiles_of<3, ByteScales>(w, levels, x, factor, t, begin, end, y, ldy);
}

void int8_tiles(const Int8Matrix& w, const void* blocks, const double* factor, int64_t t, int64_t begin, int64_t end,
                float* y, int64_t ldy) {
    const ActBlock* x = static_cast<const ActBlock*>(blocks);
    const auto at = [&](int64_t i) { return Int8Tile{w.packed + i * w.blocks * Int8Tile::kBytes}; };
    multiply<Int8Tile>(at, x, t, w.blocks, begin, end, [&](int64_t token, int64_t i, const float* totals) {
        write(totals, w.scale + i * kTile, w.n - i * kTile, factor[token], y + token * ldy + i * kTile);
    });
}

}  // namespace
}  // namespace slotmoe
