// Rows in two digits on the sets `amx` and `amx_plain`: all their products of int8 and coded matrices. Few rows take
// VNNI, many take tiles. The integers are the same, and so are the floats of a coded product and their order:
//   sum over blocks, or halves of blocks that have scales of their own, of scale * float(128 high + low)
//
// A tile of 16 rows of W is a B tile of AMX as it stands, a block at a time. What binds: a product of tiles takes 16
// cycles, storing one 16 more, and beside tiles vector arithmetic has one port. So int8 stays in tiles, and codes leave
// them once a scale, with the arithmetic between the instructions of the next pieces.
//
// Shapes: x blocks [B, T]; y [T, ldy]; R rows of a tile of tokens; a piece is the columns of one scale of weights.
namespace slotmoe {
namespace {

constexpr int64_t kTileTokens = 4;  // from here on tiles are faster, of codes
constexpr int kGroup = 8;           // tiles of tokens that pass over unpacked weights
constexpr int kChunk = 4;           // blocks whose activations and unpacked weights stay in the first-level cache
constexpr int kPanel = 64;          // tiles of float sums that stay in the second-level one
constexpr int kSpan = 8;            // blocks of int8 that stay in the first-level cache
constexpr int kA0 = 4, kA1 = 5, kB0 = 6, kB1 = 7;  // tiles; 0 to 3 are sums
constexpr int kTileSums = kTile * kTileRows;       // of a tile

// T rows as tiles of equally many, which may overlap: each row of x exists, and few are computed twice.
struct TokenTiles {
    int64_t t, rows = kTileRows, count = 0;

    explicit TokenTiles(int64_t t) : t(t) {
        constexpr int64_t kCost = 4;  // of a tile, in rows
        for (int64_t r = kTileRows, least = 0; r >= 4; r -= 4) {
            const int64_t tiles = (t + r - 1) / r, cost = tiles * (r + kCost);
            if (r <= t && (least == 0 || cost < least)) least = cost, rows = r, count = tiles;
        }
    }
    int64_t first(int64_t i) const { return (i + 1) * rows < t ? i * rows : t - rows; }
    void shape(int parts) const {
        TileShapes shapes;
        for (int i = 0; i < 4; i++) shapes.set(i, int(rows), kTileBytes);
        for (int i = kA0; i <= kA1; i++) shapes.set(i, int(rows), kBlock / parts);
        for (int i = kB0; i <= kB1; i++) shapes.set(i, kTileRows / parts, kTileBytes);
        tile_shapes(shapes);
    }
};

// --- int8

// Blocks begin..end of two tiles of W and one of tokens; sums [2 tiles of W, 2 digits], which go on from those before.
inline void int8_span(const int8_t* w0, const int8_t* w1, const FineBlock* x, int64_t t, int64_t begin, int64_t end,
                      bool ahead, int32_t (*sums)[kTileSums]) {
    if (begin == 0) {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    } else {
        tile_load<0>(sums[0], 64), tile_load<1>(sums[1], 64), tile_load<2>(sums[2], 64), tile_load<3>(sums[3], 64);
    }
    for (int64_t b = begin; b < end; b++) {
        const int8_t(*digit)[kBlock] = x[b * t].digit;
        const int8_t *first = w0 + b * kTile * kBlock, *second = w1 + b * kTile * kBlock;
        tile_load<kA0>(digit[0], sizeof *x), tile_load<kB0>(first, 64), tile_dot<int8_t, int8_t, 0, kA0, kB0>();
        tile_load<kA1>(digit[1], sizeof *x), tile_dot<int8_t, int8_t, 1, kA1, kB0>();
        tile_load<kB1>(second, 64), tile_dot<int8_t, int8_t, 2, kA0, kB1>(), tile_dot<int8_t, int8_t, 3, kA1, kB1>();
        if (!ahead) continue;
        prefetch_lines<kTile * kBlock>(first + 4 * kTile * kBlock, false);
        prefetch_lines<kTile * kBlock>(second + 4 * kTile * kBlock, false);
    }
    tile_store<0>(sums[0], 64), tile_store<1>(sums[1], 64), tile_store<2>(sums[2], 64), tile_store<3>(sums[3], 64);
}

void int8_by_tiles(const Int8Matrix& w, const void* blocks, const double* factor, int64_t t, int64_t begin, int64_t end,
                   float* y, int64_t ldy) {
    if (t < kTileTokens) return fine_tiles(w, blocks, factor, t, begin, end, y, ldy);
    const FineBlock* x = static_cast<const FineBlock*>(blocks);
    const TokenTiles tokens(t);
    alignas(64) int32_t sums[kGroup][4][kTileSums];
    tokens.shape(1);
    for (int64_t group = 0; group < tokens.count; group += kGroup) {
        const int64_t last = tokens.count - group < kGroup ? tokens.count : group + kGroup;
        const int64_t span = last - group == 1 ? w.blocks : kSpan;
        for (int64_t i = begin; i < end; i += 2) {
            const int64_t second = i + 1 < end ? i + 1 : i;
            const auto at = [&](int64_t tile) { return w.packed + tile * w.blocks * kTile * kBlock; };
            for (int64_t b = 0; b < w.blocks; b += span) {
                const int64_t stop = w.blocks - b < span ? w.blocks : b + span;
                for (int64_t a = group; a < last; a++) {
                    int32_t(*of_tile)[kTileSums] = sums[a - group];
                    int8_span(at(i), at(second), x + tokens.first(a), t, b, stop, a == group, of_tile);
                    if (stop < w.blocks) continue;
                    for (int64_t tile = i; tile <= second; tile++)
                        for (int64_t row = 0; row < tokens.rows; row++) {
                            const int32_t* high = of_tile[2 * (tile - i)] + row * kTile;
                            const int64_t token = tokens.first(a) + row;
                            write_fine(high, high + kTileSums, w, tile, factor[token], y + token * ldy);
                        }
                }
            }
        }
    }
    tile_release();
}

// --- codes

// An exponent's power of two, which `Lanes::times` wants otherwise, may be less than a normal float.
template <class Tile>
inline void piece_scales(const Tile& tile, F* out) {
    if constexpr (Tile::kSums == Tile::kParts) return tile.load_scales(out);
#pragma GCC unroll 2
    for (int part = 0; part < Tile::kParts; part++) {
        const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(tile.scales) + part));
        out[part] = _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(wide, 23), _mm512_set1_epi32(0x00400000)));
    }
}
inline F add_piece(__m512i high, __m512i low, F scale, F total) {
    return Lanes::fma(Lanes::to_float(_mm512_add_epi32(_mm512_slli_epi32(high, 7), low)), scale, total);
}

// One tile with `Tokens` tokens.
template <class Tile, int Tokens>
SLOTMOE_NOINLINE void coded_tokens(Tile tile, const FineBlock* x, int64_t t, int64_t blocks, float (*totals)[kTile]) {
    constexpr int kParts = Tile::kParts, kPairs = 8 / kParts;
    F total[Tokens] = {};
    for (int64_t b = 0; b < blocks; b++, x += t, tile.next()) {
        F scales[kParts];
        piece_scales(tile, scales);
#pragma GCC unroll 2
        for (int part = 0; part < kParts; part++) {
            Lanes::I dots[Tokens][2][2] = {};  // two sums of a digit side by side
#pragma GCC unroll 4
            for (int i = 0; i < Tokens; i++)
                dots[i][1][0] = Lanes::start(kParts == 2 ? x[i].bias[part] : x[i].bias[0] + x[i].bias[1]);
#pragma GCC unroll 8
            for (int p = part * kPairs; p < (part + 1) * kPairs; p++) {
                W w[2];
                tile.pair(p, w[0], w[1]);
#pragma GCC unroll 8
                for (int i = 0; i < 2 * Tokens; i++)
#pragma GCC unroll 2
                    for (int j = 0; j < 2; j++)
                        dots[i / 2][i % 2][j] =
                            Lanes::dot(dots[i / 2][i % 2][j], w[j], x[i / 2].digit[i % 2] + 8 * p + 4 * j);
            }
#pragma GCC unroll 4
            for (int i = 0; i < Tokens; i++) {
                const auto both = [&](int digit) { return _mm512_add_epi32(dots[i][digit][0], dots[i][digit][1]); };
                total[i] = add_piece(both(0), both(1), scales[part], total[i]);
            }
        }
        tile.prefetch();
    }
    for (int i = 0; i < Tokens; i++) Lanes::store(totals[i], total[i]);
}

// Some pieces of one tile of W, unpacked, and sums of every other piece, of both digits.
struct Pieces {
    int64_t count;
    W weights[kChunk * 16];  // 4 columns each
    F scale[2 * kChunk];
    alignas(64) int32_t sums[2][2][kTileSums];
};

template <int C, int Digit>
SLOTMOE_TILE void dot_digit(const W* weights, const int8_t* digits) {
    if (Digit == 0) tile_load<kB0>(weights, 64);
    tile_load<kA0 + Digit>(digits + Digit * kBlock, sizeof(FineBlock));
    tile_zero<C + Digit>(), tile_dot<int8_t, int8_t, C + Digit, kA0 + Digit, kB0>();
}

// Rows Begin to End of a piece.
template <int Begin, int End>
SLOTMOE_TILE void add_rows(const int32_t (*sums)[kTileSums], F scale, F* total) {
#pragma GCC unroll 16
    for (int r = Begin; r < End; r++) {
        const __m512i high = _mm512_load_si512(sums[0] + kTile * r), low = _mm512_load_si512(sums[1] + kTile * r);
        total[r] = add_piece(high, low, scale, total[r]);
    }
}

// Three pieces are on their way: while piece i is multiplied, in the sums of tiles C and C + 1, the tiles of the one
// before are stored, and those before that become floats.
template <int C, int Rows>
SLOTMOE_TILE void step(int64_t i, int64_t count, const W* weights, const int8_t* digits, Pieces& pieces, F scale,
                       F* total) {
    constexpr int kBefore = 2 - C, kQuarter = Rows / 4;
    const bool multiplies = i < count, stores = i > 0 && i <= count, adds = i > 1;
    int32_t(*sums)[kTileSums] = pieces.sums[C / 2], (*store)[kTileSums] = pieces.sums[1 - C / 2];
    if (multiplies) dot_digit<C, 0>(weights, digits);
    if (adds) add_rows<0, kQuarter>(sums, scale, total);
    if (stores) tile_store<kBefore>(store[0], 64);
    if (adds) add_rows<kQuarter, 2 * kQuarter>(sums, scale, total);
    if (multiplies) dot_digit<C, 1>(weights, digits);
    if (adds) add_rows<2 * kQuarter, 3 * kQuarter>(sums, scale, total);
    if (stores) tile_store<kBefore + 1>(store[1], 64);
    if (adds) add_rows<3 * kQuarter, Rows>(sums, scale, total);
}

// Tiles of tokens group..last times `pieces`, on top of totals [tiles, R, 16] or, `first`, from zero.
template <int Parts, int Rows>
SLOTMOE_NOINLINE void multiply_pieces(Pieces& pieces, const FineBlock* x, const TokenTiles& tokens, int64_t group,
                                      int64_t last, bool first, float (*totals)[kTileSums]) {
    const int64_t each = pieces.count, count = (last - group) * each;
    int64_t piece = 0, tile = group, added = 0;
    F total[Rows];
    for (int64_t i = 0; i < count + 2; i++) {
        const W* weights = pieces.weights + piece * (16 / Parts);
        const int8_t* digits = x[tokens.first(tile) + piece / Parts * tokens.t].digit[0] + piece % Parts * (kBlock / 2);
        if (added == 0)
#pragma GCC unroll 16
            for (int r = 0; r < Rows; r++) total[r] = first ? Lanes::zero() : Lanes::load(*totals + kTile * r);
        if (i % 2)
            step<2, Rows>(i, count, weights, digits, pieces, pieces.scale[added], total);
        else
            step<0, Rows>(i, count, weights, digits, pieces, pieces.scale[added], total);
        if (++piece == each) piece = 0, tile++;
        if (i < 2 || ++added < each) continue;
#pragma GCC unroll 16
        for (int r = 0; r < Rows; r++) Lanes::store(*totals + kTile * r, total[r]);
        totals++, added = 0;
    }
}

inline Lanes::Table signed_table(const Lanes::Table& table) {
    const __m512i offset = _mm512_set1_epi8(-128);
    return {_mm512_xor_si512(table.low, offset), _mm512_xor_si512(table.high, offset)};
}

// finish(token, tile, totals[16]) receives each result.
template <class Tile, class At, class Finish>
inline void multiply(At at, const FineBlock* x, int64_t t, int64_t blocks, int64_t begin, int64_t end, Finish finish) {
    constexpr int kParts = Tile::kParts;
    alignas(64) float totals[kPanel][kTileSums];
    if (t < kTileTokens) {
        for (int64_t i = begin; i < end; i++) {
            float(*rows)[kTile] = reinterpret_cast<float(*)[kTile]>(totals);
            if (t == 1) coded_tokens<Tile, 1>(at(i), x, t, blocks, rows);
            if (t == 2) coded_tokens<Tile, 2>(at(i), x, t, blocks, rows);
            if (t == 3) coded_tokens<Tile, 3>(at(i), x, t, blocks, rows);
            for (int64_t token = 0; token < t; token++) finish(token, i, rows[token]);
        }
        return;
    }
    const TokenTiles tokens(t);
    const auto run = tokens.rows == 16   ? multiply_pieces<kParts, 16>
                     : tokens.rows == 12 ? multiply_pieces<kParts, 12>
                     : tokens.rows == 8  ? multiply_pieces<kParts, 8>
                                         : multiply_pieces<kParts, 4>;
    Pieces pieces;
    tokens.shape(kParts);
    for (int64_t group = 0; group < tokens.count; group += kGroup) {
        const int64_t last = tokens.count - group < kGroup ? tokens.count : group + kGroup, tiles = last - group;
        for (int64_t panel = begin, stop; panel < end; panel = stop) {
            stop = panel + kPanel / tiles < end ? panel + kPanel / tiles : end;
            for (int64_t b = 0; b < blocks; b += kChunk) {
                const int64_t count = blocks - b < kChunk ? blocks - b : kChunk;
                pieces.count = count * kParts;
                for (int64_t i = panel; i < stop; i++) {
                    Tile tile = at(i);
                    tile.table = signed_table(tile.table), tile.next(b);
                    for (int64_t block = 0; block < count; block++, tile.next()) {
                        W* to = pieces.weights + 16 * block;
#pragma GCC unroll 8
                        for (int p = 0; p < 8; p++) tile.pair(p, to[2 * p], to[2 * p + 1]);
                        piece_scales(tile, pieces.scale + block * kParts);
                        Tile ahead = tile;  // of the next tile, or behind the panel's last one of the next chunk
                        ahead.next(i + 1 < stop ? blocks : count - (stop - 1 - panel) * blocks);
                        for (int line = 0; line < Tile::kBytes; line += 64) Lanes::prefetch_to_l2(ahead.codes + line);
                        Lanes::prefetch_to_l2(ahead.scales);
                    }
                    float(*sums)[kTileSums] = totals + (i - panel) * tiles;
                    run(pieces, x + b * t, tokens, group, last, b == 0, sums);
                    if (b + count < blocks) continue;
                    for (int64_t a = 0; a < tiles; a++)
                        for (int64_t row = 0; row < tokens.rows; row++)
                            finish(tokens.first(group + a) + row, i, sums[a] + kTile * row);
                }
            }
        }
    }
    tile_release();
}

}  // namespace
}  // namespace slotmoe
