// NEON: 16 lanes are four registers. Every 64-bit ARM has it. isa_neon_dot.cpp and isa_neon_i8mm.cpp compile this again
// for CPUs that multiply four bytes (sdot), or two times eight by two (smmla), in one instruction. All three give the
// bits of plain C++ on the same CPU.
#if defined(__aarch64__)
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(SLOTMOE_I8MM)
#define SLOTMOE_ISA isa_neon_i8mm
#define SLOTMOE_ISA_NAME "neon_i8mm"
#elif defined(SLOTMOE_DOT)
#define SLOTMOE_ISA isa_neon_dot
#define SLOTMOE_ISA_NAME "neon_dot"
#else
#define SLOTMOE_ISA isa_neon
#define SLOTMOE_ISA_NAME "neon"
#endif
#if defined(__clang__) && defined(SLOTMOE_I8MM)
#pragma clang attribute push(__attribute__((target("dotprod,i8mm"))), apply_to = function)
#elif defined(__clang__) && defined(SLOTMOE_DOT)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#elif defined(SLOTMOE_I8MM)
#pragma GCC target("+dotprod+i8mm")
#elif defined(SLOTMOE_DOT)
#pragma GCC target("+dotprod")
#endif
#include <arm_neon.h>

#include "isa.h"

namespace slotmoe {
namespace {

struct Lanes {
    struct F { float32x4_t v[4]; };
    struct I { int32x4_t v[4]; };
    struct W { int8x16_t v[4]; };  // 16 lanes x 4 weights
    using Table = int8x16_t;
    static constexpr int kWeightOffset = 0;
    static constexpr int kTilesAtOnce = 1, kTokensAtOnce = 2;  // what the registers hold for many tokens

    template <class Each>
    static F floats(Each each) { return {{each(0), each(1), each(2), each(3)}}; }
    template <class Each>
    static I ints(Each each) { return {{each(0), each(1), each(2), each(3)}}; }
    template <class Each>
    static W bytes(Each each) { return {{each(0), each(1), each(2), each(3)}}; }

    static F zero() { return broadcast(0); }
    static F load(const float* p) { return floats([&](int i) { return vld1q_f32(p + 4 * i); }); }
    static void store(float* p, const F& a) { for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]); }
    static F broadcast(float v) { return floats([&](int) { return vdupq_n_f32(v); }); }
    static F add(const F& a, const F& b) { return floats([&](int i) { return vaddq_f32(a.v[i], b.v[i]); }); }
    static F mul(const F& a, const F& b) { return floats([&](int i) { return vmulq_f32(a.v[i], b.v[i]); }); }
    static F div(const F& a, const F& b) { return floats([&](int i) { return vdivq_f32(a.v[i], b.v[i]); }); }
    static F fma(const F& a, const F& b, const F& c) {
        return floats([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
    }
    static F max(const F& a, const F& b) { return where_greater(a, b, a, b); }  // b where either is NaN, min too
    static F min(const F& a, const F& b) { return where_greater(b, a, a, b); }
    static F where_greater(const F& a, const F& b, const F& yes, const F& no) {
        return floats([&](int i) { return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), yes.v[i], no.v[i]); });
    }
    static uint32_t greater(const F& a, const F& b) {  // a bit a lane
        const uint32_t place[] = {1, 2, 4, 8};
        uint32_t bits = 0;
        for (int i = 0; i < 4; i++) bits |= vaddvq_u32(vandq_u32(vcgtq_f32(a.v[i], b.v[i]), vld1q_u32(place))) << 4 * i;
        return bits;
    }
    static F power_of_two(const F& shifted) {  // 2^n of 1.5 * 2^23 + n
        return floats([&](int i) {
            const int32x4_t exponent = vshlq_n_s32(vreinterpretq_s32_f32(shifted.v[i]), 23);
            return vreinterpretq_f32_s32(vaddq_s32(exponent, vdupq_n_s32(127 << 23)));
        });
    }
    static F to_float(const I& a) { return floats([&](int i) { return vcvtq_f32_s32(a.v[i]); }); }
    static F load_half(const uint16_t* p) {
        return floats([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
    }
    static F load_bf16(const uint16_t* p) {
        return floats([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
    }
    static F load_int8(const int8_t* p) { return widened(vld1q_s8(p)); }
    static F widened(int8x16_t q) {
        const int16x8_t low = vmovl_s8(vget_low_s8(q)), high = vmovl_high_s8(q);
        return to_float({{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)),
                          vmovl_high_s16(high)}});
    }
    static void load_int8s(const uint8_t* p, F* out) {  // twice 16
        const int8_t* bytes = reinterpret_cast<const int8_t*>(p);
        out[0] = load_int8(bytes), out[1] = load_int8(bytes + 16);
    }
    static void load_int4s(const uint8_t* p, F* out) {  // the low halves of 16 bytes, then the high ones
        const int8x16_t q = vreinterpretq_s8_u8(vld1q_u8(p));
        out[0] = widened(vshrq_n_s8(vshlq_n_s8(q, 4), 4)), out[1] = widened(vshrq_n_s8(q, 4));
    }
    // 1.5 * 2^23 times 2^(byte - 127), for bytes up to 231: what `times` adds an integer to the last places of.
    static F load_exponent(const uint8_t* p) {
        const uint8x16_t q = vld1q_u8(p);
        const uint16x8_t low = vmovl_u8(vget_low_u8(q)), high = vmovl_high_u8(q);
        const uint32x4_t wide[] = {vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low), vmovl_u16(vget_low_u16(high)),
                                   vmovl_high_u16(high)};
        return floats([&](int i) {
            return vreinterpretq_f32_u32(vaddq_u32(vshlq_n_u32(wide[i], 23), vdupq_n_u32(kExponents)));
        });
    }
    static void load_exponents(const uint8_t* p, F* out) { out[0] = load_exponent(p), out[1] = load_exponent(p + 16); }
    static F times(const I& v, const F& exponent) {  // exact for |v| < 2^22
        return floats([&](int i) {
            const int32x4_t sum = vaddq_s32(v.v[i], vreinterpretq_s32_f32(exponent.v[i]));
            return vsubq_f32(vreinterpretq_f32_s32(sum), exponent.v[i]);
        });
    }
    static void store_half(uint16_t* p, const F& a) {
        for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
    }

    static F pick(const float* levels, const int32_t* code) {  // levels[code], 16 times
        float picked[16];
        for (int i = 0; i < 16; i++) picked[i] = levels[code[i]];
        return load(picked);
    }

    static I start(int32_t bias) { return ints([&](int) { return vdupq_n_s32(bias); }); }
    static int32x4_t dot(int32x4_t sum, int8x16_t w, int8x16_t x) {
#ifdef SLOTMOE_DOT
        return vdotq_s32(sum, w, x);
#else  // two products of at most 128 * 127 fit 16 bits
        const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
        return vpadalq_s16(sum, vpaddq_s16(low, high));
#endif
    }
    static I dot(const I& sum, const W& w, int8x16_t x) {
        return ints([&](int i) { return dot(sum.v[i], w.v[i], x); });
    }
    static I dot(const I& sum, const W& w, const int8_t* x4) { return dot(sum, w, broadcast_bytes(x4)); }
    static W weights(const int8_t* p) { return bytes([&](int i) { return vld1q_s8(p + 16 * i); }); }
    static Table table(const int8_t* q) { return vld1q_s8(q); }
    static void lookup(const uint8_t* codes, Table table, W& high, W& low) {
        for (int i = 0; i < 4; i++) {
            const uint8x16_t c = vld1q_u8(codes + 16 * i);
            high.v[i] = vqtbl1q_s8(table, vshrq_n_u8(c, 4));
            low.v[i] = vqtbl1q_s8(table, vandq_u8(c, vdupq_n_u8(15)));
        }
    }
    // 3-bit codes of 8 columns, the `t`-th of four such, which three vectors hold: the last pairs are in the others'
    // two highest bits.
    static void lookup3(const uint8_t* codes, int t, Table table, W& first, W& second) {
        for (int i = 0; i < 4; i++) {
            const uint8_t* p = codes + 16 * i;
            uint8x16_t c;
            if (t < 3) {
                c = vld1q_u8(p + 64 * t);
            } else {
                c = vsliq_n_u8(vshrq_n_u8(vld1q_u8(p), 6), vshrq_n_u8(vld1q_u8(p + 64), 6), 2);
                c = vsliq_n_u8(c, vshrq_n_u8(vld1q_u8(p + 128), 6), 4);
            }
            first.v[i] = vqtbl1q_s8(table, vandq_u8(c, vdupq_n_u8(7)));
            second.v[i] = vqtbl1q_s8(table, vandq_u8(vshrq_n_u8(c, 3), vdupq_n_u8(7)));
        }
    }
    static W plane(const uint8_t* codes) { return weights(reinterpret_cast<const int8_t*>(codes)); }  // of fewer bits
    static W shifted(const W& w, int bits) {
        const int8x16_t by = vdupq_n_s8(int8_t(-bits));
        return bytes([&](int i) { return vreinterpretq_s8_u8(vshlq_u8(vreinterpretq_u8_s8(w.v[i]), by)); });
    }
    static int8x16_t masked(int8x16_t bits, int mask) { return vandq_s8(bits, vdupq_n_s8(int8_t(mask))); }
    static W at(Table table, const W& codes) {
        return bytes([&](int i) { return vqtbl1q_s8(table, vreinterpretq_u8_s8(masked(codes.v[i], 15))); });
    }
    static void add_low(W& w, const W& bits, int mask) {
        for (int i = 0; i < 4; i++) w.v[i] = vaddq_s8(w.v[i], masked(bits.v[i], mask));
    }
    static void prefetch_to_l1(const void* p) { __builtin_prefetch(p, 0, 3); }
    static void prefetch_to_l2(const void* p) { __builtin_prefetch(p, 0, 2); }
    static void prefetch_write(const void* p) { __builtin_prefetch(p, 1); }

    static I add_bytes(const I& sum, const uint8_t* p) {
        return ints([&](int i) { return vaddq_s32(sum.v[i], vreinterpretq_s32_u8(vld1q_u8(p + 16 * i))); });
    }
    static constexpr int kScoreRows = 2;     // rows that are scored together
    static W load_bytes(const void* p) { return weights(static_cast<const int8_t*>(p)); }
    static int8x16_t broadcast_bytes(const void* p) {  // 4 to each lane
        int32_t four;
        memcpy(&four, p, 4);
        return vreinterpretq_s8_s32(vdupq_n_s32(four));
    }
    static I dot_bytes(const I& sum, const W& a, int8x16_t b) { return dot(sum, a, b); }
    static I dot_bytes(const I& sum, int8x16_t a, const W& b) { return dot(sum, b, a); }
    // out[4 c + j] = column c of row j, 64 columns.
    static void interleave(const int8_t* a, const int8_t* b, const int8_t* c, const int8_t* d, int8_t* out) {
        for (int i = 0; i < 64; i += 16) {
            const int8x16x4_t rows = {{vld1q_s8(a + i), vld1q_s8(b + i), vld1q_s8(c + i), vld1q_s8(d + i)}};
            vst4q_s8(out + 4 * i, rows);
        }
    }

    static void store_int8(int8_t* p, const F& a) {  // integers within 8 bits
        const auto narrow = [&](int i) {
            return vcombine_s16(vmovn_s32(vcvtq_s32_f32(a.v[i])), vmovn_s32(vcvtq_s32_f32(a.v[i + 1])));
        };
        vst1q_s8(p, vcombine_s8(vmovn_s16(narrow(0)), vmovn_s16(narrow(2))));
    }
    // out[i] = all lanes of a[i], i < 16, in the order of isa_portable.cpp.
    static void sum_lanes(const F* a, float* out) {
        const auto quarter = [&](int i) {
            return vaddq_f32(vaddq_f32(a[i].v[0], a[i].v[2]), vaddq_f32(a[i].v[1], a[i].v[3]));
        };
        for (int i = 0; i < 16; i += 4)
            vst1q_f32(out + i, vpaddq_f32(vpaddq_f32(quarter(i), quarter(i + 1)),
                                          vpaddq_f32(quarter(i + 2), quarter(i + 3))));
    }
    static void max_lanes(const F* a, float* out) {
        for (int i = 0; i < 16; i++)
            out[i] = vmaxvq_f32(vmaxq_f32(vmaxq_f32(a[i].v[0], a[i].v[1]), vmaxq_f32(a[i].v[2], a[i].v[3])));
    }
};

#ifdef SLOTMOE_I8MM
#define SLOTMOE_TWO_TOKENS

// A decoded block's first and second four of 8 columns -> all 8 of lanes 0 to 7, and of lanes 8 to 15.
inline void join_columns(Lanes::W& first, Lanes::W& second) {
    int8x16_t pairs[8];
    for (int i = 0; i < 4; i++) {
        const int32x4_t a = vreinterpretq_s32_s8(first.v[i]), b = vreinterpretq_s32_s8(second.v[i]);
        pairs[2 * i] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
        pairs[2 * i + 1] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
    }
    for (int i = 0; i < 4; i++) first.v[i] = pairs[i], second.v[i] = pairs[4 + i];
}

// Part j of a decoded block, two tokens at a time; one alone is its own companion.
template <int Tiles, int Tokens>
inline void dot_tokens(const Lanes::W (*w)[16], const ActBlock* x, int j, Lanes::I (*dots)[Tokens]) {
#pragma GCC unroll 4
    for (int i = 0; i < Tokens; i += 2) {
        const ActBlock &a = x[i], &b = x[i + 1 < Tokens ? i + 1 : i];
        int8x16_t tokens[2];
        for (int c = 0; c < 2; c++)
            tokens[c] = vcombine_s8(vld1_s8(a.q + 16 * j + 8 * c), vld1_s8(b.q + 16 * j + 8 * c));
        const int32_t biases[] = {a.bias[j], b.bias[j], a.bias[j], b.bias[j]};
        const int32x4_t start = vld1q_s32(biases);
#pragma GCC unroll 2
        for (int tile = 0; tile < Tiles; tile++) {
            const Lanes::W* columns = w[tile] + 4 * j;
            int32x4_t pairs[8];  // two lanes by two tokens
#pragma GCC unroll 8
            for (int p = 0; p < 8; p++) {
                pairs[p] = vmmlaq_s32(start, columns[p / 4].v[p % 4], tokens[0]);
                pairs[p] = vmmlaq_s32(pairs[p], columns[2 + p / 4].v[p % 4], tokens[1]);
            }
            dots[tile][i] = Lanes::ints([&](int p) { return vuzp1q_s32(pairs[2 * p], pairs[2 * p + 1]); });
            if (i + 1 < Tokens)
                dots[tile][i + 1] = Lanes::ints([&](int p) { return vuzp2q_s32(pairs[2 * p], pairs[2 * p + 1]); });
        }
    }
}
#endif

}  // namespace
}  // namespace slotmoe

#include "templates.h"
#if defined(__clang__) && defined(SLOTMOE_DOT)
#pragma clang attribute pop
#endif
#endif
