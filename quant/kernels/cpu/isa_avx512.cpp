// AVX-512 with VNNI: one register holds 16 lanes. Weights enter vpdpbusd as unsigned bytes (signed + 128).
// isa_avx512vbmi.cpp compiles this again for CPUs that also look up bytes without a mask, isa_amx.cpp for those that
// multiply tiles too, and isa_amx_plain.cpp with tiles in plain C++, which give the same bits.
#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(SLOTMOE_PLAIN_TILES)
#define SLOTMOE_ISA isa_amx_plain
#define SLOTMOE_ISA_NAME "amx_plain"
#define SLOTMOE_FINE_COLUMNS 0
#elif defined(SLOTMOE_AMX)
#define SLOTMOE_ISA isa_amx
#define SLOTMOE_ISA_NAME "amx"
#define SLOTMOE_FINE_COLUMNS 1024
#elif defined(SLOTMOE_VBMI)
#define SLOTMOE_ISA isa_avx512vbmi
#define SLOTMOE_ISA_NAME "avx512vbmi"
#else
#define SLOTMOE_ISA isa_avx512vnni
#define SLOTMOE_ISA_NAME "avx512vnni"
#endif
#if defined(__clang__) && defined(SLOTMOE_VBMI)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi"))), apply_to = function)
#elif defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#ifdef SLOTMOE_VBMI
#pragma GCC target("avx512vbmi")
#endif
#endif
#include <immintrin.h>

#include "isa.h"
#define SLOTMOE_TURN Lanes::turn
#define SLOTMOE_SEARCH Lanes::search
#define SLOTMOE_DOT_ONCE Lanes::dot_once
#ifdef SLOTMOE_AMX
#include "amx.h"
#endif

namespace slotmoe {
namespace {

struct Lanes {
    using F = __m512;
    using I = __m512i;
    using W = __m512i;      // 16 lanes x 4 weights
    struct Table { __m512i low, high; };  // 16 or 8 levels by the low bits of a byte, 8 levels by the next 3 bits
    static constexpr int kWeightOffset = 128;
    static constexpr int kTilesAtOnce = 2, kTokensAtOnce = 4;  // what the registers hold for many tokens

    static F zero() { return _mm512_setzero_ps(); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    static F broadcast(float v) { return _mm512_set1_ps(v); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN, min too
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F where_greater(F a, F b, F yes, F no) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
    }
    static uint32_t greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }  // a bit a lane
    static F power_of_two(F shifted) {  // 2^n of 1.5 * 2^23 + n
        return _mm512_castsi512_ps(
            _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(shifted), 23), _mm512_set1_epi32(127 << 23)));
    }
    static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
    static F load_half(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static F load_bf16(const uint16_t* p) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static F load_int8(const int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    // 32 bytes by one load: compilers make two of it, and loads are what binds one row.
    static __m256i load_pair(const uint8_t* p) {
        __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        asm("" : "+v"(v));
        return v;
    }
    static void load_int8s(const uint8_t* p, F* out) {  // twice 16
        const __m256i pair = load_pair(p);
        out[0] = to_float(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(pair)));
        out[1] = to_float(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(pair, 1)));
    }
    static void load_int4s(const uint8_t* p, F* out) {  // the low halves of 16 bytes, then the high ones
        const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        out[0] = to_float(_mm512_srai_epi32(_mm512_slli_epi32(wide, 28), 28)), out[1] = to_float(_mm512_srai_epi32(wide, 4));
    }
    static F exponent(__m128i bytes) {
        const __m512i shifted = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23);
        return _mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(kExponents)));
    }
    // Twice 16 times 1.5 * 2^23 times 2^(byte - 127), for bytes up to 231: what `times` adds an integer to the last
    // places of.
    static void load_exponents(const uint8_t* p, F* out) {
        const __m256i pair = load_pair(p);
        out[0] = exponent(_mm256_castsi256_si128(pair)), out[1] = exponent(_mm256_extracti128_si256(pair, 1));
    }
    static F times(I v, F exponent) {  // exact for |v| < 2^22
        return _mm512_sub_ps(_mm512_castsi512_ps(_mm512_add_epi32(v, _mm512_castps_si512(exponent))), exponent);
    }
    static void store_half(uint16_t* p, F v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                            _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

    static F pick(const float* levels, const int32_t* code) {  // levels[code], 16 times
        return _mm512_permutexvar_ps(_mm512_loadu_si512(code), load(levels));
    }

    // values[how many of L - 1 ascending numbers are less]; both can be loaded from, 16 at once, up to L / 2.
    template <int L>
    static F search(F v, const float* numbers, const float* values) {
        const auto greater = [&](F n) { return _mm512_cmp_ps_mask(v, n, _CMP_GT_OQ); };
        I count = _mm512_maskz_set1_epi32(greater(broadcast(numbers[L / 2 - 1])), L / 2);
#pragma GCC unroll 4
        for (int half = L / 4; half; half /= 2) {
            const F number = _mm512_permutexvar_ps(count, load(numbers + half - 1));
            count = _mm512_mask_or_epi32(count, greater(number), count, _mm512_set1_epi32(half));
        }
        return _mm512_permutexvar_ps(count, load(values));
    }

    static I start(int32_t bias) { return _mm512_set1_epi32(bias); }
    static I dot(I sum, W w, const int8_t* x4) { return dot_bytes(sum, w, broadcast_bytes(x4)); }
    static I dot_once(I sum, W w, const int8_t* x4) {  // without a register for what no other sum takes
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const int32_t*>(x4)));
        return sum;
    }
    static W weights(const int8_t* p) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128)); }
    static Table table(const int8_t* q) {
        alignas(64) uint8_t low[64], high[64];
        for (int i = 0; i < 64; i++) low[i] = uint8_t(q[i % 16]) ^ 128, high[i] = uint8_t(q[i / 8]) ^ 128;
        return {_mm512_load_si512(low), _mm512_load_si512(high)};
    }
    // Levels of the codes in the low bits of each byte; what is above them does not count.
    static W at(const Table& table, __m512i codes) {
#ifdef SLOTMOE_VBMI
        return _mm512_permutexvar_epi8(codes, table.low);  // looks at 6 bits: the table stands there four times
#else
        return _mm512_shuffle_epi8(table.low, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
#endif
    }
    static void lookup(const uint8_t* codes, const Table& table, W& high, W& low) {
        __m512i c = _mm512_loadu_si512(codes);
        asm("" : "+v"(c));  // one load: compilers fold it into both uses, and loads are what binds one row
        high = at(table, _mm512_srli_epi16(c, 4));
        low = at(table, c);
    }
    // 3-bit codes of 8 columns, the `t`-th of four such, which three vectors hold: the last pairs are in the others'
    // two highest bits.
    static void lookup3(const uint8_t* codes, int t, const Table& table, W& first, W& second) {
        __m512i c;
        if (t < 3) {
            c = _mm512_loadu_si512(codes + 64 * t);
        } else {  // bits of the first operand choose between the two others
            const __m512i a = _mm512_srli_epi16(_mm512_loadu_si512(codes), 6);
            const __m512i b = _mm512_srli_epi16(_mm512_loadu_si512(codes + 64), 4);
            c = _mm512_srli_epi16(_mm512_loadu_si512(codes + 128), 2);
            c = _mm512_ternarylogic_epi32(_mm512_set1_epi8(12), b, c, 0xca);
            c = _mm512_ternarylogic_epi32(_mm512_set1_epi8(3), a, c, 0xca);
        }
        asm("" : "+v"(c));  // as above
        first = at(table, c);
#ifdef SLOTMOE_VBMI
        second = _mm512_permutexvar_epi8(c, table.high);
#else
        second = at(table, _mm512_srli_epi16(c, 3));
#endif
    }
    // 64 bytes of a plane of fewer bits.
    static W plane(const uint8_t* codes) {
        __m512i c = _mm512_loadu_si512(codes);
        asm("" : "+v"(c));  // as above
        return c;
    }
    static W shifted(W v, int bits) { return _mm512_srli_epi16(v, unsigned(bits)); }
    static void add_low(W& w, W bits, int mask) {
        w = _mm512_add_epi8(w, _mm512_and_si512(bits, _mm512_set1_epi8(char(mask))));
    }
    static void prefetch_to_l1(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
    static void prefetch_to_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
    static void prefetch_write(const void* p) { asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p))); }

    static I add_bytes(I sum, const uint8_t* p) { return _mm512_add_epi32(sum, _mm512_loadu_si512(p)); }
    static constexpr int kScoreRows = 8;     // rows that are scored together
    static W load_bytes(const void* p) { return _mm512_loadu_si512(p); }
    static W broadcast_bytes(const void* p) {  // 4 to each lane
        int32_t four;
        memcpy(&four, p, 4);
        return _mm512_set1_epi32(four);
    }
    // Unsigned by signed bytes. An instruction, since GCC 12 copies the sums to and fro around the intrinsic.
    static I dot_bytes(I sum, W weight, W value) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(value));
        return sum;
    }
    // out[4 c + j] = column c of row j, 64 columns.
    static void interleave(const int8_t* a, const int8_t* b, const int8_t* c, const int8_t* d, int8_t* out) {
        // Unpacking stays within 16 bytes, so first 4 neighbouring columns go to each 16.
        const __m512i deal = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const auto dealt = [&](const int8_t* p) { return _mm512_permutexvar_epi32(deal, _mm512_loadu_si512(p)); };
        const __m512i va = dealt(a), vb = dealt(b), vc = dealt(c), vd = dealt(d);
        const __m512i ab_low = _mm512_unpacklo_epi8(va, vb), ab_high = _mm512_unpackhi_epi8(va, vb);
        const __m512i cd_low = _mm512_unpacklo_epi8(vc, vd), cd_high = _mm512_unpackhi_epi8(vc, vd);
        _mm512_storeu_si512(out, _mm512_unpacklo_epi16(ab_low, cd_low));
        _mm512_storeu_si512(out + 64, _mm512_unpackhi_epi16(ab_low, cd_low));
        _mm512_storeu_si512(out + 128, _mm512_unpacklo_epi16(ab_high, cd_high));
        _mm512_storeu_si512(out + 192, _mm512_unpackhi_epi16(ab_high, cd_high));
    }

    static void store_int8(int8_t* p, F v) {  // integers within 8 bits
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
    }
    // out[i] = all lanes of a[i], joined two and two, i < 16.
    template <F (*kJoin)(F, F)>
    static void join_lanes(const F* a, float* out) {
        __m512 b[8], c[4];
        for (int i = 0; i < 8; i++)
            b[i] = kJoin(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd));
        for (int i = 0; i < 4; i++)
            c[i] = kJoin(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
        const __m512 d = kJoin(_mm512_unpacklo_ps(c[0], c[1]), _mm512_unpackhi_ps(c[0], c[1]));
        const __m512 e = kJoin(_mm512_unpacklo_ps(c[2], c[3]), _mm512_unpackhi_ps(c[2], c[3]));
        const __m512 f = kJoin(_mm512_shuffle_ps(d, e, 0x44), _mm512_shuffle_ps(d, e, 0xee));  // lane 4L + m: a[4m + L]
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        _mm512_storeu_ps(out, _mm512_permutexvar_ps(order, f));
    }
    static void sum_lanes(const F* a, float* out) { join_lanes<add>(a, out); }
    static void max_lanes(const F* a, float* out) { join_lanes<max>(a, out); }
    // n rows of 16 words, `stride` bytes apart, and zeros in place of others -> their columns, which may take their place.
    static void turn(const void* rows, int64_t stride, int64_t n, void* columns) {
        const char* in = static_cast<const char*>(rows);
        __m512i r[16], s[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            r[i] = n == 16 || i < n ? _mm512_loadu_si512(in + i * stride) : _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int i = 0; i < 16; i += 2)  // of each 4 columns that are neighbours, 2 of 2 rows
            s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {  // one of 4 rows: r[i], of rows i / 4 * 4 on
            const int at = i / 2 * 4 + i % 2;
            r[2 * i] = _mm512_unpacklo_epi64(s[at], s[at + 2]), r[2 * i + 1] = _mm512_unpackhi_epi64(s[at], s[at + 2]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {  // of 8 rows, two columns
            const int at = i / 4 * 8 + i % 4;
            s[at] = _mm512_shuffle_i32x4(r[at], r[at + 4], 0x88), s[at + 4] = _mm512_shuffle_i32x4(r[at], r[at + 4], 0xdd);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            char* out = static_cast<char*>(columns) + 64 * i;
            _mm512_storeu_si512(out, _mm512_shuffle_i32x4(s[i], s[i + 8], 0x88));
            _mm512_storeu_si512(out + 8 * 64, _mm512_shuffle_i32x4(s[i], s[i + 8], 0xdd));
        }
    }
};

}  // namespace
}  // namespace slotmoe

#include "templates.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
