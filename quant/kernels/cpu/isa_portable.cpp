// Plain C++: 16 lanes are an array, for the compiler to vectorize as it can.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace slotmoe {
namespace {

struct Lanes {
    struct F { float v[16]; };
    struct I { int32_t v[16]; };
    struct W { int8_t v[64]; };
    struct Table { int8_t v[16]; };
    static constexpr int kWeightOffset = 0;
    static constexpr int kTilesAtOnce = 1, kTokensAtOnce = 1;  // what the registers hold for many tokens

    static F zero() { return broadcast(0); }
    static F load(const float* p) { F r; memcpy(r.v, p, 64); return r; }
    static void store(float* p, const F& a) { memcpy(p, a.v, 64); }
    static F broadcast(float v) { F r; for (float& x : r.v) x = v; return r; }
    static F add(F a, const F& b) { for (int i = 0; i < 16; i++) a.v[i] += b.v[i]; return a; }
    static F mul(F a, const F& b) { for (int i = 0; i < 16; i++) a.v[i] *= b.v[i]; return a; }
    static F div(F a, const F& b) { for (int i = 0; i < 16; i++) a.v[i] /= b.v[i]; return a; }
#if defined(__aarch64__)  // every one rounds once, and so does NEON
    static F fma(const F& a, const F& b, F c) {
        for (int i = 0; i < 16; i++) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
        return c;
    }
#else
    static F fma(const F& a, const F& b, F c) { for (int i = 0; i < 16; i++) c.v[i] += a.v[i] * b.v[i]; return c; }
#endif
    static F max(const F& a, F b) {
        for (int i = 0; i < 16; i++) b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
        return b;
    }  // b for NaN
    static F min(const F& a, F b) { for (int i = 0; i < 16; i++) b.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return b; }
    static F where_greater(const F& a, const F& b, const F& yes, F no) {
        for (int i = 0; i < 16; i++) no.v[i] = a.v[i] > b.v[i] ? yes.v[i] : no.v[i];
        return no;
    }
    static uint32_t greater(const F& a, const F& b) {  // a bit a lane
        uint32_t bits = 0;
        for (int i = 0; i < 16; i++) bits |= uint32_t(a.v[i] > b.v[i]) << i;
        return bits;
    }
    static F power_of_two(F shifted) {  // 2^n of 1.5 * 2^23 + n
        for (float& v : shifted.v) {
            uint32_t bits;
            memcpy(&bits, &v, 4);
            bits = (bits << 23) + (127u << 23);
            memcpy(&v, &bits, 4);
        }
        return shifted;
    }
    static F to_float(const I& a) { F r; for (int i = 0; i < 16; i++) r.v[i] = float(a.v[i]); return r; }

    static float half(uint16_t h) {
        const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
        if (exponent == 0) {  // zero or denormal: mantissa * 2^-24, exact
            const float magnitude = float(mantissa) * 5.9604644775390625e-8f;
            return sign ? -magnitude : magnitude;
        }
        const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
        float f;
        memcpy(&f, &bits, 4);
        return f;
    }
    // Round to nearest even; NaN stays NaN.
    static uint16_t to_half(float f) {
        uint32_t bits;
        memcpy(&bits, &f, 4);
        const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
        bits &= 0x7fffffff;
        if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
        // below 2^-14: a multiple of 2^-24, rounded by adding 2^-1 (whose last place is 2^-24)
        if (bits < 0x38800000) {
            float magnitude;
            memcpy(&magnitude, &bits, 4);
            magnitude += 0.5f;
            memcpy(&bits, &magnitude, 4);
            return uint16_t(sign | (bits - 0x3f000000));
        }
        bits += 0xfff + (bits >> 13 & 1);  // may carry into the exponent, which is right
        return uint16_t(sign | (bits >= 0x47800000 ? 0x7c00 : (bits - 0x38000000) >> 13));
    }
    static F load_half(const uint16_t* p) { F r; for (int i = 0; i < 16; i++) r.v[i] = half(p[i]); return r; }
    static F load_bf16(const uint16_t* p) {
        F r;
        for (int i = 0; i < 16; i++) {
            const uint32_t bits = uint32_t(p[i]) << 16;
            memcpy(&r.v[i], &bits, 4);
        }
        return r;
    }
    static F load_int8(const int8_t* p) { F r; for (int i = 0; i < 16; i++) r.v[i] = float(p[i]); return r; }
    static void load_int8s(const uint8_t* p, F* out) {  // twice 16
        const int8_t* bytes = reinterpret_cast<const int8_t*>(p);
        out[0] = load_int8(bytes), out[1] = load_int8(bytes + 16);
    }
    static void load_int4s(const uint8_t* p, F* out) {  // the low halves of 16 bytes, then the high ones
        for (int i = 0; i < 16; i++) out[0].v[i] = float(((p[i] & 15) ^ 8) - 8), out[1].v[i] = float((p[i] >> 4 ^ 8) - 8);
    }
    // 1.5 * 2^23 times 2^(byte - 127), for bytes up to 231: what `times` adds an integer to the last places of.
    static F load_exponent(const uint8_t* p) {
        F r;
        for (int i = 0; i < 16; i++) {
            const uint32_t bits = (uint32_t(p[i]) << 23) + kExponents;
            memcpy(&r.v[i], &bits, 4);
        }
        return r;
    }
    static void load_exponents(const uint8_t* p, F* out) { out[0] = load_exponent(p), out[1] = load_exponent(p + 16); }
    static F times(const I& a, F exponent) {  // exact for |a| < 2^22
        for (int i = 0; i < 16; i++) {
            uint32_t bits;
            float sum;
            memcpy(&bits, &exponent.v[i], 4);
            bits += uint32_t(a.v[i]);
            memcpy(&sum, &bits, 4);
            exponent.v[i] = sum - exponent.v[i];
        }
        return exponent;
    }
    static void store_half(uint16_t* p, const F& a) { for (int i = 0; i < 16; i++) p[i] = to_half(a.v[i]); }

    static F pick(const float* levels, const int32_t* code) {
        F r;
        for (int i = 0; i < 16; i++) r.v[i] = levels[code[i]];
        return r;
    }

    static I start(int32_t bias) { I r; for (int32_t& x : r.v) x = bias; return r; }
    static I dot(I sum, const W& w, const int8_t* x) {
        for (int lane = 0; lane < 16; lane++) {
            const int8_t* v = w.v + 4 * lane;
            sum.v[lane] += v[0] * x[0] + v[1] * x[1] + v[2] * x[2] + v[3] * x[3];
        }
        return sum;
    }
    static W weights(const int8_t* p) { W r; memcpy(r.v, p, 64); return r; }
    static Table table(const int8_t* q) { Table r; memcpy(r.v, q, 16); return r; }
    static void lookup(const uint8_t* codes, const Table& table, W& high, W& low) {
        for (int i = 0; i < 64; i++) high.v[i] = table.v[codes[i] >> 4], low.v[i] = table.v[codes[i] & 15];
    }
    // 3-bit codes of 8 columns, the `t`-th of four such, which three vectors hold: the last pairs are in the others'
    // two highest bits.
    static void lookup3(const uint8_t* codes, int t, const Table& table, W& first, W& second) {
        for (int i = 0; i < 64; i++) {
            const uint8_t *p = codes + i, last = uint8_t(p[0] >> 6 | p[64] >> 6 << 2 | p[128] >> 6 << 4);
            const uint8_t c = t < 3 ? p[64 * t] : last;
            first.v[i] = table.v[c & 7], second.v[i] = table.v[c >> 3 & 7];
        }
    }
    static W plane(const uint8_t* codes) { return weights(reinterpret_cast<const int8_t*>(codes)); }  // of fewer bits
    static W shifted(W w, int bits) { for (int8_t& v : w.v) v = int8_t(uint8_t(v) >> bits); return w; }
    static W at(const Table& table, W codes) { for (int8_t& v : codes.v) v = table.v[v & 15]; return codes; }
    static void add_low(W& w, const W& bits, int mask) { for (int i = 0; i < 64; i++) w.v[i] += int8_t(bits.v[i] & mask); }
    static void prefetch_to_l1(const void*) {}
    static void prefetch_to_l2(const void*) {}
    static void prefetch_write(const void*) {}

    static I add_bytes(I sum, const uint8_t* p) {
        uint32_t words[16];
        memcpy(words, p, 64);
        for (int i = 0; i < 16; i++) sum.v[i] = int32_t(uint32_t(sum.v[i]) + words[i]);
        return sum;
    }
    static constexpr int kScoreRows = 4;     // rows that are scored together
    static W load_bytes(const void* p) { return weights(static_cast<const int8_t*>(p)); }
    static const int8_t* broadcast_bytes(const void* p) { return static_cast<const int8_t*>(p); }  // 4 to each lane
    static I dot_bytes(const I& sum, const W& a, const int8_t* b) { return dot(sum, a, b); }
    static I dot_bytes(const I& sum, const int8_t* a, const W& b) { return dot(sum, b, a); }
    // out[4 c + j] = column c of row j, 64 columns.
    static void interleave(const int8_t* a, const int8_t* b, const int8_t* c, const int8_t* d, int8_t* out) {
        for (int i = 0; i < 64; i++)
            out[4 * i] = a[i], out[4 * i + 1] = b[i], out[4 * i + 2] = c[i], out[4 * i + 3] = d[i];
    }

    static void store_int8(int8_t* p, const F& v) {
        for (int i = 0; i < 16; i++) p[i] = int8_t(v.v[i]);
    }  // integers within 8 bits
    static void sum_lanes(const F* v, float* out) {
        for (int i = 0; i < 16; i++) {
            const float* p = v[i].v;
            float s[4];
            for (int lane = 0; lane < 4; lane++) s[lane] = (p[lane] + p[lane + 8]) + (p[lane + 4] + p[lane + 12]);
            out[i] = (s[0] + s[1]) + (s[2] + s[3]);
        }
    }
    static void max_lanes(const F* v, float* out) {
        for (int i = 0; i < 16; i++) {
            float m = v[i].v[0];
            for (int lane = 1; lane < 16; lane++) m = m > v[i].v[lane] ? m : v[i].v[lane];
            out[i] = m;
        }
    }
};

}  // namespace
}  // namespace slotmoe

#define SLOTMOE_ISA isa_portable
#define SLOTMOE_ISA_NAME "portable"
#include "templates.h"
