// AVX-512 with VNNI: one register holds 16 lanes. Weights enter vpdpbusd as unsigned bytes (signed + 128).
#if defined(__x86_64__)
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#endif
#include <immintrin.h>

#include "isa.h"

namespace slotmoe {
namespace {

struct Lanes {
    using F = __m512;
    using I = __m512i;
    using W = __m512i;      // 16 lanes x 4 weights
    using Table = __m512i;  // 16 levels
    static constexpr int kWeightOffset = 128;
    static constexpr int kTilesAtOnce = 2, kTokensAtOnce = 4;  // what the registers hold for many tokens

    static F zero() { return _mm512_setzero_ps(); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    static F broadcast(float v) { return _mm512_set1_ps(v); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
    static F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static F load_bf16(const uint16_t* p) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static F load_int8(const int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    static void store_half(uint16_t* p, F v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

    static F pick(const float* levels, const int32_t* code) {  // levels[code], 16 times
        return _mm512_permutexvar_ps(_mm512_loadu_si512(code), load(levels));
    }

    static I start(int32_t bias) { return _mm512_set1_epi32(bias); }
    static I dot(I sum, W w, const int8_t* x4) {
        int32_t x;
        memcpy(&x, x4, 4);
        return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(x));
    }
    static W weights(const int8_t* p) { return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128)); }
    static Table table(const int8_t* q) {
        const __m128i t = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)), _mm_set1_epi8(-128));
        return _mm512_broadcast_i32x4(t);
    }
    static void lookup(const uint8_t* codes, Table table, W& high, W& low) {
        const __m512i nibble = _mm512_set1_epi8(15);
        __m512i c = _mm512_loadu_si512(codes);
        asm("" : "+v"(c));  // one load: compilers fold it into both uses, and loads are what binds one row
        high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(c, 4), nibble));
        low = _mm512_shuffle_epi8(table, _mm512_and_si512(c, nibble));
    }
    static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_NTA); }
    static void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

    static I add_bytes(I sum, const uint8_t* p) { return _mm512_add_epi32(sum, _mm512_loadu_si512(p)); }
    static I to_int(F v) { return _mm512_cvtps_epi32(v); }  // to nearest even
    static void store_rows(int16_t* a, int16_t* b, I low, I high) {
        const __m512i both = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_packs_epi32(low, high));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(a), _mm512_castsi512_si256(both));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(b), _mm512_extracti64x4_epi64(both, 1));
    }
    static void store_pairs(int32_t* p, I low, I high) {
        _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16)));
    }
    static I izero() { return _mm512_setzero_si512(); }
    static I load16(const int16_t* p) { return _mm512_loadu_si512(p); }
    static I dot16(I sum, I a, I b) { return _mm512_dpwssd_epi32(sum, a, b); }
    static I dot16(I sum, I a, const int16_t* pair) {
        int32_t b;
        memcpy(&b, pair, 4);
        return _mm512_dpwssd_epi32(sum, a, _mm512_set1_epi32(b));
    }

    // out[i] = the sum of a[i]'s lanes, i < 16.
    static void sum_lanes(const F* a, float* out) {
        __m512 b[8], c[4];
        for (int i = 0; i < 8; i++)
            b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88), _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd));
        for (int i = 0; i < 4; i++)
            c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
        const __m512 d = _mm512_add_ps(_mm512_unpacklo_ps(c[0], c[1]), _mm512_unpackhi_ps(c[0], c[1]));
        const __m512 e = _mm512_add_ps(_mm512_unpacklo_ps(c[2], c[3]), _mm512_unpackhi_ps(c[2], c[3]));
        const __m512 f = _mm512_add_ps(_mm512_shuffle_ps(d, e, 0x44), _mm512_shuffle_ps(d, e, 0xee));  // lane 4L + m: a[4m + L]
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        _mm512_storeu_ps(out, _mm512_permutexvar_ps(order, f));
    }
};

}  // namespace
}  // namespace slotmoe

#define SLOTMOE_ISA isa_avx512vnni
#define SLOTMOE_ISA_NAME "avx512vnni"
#include "templates.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
