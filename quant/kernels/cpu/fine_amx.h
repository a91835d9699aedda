// Rows in two digits by AMX. Few rows take VNNI, many take tiles. The integers are the same, and so are the floats of a
// coded product and their order: sum over the pieces of scale * float(128 high + low).
//
// A tile of 16 rows of W is a B tile of AMX as it stands, a block at a time. What binds: a product of tiles takes 16
// cycles, storing one 16 more, and beside tiles vector arithmetic has one port. So int8 stays in tiles, and codes leave
// them once a scale, with the arithmetic between the instructions of the next pieces.
//
// Shapes: x blocks [B, T]; y [T, ldy]; R rows of a tile of tokens; a piece is the columns of one scale of weights.
namespace slotmoe {
namespace {

constexpr int64_t kTileTokens = 8;  // from here on tiles are faster, of int8; of codes from 6 on
constexpr int kGroup = 8;           // tiles of tokens that pass over unpacked weights
constexpr int kChunk = 4;           // blocks whose activations and unpacked weights stay in the first-level cache
constexpr int kPanel = 64;          // tiles of float sums that stay in the second-level one
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

// Two tiles of W and one of tokens -> sums [2 tiles of W, 2 digits].
inline void int8_sums(const int8_t* w0, const int8_t* w1, const FineBlock* x, int64_t t, int64_t blocks, bool ahead,
                      int32_t (*sums)[kTileSums]) {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (int64_t b = 0; b < blocks; b++, x += t, w0 += kTile * kBlock, w1 += kTile * kBlock) {
        tile_load<kA0>(x->digit[0], sizeof *x), tile_load<kB0>(w0, 64), tile_dot<int8_t, int8_t, 0, kA0, kB0>();
        tile_load<kA1>(x->digit[1], sizeof *x), tile_dot<int8_t, int8_t, 1, kA1, kB0>();
        tile_load<kB1>(w1, 64), tile_dot<int8_t, int8_t, 2, kA0, kB1>(), tile_dot<int8_t, int8_t, 3, kA1, kB1>();
        for (int row = 0; row < kTileRows; row++) prefetch_lines<2 * kBlock>(x + t + row);
        constexpr int kSize = kTile * kBlock;
        if (ahead) prefetch_lines<kSize>(w0 + 4 * kSize), prefetch_lines<kSize>(w1 + 4 * kSize);
    }
    tile_store<0>(sums[0], 64), tile_store<1>(sums[1], 64), tile_store<2>(sums[2], 64), tile_store<3>(sums[3], 64);
}

void int8_by_tiles(const Int8Matrix& w, const void* blocks, const double* factor, int64_t t, int64_t begin, int64_t end,
                   float* y, int64_t ldy) {
    const int64_t fewest = w.blocks < 16 ? kTileTokens + 1 : kTileTokens;
    if (t < fewest) return fine_tiles(w, blocks, factor, t, begin, end, y, ldy);
    const FineBlock* x = static_cast<const FineBlock*>(blocks);
    const TokenTiles tokens(t);
    alignas(64) int32_t sums[4][kTileSums];
    tokens.shape(1);
    for (int64_t group = 0; group < tokens.count; group += kGroup)
        for (int64_t i = begin; i < end; i += 2)
            for (int64_t a = group; a < tokens.count && a < group + kGroup; a++) {
                const int64_t second = i + 1 < end ? i + 1 : i, first = tokens.first(a);
                const auto at = [&](int64_t tile) { return w.packed + tile * w.blocks * kTile * kBlock; };
                int8_sums(at(i), at(second), x + first, t, w.blocks, a == group, sums);
                for (int64_t tile = i; tile <= second; tile++)
                    for (int64_t row = 0; row < tokens.rows; row++) {
                        const int32_t* high = sums[2 * (tile - i)] + row * kTile;
                        write_fine(high, high + kTileSums, w, tile, factor[first + row], y + (first + row) * ldy);
                    }
            }
    tile_release();
}

// --- codes

template <class Tile>
inline void piece_scales(const Tile& tile, F* out) {
    tile.load_scales(out);
#pragma GCC unroll 2
    for (int part = 0; Tile::kSums < Tile::kParts && part < Tile::kParts; part++)
        out[part] = Tile::number(Lanes::start(1), out[part]);  // of an exponent its power of two
}
inline F add_piece(__m512i high, __m512i low, F scale, F total) {
    return Lanes::fma(Lanes::to_float(_mm512_add_epi32(_mm512_slli_epi32(high, 7), low)), scale, total);
}

// A few tokens. Sums become floats when the next piece's first weights have been looked up, as in `one_token`.
template <class Tile, int Tokens, class At, class Finish>
SLOTMOE_NOINLINE void coded_tokens(At at, const FineBlock* x, int64_t t, int64_t blocks, int64_t begin, int64_t end,
                                   Finish finish) {
    constexpr int kParts = Tile::kParts, kPairs = 8 / kParts;
    for (int64_t i = begin; i < end; i++) {
        Tile tile = at(i);
        F total[Tokens] = {}, scale = Lanes::zero();
        Lanes::I dots[Tokens][2][2] = {};  // two sums of a digit side by side
        const auto add = [&] {
            const auto both = [](const Lanes::I* two) { return _mm512_add_epi32(two[0], two[1]); };
#pragma GCC unroll 8
            for (int token = 0; token < Tokens; token++)
                total[token] = add_piece(both(dots[token][0]), both(dots[token][1]), scale, total[token]);
        };
        const FineBlock* block = x;
        for (int64_t b = 0; b < blocks; b++, block += t, tile.next()) {
            F scales[kParts];
            piece_scales(tile, scales);
#pragma GCC unroll 8
            for (int p = 0; p < 8; p++) {
                W w[2];
                tile.pair(p, w[0], w[1]);
                if (p % kPairs == 0) {
                    if (b || p) add();
                    scale = scales[p / kPairs];
#pragma GCC unroll 8
                    for (int token = 0; token < Tokens; token++) {
                        const int32_t* bias = block[token].bias;
                        dots[token][0][0] = dots[token][0][1] = dots[token][1][1] = Lanes::start(0);
                        dots[token][1][0] = Lanes::start(kParts == 2 ? bias[p / kPairs] : bias[0] + bias[1]);
                    }
                }
#pragma GCC unroll 32
                for (int k = 0; k < 4 * Tokens; k++) {
                    Lanes::I& dot = dots[k / 4][k / 2 % 2][k % 2];
                    dot = Lanes::dot_once(dot, w[k % 2], block[k / 4].digit[k / 2 % 2] + 8 * p + 4 * (k % 2));
                }
            }
            tile.prefetch();
        }
        add();
        for (int token = 0; token < Tokens; token++) {
            alignas(64) float row[kTile];
            Lanes::store(row, total[token]), finish(token, i, row);
        }
    }
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
    if (t == 1) return coded_tokens<Tile, 1>(at, x, t, blocks, begin, end, finish);
    if (t == 2) return coded_tokens<Tile, 2>(at, x, t, blocks, begin, end, finish);
    if (t == 3) return coded_tokens<Tile, 3>(at, x, t, blocks, begin, end, finish);
    if (t == 4) return coded_tokens<Tile, 4>(at, x, t, blocks, begin, end, finish);
    if (t == 5) return coded_tokens<Tile, 5>(at, x, t, blocks, begin, end, finish);
    alignas(64) float totals[kPanel][kTileSums];
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
