// Products whose activations have 15 bits: two int8 digits under one scale a row, x = (128 high + low) * factor. Their
// sums of integers are exact and leave no order to floats before the row's end. So a row's result is the same alone or
// among others, and on every instruction set.
//
// Shapes: x [T, K]; blocks [B, T]; W tiles of 16 rows; y [T, ldy].
#ifndef SLOTMOE_DOT_ONCE
#define SLOTMOE_DOT_ONCE Lanes::dot
#endif

namespace slotmoe {
namespace {

constexpr float kMostFine = 16256.0f;  // 128 * 127: both digits fit 8 bits

// One block of a row; v times both factors are integers within kMostFine. `sums` of digits, of the blocks before.
inline void fine_block(const float* v, float first, float second, FineBlock* out, int32_t* sums) {
    for (int half = 0; half < 2; half++) {
        int32_t sum = 0, of_high = 0;
        for (int i = half * kBlock / 2; i < (half + 1) * kBlock / 2; i++) {
            const int32_t q = int32_t(round_even(v[i] * first * second)), high = (q + 64) >> 7;
            out->digit[0][i] = int8_t(high), out->digit[1][i] = int8_t(q - 128 * high);
            sum += q, of_high += high;
        }
        out->bias[half] = -Lanes::kWeightOffset * sum;
        sums[0] += of_high, sums[1] += sum - 128 * of_high;
    }
    memcpy(out->sum, sums, sizeof out->sum);
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
                       float* __restrict y) {
    const int64_t row = tile * kTile, lanes = w.n - row;
    const auto write = [&](int64_t lane) {
        y[row + lane] = float((128.0 * high[lane] + low[lane]) * (double(w.scale[row + lane]) * factor));
    };
    for (int64_t lane = 0; lane < lanes && lanes < kTile; lane++) write(lane);
    for (int64_t lane = 0; lane < kTile && lanes >= kTile; lane++) write(lane);  // so many become vectors
}

// `Tokens` tokens by `Tiles` neighbouring tiles at a time. Few tokens have several sums side by side, or each instruction
// would wait for the one before.
template <int Tiles, int Tokens>
SLOTMOE_NOINLINE void fine_tokens(const Int8Matrix& w, const FineBlock* x, const double* factor, int64_t t,
                                  int64_t begin, int64_t end, bool ahead, float* y, int64_t ldy) {
    constexpr int kAll = Tiles * Tokens * 2, kChains = Lanes::kTokensAtOnce == 4 && Tokens < 3 ? 4 / Tokens : 1;
    const bool past = past_l2();
    const int64_t apart = w.blocks * kTile * kBlock;
    const int8_t* packed = w.packed + begin * apart;
    for (int64_t tile = begin; tile < end; tile += Tiles, packed += (Tiles - 1) * apart) {
        Lanes::I dots[kAll][kChains];
        const FineBlock *last = x + (w.blocks - 1) * t, *block = x;
#pragma GCC unroll 16
        for (int i = 0; i < kAll; i++)
#pragma GCC unroll 4
            for (int chain = 0; chain < kChains; chain++)
                dots[i][chain] = Lanes::start(chain ? 0 : -Lanes::kWeightOffset * last[i / 2 % Tokens].sum[i % 2]);
        for (int64_t b = 0; b < w.blocks; b++, packed += kTile * kBlock, block += t) {
#pragma GCC unroll 16
            for (int c = 0; c < 16; c++) {
                W of[Tiles];
#pragma GCC unroll 2
                for (int a = 0; a < Tiles; a++) of[a] = Lanes::weights(packed + a * apart + 64 * c);
#pragma GCC unroll 8
                for (int i = 0; i < 2 * Tokens; i++)
#pragma GCC unroll 2
                    for (int a = 0; a < Tiles; a++) {
                        Lanes::I& dot = dots[2 * Tokens * a + i][c % kChains];
                        const int8_t* x4 = block[i / 2].digit[i % 2] + 4 * c;
                        dot = Tiles > 1 ? Lanes::dot(dot, of[a], x4) : SLOTMOE_DOT_ONCE(dot, of[a], x4);
                    }
            }
            for (int a = 0; a < Tiles && ahead; a++)
                prefetch_lines<kTile * kBlock, Tiles == 1>(packed + a * apart + kPrefetch, past);
        }
        alignas(64) int32_t sums[kAll][kTile];
        for (int i = 0; i < kAll; i++) {
            for (int chain = 1; chain < kChains; chain++)  // each alone may overflow
                dots[i][0] = Lanes::add_bytes(dots[i][0], reinterpret_cast<const uint8_t*>(&dots[i][chain]));
            memcpy(sums[i], &dots[i][0], sizeof sums[i]);
        }
        for (int i = 0; i < kAll; i += 2)
            write_fine(sums[i], sums[i + 1], w, tile + i / 2 / Tokens, factor[i / 2 % Tokens],
                       y + i / 2 % Tokens * ldy);
    }
}

// Up to kFineColumns, and few tokens.
void fine_tiles(const Int8Matrix& w, const void* blocks, const double* factor, int64_t t, int64_t begin, int64_t end,
                float* y, int64_t ldy) {
    const FineBlock* x = static_cast<const FineBlock*>(blocks);
    constexpr int kAtOnce = Lanes::kTokensAtOnce, kTiles = Lanes::kTilesAtOnce;
    constexpr decltype(&fine_tokens<1, 1>) kRuns[] = {
        fine_tokens<1, 1>, fine_tokens<1, (kAtOnce < 2 ? kAtOnce : 2)>, fine_tokens<1, (kAtOnce < 3 ? kAtOnce : 3)>,
        fine_tokens<1, kAtOnce>};
    if (t == 1) return kRuns[0](w, x, factor, t, begin, end, true, y, ldy);
    for (int64_t i = begin, tiles; i < end; i += tiles) {
        tiles = t < kManyTokens || end - i < kTiles ? 1 : kTiles;
        for (int64_t token = 0, count; token < t; token += count) {
            count = t - token < kAtOnce ? t - token : kAtOnce;
            (tiles > 1 && count == kAtOnce ? fine_tokens<kTiles, kAtOnce> : kRuns[count - 1])(
                w, x + token, factor + token, t, i, i + tiles, token == 0, y + token * ldy, ldy);
        }
    }
}

}  // namespace
}  // namespace slotmoe
