// What one instruction set offers: a table of serial routines over a range of rows, tiles or spans.
// api.cpp splits the ranges over threads. isa_*.cpp each fill one table from the same templates.
//
// Shapes: T tokens; W [N, K]; Kp = K rounded up to 64; B = Kp / 64 blocks; a tile is 16 rows of W.
#pragma once
#include <cstddef>
#include <cstdint>

// Loops that need most of the registers compile best alone.
#if defined(__GNUC__)
#define SLOTMOE_NOINLINE __attribute__((noinline))
#else
#define SLOTMOE_NOINLINE
#endif

namespace slotmoe {

constexpr int kTile = 16;      // rows of W that are computed together, one 32-bit lane a row
constexpr int kBlock = 64;     // columns that are stored together
constexpr int kXBlock = 16;    // columns that share an activation scale
constexpr int kXScales = kBlock / kXBlock;
constexpr int kExponents = 0x0bc00000;  // bits of 1.5 * 2^23 less those of 1: see Lanes::load_exponent
constexpr int kChunkRows = 64; // MLA: cache rows that are scored together
constexpr int kShared = 4;     // MLA: tiles of heads, of one query or several, that share what is read of a chunk

// 64 activations of one token: x = q * scale * 2^e, with one e a token so that scales stay near 1.
// bias is what a dot product starts from: it takes back the offsets of the weights' integers.
struct ActBlock {
    int8_t q[kBlock];
    float scale[kXScales];
    int32_t bias[kXScales];
};

// 64 activations of one token in two digits, x = (128 high + low) * the row's factor: see fine.h. 16 tokens are the rows
// of two tiles of AMX.
struct alignas(64) FineBlock {
    int8_t digit[2][kBlock];
    int32_t sum[2];   // of each digit, over the row up to here
    int32_t bias[2];  // what a product of both digits with a half's columns starts from
};

// What a matrix is made of. A coded one is one of quant/codecs/codec.py; the digit is the bits of a code.
enum Kind : int64_t { kInt8, kNf4, kLut4, kLut3, kInt4, kMxfp4, kLut2, kInt5, kInt6, kF32, kF16, kBf16 };
constexpr int kBits[] = {8, 4, 4, 3, 4, 4, 2, 5, 6};
constexpr int64_t kFineColumns = 131072;  // whose sums of bytes by bytes 32 bits hold
constexpr bool is_coded(int64_t kind) { return kind >= kNf4 && kind <= kInt6; }
// Codes of more than 4 bits are whole numbers, in a plane of 4 bits and one of the rest.
constexpr int low_bits(int64_t kind) { return kBits[kind] > 4 ? kBits[kind] - 4 : 0; }

// Bytes of a tile of a coded matrix of so many blocks.
constexpr int64_t code_bytes(int64_t kind, int64_t blocks) { return blocks * 128 * kBits[kind]; }
constexpr int64_t scale_bytes(int64_t kind, int64_t blocks) {
    const int64_t each = kind == kInt4 ? 64 : kind == kLut2 ? 16 : 32;
    return blocks * each + (kind == kNf4 || kind == kInt4 || kind == kMxfp4 ? 0 : 64);
}

// 16 levels of codes as integers: level = (q + offset) * step. Eight stand twice, four four times; of codes with two
// planes those of the first, to which the second's numbers are added.
struct Levels {
    int8_t q[16];
    float offset;
    double step;
};

struct CodedMatrix {
    int64_t kind;
    const uint8_t *codes, *scales;  // of each tile code_bytes and scale_bytes: quant/codecs/codec.py
    int64_t n, blocks;

    const uint8_t* tile_codes(int64_t i) const { return codes + i * code_bytes(kind, blocks); }
    const uint8_t* tile_scales(int64_t i) const { return scales + i * scale_bytes(kind, blocks); }
};

struct Int8Matrix {
    const int8_t* packed;  // [tiles, B, 1024]: byte 64t + 4 lane + i: column 4t + i
    const float* scale;    // [N]
    int64_t n, blocks;
};

struct Mla {
    const float* q;        // [heads, query_columns]
    const uint8_t* cache;  // rows, `stride` bytes apart; see attention.h
    int64_t heads, context, stride, r, p;
    const int32_t* list;   // [context]: the rows in their order, or null: the first ones
    int64_t split;         // row `split` and those behind it are the first of `others`, `others_stride` bytes apart
    const uint8_t* others;
    int64_t others_stride;
    const float* sinks;    // [heads]: a logit that has no value; or null
    bool apart;            // keys are the last P columns alone, and q is [heads, P]: attention by groups
    float scale;
    int64_t span_chunks;  // chunks of kChunkRows rows in one span
    int64_t tiles;        // of 16 heads
    int64_t r4, k;        // R rounded up to 4; that plus P rounded up to 4
    int64_t r_padded;     // R rounded up to 64
    int64_t shared;       // queries that go through chunks together at most
    // Filled by mla_queries and, the last, by mla_pack
    float* q_mixed;     // [heads, query_columns]
    uint8_t* q_rows;    // [heads, 2 digits, k]
    float* q_scale;     // [2, tiles * 16]: of the latent columns and of the rope columns, times `scale`
    uint8_t* q_digits;  // [tiles, padded_columns * 32]: [k / 4, 2 digits or 1, 16 heads, 4 columns]; with AMX [blocks of
                        // 64 columns, 2 digits, 16, 16 heads, 4 columns]
    // Per span: what probabilities are relative to, their sum and the weighted sum of rows
    float* span_max;  // [spans, tiles * 16]
    float* span_sum;  // [spans, tiles * 16]
    float* span_out;  // [spans, heads, r_padded]
    float* out;       // [heads, R]
};

constexpr int64_t query_columns(const Mla& m) { return m.apart ? m.p : m.r + m.p; }
// Of a row whose parts are padded to 64 each.
constexpr int64_t padded_columns(const Mla& m) { return m.r_padded + (m.k - m.r4 + kBlock - 1) / kBlock * kBlock; }

// A hyper-connection of m streams, or the head's, which has only the first m rows; see streams.h.
struct Hyper {
    const float *fn, *base, *scale;  // [rows, m * D], [rows], [3] or [1]
    int64_t m, iterations;
    float eps, hc_eps;               // of the norm of the streams, and of all else

    int64_t rows(bool head) const { return head ? m : (2 + m) * m; }
};

constexpr int kDeltaColumns = 32;

// A block of columns of a head's state [keys, columns], and what t tokens, `stride` floats apart, bring; see delta.h.
struct DeltaBlock {
    int64_t keys, columns, t, stride;
    const float *q, *k, *v;
    const float* gates;   // beta, q k, and what decays: all, or each of the keys, if by `channels`; q has that already
    const float* before;  // the state
    float* after;         // may be `before`
    float* out;           // [t, columns], `out_stride` floats apart
    int64_t out_stride;
    bool channels;
};

constexpr int64_t latent_bytes(int64_t r, int64_t p) {  // of a cache row
    return (r + 3) / 4 * 4 + (p + 3) / 4 * 4 + 16;
}

// (up + offset) * gate * sigmoid(alpha * gate). Gates above the limit and ups beyond it, of either sign, become it; a
// limit of 0 is none.
struct Activation {
    float limit = 0.0f, alpha = 1.0f, offset = 0.0f;
};

enum class Source : int { f32 = 0, f16 = 1, bf16 = 2 };

// Choosing scales and codes among levels; see encode.h.
struct Encoder {
    void (*fit_rows)(const void* src, Source type, int64_t n, int64_t k, const float* weights, const float* levels,
                     const float* starts, int64_t count, int64_t block, int64_t begin, int64_t end, float* scales);
    void (*code_rows)(const void* src, Source type, int64_t n, int64_t k, const float* scales, const float* levels,
                      int64_t block, int64_t begin, int64_t end, uint8_t* codes);
    void (*feed_back)(const float* x, int64_t s, int64_t n, const float* u, const float* factors, int64_t most,
                      const float* levels, const float* starts, int64_t count, int64_t block, int64_t begin, int64_t end,
                      float* scales, float* q);
    void (*descend)(const float* gradient, int64_t s, int64_t n, const float* h, const float* factors, int64_t most,
                    const float* levels, int64_t block, int64_t begin, int64_t end, float* scales, float* q);
};

// Rows times matrices. Blocks are FineBlocks if `fine`, and levels have no offsets, or else ActBlocks.
struct Products {
    bool fine;
    // x [T, K] (row stride K), rows begin..end -> blocks [B, T], factor [T] = 2^e or, of FineBlocks, a row's scale (NaN
    // for a row with NaN or infinity).
    void (*quantize_rows)(const float* x, int64_t k, int64_t begin, int64_t end, int64_t t, float offset, void* blocks,
                          double* factor);
    // y [T, ldy] for the rows of tiles begin..end.
    void (*coded_tiles)(const CodedMatrix& w, const Levels& levels, const void* blocks, const double* factor, int64_t t,
                        int64_t begin, int64_t end, float* y, int64_t ldy);
    void (*int8_tiles)(const Int8Matrix& w, const void* blocks, const double* factor, int64_t t, int64_t begin,
                       int64_t end, float* y, int64_t ldy);
};

struct Isa {
    const char* name;

    // Tiles of AMX pay for layers of so many columns. Their rows' bits are others, which no number of rows may change.
    int64_t fine_columns;
    Products coarse, fine;  // a set that has no such columns multiplies int8 alone by the second
    const Products& products(int64_t columns) const { return columns < fine_columns ? coarse : fine; }
    // y [T, ldy], rows begin..end of W [N, K].
    void (*linear_dense)(const float* x, int64_t t, int64_t k, const void* w, Source type, int64_t begin, int64_t end,
                         float* y, int64_t ldy);
    // One row; without a weight it is 1.
    void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* y);
    void (*layer_norm)(const float* x, const float* weight, const float* bias, int64_t n, float eps, float* y);
    void (*activate)(const float* gate, const float* up, const Activation& how, float* out, int64_t n);  // to gate too
    void (*weighted_sum)(const float* outs, const float* weights, int64_t k, int64_t n, float* y);

    void (*learn)(const float* x, float rate, const float* next, int64_t n, int64_t m, float* w, float* y);
    double (*survey)(const float* x, int64_t n, float inverse, float reach, int64_t most, int64_t* ids, int64_t* found,
                     float* top);

    // Of one token, see streams.h.
    void (*hyper_coefficients)(const Hyper& hyper, const float* mixes, float square, int64_t columns, float* pre,
                               float* post, float* comb);
    void (*hyper_out)(const float* y, const float* h, const float* post, const float* comb, int64_t m, int64_t d,
                      float* out);
    // One window.
    void (*compress)(const float* kv, const float* gate, const float* bias, int64_t rows, int64_t z, float* y);

    void (*convolve)(const float* x, int64_t stride, const float* weights, int64_t apart, int64_t taps, int64_t n,
                     float* y);
    void (*delta_block)(const DeltaBlock& d);
    void (*decays)(const float* x, const float* bias, float rate, int64_t n, float* y);
    void (*gated)(const float* x, const float* gate, int64_t n, float* y);  // x times the gate's sigmoid

    void (*mla_queries)(const Mla& m, int64_t begin, int64_t end);                 // heads begin..end
    void (*mla_pack)(const Mla& m, int64_t begin, int64_t end);                    // tiles begin..end
    // Chunks begin..end, of those that the last of m.shared or fewer queries has. Several are over the first rows of
    // one cache, none over fewer than the one before.
    void (*mla_chunks)(const Mla* m, int64_t queries, int64_t begin, int64_t end, uint8_t* scratch);
    void (*mla_merge)(const Mla& m, int64_t begin, int64_t end);                   // heads begin..end
    size_t (*mla_scratch)(const Mla& m);
    // scores [context]: each row's of chunks begin..end, summed over the heads; see attention.h.
    void (*index_scores)(const Mla& m, const float* weights, int64_t begin, int64_t end, uint8_t* scratch,
                         float* scores);

    void (*store_latent)(float* row, int64_t r, int64_t p, uint8_t* out);  // row is overwritten

    // Tiles begin..end of src [N, K]. Return 0, or 2 for NaN or infinity in src, or 3 for a scale beyond fp16.
    int (*quantize_nf4)(const void* src, Source type, int64_t n, int64_t k, const float* levels, int64_t begin,
                        int64_t end, uint8_t* codes, uint16_t* absmax);
    int (*quantize_int8)(const void* src, Source type, int64_t k, int64_t begin, int64_t end, int8_t* q, float* scale);

    // sums [tiles or rows, 2]: of (src - dequantized)^2 and of src^2, for tiles or rows begin..end of src [N, K].
    void (*coded_error)(const void* src, Source type, int64_t k, const float* levels, const CodedMatrix& w,
                        int64_t begin, int64_t end, double* sums);
    void (*int8_error)(const void* src, Source type, int64_t k, const int8_t* q, const float* scale, int64_t begin,
                       int64_t end, double* sums);

    uint64_t (*read)(const void* memory, int64_t bytes);  // reads every byte; the sum only keeps the compiler honest

    Encoder encoders[5];  // of 4, 8, 16, 32 and 64 levels
};

// Whether this processor computes 512 bits in two halves, as Zen 4 does, and its best instruction set is in use.
bool in_halves();

extern const Isa isa_portable;
#if defined(__x86_64__)
extern const Isa isa_avx2, isa_avxvnni, isa_avx512vnni, isa_avx512vbmi, isa_amx, isa_amx_plain;
#elif defined(__aarch64__)
extern const Isa isa_neon, isa_neon_dot, isa_neon_i8mm;
#endif

}  // namespace slotmoe
