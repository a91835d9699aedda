// What the files of the C ABI share: status codes, scratch slots, and a matrix as the Python side prepared it.
#pragma once
#include <cstring>
#include <new>
#include <type_traits>

#include "isa.h"
#include "pool.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace slotmoe {

constexpr int kOk = 0, kBadArgument = 1, kOutOfMemory = 4;

// Scratch slots. A phase uses each for one thing.
enum Slot { kX, kXFactor, kGate, kUp, kAct, kActFactor, kOuts, kMlaBuffers, kMlaThreads, kQuery, kQueryLatent,
            kQueryFull, kRow, kLatentOut, kValues, kUses, kParts, kPartOf,
            kMlas, kScores, kChoices, kLogits, kStreams, kRecords, kTokenOuts, kCaches, kIndexScores, kOrder, kHyper,
            kIndexQuery, kIndexKey, kIndexWeights, kIndexCounts, kChosen, kLists, kBlockOut,
            kGiven, kDelta, kDeltaSpans, kSlotCount };
static_assert(kSlotCount <= kScratchSlots, "pool.h has a buffer for each");

constexpr int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple; }

// Blocks of activations, [B, T]: ActBlocks or FineBlocks.
struct Blocks {
    uint8_t* p;
    int64_t bytes;  // of one

    Blocks operator+(int64_t count) const { return {p + count * bytes, bytes}; }
    operator void*() const { return p; }
};
inline Blocks scratch_blocks(Job& job, Slot slot, int64_t count, const Products& by) {
    const int64_t bytes = by.fine ? sizeof(FineBlock) : sizeof(ActBlock);
    return {job.scratch<uint8_t>(slot, count * bytes), bytes};
}

const Isa& best_isa();
const Levels& levels_for(const Products& by, int64_t kind, const float* levels);  // valid for the job
bool finite(const float* levels);

// What body(job, isa) returns, kOk if that is nothing.
template <class Body>
int guarded(Body body) {
    try {
        Job job;
        const Isa& isa = best_isa();
        if constexpr (std::is_void_v<decltype(body(job, isa))>) {
            body(job, isa);
            return kOk;
        } else {
            return body(job, isa);
        }
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
}

// A matrix [n, k] of any kind; Python holds the memory (quant/kernels/cpu/weights.py has the same structure).
struct Matrix {
    int64_t kind, n, k;
    const void* data;     // tiles of 16 rows (isa.h), or row-major if nothing is quantized
    const void* scale;    // int8: float [n]; coded: those of tiles
    const float* levels;  // coded: [16]

    bool valid() const {
        return n >= 1 && k >= 1 && kind >= kInt8 && kind <= kBf16 && (!is_coded(kind) || finite(levels)) &&
               (kind != kInt8 || k <= kFineColumns);
    }
    bool quantized() const { return kind < kF32; }
    int64_t tiles() const { return up_to(n, kTile); }
    Int8Matrix as_int8() const {
        return {static_cast<const int8_t*>(data), static_cast<const float*>(scale), n, up_to(k, kBlock)};
    }
    CodedMatrix as_coded() const {
        return {kind, static_cast<const uint8_t*>(data), static_cast<const uint8_t*>(scale), n, up_to(k, kBlock)};
    }
};

// Gate [i, h], up [i, h], down [h, i].
struct Mlp {
    Matrix matrix[3];
    Activation activation;
    const float* output_gate;  // [h]: the sigmoid of its product with x multiplies the result; null without one

    bool valid() const { return matrix[0].valid() && matrix[1].valid() && matrix[2].valid(); }
    // Whether all are int8, or all of one codec.
    bool alike() const {
        const auto like = [&](const Matrix& other) {
            return other.kind == matrix[0].kind &&
                   (!is_coded(other.kind) || !memcmp(other.levels, matrix[0].levels, 16 * sizeof(float)));
        };
        return matrix[0].quantized() && like(matrix[1]) && like(matrix[2]);
    }
};

// How the record of an expert is coded: gate and up [intermediate, hidden] alike, and down [hidden, intermediate].
struct Record {
    int64_t hidden, intermediate, gate_up, down;    // kinds of matrices
    int64_t biases;                                 // whether each matrix has one
    const float *gate_up_levels, *down_levels;      // [16]
    Activation activation;

    bool valid() const {
        return hidden >= 1 && intermediate >= 1 && is_coded(gate_up) && is_coded(down) && finite(gate_up_levels) &&
               finite(down_levels);
    }
};

// Rows of t tokens' sequences in some layers: of a token's sequence those of the first layer begin at `start`, with that
// of position `first`, or 0 if that is null.
struct Store {
    uint8_t* const* start;
    const int64_t* first;
    int64_t layer_bytes, row_bytes;

    uint8_t* at(int64_t token, int64_t layer, int64_t position) const {
        return start[token] + layer * layer_bytes + (position - (first ? first[token] : 0)) * row_bytes;
    }
};

// Compressed rows of the layers with one ratio, and what kv and gate gave of the tokens that none has yet: [2, columns].
struct Group {
    Store rows, open;
    const float* table;  // [t, p / 2] complex: rotates the row that a token completes
};
constexpr int64_t kGroups = 3;
constexpr int64_t kFewTokens = 64;  // whose attention holds the sums of all spans at once

// Of a token's sequence: state `read` of two is that behind the first `at` tokens, and `write`, which may be the same,
// becomes that behind the first `end`, if there are so many.
struct Fold {
    int64_t at, read, write, end;
};

// Where t tokens stand, and what their sequences keep.
struct Tokens {
    const int64_t* positions;
    const float *table, *query_scale;  // [t, pairs] complex, made by slotmoe_decode; [t]: times queries, unless null
    Store rows;                        // latents, or those of the window
    Store keys;                        // of the layers with an indexer, or rows of those with a window
    int32_t* lists;                    // [t, topk]: what the last indexer has chosen
    const int64_t* ids;                // [t], for gates that choose by them
    const float* compressed_table;     // in place of `table` in layers with a compressor
    Store inputs, states;              // of a delta rule, float32: rows of inputs, and two states a layer
    const Fold* folds;                 // [t]
    Group groups[kGroups];
};

// The lightning indexer (DeepSeek-V3.2): queries of a latent of the query, weights of the heads, a key of each token.
struct Indexer {
    int64_t heads, width, topk, halves;
    float scale, unused;  // of the weights
    Matrix query, weights, key;
    const float *key_norm, *key_bias;

    bool valid() const {
        return heads >= 1 && width >= 1 && topk >= 1 && query.valid() && weights.valid();
    }
};

// kv_b_proj [heads * (n + v), r] as attention multiplies it: of each head the rows of its query, turned, [r, n], and those
// of its values, [v, r]. int8 is in tiles of each head's own (isa.h), and its activations in two digits; scales are null
// where nothing is quantized.
struct Absorbed {
    int64_t heads, n, r, v, kind;
    const void *query, *value;
    const float *query_scale, *value_scale, *ones;  // [heads, n], [heads, v], [r]

    bool valid() const {
        return heads >= 1 && n >= 1 && n <= kFineColumns && r >= 1 && r <= kFineColumns && v >= 1 &&
               (kind == kInt8 || (kind >= kF32 && kind <= kBf16));
    }
};

// A layer's weights up to its router, as the Python side prepared them.
struct Attention {
    int64_t heads, n, p, r, v;
    int64_t halves;  // rotated are columns i and i + p / 2 of a head; else 2 i and 2 i + 1
    int64_t row;     // its layer in `Tokens::rows`
    float eps, latent_eps, scale, unused;
    const float *input_norm, *query_norm, *latent_norm, *next_norm;  // query_norm is null without q-LoRA
    Matrix query, query_b, latent, out;  // without q-LoRA `query` makes the heads' queries and `query_b` is unused
    Matrix gate;                         // of the router; n is 0 in a layer without one
    const float* gate_bias;              // [gate.n], null without one
    const Absorbed* kv_b;
    const Indexer* indexer;              // null in a layer without one
    int64_t keys;                        // its layer in `Tokens::keys`
    int64_t topk;                        // unless 0, rows are chosen where there are more

    bool valid(const Tokens& tokens) const;
};

// What makes one row of `ratio` tokens' (DeepSeek-V4). Where windows `overlap` the first half of the columns is for the
// row of the next window.
struct Compressor {
    Matrix kv, gate;           // [columns, hidden]
    const float *bias, *norm;  // [rows, width] and [width]
    int64_t ratio, width, overlaps;
    int64_t group, layer;      // of Tokens::groups, and which of its layers

    int64_t columns() const { return overlaps ? 2 * width : width; }
    int64_t rows() const { return overlaps ? 2 * ratio : ratio; }
    bool valid(const Tokens& tokens, int64_t p) const;
};

// A layer of DeepSeek-V4 up to its router: one key of z columns, the last p rotated, that is the value too.
struct Compressed {
    int64_t heads, z, p, groups, window;
    float eps, scale;
    const float *input_norm, *query_norm, *key_norm, *sinks, *next_norm;
    Matrix query, query_b, key, out_a, out_b, gate;
    const float* gate_bias;                       // null without one
    const Compressor *compressor, *index_keys;    // null in a layer without them
    const Indexer* indexer;                       // has no `key`

    bool valid(const Tokens& tokens) const;
};

// A layer of attention by groups up to its router: keys and values of z columns, the first p of a key rotated.
struct Grouped {
    int64_t heads, groups, z, p;
    int64_t halves, norm_last;           // as in Attention; norms of heads are behind the rotation
    int64_t window, row;                 // 0: none; its first group's, of Tokens::rows, or with a window of Tokens::keys
    int64_t query_normed, key_normed;    // columns that are normed together, z or all; 0: none
    float eps, scale;
    const float *input_norm, *next_norm, *query_norm, *key_norm;
    const float *sinks, *query_bias, *key_bias, *value_bias, *out_bias;  // null without them
    Matrix query, key, value, out, gate;
    const float* gate_bias;
    Matrix query_gate;  // [heads z]: by its sigmoid the heads' values are multiplied; n is 0 without one

    const Store& rows(const Tokens& tokens) const { return window ? tokens.keys : tokens.rows; }
    bool valid(const Tokens& tokens) const;
};

constexpr int64_t kTaps = 4;  // tokens that a convolution is over

// A gated delta rule, see delta.h: each head of keys and queries, of k columns, belongs to some heads of values, of v.
// A row of inputs has what is convolved, q, k and v, of all heads each, then b and a of the heads of values, or a of all
// their channels of keys, if they decay by_channel; then a sigmoid gates the result, else SiLU.
struct DeltaRule {
    int64_t key_heads, heads, k, v, by_channel;
    float eps, unused;
    const float *convolution, *decay, *bias, *norm;  // [kTaps, columns], [heads], [heads, decays], [v]

    int64_t columns() const { return 2 * key_heads * k + heads * v; }
    int64_t decays() const { return by_channel ? k : 1; }
    int64_t inputs() const { return columns() + heads * (1 + decays()); }
    bool valid() const {
        return key_heads >= 1 && heads >= key_heads && heads % key_heads == 0 && k >= 1 && v >= 1 &&
               (!by_channel || heads == key_heads);
    }
};

// Rows of inputs of one sequence, of which the first `past` are for the convolution alone. The state [heads, k, v],
// each head's in blocks of kDeltaColumns columns, before the others -> that behind the first `folded` of them.
struct DeltaSpan {
    int64_t rows, past, folded, outs;  // of the last `outs` the result is asked for
    const float *inputs, *before;
    float* after;                      // may be `before`
};

// A layer of such a rule up to its router. What it projects to, row by row, is in Tokens::inputs.
struct Delta : DeltaRule {
    int64_t layer;  // of Tokens::inputs and Tokens::states
    const float *input_norm, *next_norm;
    Matrix qkv, z, b, a, out, gate;
    const float* gate_bias;
    Matrix z_latent, a_latent;  // what z and a multiply; n is 0 where that is the layer's input

    bool valid(const Tokens& tokens) const;
};

// Scores of a router are a token's softmax, or each is that of its logit alone: its sigmoid, or the root of its softplus.
enum Scoring : int64_t { kSoftmax = 0, kSigmoid = 1, kSqrtSoftplus = 2 };

// What becomes of the logits of a router.
struct Router {
    int64_t groups, kept, top_k;  // of groups of experts, the best `kept` take part
    int64_t group_best;           // a group counts by the sum of so many best scores, 1 or 2
    int64_t scoring;
    int64_t normalized;           // weights add up to 1, before each is multiplied by `factor`
    double factor;

    bool valid(int64_t e) const {
        return groups >= 1 && e >= groups && e % groups == 0 && kept >= 1 && kept <= groups && top_k >= 1 &&
               top_k <= kept * (e / groups) && group_best >= 1 && group_best <= 2 && group_best <= e / groups;
    }
};

struct Layer {
    const Attention* attention;                  // or null, and
    const Compressed* compressed;                // with
    const Hyper *attention_mixing, *mlp_mixing;  // of the residual streams
    const Mlp* mlp;             // the dense MLP or the shared experts; null if there are none
    const int32_t* experts_of;  // [vocabulary, top_k]: those of a token, where the gate does not choose; else null
    const Grouped* grouped;     // or null
    const float* logit_bias;    // [gate.n], of the router's logits, or null
    const Delta* delta;         // or null

    // What of(weights) says of those that it has.
    template <class Of>
    auto any(Of of) const {
        return attention ? of(*attention) : grouped ? of(*grouped) : delta ? of(*delta) : of(*compressed);
    }
    const Matrix& gate() const {
        return *any([](const auto& weights) { return &weights.gate; });
    }
    const float* gate_bias() const {
        return any([](const auto& weights) { return weights.gate_bias; });
    }
    bool valid(const Tokens& tokens) const {
        return any([&](const auto& weights) { return weights.valid(tokens); });
    }
};

struct Model {
    int64_t layers, hidden, experts, streams, vocabulary;
    const Layer* layer;
    Router router;
    Matrix embedding, head;  // of kRows, or a kind of `Matrix`: no codes; any kind
    int64_t pairs;
    const float *norm, *frequencies;  // [hidden], before the head; [pairs], of rotations, times `factor`
    float eps, factor;
};

// What entries of other files are made of. No argument is checked here.
void attention(Job& job, const Isa& isa, const Attention& a, int64_t t, const float* h,
               const Tokens& tokens, float* y, float* x, float* logits);
// (cos, sin) [c] of a position times `frequencies`, times `factor`.
void rotations(float position, const float* frequencies, int64_t c, float factor, float* y);
void grouped_layer(Job& job, const Isa& isa, const Grouped& a, int64_t t, const float* h, const Tokens& tokens,
                   float* y, float* x, float* logits);
void delta_layer(Job& job, const Isa& isa, const Delta& a, int64_t t, const float* h, const Tokens& tokens, float* y,
                 float* x, float* logits);
// z, y [outs of all spans, heads, v].
void delta_rule(Job& job, const Isa& isa, const DeltaRule& rule, const DeltaSpan* spans, int64_t count, const float* z,
                float* y);
// Streams h [t, m, hidden] -> y, those behind the layer's attention, x [t, hidden], what the feed-forward starts with,
// its logits, and how its result is mixed in: post [t, m] and comb [t, m, m].
void compressed_layer(Job& job, const Isa& isa, const Layer& layer, int64_t index, int64_t t, const float* h,
                      const Tokens& tokens, float* y, float* x, float* post, float* comb, float* logits);
void mlp(Job& job, const Isa& isa, const float* x, int64_t t, const Mlp* mlp, const float* residual,
         const float* others, float* y);
// T tokens through those of their K experts, indices [t, k], that are in the slab (records `stride` bytes apart): slots
// says where by expert; where it is negative the row of y [t, k, h] is left as it is. A row's arithmetic does not depend
// on the other rows.
void experts_by_slot(Job& job, const Isa& isa, const float* x, int64_t t, int64_t k, const int64_t* indices,
                     const int32_t* slots, const uint8_t* slab, int64_t stride, const Record& record, float* y);
// Streams h [t, m, d] -> x [t, d], what goes into a block, post [t, m] and comb [t, m, m]. Without post it is the head's.
void hyper_in(Job& job, const Isa& isa, const Hyper& hyper, const float* h, int64_t t, int64_t d, float* x, float* post,
              float* comb);
// The block's y [t, d] and the streams before it -> the streams behind it.
void hyper_out(Job& job, const Isa& isa, const float* y, const float* h, const float* post, const float* comb,
               int64_t t, int64_t m, int64_t d, float* out);
// outs [t, k, h], weights [t, k] -> y [t, h]: the products are added one by one in order, from zero.
void weighted_sum(Job& job, const Isa& isa, const float* outs, const float* weights, int64_t t, int64_t k, int64_t h,
                  float* y);

// Quantized rows times the tiles begin..end of a quantized matrix -> y [t, n].
inline void multiply_tiles(const Products& by, const Matrix& w, const Levels& levels, const void* blocks,
                           const double* factor, int64_t t, int64_t begin, int64_t end, float* y) {
    if (is_coded(w.kind)) return by.coded_tiles(w.as_coded(), levels, blocks, factor, t, begin, end, y, w.n);
    by.int8_tiles(w.as_int8(), blocks, factor, t, begin, end, y, w.n);
}

// Rows x [t, k] times a matrix, plus bias [n] unless that is null, -> y [t, n], their activations quantized as the
// matrix wants them. With several groups x is [t, groups, k], and a group's share of the matrix's rows, whole tiles,
// multiplies only what is of that group.
class Product {
public:
    Product(Job& job, const Isa& isa, const Matrix& w, const float* x, int64_t t, float* y,
            const float* bias = nullptr, Slot blocks = kX, Slot factor = kXFactor, int64_t groups = 1)
        : isa_(isa), by_(isa.products(w.k)), w_(w), x_(x), t_(t), y_(y), bias_(bias), groups_(groups) {
        if (!w.quantized()) return;
        if (is_coded(w.kind)) levels_ = levels_for(by_, w.kind, w.levels);
        const int64_t size = up_to(w.k, kBlock);
        blocks_ = scratch_blocks(job, blocks, t * groups * size, by_);
        factor_ = job.scratch<double>(factor, t * groups);
        job.each(t * groups, [&](int, int64_t row) {
            const int64_t group = row % groups, token = row / groups;
            by_.quantize_rows(x + row * w.k, w.k, 0, 1, t, levels_.offset, blocks_ + (group * t * size + token),
                              factor_ + group * t + token);
        });
    }

    int64_t tiles() const { return w_.tiles(); }

    void run(int64_t begin, int64_t end) const {  // tiles begin..end
        const int64_t each = tiles() / groups_;
        for (int64_t group = begin / each; group * each < end; group++) {
            const int64_t last = (group + 1) * each;
            run_group(group, begin > group * each ? begin : group * each, end < last ? end : last);
        }
        for (int64_t token = 0; bias_ && token < t_; token++)
            for (int64_t i = begin * kTile; i < end * kTile && i < w_.n; i++) y_[token * w_.n + i] += bias_[i];
    }

private:
    void run_group(int64_t group, int64_t begin, int64_t end) const {
        const int64_t rows = end * kTile < w_.n ? end * kTile : w_.n;
        const Source source = Source(w_.kind - kF32);
        if (w_.quantized())
            multiply_tiles(by_, w_, levels_, blocks_ + group * t_ * up_to(w_.k, kBlock), factor_ + group * t_, t_,
                           begin, end, y_);
        else if (groups_ == 1)
            isa_.linear_dense(x_, t_, w_.k, w_.data, source, begin * kTile, rows, y_, w_.n);
        else  // a group's rows of x are apart
            for (int64_t row = begin * kTile; row < rows; row++)
                for (int64_t token = 0; token < t_; token++)
                    isa_.linear_dense(x_ + (token * groups_ + group) * w_.k, 1, w_.k, w_.data, source, row, row + 1,
                                      y_ + token * w_.n, w_.n);
    }

    const Isa& isa_;
    const Products& by_;
    const Matrix& w_;
    const float* x_;
    int64_t t_;
    float* y_;
    const float* bias_;
    int64_t groups_;
    Levels levels_{};
    Blocks blocks_{};
    double* factor_ = nullptr;
};

// All in one phase.
template <size_t Count>
void multiply(Job& job, const Product (&products)[Count]) {
    int64_t tiles = 0;
    for (const Product& product : products) tiles += product.tiles();
    job.parallel(tiles, [&](int, int64_t begin, int64_t end) {
        for (const Product& product : products) {
            const int64_t own = product.tiles(), from = begin > 0 ? begin : 0, to = end < own ? end : own;
            if (from < to) product.run(from, to);
            begin -= own, end -= own;
        }
    });
}

inline void multiply(Job& job, const Isa& isa, const Matrix& w, const float* x, int64_t t, float* y,
                     int64_t groups = 1) {
    multiply(job, {{job, isa, w, x, t, y, nullptr, kX, kXFactor, groups}});
}

inline void norm_rows(Job& job, const Isa& isa, const float* x, const float* weight, int64_t t, int64_t columns,
                      float eps, float* y) {
    job.each(t, [&](int, int64_t i) { isa.rms_norm(x + i * columns, weight, columns, eps, y + i * columns); });
}

}  // namespace slotmoe
