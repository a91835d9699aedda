// AVX2 with FMA and F16C: 16 lanes are two registers. vpmaddubsw would saturate with unsigned weights, so it gets
// |w| (at most 128) and x with w's sign: two products of at most 128 * 127 fit 16 bits. isa_avxvnni.cpp compiles this
// again with vpdpbusd, whose weights are unsigned bytes (signed + 128); with SLOTMOE_EVEX in the encoding of AVX-512,
// so that CPUs that have only that one can test it.
#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>
#include <cstring>

#if !defined(SLOTMOE_AVXVNNI)
#define SLOTMOE_ISA isa_avx2
#define SLOTMOE_ISA_NAME "avx2"
#else
#define SLOTMOE_ISA isa_avxvnni
#define SLOTMOE_ISA_NAME "avxvnni"
#if defined(SLOTMOE_EVEX)
#define SLOTMOE_DOT "%{evex%} vpdpbusd"
#else
#define SLOTMOE_DOT "%{vex%} vpdpbusd"
#endif
#endif
#if defined(__clang__) && defined(SLOTMOE_EVEX)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512vl,avx512vnni"))), apply_to = function)
#elif defined(__clang__) && defined(SLOTMOE_AVXVNNI)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

#include "isa.h"

namespace slotmoe {
namespace {

struct Lanes {
    struct F { __m256 a, b; };
    struct I { __m256i a, b; };
    using W = I;
    using Table = __m256i;
    static constexpr int kTilesAtOnce = 1, kTokensAtOnce = 2;  // what the registers hold for many tokens

    static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float* p, F v) { _mm256_storeu_ps(p, v.a), _mm256_storeu_ps(p + 8, v.b); }
    static F broadcast(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
    static F add(F a, F b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
    static F mul(F a, F b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
    static F div(F a, F b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
    static F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
    static F max(F a, F b) {
        return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)};
    }  // b where either is NaN, min too
    static F min(F a, F b) { return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }
    static F where_greater(F a, F b, F yes, F no) {
        return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(a.a, b.a, _CMP_GT_OQ)),
                _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(a.b, b.b, _CMP_GT_OQ))};
    }
    static uint32_t greater(F a, F b) {  // a bit a lane
        const auto bits = [](__m256 x, __m256 y) {
            return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_GT_OQ)));
        };
        return bits(a.a, b.a) | bits(a.b, b.b) << 8;
    }
    static __m256 power_of_two(__m256 shifted) {
        return _mm256_castsi256_ps(
            _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23), _mm256_set1_epi32(127 << 23)));
    }
    static F power_of_two(F shifted) {
        return {power_of_two(shifted.a), power_of_two(shifted.b)};
    }  // 2^n of 1.5 * 2^23 + n
    static F to_float(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
    static F load_half(const uint16_t* p) {
        const __m128i* h = reinterpret_cast<const __m128i*>(p);
        return {_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
    }
    static __m256 wide_bf16(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
    static F load_bf16(const uint16_t* p) {
        const __m256i bits = bytes(p);
        return {wide_bf16(_mm256_castsi256_si128(bits)), wide_bf16(_mm256_extracti128_si256(bits, 1))};
    }
    static F load_int8(const int8_t* p) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
    }
    static __m256 exponent(__m128i bytes) {
        const __m256i shifted = _mm256_slli_epi32(_mm256_cvtepu8_epi32(bytes), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(kExponents)));
    }
    static void load_int8s(const uint8_t* p, F* out) {  // twice 16
        const int8_t* bytes = reinterpret_cast<const int8_t*>(p);
        out[0] = load_int8(bytes), out[1] = load_int8(bytes + 16);
    }
    static void load_int4s(const uint8_t* p, F* out) {  // the low halves of 16 bytes, then the high ones
        const auto wide = [&](const uint8_t* q) {
            return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q)));
        };
        const I v{wide(p), wide(p + 8)};
        const I low{_mm256_slli_epi32(v.a, 28), _mm256_slli_epi32(v.b, 28)};
        out[0] = to_float({_mm256_srai_epi32(low.a, 28), _mm256_srai_epi32(low.b, 28)});
        out[1] = to_float({_mm256_srai_epi32(v.a, 4), _mm256_srai_epi32(v.b, 4)});
    }
    // 1.5 * 2^23 times 2^(byte - 127), for bytes up to 231: what `times` adds an integer to the last places of.
    static F load_exponent(const uint8_t* p) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {exponent(bytes), exponent(_mm_srli_si128(bytes, 8))};
    }
    static void load_exponents(const uint8_t* p, F* out) {  // twice 16
        out[0] = load_exponent(p), out[1] = load_exponent(p + 16);
    }
    static __m256 times(__m256i v, __m256 exponent) {
        return _mm256_sub_ps(_mm256_castsi256_ps(_mm256_add_epi32(v, _mm256_castps_si256(exponent))), exponent);
    }
    static F times(I v, F exponent) { return {times(v.a, exponent.a), times(v.b, exponent.b)}; }  // exact for |v| < 2^22
    static void store_half(uint16_t* p, F v) {
        __m128i* h = reinterpret_cast<__m128i*>(p);
        _mm_storeu_si128(h, _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        _mm_storeu_si128(h + 1, _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

    // bit 3 of a code says which half of the table; a blend looks at bit 31
    static __m256 pick(F table, __m256i code) {
        const __m256 low = _mm256_permutevar8x32_ps(table.a, code), high = _mm256_permutevar8x32_ps(table.b, code);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
    }
    static F pick(const float* levels, const int32_t* code) {
        return {pick(load(levels), bytes(code)), pick(load(levels), bytes(code + 8))};
    }

    static __m256i bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static I start(int32_t bias) { return {_mm256_set1_epi32(bias), _mm256_set1_epi32(bias)}; }
    static __m256i flip(__m256i weights) {  // as `dot` takes them
        return _mm256_xor_si256(weights, _mm256_set1_epi8(char(kWeightOffset)));
    }
#ifdef SLOTMOE_AVXVNNI
    static constexpr int kWeightOffset = 128;
    // An instruction, as in isa_avx512.cpp.
    static __m256i dot(__m256i sum, __m256i w, __m256i x) {
        asm(SLOTMOE_DOT " %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
        return sum;
    }
    static __m256i dot_bytes(__m256i sum, __m256i weight, __m256i value) { return dot(sum, weight, value); }
#else
    static constexpr int kWeightOffset = 0;
    // Bytes up to 127 by signed bytes: two products fit 16 bits.
    static __m256i dot_bytes(__m256i sum, __m256i weight, __m256i value) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(weight, value), _mm256_set1_epi16(1)));
    }
    static __m256i dot(__m256i sum, __m256i w, __m256i x) {
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
#endif
    static I dot(I sum, W w, const int8_t* x4) {
        int32_t x;
        memcpy(&x, x4, 4);
        const __m256i v = _mm256_set1_epi32(x);
        return {dot(sum.a, w.a, v), dot(sum.b, w.b, v)};
    }
    static W weights(const int8_t* p) { return {flip(bytes(p)), flip(bytes(p + 32))}; }
    static Table table(const int8_t* q) {
        return flip(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q))));
    }
    static void lookup(const uint8_t* codes, Table table, W& high, W& low) {
        const __m256i nibble = _mm256_set1_epi8(15), a = bytes(codes), b = bytes(codes + 32);
        high = {_mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(a, 4), nibble)),
                _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(b, 4), nibble))};
        low = {_mm256_shuffle_epi8(table, _mm256_and_si256(a, nibble)),
               _mm256_shuffle_epi8(table, _mm256_and_si256(b, nibble))};
    }
    static __m256i low_bits(__m256i v, char mask) { return _mm256_and_si256(v, _mm256_set1_epi8(mask)); }
    // 3-bit codes of 8 columns, the `t`-th of four such, which three vectors hold: the last pairs are in the others'
    // two highest bits.
    static void lookup3(const uint8_t* codes, int t, Table table, W& first, W& second) {
        const auto part = [&](const uint8_t* p) {
            if (t < 3) return bytes(p + 64 * t);
            const __m256i a = low_bits(_mm256_srli_epi16(bytes(p), 6), 3);
            const __m256i b = low_bits(_mm256_srli_epi16(bytes(p + 64), 4), 12);
            return _mm256_or_si256(_mm256_or_si256(a, b), low_bits(_mm256_srli_epi16(bytes(p + 128), 2), 48));
        };
        const auto level = [&](__m256i v) { return _mm256_shuffle_epi8(table, low_bits(v, 7)); };
        const __m256i a = part(codes), b = part(codes + 32);
        first = {level(a), level(b)};
        second = {level(_mm256_srli_epi16(a, 3)), level(_mm256_srli_epi16(b, 3))};
    }
    static W plane(const uint8_t* codes) { return {bytes(codes), bytes(codes + 32)}; }  // of fewer bits
    static W shifted(W v, int bits) { return {_mm256_srli_epi16(v.a, bits), _mm256_srli_epi16(v.b, bits)}; }
    static W at(Table table, W codes) {
        return {_mm256_shuffle_epi8(table, low_bits(codes.a, 15)), _mm256_shuffle_epi8(table, low_bits(codes.b, 15))};
    }
    static void add_low(W& w, W bits, int mask) {
        w = {_mm256_add_epi8(w.a, low_bits(bits.a, char(mask))), _mm256_add_epi8(w.b, low_bits(bits.b, char(mask)))};
    }
    static void prefetch_to_l1(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
    static void prefetch_to_l2(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
    static void prefetch_write(const void* p) { __builtin_prefetch(p, 1); }

    static I add_bytes(I sum, const uint8_t* p) {
        return {_mm256_add_epi32(sum.a, bytes(p)), _mm256_add_epi32(sum.b, bytes(p + 32))};
    }
    static constexpr int kScoreRows = 2;    // rows that are scored together
    static W load_bytes(const void* p) { return {bytes(p), bytes(static_cast<const uint8_t*>(p) + 32)}; }
    static W broadcast_bytes(const void* p) {  // 4 to each lane
        int32_t four;
        memcpy(&four, p, 4);
        return start(four);
    }
    static I dot_bytes(I sum, W weight, W value) {
        return {dot_bytes(sum.a, weight.a, value.a), dot_bytes(sum.b, weight.b, value.b)};
    }
    // out[4 c + j] = column c of row j, 64 columns.
    static void interleave(const int8_t* a, const int8_t* b, const int8_t* c, const int8_t* d, int8_t* out) {
        for (int i = 0; i < 64; i += 16) {
            const auto part = [&](const int8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)); };
            const __m128i ab_low = _mm_unpacklo_epi8(part(a), part(b)), ab_high = _mm_unpackhi_epi8(part(a), part(b));
            const __m128i cd_low = _mm_unpacklo_epi8(part(c), part(d)), cd_high = _mm_unpackhi_epi8(part(c), part(d));
            __m128i* to = reinterpret_cast<__m128i*>(out + 4 * i);
            _mm_storeu_si128(to, _mm_unpacklo_epi16(ab_low, cd_low)),
                _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(ab_low, cd_low));
            _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(ab_high, cd_high)),
                _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(ab_high, cd_high));
        }
    }

    static void store_int8(int8_t* p, F v) {  // integers within 8 bits
        // 0-3, 8-11; 4-7, 12-15
        const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b));
        const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
        const __m128i low = _mm256_castsi256_si128(ordered), high = _mm256_extracti128_si256(ordered, 1);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(low, high));
    }
    // out[i] = all lanes of v[i], joined two and two, i < 16.
    template <__m256 (*kJoin)(__m256, __m256)>
    static __m256 neighbours(__m256 a, __m256 b) {
        return kJoin(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
    }
    template <__m256 (*kJoin)(__m256, __m256)>
    static void join_lanes(const F* v, float* out) {
        for (int i = 0; i < 16; i += 4) {
            __m256 s[4];
            for (int j = 0; j < 4; j++) s[j] = kJoin(v[i + j].a, v[i + j].b);
            const __m256 t = neighbours<kJoin>(neighbours<kJoin>(s[0], s[1]), neighbours<kJoin>(s[2], s[3]));
            _mm_storeu_ps(out + i, _mm256_castps256_ps128(kJoin(t, _mm256_permute2f128_ps(t, t, 1))));
        }
    }
    static __m256 sum(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
    static __m256 larger(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
    static void sum_lanes(const F* v, float* out) { join_lanes<sum>(v, out); }
    static void max_lanes(const F* v, float* out) { join_lanes<larger>(v, out); }
};

}  // namespace
}  // namespace slotmoe

#include "templates.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
