// Products whose activations have 15 bits: two int8 digits under one scale a row, x = (128 high + low) * factor. Their
// sums of integers are exact and leave no order to floats before the row's end. So a row's result is the same alone or
// among others, and on every instruction set.
//
// Shapes: x [T, K]; blocks [B, T]; W tiles of 16 rows; y [T, ldy].
namespace slotmoe {
namespace {

constexpr float kMostFine = 16256.0f;  // 128 * 127: both digits fit 8 bits

// Up to 4 blocks of a row, the first at `out`, one `t` after the other; scaled x are integers within kMostFine. `sums`
// of digits, of the blocks before.
inline void fine_blocks(const float* x, const Scaled& scaled, int64_t count, FineBlock* out, int64_t t, int32_t* sums) {
    F both[kPartsAtOnce], highs[kPartsAtOnce];
    alignas(64) float of_both[kPartsAtOnce], of_high[kPartsAtOnce];
    alignas(64) int8_t digits[2][kColumnsAtOnce];
    const F shift = Lanes::broadcast(12582912.0f), back = Lanes::broadcast(-12582912.0f);  // as in round_even
    const F inverse = Lanes::broadcast(1.0f / 128), up = Lanes::broadcast(0.25f / 128), minus = Lanes::broadcast(-128.0f);
    for (int i = 0; i < kPartsAtOnce; i++) {
        both[i] = Lanes::add(Lanes::add(scaled(x + i * kXBlock), shift), back);
        // (both + 64) >> 7: halves go up
        highs[i] = Lanes::add(Lanes::add(Lanes::fma(both[i], inverse, up), shift), back);
        Lanes::store_int8(digits[0] + i * kXBlock, highs[i]);
        Lanes::store_int8(digits[1] + i * kXBlock, Lanes::fma(highs[i], minus, both[i]));
    }
    Lanes::sum_lanes(both, of_both), Lanes::sum_lanes(highs, of_high);
    for (int64_t b = 0; b < count; b++, out += t) {
        for (int half = 0; half < 2; half++) {
            const int64_t i = b * kXScales + half * 2;
            const int32_t sum = int32_t(of_both[i] + of_both[i + 1]), high = int32_t(of_high[i] + of_high[i + 1]);
            memcpy(out->digit[half], digits[half] + b * kBlock, kBlock);
            out->bias[half] = -Lanes::kWeightOffset * sum;
            sums[0] += high, sums[1] += sum - 128 * high;
        }
        memcpy(out->sum, sums, sizeof out->sum);
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
        const Scaled scaled{Lanes::broadcast(first), Lanes::broadcast(second)};
        int32_t sums[2] = {};
        each_group(in, k, largest > 0.0, [&](const float* columns, int64_t first, int64_t count) {
            fine_blocks(columns, scaled, count, static_cast<FineBlock*>(blocks) + first * t + row, t, sums);
        });
    }
}

// 128 times sums of high digits and those of low ones, of the rows of a tile; y of one token.
inline void write_fine(const int32_t* high, const int32_t* low, const Int8Matrix& w, int64_t tile, double factor,
                       float* __restrict y) {
    const int64_t row = tile * kTile;
    each_lane(w.n - row, [&](int64_t lane) {
        y[row + lane] = float((128.0 * high[lane] + low[lane]) * (double(w.scale[row + lane]) * factor));
    });
}

// `Tokens` tokens. Few have several sums side by side, or each instruction would wait for the one before.
template <int Tokens>
SLOTMOE_NOINLINE void fine_tokens(const Int8Matrix& w, const FineBlock* x, const double* factor, int64_t t,
                                  int64_t begin, int64_t end, bool ahead, float* y, int64_t ldy) {
    constexpr int kAll = Tokens * 2, kChains = Lanes::kTokensAtOnce == 4 && Tokens < 3 ? 4 / Tokens : 1;
    const int8_t* packed = w.packed + begin * w.blocks * kTile * kBlock;
    for (int64_t tile = begin; tile < end; tile++) {
        Lanes::I dots[kAll][kChains];
        const FineBlock *last = x + (w.blocks - 1) * t, *block = x;
#pragma GCC unroll 16
        for (int i = 0; i < kAll; i++)
#pragma GCC unroll 4
            for (int chain = 0; chain < kChains; chain++)
                dots[i][chain] = Lanes::start(chain ? 0 : -Lanes::kWeightOffset * last[i / 2].sum[i % 2]);
        for (int64_t b = 0; b < w.blocks; b++, packed += kTile * kBlock, block += t) {
#pragma GCC unroll 16
            for (int c = 0; c < 16; c++) {
                const W of = Lanes::weights(packed + 64 * c);
#pragma GCC unroll 16
                for (int i = 0; i < kAll; i++) {
                    Lanes::I& dot = dots[i][c % kChains];
                    dot = SLOTMOE_DOT_ONCE(dot, of, block[i / 2].digit[i % 2] + 4 * c);
                }
            }
            if (ahead) prefetch_lines<kTile * kBlock, true>(packed + kPrefetch);
        }
        alignas(64) int32_t sums[kAll][kTile];
        for (int i = 0; i < kAll; i++) {
            for (int chain = 1; chain < kChains; chain++)  // each alone may overflow
                dots[i][0] = Lanes::add_bytes(dots[i][0], reinterpret_cast<const uint8_t*>(&dots[i][chain]));
            memcpy(sums[i], &dots[i][0], sizeof sums[i]);
        }
        for (int i = 0; i < Tokens; i++) write_fine(sums[2 * i], sums[2 * i + 1], w, tile, factor[i], y + i * ldy);
    }
}

template <int Tokens>
constexpr decltype(&fine_tokens<1>) fine_run(int64_t count) {
    if constexpr (Tokens > 1)
        if (count < Tokens) return fine_run<Tokens - 1>(count);
    return fine_tokens<Tokens>;
}

// Up to kFineColumns, and few tokens.
void fine_tiles(const Int8Matrix& w, const void* blocks, const double* factor, int64_t t, int64_t begin, int64_t end,
                float* y, int64_t ldy) {
    constexpr int kMost = Lanes::kTokensAtOnce == 4 ? 8 : Lanes::kTokensAtOnce;  // whose sums the registers hold
    const FineBlock* x = static_cast<const FineBlock*>(blocks);
    const int64_t runs = (t + kMost - 1) / kMost;
    for (int64_t i = begin, next; i < end; i = next) {
        next = runs == 1 ? end : i + 1;
        for (int64_t token = 0, count, left = runs; token < t; token += count, left--) {
            count = (t - token + left - 1) / left;
            fine_run<kMost>(count)(w, x + token, factor + token, t, i, next, token == 0, y + token * ldy, ldy);
        }
    }
}

}  // namespace
}  // namespace slotmoe
