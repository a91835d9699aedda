// Products whose activations have 15 bits: two int8 digits under one scale a row, x = (128 high + low) * factor. Their
// sums of integers are exact and leave no order to floats before the row's end, so that a row's result is the same alone
// or among others, and on every instruction set.
//
// Shapes: x [T, K]; blocks [B, T]; W tiles of 16 rows; y [T, ldy].
namespace slotmoe {
namespace {

constexpr float kMostFine = 16256.0f;  // 128 * 127: both digits fit 8 bits

// What coded weights' dot products start from: their integers lack `offset`, and are unsigned where those of Lanes are.
inline int32_t fine_bias(float offset, int32_t sum) {
    return int32_t(round_even(offset * float(sum))) - Lanes::kWeightOffset * sum;
}

// One row; v has kBlock columns, which times both factors are integers within kMostFine.
inline void fine_block(const float* v, float first, float second, float offset, FineBlock* out, int32_t* sums) {
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
        out->bias[i] = fine_bias(offset, halves[i]);
    }
}

void quantize_fine(const float* x, int64_t k, int64_t begin, int64_t end, int64_t t, float offset, FineBlock* blocks,
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
            fine_block(v, first, second, offset, blocks + column / kBlock * t + row, sums);
        }
    }
}

// 128 times sums of high digits and those of low ones, of a tile's rows.
inline void write_fine(const int32_t* high, const int32_t* low, const float* rows, int64_t lanes, double factor,
                       float* y) {
    for (int64_t lane = 0; lane < lanes; lane++)
        y[lane] = float((128.0 * high[lane] + low[lane]) * (double(rows[lane]) * factor));
}

// One tile with all columns of `Tokens` tokens: sums [2 digits] of each. A token alone has several sums side by side,
// or each instruction would wait for the one before.
template <int Tokens>
SLOTMOE_NOINLINE void fine_tokens(const int8_t* packed, const FineBlock* x, int64_t t, int64_t blocks, bool past,
                                  int32_t (*sums)[2][kTile]) {
    constexpr int kChains = Lanes::kTokensAtOnce == 4 && Tokens < 3 ? 4 / Tokens : 1;
    Lanes::I dots[Tokens][2][kChains];
    const FineBlock* last = x + (blocks - 1) * t;
#pragma GCC unroll 8
    for (int i = 0; i < 2 * Tokens; i++)
#pragma GCC unroll 4
        for (int chain = 0; chain < kChains; chain++)
            dots[i / 2][i % 2][chain] = Lanes::start(chain ? 0 : -Lanes::kWeightOffset * last[i / 2].sum[i % 2]);
    for (int64_t b = 0; b < blocks; b++, packed += kTile * kBlock, x += t) {
#pragma GCC unroll 16
        for (int c = 0; c < 16; c++) {
            const W w = Lanes::weights(packed + 64 * c);
#pragma GCC unroll 8
            for (int i = 0; i < 2 * Tokens; i++) {
                Lanes::I& dot = dots[i / 2][i % 2][c % kChains];
                dot = Lanes::dot(dot, w, x[i / 2].digit[i % 2] + 4 * c);
            }
        }
        prefetch_lines<kTile * kBlock>(packed + kPrefetch, past);
    }
    for (int i = 0; i < 2 * Tokens; i++) {
        uint32_t lanes[kTile] = {}, chain[kTile];  // a chain alone may overflow
        for (int j = 0; j < kChains; j++) {
            memcpy(chain, &dots[i / 2][i % 2][j], sizeof chain);
            for (int lane = 0; lane < kTile; lane++) lanes[lane] += chain[lane];
        }
        memcpy(sums[i / 2][i % 2], lanes, sizeof lanes);
    }
}

// Up to 131,072 columns.
void fine_tiles(const Int8Matrix& w, const FineBlock* x, const double* factor, int64_t t, int64_t begin, int64_t end,
                float* y, int64_t ldy) {
    const bool past = past_l2();
    constexpr int kAtOnce = Lanes::kTokensAtOnce;
    alignas(64) int32_t sums[kAtOnce][2][kTile];
    for (int64_t first = 0; first < t; first += kTokens) {
        const int64_t stop = t - first < kTokens ? t : first + kTokens;
        for (int64_t i = begin; i < end; i++) {
            const int64_t left = w.n - i * kTile, lanes = left < kTile ? left : kTile;
            const int8_t* packed = w.packed + i * w.blocks * kTile * kBlock;
            for (int64_t token = first, count; token < stop; token += count) {
                count = stop - token >= kAtOnce ? kAtOnce : kAtOnce > 2 && stop - token >= 2 ? 2 : 1;
                if (count == kAtOnce)
                    fine_tokens<kAtOnce>(packed, x + token, t, w.blocks, past, sums);
                else if (kAtOnce > 2 && count == 2)
                    fine_tokens<(kAtOnce > 2 ? 2 : 1)>(packed, x + token, t, w.blocks, past, sums);
                else
                    fine_tokens<1>(packed, x + token, t, w.blocks, past, sums);
                for (int64_t a = 0; a < count; a++)
                    write_fine(sums[a][0], sums[a][1], w.scale + i * kTile, lanes, factor[token + a],
                               y + (token + a) * ldy + i * kTile);
            }
        }
    }
}

}  // namespace
}  // namespace slotmoe
