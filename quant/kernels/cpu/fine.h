// Products whose activations have 15 bits: two int8 digits under one scale a row, x = (128 high + low) * factor. Their
// sums of integers are exact and leave no order to floats before the row's end. So a row's result is the same alone or
// among others, and on every instruction set.
//
// Shapes: x [T, K]; blocks [B, T]; W tiles of 16 rows; y [T, ldy].
namespace slotmoe {
namespace {

constexpr float kMostFine = 16256.0f;  // 128 * 127: both digits fit 8 bits

// One block of a row; v times both factors are integers within kMostFine. `sums` of digits, of the blocks before.
inline void fine_block(const float* v, float first, float second, FineBlock* out, int32_t* sums) {
    int32_t q[kBlock], of_digits[2] = {}, halves[2] = {};
    for (int i = 0; i < kBlock; i++) q[i] = int32_t(round_even(v[i] * first * second));
    for (int i = 0; i < kBlock; i++) {
        const int32_t high = (q[i] + 64) >> 7, low = q[i] - 128 * high;
        out->digit[0][i] = int8_t(high), out->digit[1][i] = int8_t(low);
        of_digits[0] += high, of_digits[1] += low;
    }
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < kBlock / 2; i++) halves[half] += q[half * kBlock / 2 + i];
    for (int i = 0; i < 2; i++) {
        out->sum[i] = sums[i] += of_digits[i];
        out->bias[i] = -Lanes::kWeightOffset * halves[i];
    }
}

// No levels of weights have an offset here.
void quantize_fine(const float* x, int64_t k, int64_t begin, int64_t end, int64_t t, float, void* blocks,
                   double* factor) {
    for (int64_t row = begin; row < end; row++) {
        const float* in = x + row * k;
        const uint32_t top = max_bits(in, k);
        const double largest = top < kInfinityBits ? double(bits_float(top)) : double(bits_float(0x7fc00000));
        factor[row] = largest / double(kMostFine);
        float first = 0.0f, second = 0.0f;  // their product may not be a float
        if (largest > 0.0) {
            first = power_of_two((127 - int(top >> 23)) / 2);
            second = float(double(kMostFine) / largest / double(first));
        }
        int32_t sums[2] = {};
        for (int64_t column = 0; column < k; column += kBlock) {
            alignas(64) float v[kBlock] = {};
            if (largest > 0.0) memcpy(v, in + column, size_t(k - column < kBlock ? k - column : kBlock) * sizeof *v);
            fine_block(v, first, second, static_cast<FineBlock*>(blocks) + column / kBlock * t + row, sums);
        }
    }
}

// 128 times sums of high digits and those of low ones, of the rows of a tile; y of one token.
inline void write_fine(const int32_t* high, const int32_t* low, const Int8Matrix& w, int64_t tile, double factor,
                       float* y) {
    const int64_t row = tile * kTile, lanes = w.n - row < kTile ? w.n - row : kTile;
    for (int64_t lane = 0; lane < lanes; lane++)
        y[row + lane] = float((128.0 * high[lane] + low[lane]) * (double(w.scale[row + lane]) * factor));
}

// `Tiles` neighbouring tiles with all columns of `Tokens` tokens: sums [tiles, tokens, 2 digits]. A token alone has
// several sums side by side, or each instruction would wait for the one before.
template <int Tiles, int Tokens>
SLOTMOE_NOINLINE void fine_tokens(const int8_t* packed, const FineBlock* x, int64_t t, int64_t blocks, bool ahead,
                                  int32_t (*sums)[2][kTile]) {
    const bool past = past_l2();
    constexpr int kAll = Tiles * Tokens * 2, kChains = Lanes::kTokensAtOnce == 4 && Tokens < 3 ? 4 / Tokens : 1;
    Lanes::I dots[kAll][kChains];
    const FineBlock* last = x + (blocks - 1) * t;
#pragma GCC unroll 16
    for (int i = 0; i < kAll; i++)
#pragma GCC unroll 4
        for (int chain = 0; chain < kChains; chain++)
            dots[i][chain] = Lanes::start(chain ? 0 : -Lanes::kWeightOffset * last[i / 2 % Tokens].sum[i % 2]);
    for (int64_t b = 0; b < blocks; b++, packed += kTile * kBlock, x += t) {
#pragma GCC unroll 16
        for (int c = 0; c < 16; c++) {
            W w[Tiles];
#pragma GCC unroll 2
            for (int a = 0; a < Tiles; a++) w[a] = Lanes::weights(packed + a * blocks * kTile * kBlock + 64 * c);
#pragma GCC unroll 8
            for (int i = 0; i < 2 * Tokens; i++)
#pragma GCC unroll 2
                for (int a = 0; a < Tiles; a++) {
                    Lanes::I& dot = dots[2 * Tokens * a + i][c % kChains];
                    dot = Lanes::dot(dot, w[a], x[i / 2].digit[i % 2] + 4 * c);
                }
        }
#pragma GCC unroll 2
        for (int a = 0; a < Tiles; a++)
            if (ahead)
                prefetch_lines<kTile * kBlock, Tiles == 1>(packed + a * blocks * kTile * kBlock + kPrefetch, past);
    }
    for (int i = 0; i < kAll; i++) {
        for (int chain = 1; chain < kChains; chain++)  // each alone may overflow
            dots[i][0] = Lanes::add_bytes(dots[i][0], reinterpret_cast<const uint8_t*>(&dots[i][chain]));
        memcpy(sums[i / 2][i % 2], &dots[i][0], sizeof dots[i][0]);
    }
}

// Up to kFineColumns.
void fine_tiles(const Int8Matrix& w, const void* blocks, const double* factor, int64_t t, int64_t begin, int64_t end,
                float* y, int64_t ldy) {
    const FineBlock* x = static_cast<const FineBlock*>(blocks);
    constexpr int kAtOnce = Lanes::kTokensAtOnce, kTiles = Lanes::kTilesAtOnce;
    constexpr decltype(&fine_tokens<1, 1>) kRuns[] = {
        fine_tokens<1, 1>, fine_tokens<1, (kAtOnce < 2 ? kAtOnce : 2)>, fine_tokens<1, (kAtOnce < 3 ? kAtOnce : 3)>,
        fine_tokens<1, kAtOnce>};
    alignas(64) int32_t sums[kTiles * kAtOnce][2][kTile];
    for (int64_t first = 0; first < t; first += kTokens) {
        const int64_t stop = t - first < kTokens ? t : first + kTokens;
        for (int64_t i = begin, tiles; i < end; i += tiles) {
            tiles = stop - first < kManyTokens || end - i < kTiles ? 1 : kTiles;
            const int8_t* packed = w.packed + i * w.blocks * kTile * kBlock;
            for (int64_t token = first, count; token < stop; token += count) {
                count = stop - token < kAtOnce ? stop - token : kAtOnce;
                if (tiles > 1 && count == kAtOnce)
                    fine_tokens<kTiles, kAtOnce>(packed, x + token, t, w.blocks, token == first, sums);
                else
                    for (int64_t a = 0; a < tiles; a++)
                        kRuns[count - 1](packed + a * w.blocks * kTile * kBlock, x + token, t, w.blocks,
                                         token == first, sums + a * count);
                for (int64_t a = 0; a < tiles * count; a++)
                    write_fine(sums[a][0], sums[a][1], w, i + a / count, factor[token + a % count],
                               y + (token + a % count) * ldy);
            }
        }
    }
}

}  // namespace
}  // namespace slotmoe
