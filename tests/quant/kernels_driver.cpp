#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "api.h"

using slotmoe::Attention;
using slotmoe::Compressed;
using slotmoe::Compressor;
using slotmoe::Delta;
using slotmoe::Fold;
using slotmoe::Grouped;
using slotmoe::Hyper;
using slotmoe::Indexer;
using slotmoe::latent_bytes;
using slotmoe::Layer;
using slotmoe::Matrix;
using slotmoe::Model;
using slotmoe::Record;
using slotmoe::Router;
using slotmoe::Store;
using slotmoe::Tokens;
using namespace slotmoe;  // kinds of matrices

extern "C" {
int slotmoe_isa_count();
const char* slotmoe_isa_name(int);
int slotmoe_isa_supported(int);
int slotmoe_set_isa(const char*);
void slotmoe_set_threads(int);
uint64_t slotmoe_read(const void*, int64_t);
int slotmoe_linear(const Matrix*, const float*, const float*, float, int64_t, int64_t, float*);
int slotmoe_pack_int8(const int8_t*, int64_t, int64_t, int8_t*);
int slotmoe_weighted_sum(const float*, const float*, int64_t, int64_t, int64_t, float*);
int slotmoe_experts_by_slot(const Record*, const float*, int64_t, int64_t, const int64_t*,
                            const int32_t*, int64_t, const uint8_t*, int64_t, int64_t, float*);
int slotmoe_store_latents(const float*, int64_t, int64_t, int64_t, uint8_t*, int64_t);
int slotmoe_mla(const float*, int64_t, int64_t, const uint8_t*, int64_t, int64_t, int64_t, int64_t,
                float, float*);
int slotmoe_attend(const float*, int64_t, int64_t, const uint8_t*, int64_t, int64_t, const uint8_t*,
                   int64_t, int64_t, const int32_t*, int64_t, int64_t, int64_t, float, const float*,
                   float*);
int slotmoe_grouped(const float*, int64_t, int64_t, const uint8_t*, int64_t, int64_t, int64_t,
                    int64_t, int64_t, int64_t, float, int64_t, const float*, float*);
int slotmoe_index(const float*, const float*, int64_t, int64_t, int64_t, const uint8_t*, int64_t,
                  int64_t, const int32_t*, int64_t, int32_t*);
int slotmoe_hyper_in(const float*, const float*, const float*, const float*, int64_t, int64_t,
                     int64_t, int64_t, float, int64_t, float, float*, float*, float*);
int slotmoe_hyper_head(const float*, const float*, const float*, const float*, int64_t, int64_t,
                       int64_t, float, float, float*);
int slotmoe_hyper_out(const float*, const float*, const float*, const float*, int64_t, int64_t,
                      int64_t, float*);
int slotmoe_delta(const float*, const float*, const float*, const float*, const float*,
                  const float*, const float*, float*, int64_t, int64_t, int64_t, int64_t, int64_t,
                  int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, float*);
int slotmoe_gated(const float*, const float*, int64_t, int64_t, float*);
int slotmoe_compress(const float*, const float*, const float*, const float*, int64_t, int64_t,
                     int64_t, float, float*);
int slotmoe_absorb_query(const Absorbed*, const float*, int64_t, float*);
int slotmoe_absorb_value(const Absorbed*, const float*, int64_t, float*);
int slotmoe_rms_norm(const float*, const float*, int64_t, int64_t, float, float*);
int slotmoe_mlp(const Mlp*, const float*, int64_t, const float*, const float*, float*);
int slotmoe_rotate(const float*, const float*, int64_t, int64_t, int64_t, int64_t, float*);
int slotmoe_quantize_nf4(const void*, int, int64_t, int64_t, const float*, uint8_t*, uint16_t*);
int slotmoe_quantize_int8(const void*, int, int64_t, int64_t, int8_t*, float*);
int slotmoe_route(const Router*, const float*, const float*, const int64_t*, int64_t, int64_t,
                  float*, int64_t*);
int slotmoe_decode(const Model*, int64_t, int64_t, int64_t, const float*, const Tokens*, const int32_t*,
                   const uint8_t*, int64_t, int64_t, const Record*, const float*, const float*,
                   float*, float*, float*,
                   float*, float*, int64_t*, int64_t*, float*, double*);
int slotmoe_coded_error(const Matrix*, const void*, int, double*);
int slotmoe_fit_rows(const void*, int, int64_t, int64_t, const float*, const float*, int64_t,
                     const float*, int64_t, int64_t, float*);
int slotmoe_code_rows(const void*, int, int64_t, int64_t, const float*, const float*, int64_t,
                      int64_t, uint8_t*);
int slotmoe_feed_back(const float*, int64_t, int64_t, const float*, const float*, int64_t,
                      const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t,
                      float*);
int slotmoe_rotations(const float*, const float*, int64_t, int64_t, float, float*);
int slotmoe_descend(const float*, int64_t, int64_t, const float*, const float*, int64_t,
                    const float*, int64_t, int64_t, float*, int64_t, float*);
int slotmoe_int8_error(const void*, int, int64_t, int64_t, const int8_t*, const float*, double*);
}

static uint32_t state = 1;
static uint32_t next() { return state = state * 1664525u + 1013904223u; }
static uint64_t digest = 0;  // of what every array held at its end

// Exactly `count` elements: the sanitizer guards both ends.
template <class T>
struct Array {
    T* p;
    int64_t count;
    explicit Array(int64_t count) : count(count) {
        void* memory = operator new(size_t(count) * sizeof(T) + (count == 0), std::align_val_t(64));
        p = static_cast<T*>(memory);
        uint8_t* bytes = static_cast<uint8_t*>(memory);
        for (size_t i = 0; i < size_t(count) * sizeof(T); i++) bytes[i] = uint8_t(next() >> 24);
    }
    ~Array() {
        const uint8_t* bytes = reinterpret_cast<const uint8_t*>(p);
        for (size_t i = 0; i < size_t(count) * sizeof(T); i++)
            digest = (digest ^ bytes[i]) * 1099511628211u;
        operator delete(p, std::align_val_t(64));
    }
    operator T*() const { return p; }
};

struct Floats : Array<float> {
    explicit Floats(int64_t count, float scale = 1) : Array(count) {
        for (int64_t i = 0; i < count; i++) p[i] = (float(next() >> 8) / 8388608.0f - 1.0f) * scale;
    }
};

static void halves(uint16_t* p, int64_t count) {  // finite, of either sign
    for (int64_t i = 0; i < count; i++) p[i] = uint16_t(next() >> 16) & 0xbbff;
}

static void check(int status) {
    if (status) {
        printf("status %d\n", status);
        exit(1);
    }
}

static int64_t tiles(int64_t n) { return (n + 15) / 16; }
static int64_t blocks(int64_t k) { return (k + 63) / 64; }
static int64_t packed_bytes(int64_t n, int64_t k) { return tiles(n) * blocks(k) * 1024; }
static int64_t record_bytes(const Record& r) {
    const int64_t in = blocks(r.hidden), out = blocks(r.intermediate);
    const int64_t gate_or_up = code_bytes(r.gate_up, in) + scale_bytes(r.gate_up, in);
    const int64_t down = code_bytes(r.down, out) + scale_bytes(r.down, out);
    return 2 * tiles(r.intermediate) * gate_or_up + tiles(r.hidden) * down +
           r.biases * 4 * (2 * r.intermediate + r.hidden);
}

// Random bytes become finite scales of so many tiles.
static void fill_scales(uint8_t* p, int64_t kind, int64_t count, int64_t blocks) {
    const int64_t size = scale_bytes(kind, blocks);
    if (kind == kNf4 || kind == kInt4)
        return halves(reinterpret_cast<uint16_t*>(p), count * size / 2);
    if (kind == kMxfp4) {
        for (int64_t i = 0; i < count * size; i++) p[i] = uint8_t(next() >> 24) % 160;
        return;
    }
    for (int64_t tile = 0; tile < count; tile++) {
        const Floats rows(16);
        memcpy(p + tile * size, rows.p, 64);
    }
}

// The scales of a record's projections, likewise, and its biases.
static void fill_record(uint8_t* p, const Record& r) {
    const int64_t in = blocks(r.hidden), out = blocks(r.intermediate);
    const int64_t in_tiles = 2 * tiles(r.intermediate), out_tiles = tiles(r.hidden);
    p += in_tiles * code_bytes(r.gate_up, in) + out_tiles * code_bytes(r.down, out);
    fill_scales(p, r.gate_up, in_tiles, in);
    p += in_tiles * scale_bytes(r.gate_up, in);
    fill_scales(p, r.down, out_tiles, out);
    const Floats biases(r.biases ? 2 * r.intermediate + r.hidden : 0);
    if (r.biases)
        memcpy(p + out_tiles * scale_bytes(r.down, out), biases.p,
               size_t(2 * r.intermediate + r.hidden) * 4);
}

// A matrix of any kind with the memory that it points to.
struct Weights {
    Array<uint8_t> data, scale;
    Floats levels;
    Matrix matrix;
    static int64_t data_bytes(int64_t kind, int64_t n, int64_t k) {
        if (kind == kInt8) return packed_bytes(n, k);
        if (is_coded(kind)) return tiles(n) * code_bytes(kind, blocks(k));
        return n * k * (kind == kF32 ? 4 : 2);
    }
    static int64_t scale_bytes(int64_t kind, int64_t n, int64_t k) {
        if (is_coded(kind)) return tiles(n) * slotmoe::scale_bytes(kind, blocks(k));
        return kind == kInt8 ? n * 4 : 0;
    }
    Weights(int64_t kind, int64_t n, int64_t k)
        : data(data_bytes(kind, n, k)),
          scale(scale_bytes(kind, n, k)),
          levels(16),
          matrix{kind, n, k, data.p, scale.p, levels.p} {
        const Floats values(kind == kInt8 ? n : kind == kF32 ? n * k : 0);
        if (kind == kInt8) memcpy(scale.p, values.p, size_t(n) * 4);
        if (kind == kF32) memcpy(data.p, values.p, size_t(n * k) * 4);
        if (is_coded(kind)) fill_scales(scale.p, kind, tiles(n), blocks(k));
        if (kind > kF32 && kind <= kBf16) halves(reinterpret_cast<uint16_t*>(data.p), n * k);
    }
};

static void linear(int64_t t, int64_t n, int64_t k, float scale) {
    Floats x(t * k, scale), y(t * n), weight(k), normed(t * k);
    Array<int8_t> w(n * k), packed(packed_bytes(n, k));
    check(slotmoe_pack_int8(w, n, k, packed));
    for (int64_t kind = kInt8; kind <= kBf16; kind++) {
        const Weights weights(kind, n, k);
        check(slotmoe_linear(&weights.matrix, x, kind == kInt8 ? weight.p : nullptr, 1e-6f, t, 1, y));
        slotmoe_read(weights.data, Weights::data_bytes(kind, n, k) - 1);
    }
    check(slotmoe_rms_norm(x, weight, t, k, 1e-6f, normed));
}

static void mlp(int64_t t, int64_t h, int64_t i) {
    Floats x(t * h), y(t * h), residual(t * h), others(t * h), gate(h);
    for (int64_t kind = kInt8; kind <= kInt6; kind++) {
        Weights in(kind, i, h), out(kind, h, i);
        const Mlp w{{in.matrix, in.matrix, out.matrix}, {kind % 2 ? 0.5f : 0.0f}, kind % 2 ? gate.p : nullptr};
        check(slotmoe_mlp(&w, x, t, nullptr, nullptr, y));
        check(slotmoe_mlp(&w, x, t, residual, nullptr, y));
        check(slotmoe_mlp(&w, x, t, residual, others, y));
    }
}

// Two such layers in one call, for one token and for one of each of three sequences: the caches'
// last row and the slab's last record have no slack. Then with no expert in any slot, and then from
// the second layer's experts on.
static void decode(const Attention& a, int64_t hidden, int64_t experts, const float* h,
                   const float* table) {
    const int64_t i = 33, top_k = 2, count = 3;
    const Floats levels(16);
    const Record record{hidden, i, kNf4, kLut4, 0, levels, levels, {}};
    const int64_t bytes = record_bytes(record), apart = (bytes + 63) / 64 * 64;
    Array<uint8_t> slab((count - 1) * apart + bytes);
    for (int64_t slot = 0; slot < count; slot++) fill_record(slab + slot * apart, record);
    Weights in(kInt8, i, hidden), down(kInt8, hidden, i);
    const Mlp mlp{{in.matrix, in.matrix, down.matrix}, {0.5f}, nullptr};
    const Layer layers[] = {{&a, nullptr, nullptr, nullptr, &mlp, nullptr}, {&a}};
    const int64_t odd = experts % 2;
    const Router router{experts % 3 ? 1 : 3, 1, top_k, 1 + odd, odd, odd, 1.5};
    const Model model{2, hidden, experts, 1, 0, layers, router, {}, {}, a.p / 2,
                      nullptr, table};
    const int64_t rows = 70, size = latent_bytes(a.r, a.p), stride = size + 1,
                  layer = rows * stride;
    Floats latents(rows * (a.r + a.p)), scales(3);
    Array<int32_t> slots(2 * experts);
    for (int64_t t : {1, 3}) {
        std::vector<Array<uint8_t>*> held;
        std::vector<uint8_t*> caches;
        std::vector<int64_t> positions;
        for (int64_t token = 0; token < t; token++) {
            held.push_back(new Array<uint8_t>(layer + (rows - 1) * stride + size));
            caches.push_back(*held.back());
            positions.push_back(token ? token - 1 : rows - 1);
            for (int64_t l = 0; l < 2; l++)
                check(slotmoe_store_latents(latents, rows, a.r, a.p, caches[token] + l * layer,
                                            stride));
        }
        // The routers' inputs: those of both layers, and one more.
        Floats y(t * hidden), x(3 * t * hidden), weights(t * top_k), sum(t * hidden);
        double seconds[5] = {};
        for (int64_t expected : {2, 0, 1, 3}) {  // 3: from the sum of the second layer's experts on
            const int64_t first = expected == 3, asked = expected == 1   ? 2
                                                         : expected == 3 ? 0
                                                                         : expected + 1;
            Array<int64_t> indices((asked > 2 ? 2 : asked) * t * top_k);
            for (int64_t at = 0; at < 2 * experts; at++)
                slots[at] = expected == 2 || at / experts < expected ? int32_t(at % count) : -1;
            int64_t reached = -1;
            const Tokens tokens{positions.data(), table, t > 1 ? scales.p : nullptr,
                                {caches.data(), nullptr, layer, stride}, {}, nullptr};
            check(slotmoe_decode(&model, first, model.layers, t, h, &tokens, slots, slab, count, apart, &record,
                                 first ? sum.p : nullptr, first ? sum.p : nullptr, nullptr,
                                 nullptr, y, x, weights,
                                 indices, &reached, nullptr, seconds));
            if (reached != (expected == 3 ? 2 : expected)) check(int(10 + reached));
        }
        for (auto* cache : held) delete cache;
    }
    Floats logits(3 * experts), several(3 * top_k);
    Array<int64_t> chosen(3 * top_k);
    for (const float* bias : {a.gate_bias, static_cast<const float*>(nullptr)})
        for (bool given : {false, true})
            check(slotmoe_route(&router, logits, bias, given ? chosen.p : nullptr, 3, experts,
                                several, chosen));
}

// A layer of DeepSeek-V4 for one token, with as much memory as it reads and writes: of compressed
// rows of so many tokens, which an indexer chooses from where windows overlap.
static void compressed(int64_t kind, int64_t ratio, bool overlaps, int64_t position) {
    const int64_t hidden = 40, heads = 3, z = 22, p = 6, width = 10, window = 5, q_rank = 17, m = 2,
                  top_k = 2, experts = 4, i = 33;
    const int64_t parts = overlaps ? 2 : 1;
    Weights query(kind, q_rank, hidden), query_b(kind, heads * z, q_rank), key(kind, z, hidden),
        out_a(kind, 48, z), out_b(kind, hidden, 48), gate(kF32, experts, hidden),
        kv(kind, parts * z, hidden), index_kv(kind, parts * width, hidden),
        index_query(kind, 2 * width, q_rank), index_weights(kind, 2, hidden), in(kInt8, i, hidden),
        down(kInt8, hidden, i);
    Floats norm(hidden), low_norm(q_rank), row_norm(z), sinks(heads), bias(parts * ratio * z),
        fn((2 + m) * m * m * hidden), base((2 + m) * m), scale(3), table(p), levels(16);
    const Compressor compressor{kv.matrix, kv.matrix, bias, row_norm, ratio, z, overlaps, 0, 0},
        keys{index_kv.matrix, index_kv.matrix, bias, row_norm, ratio, width, overlaps, 1, 0};
    const Indexer indexer{2, width, 3, 0, 0.2f, 0, index_query.matrix, index_weights.matrix,
                          {}, nullptr, nullptr};
    const Compressed a{heads, z, p, 3, window, 1e-6f, 0.1f, norm, low_norm, row_norm, sinks, norm,
                       query.matrix, query_b.matrix, key.matrix, out_a.matrix, out_b.matrix,
                       gate.matrix, nullptr, ratio ? &compressor : nullptr,
                       overlaps ? &keys : nullptr, overlaps ? &indexer : nullptr};
    const Hyper hyper{fn, base, scale, m, 20, 1e-6f, 1e-6f};
    const Mlp mlp{{in.matrix, in.matrix, down.matrix}, {0.5f}, nullptr};
    Array<int32_t> experts_of(3 * top_k), slots(experts);
    for (int64_t e = 0; e < 3 * top_k; e++) experts_of[e] = int32_t(e % experts);
    const Layer layer{nullptr, &a, &hyper, &hyper, &mlp, experts_of};
    const Model model{1, hidden, experts, m, 3, &layer, {1, 1, top_k, 1, kSqrtSoftplus, 1, 1.5}, {}, {}, p / 2,
                      nullptr, table};
    const Record record{hidden, i, kNf4, kLut4, 0, levels, levels, {}};
    const int64_t bytes = record_bytes(record), apart = (bytes + 63) / 64 * 64;
    Array<uint8_t> slab(apart);
    fill_record(slab, record);

    const int64_t seen = position + 1 < window ? position + 1 : window, id = 2;
    const bool done = ratio && (position + 1) % ratio == 0;
    const int64_t open = done && parts * ratio <= position + 1 ? parts * ratio : done ? ratio : 1;
    const int64_t ready = ratio ? (position + 1) / ratio : 0;
    const int64_t firsts[] = {position + 1 - seen, position + 1 - open};
    Array<uint8_t> rows(seen * latent_bytes(z, 0)), more(ready * latent_bytes(z, 0)),
        index_rows(ready * latent_bytes(width, 0));
    Floats open_rows(open * 2 * parts * z), open_keys(open * 2 * parts * width),
        latents((seen + ready) * z);
    check(slotmoe_store_latents(latents, seen, z, 0, rows, latent_bytes(z, 0)));
    check(slotmoe_store_latents(latents, ready, z, 0, more, latent_bytes(z, 0)));
    check(slotmoe_store_latents(latents, ready, width, 0, index_rows, latent_bytes(width, 0)));
    uint8_t* starts[] = {rows, more, reinterpret_cast<uint8_t*>(open_rows.p), index_rows,
                         reinterpret_cast<uint8_t*>(open_keys.p)};
    const Store others{&starts[1], nullptr, 0, latent_bytes(z, 0)},
        opened{&starts[2], &firsts[1], 0, 8 * parts * z},
        indexed{&starts[3], nullptr, 0, latent_bytes(width, 0)},
        opened_keys{&starts[4], &firsts[1], 0, 8 * parts * width};
    const Tokens tokens{&position, table, nullptr, {&starts[0], firsts, 0, latent_bytes(z, 0)}, {},
                        nullptr, &id, table, {}, {}, nullptr,
                        {{others, opened, table}, {indexed, opened_keys, table}, {}}};
    Floats h(m * hidden), post(m), comb(m * m), y(m * hidden), x(2 * hidden), weights(top_k);
    Array<int64_t> indices(top_k);
    double seconds[5] = {};
    for (int64_t e = 0; e < experts; e++) slots[e] = 0;
    int64_t reached = -1;
    check(slotmoe_decode(&model, 0, model.layers, 1, h, &tokens, slots, slab, 1, apart, &record, nullptr, nullptr,
                         post, comb, y, x, weights, indices, &reached, nullptr, seconds));
    if (reached != 1) check(int(10 + reached));
}

// Two layers of attention by groups for two tokens of a sequence, over all rows and over a window
// that has no slack.
static void groups(int64_t kind, int64_t heads, int64_t z, int64_t p, int64_t position) {
    const int64_t hidden = 40, window = 5, experts = 4, i = 33, top_k = 2, t = 2, width = 2 * z;
    Weights query(kind, heads * z, hidden), key(kind, width, hidden), out(kind, hidden, heads * z),
        gate(kF32, experts, hidden);
    Floats norm(hidden), head_norm(z), row_norm(width), sinks(heads), bias(heads * z), few(width),
        logit_bias(experts), table(t * p), levels(16), both(width * (position + t));
    const bool whole = position % 2;
    const Grouped all{heads, 2, z, p, whole, 0, 0, 0, heads * z, width, 1e-6f, 0.1f, norm, norm,
                      bias, row_norm, nullptr, nullptr, nullptr, nullptr, nullptr,
                      query.matrix, key.matrix, key.matrix, out.matrix, {}, nullptr},
        last{heads, 2, z, p, !whole, whole, window, 0, z, z, 1e-6f, 0.1f, norm, norm,
             head_norm, head_norm, sinks, bias, few, few, norm,
             query.matrix, key.matrix, key.matrix, out.matrix, gate.matrix, logit_bias, query.matrix};
    Weights in(kInt8, i, hidden), down(kInt8, hidden, i), words(kind > kInt8 && kind < kF32 ? kInt8 : kind, 19, hidden);
    const Mlp mlp{{in.matrix, in.matrix, down.matrix}, {0.5f, 1.0f, 0.0f}};
    const Layer layers[] = {{nullptr, nullptr, nullptr, nullptr, &mlp, nullptr, &all, nullptr},
                            {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, &last, logit_bias}};
    const Model model{2, hidden, experts, 1, 0, layers, {1, 1, top_k, 1, kSoftmax, 1, 1.5},
                      words.matrix, words.matrix, p / 2, norm, table, 1e-6f, 1.0f};
    const Record record{hidden, i, kNf4, kLut4, 0, levels, levels, {0.0f, 1.0f, 0.0f}};
    Array<uint8_t> slab((record_bytes(record) + 63) / 64 * 64);
    fill_record(slab, record);
    const int64_t size = latent_bytes(z, z), end = position + t,
                  first = end - t + 1 < window ? 0 : end - t + 1 - window;
    Array<uint8_t> rows(2 * end * size), windowed(2 * (end - first) * size);
    check(slotmoe_store_latents(both, end, z, z, rows, size));
    check(slotmoe_store_latents(both, end, z, z, rows + end * size, size));
    memcpy(windowed, rows + first * size, size_t((end - first) * size));
    memcpy(windowed + (end - first) * size, rows + first * size, size_t((end - first) * size));
    uint8_t *starts[] = {rows, rows}, *window_starts[] = {windowed, windowed};
    const int64_t firsts[] = {first, first}, positions[] = {position, position + 1};
    const int64_t ids[t] = {18, 0};
    const Tokens tokens{positions, table, nullptr, {starts, nullptr, end * size, size},
                        {window_starts, firsts, (end - first) * size, size}, nullptr, ids};
    Floats y(t * hidden), x(2 * t * hidden), weights(t * top_k), logits(t * 19);
    Array<int64_t> indices(t * top_k);
    Array<int32_t> slots(experts);
    double seconds[5] = {};
    for (int64_t e = 0; e < experts; e++) slots[e] = 0;
    int64_t reached = -1;
    check(slotmoe_decode(&model, 0, model.layers, t, nullptr, &tokens, slots, slab, 1, 64, &record, nullptr,
                         nullptr, nullptr, nullptr, y, x, weights, indices, &reached, logits, seconds));
    if (reached != 2) check(int(10 + reached));
}

// A layer with a delta rule for two tokens of one sequence, the first with another to replay, and one
// of another sequence, whose rows of inputs have no slack; then the rule over a prompt.
static void delta(int64_t kind, int64_t keys, int64_t each, int64_t k, int64_t v, int64_t position,
                  bool by_channel = false) {
    const int64_t hidden = 40, heads = keys * each, columns = 2 * keys * k + heads * v, i = 33,
                  decays = heads * (by_channel ? k : 1), wide = columns + heads + decays,
                  state = heads * k * v, t = 3, folded = position - 1;
    Weights qkv(kind, columns, hidden), z(kind, heads * v, hidden), b(kF32, heads, hidden),
        a(kF32, decays, hidden), out(kind, hidden, heads * v), gate(kF32, 4, hidden),
        in(kInt8, i, hidden), down(kInt8, hidden, i);
    Floats norm(hidden), taps(4 * columns), decay(heads), bias(decays), own_norm(v), levels(16),
        table(0);
    const Delta rule{{keys, heads, k, v, by_channel, 1e-6f, 0, taps, decay, bias, own_norm}, 0,
                     norm, norm, qkv.matrix, z.matrix, b.matrix, a.matrix, out.matrix, gate.matrix,
                     nullptr, {}, {}};
    const Mlp mlp{{in.matrix, in.matrix, down.matrix}, {}};
    const Layer layer{nullptr, nullptr, nullptr, nullptr, &mlp, nullptr, nullptr, nullptr, &rule};
    const Model model{1, hidden, 4, 1, 0, &layer, {1, 1, 2, 1, kSoftmax, 1, 1.5}};
    const Record record{hidden, i, kNf4, kLut4, 0, levels, levels, {0.0f, 1.0f, 0.0f}};
    Array<uint8_t> slab((record_bytes(record) + 63) / 64 * 64);
    fill_record(slab, record);
    const int64_t past = folded < 3 ? folded : 3;
    Floats rows((past + 3) * wide), other(wide), states(2 * state), others(2 * state);
    uint8_t *inputs[] = {reinterpret_cast<uint8_t*>(rows.p), reinterpret_cast<uint8_t*>(rows.p),
                         reinterpret_cast<uint8_t*>(other.p)},
            *kept[] = {reinterpret_cast<uint8_t*>(states.p), reinterpret_cast<uint8_t*>(states.p),
                       reinterpret_cast<uint8_t*>(others.p)};
    const int64_t firsts[] = {folded - past, folded - past, 0}, at[] = {position, position + 1, 0};
    const Fold folds[] = {{folded, 1, 0, position + 2}, {folded, 1, 0, position + 2}, {0, 0, 1, 1}};
    const Tokens tokens{at, table, nullptr, {}, {}, nullptr, nullptr, nullptr,
                        {inputs, firsts, 0, 4 * wide}, {kept, nullptr, 0, 4 * state}, folds, {}};
    Floats h(t * hidden), y(t * hidden), x(2 * t * hidden), weights(t * 2);
    Array<int64_t> indices(t * 2);
    Array<int32_t> slots(4);
    double seconds[5] = {};
    for (int64_t e = 0; e < 4; e++) slots[e] = 0;
    int64_t reached = -1;
    check(slotmoe_decode(&model, 0, model.layers, t, h, &tokens, slots, slab, 1, 64, &record, nullptr, nullptr,
                         nullptr, nullptr, y, x, weights, indices, &reached, nullptr, seconds));
    if (reached != 1) check(int(10 + reached));
    const int64_t count = 67 + past, asked = count - past - 1;
    Floats prompt(count * wide), gates(asked * heads * v), result(asked * heads * v);
    check(slotmoe_delta(prompt, gates, taps, decay, bias, own_norm, states, others, count, wide,
                        columns, asked, keys, heads, k, v, decays, past, count - past - 1, by_channel,
                        1e-6f, result));
    check(slotmoe_gated(result, gates, asked, heads * v, result));
}

// kv_b by head, its tiles end where the last head's do.
struct KvB {
    Array<int8_t> query, value;
    Floats query_scale, value_scale, ones;
    Absorbed absorbed;
    KvB(int64_t heads, int64_t n, int64_t r, int64_t v)
        : query(heads * packed_bytes(r, n)),
          value(heads * packed_bytes(v, r)),
          query_scale(heads * n),
          value_scale(heads * v),
          ones(r),
          absorbed{heads, n, r, v, query, value, query_scale, value_scale, ones} {}
};

// Layers with latent attention, all their matrices of one kind.
static void layer(int64_t kind, int64_t hidden, int64_t heads, int64_t n, int64_t p, int64_t r,
                  int64_t v, int64_t q_rank, int64_t experts) {
    Weights query(kind, q_rank ? q_rank : heads * (n + p), hidden),
        query_b(kind, heads * (n + p), q_rank ? q_rank : 1);
    Weights latent(kind, r + p, hidden), out(kind, hidden, heads * v),
        gate(kF32, experts, hidden);
    Floats h(3 * hidden), table(3 * p), norm(hidden), query_norm(q_rank), latent_norm(r, 1e6f),
        bias(experts);
    const KvB kv_b(heads, n, r, v);
    Attention a{heads,
                n,
                p,
                r,
                v,
                q_rank > 0,
                0,
                1e-6f,
                1e-6f,
                0.01f,
                0,
                norm,
                q_rank ? query_norm.p : nullptr,
                latent_norm,
                norm,
                query.matrix,
                query_b.matrix,
                latent.matrix,
                out.matrix,
                gate.matrix,
                bias,
                &kv_b.absorbed};
    Floats many(3 * heads * p), tables(3 * p), turned(3 * heads * p);
    for (int64_t in_halves : {0, 1})
        check(slotmoe_rotate(many, tables, in_halves, 3, heads, p, turned));
    decode(a, hidden, experts, h, table);
}

static void absorb(int64_t t, int64_t heads, int64_t n, int64_t v, int64_t r) {
    Floats q(t * heads * n), latent(t * heads * r), value(t * heads * v);
    const KvB kv_b(heads, n, r, v);
    check(slotmoe_absorb_query(&kv_b.absorbed, q, t, latent));
    check(slotmoe_absorb_value(&kv_b.absorbed, latent, t, value));
}

static void quantize(int64_t n, int64_t k) {
    float levels[16];
    for (int i = 0; i < 16; i++) levels[i] = float(i) / 7.5f - 1.0f;
    Array<uint8_t> codes(tiles(n) * blocks(k) * 512);
    Array<uint16_t> absmax(tiles(n) * blocks(k) * 16), source(n * k);
    Array<int8_t> q(n * k);
    Floats scale(n), wide(n * k);
    Array<double> tile_sums(2 * tiles(n)), row_sums(2 * n);
    halves(source, n * k);
    for (int type = 0; type < 3; type++) {
        const void* src = type == 0 ? static_cast<void*>(wide.p) : source.p;
        const int status = slotmoe_quantize_nf4(src, type, n, k, levels, codes, absmax);
        if (status != 3) check(status);  // random bf16 may well exceed fp16
        check(slotmoe_quantize_int8(src, type, n, k, q, scale));
        for (int64_t kind = kNf4; kind <= kInt6; kind++) {
            const Weights weights(kind, n, k);
            check(slotmoe_coded_error(&weights.matrix, src, type, tile_sums));
        }
        check(slotmoe_int8_error(src, type, n, k, q, scale, row_sums));
    }
}

static void experts(int64_t t, int64_t k, int64_t h, int64_t i) {
    Floats x(t * h), y(t * h), outs(t * k * h), weights(t * k), levels(16);
    const Record record{h, i, t % 2 ? kLut3 : kMxfp4, k % 2 ? kLut2 : kInt4, t % 2, levels, levels,
                        {0.5f, 1.7f, 1.0f}};
    const int64_t size = record_bytes(record), apart = (size + 63) / 64 * 64;
    Array<uint8_t> slab((k - 1) * apart + size);  // the last record has no slack
    for (int64_t e = 0; e < k; e++) fill_record(slab + e * apart, record);
    std::vector<int32_t> slots(k);
    for (int64_t e = 0; e < k; e++) slots[e] = int32_t(k - 1 - e);
    std::vector<int64_t> indices(t * k);
    for (int64_t use = 0; use < t * k; use++) indices[use] = use % k;
    for (int64_t tokens : {int64_t(1), t}) {
        check(slotmoe_experts_by_slot(&record, x, tokens, k, indices.data(), slots.data(), k, slab,
                                      k, apart, outs));
        check(slotmoe_weighted_sum(outs, weights, tokens, k, h, y));
    }
}

// Two groups with so many heads each, over all rows and over windows that begin with the first.
static void grouped(int64_t heads, int64_t rows, int64_t z, int64_t extra, float size_of_rows) {
    const int64_t size = latent_bytes(z, z), stride = size + extra, apart = rows * stride;
    Array<uint8_t> cache(apart + (rows - 1) * stride + size);
    Floats both(rows * 2 * z, size_of_rows), q(3 * 2 * heads * z), sinks(2 * heads);
    for (int64_t group = 0; group < 2; group++)
        check(slotmoe_store_latents(both, rows, z, z, cache + group * apart, stride));
    for (int64_t t : {int64_t(1), rows < 3 ? rows : 3}) {
        Floats out(t * 2 * heads * z);
        check(slotmoe_grouped(q, t, 2 * heads, cache, 2, apart, rows, stride, 0, z, 0.1f, 0, nullptr,
                              out));
        check(slotmoe_grouped(q, t, 2 * heads, cache, 2, apart, rows, stride, 7, z, 0.1f,
                              rows - t + 1, sinks, out));
    }
}

static void attention(int64_t heads, int64_t context, int64_t r, int64_t p, int64_t extra,
                      float size_of_rows = 1) {
    Floats q(heads * (r + p)), out(heads * r);
    const int64_t size = latent_bytes(r, p), stride = size + extra;
    Array<uint8_t> cache((context - 1) * stride + size);  // the last row has no slack
    Floats latents(context * (r + p), size_of_rows);
    check(slotmoe_store_latents(latents, context, r, p, cache, stride));
    check(slotmoe_mla(q, 1, heads, cache, context, stride, r, p, 0.01f, out));
    const int64_t several = context < 5 ? context : 5;
    Floats many(several * heads * (r + p)), outs(several * heads * r);
    check(slotmoe_mla(many, several, heads, cache, context, stride, r, p, 0.01f, outs));
    grouped(heads, context, r, extra, size_of_rows);
}

// Lists of `length` of so many rows in two places, and the indexer's.
static void lists(int64_t heads, int64_t rows, int64_t length, int64_t r, int64_t p) {
    const int64_t size = latent_bytes(r, p), t = 3, split = rows / 3;
    Array<uint8_t> a(split * size), b((rows - split) * size), keys(rows * latent_bytes(r, 0));
    Floats latents(rows * (r + p)), q(t * heads * (r + p)), sinks(heads), out(t * heads * r);
    check(slotmoe_store_latents(latents, split, r, p, a, size));
    check(slotmoe_store_latents(latents, rows - split, r, p, b, size));
    check(slotmoe_store_latents(latents, rows, r, 0, keys, latent_bytes(r, 0)));
    Array<int32_t> list(t * length), counts(t), chosen(t * 40);
    for (int64_t i = 0; i < t * length; i++) list[i] = int32_t((next() >> 8) % uint32_t(rows));
    if (length) list[length / 2] = -1;
    for (int64_t i = 0; i < t; i++) counts[i] = int32_t(rows * i / (t - 1));
    for (int64_t tokens : {int64_t(1), t}) {
        check(slotmoe_attend(q, tokens, heads, a, split, size, b, rows - split, size, list, length,
                             r, p, 0.1f, tokens > 1 ? sinks.p : nullptr, out));
        check(slotmoe_index(q, sinks, 1, heads, r, keys, rows, latent_bytes(r, 0), counts + t - 1,
                            40, chosen));
    }
    const Floats weights(t * heads);
    check(slotmoe_index(q, weights, t, heads, r, keys, rows, latent_bytes(r, 0), counts, 40,
                        chosen));
}

static void streams(int64_t t, int64_t m, int64_t d, int64_t window) {
    const int64_t rows = (2 + m) * m;
    Floats h(t * m * d), fn(rows * m * d), base(rows), scale(3), x(t * d), post(t * m);
    Floats comb(t * m * m), out(t * m * d), kv(t * window * d), gate(t * window * d),
        bias(window * d);
    check(slotmoe_hyper_in(h, fn, base, scale, t, m, d, rows, 1e-6f, 20, 1e-6f, x, post, comb));
    check(slotmoe_hyper_out(x, h, post, comb, t, m, d, out));
    check(slotmoe_hyper_head(h, fn, base, scale, t, m, d, 1e-6f, 1e-6f, x));
    check(slotmoe_compress(kv, gate, bias, fn, t, window, d, 1e-6f, x));
}

// Scales and codes of a table of levels.
static void encode(int64_t n, int64_t k, int64_t l, int64_t block) {
    const int64_t columns = (n + 15) / 16 * 16, found = (k + block - 1) / block, s = 128;
    float levels[64], starts[] = {0.8f, -1.0f};
    for (int i = 0; i < 64; i++) levels[i] = float(i - l / 2) / 7.5f;
    Floats x(n * k), weights(k), scales(n * found), panel(s * columns), matrix(s * s),
        of_columns(s / block * columns), q(s * columns), factors(columns);
    Array<uint8_t> codes(n * found * block);
    for (int64_t i = 0; i < k; i++) weights[i] = 1 + weights[i] / 2;
    for (int64_t i = 0; i < s; i++) matrix[i * s + i] = 1;
    for (int64_t i = 0; i < columns; i++) factors[i] = 0.01f;
    Array<uint16_t> short_x(n * k);
    halves(short_x, n * k);
    for (int type = 0; type < 3; type++) {
        const void* src = type == 0 ? static_cast<void*>(x.p) : short_x.p;
        check(slotmoe_fit_rows(src, type, n, k, weights, levels, l, starts, 2, block, scales));
        check(slotmoe_code_rows(src, type, n, k, scales, levels, l, block, codes));
    }
    check(slotmoe_feed_back(panel, s, columns, matrix, factors, 127, levels, l, starts, 2, block,
                            of_columns, s / block, q));
    check(slotmoe_descend(panel, s, columns, matrix, factors, 127, levels, l, block, of_columns,
                          s / block, q));
}

static void rotations(int64_t t, int64_t c) {
    Floats positions(t), frequencies(c);
    Array<float> y(2 * t * c);
    for (int64_t i = 0; i < t; i++) positions[i] = float(next() >> 14);
    for (int64_t i = 0; i < c; i++) frequencies[i] = float(next() >> 8) / 16777216.0f;
    check(slotmoe_rotations(positions, frequencies, t, c, 1.5f, y));
}

// Every entry in few shapes.
static void few() {
    for (int64_t t : {1, 3, 40}) {
        linear(t, 37, 130, 1);
        experts(t, 2, 65, 90);
        mlp(t, 40, 90);
    }
    linear(600, 20, 70, 1e-42f);
    quantize(17, 130);
    for (int64_t l : {8, 16}) encode(17, 130, l, 4 * l);
    absorb(3, 3, 7, 20, 300);
    absorb(40, 2, 70, 16, 33);
    for (int64_t kind = kInt8; kind <= kBf16; kind++)
        layer(kind, 65, 3, 7, 6, 70, 5, kind % 2 * 17, 9);
    attention(17, 200, 70, 10, 5);
    attention(20, 130, 70, 10, 0, 1e38f);
    lists(17, 200, 150, 70, 10);
    groups(kInt8, 6, 22, 6, 70);
    groups(kBf16, 2, 64, 64, 3);
    delta(kInt8, 2, 2, 24, 40, 9);
    delta(kBf16, 1, 3, 7, 32, 1);
    delta(kF32, 3, 1, 20, 24, 9, true);
    streams(2, 4, 70, 8);
    rotations(40, 33);
    for (int64_t position : {0, 3, 31, 42}) {
        compressed(kInt8, 4, true, position);
        compressed(kNf4, 8, false, position);
        compressed(kBf16, 0, false, position);
    }
}

// The few's bytes, whatever ran before.
static uint64_t bits(const char* isa, int threads) {
    check(slotmoe_set_isa(isa));
    slotmoe_set_threads(threads);
    state = 1, digest = 14695981039346656037u;
    few();
    return digest;
}

static void all() {
    const int64_t odd[] = {1, 15, 16, 17, 63, 64, 65, 130};
    for (int64_t n : odd)
        for (int64_t k : odd) {
            linear(1, n, k, 1);
            linear(3, n, k, 1e30f);
            linear(21, n, k, 1);
            quantize(n, k);
            encode(n, k, 16, 32);
        }
    linear(600, 20, 70, 1e-42f);
    linear(0, 20, 70, 1);
    for (int64_t h : {1, 16, 65, 200})
        for (int64_t i : {1, 15, 64, 90}) {
            experts(3, 2, h, i);
            mlp(1, h, i);
            mlp(3, h, i);
        }
    for (int64_t r : {1, 63, 256, 300})
        for (int64_t heads : {1, 3, 5}) absorb(2, heads, 7, 5, r);
    for (int64_t heads : {1, 3, 4, 9})
        for (int64_t context : {1, 2, 15, 64, 65, 200})
            for (int64_t r : {1, 16, 64, 70})
                for (int64_t p : {0, 1, 64}) attention(heads, context, r, p, context % 3);
    for (int64_t kind = kInt8; kind <= kBf16; kind++) {
        layer(kind, 65, 3, 7, 6, 70, 5, 0, 9);
        layer(kind, 40, 1, 1, 2, 1, 1, 17, 9);
        layer(kind, 200, 5, 16, 0, 300, 20, 90, 33);
    }
    for (int64_t block : {32, 64})
        for (int64_t l : {4, 8, 16, 32, 64}) encode(33, 70, l, block);
    for (int64_t heads : {1, 5, 20})
        for (int64_t length : {0, 1, 64, 200}) lists(heads, 150, length, 70, 6);
    for (int64_t m : {1, 4})
        for (int64_t d : {1, 16, 70, 300}) streams(2, m, d, d % 9 + 1);
    for (int64_t kind : {kInt8, kLut3, kInt5, kF16})
        for (int64_t position : {0, 2, 3, 4, 7, 11, 30, 31, 127}) {
            compressed(kind, 4, true, position);
            compressed(kind, position % 2 ? 8 : 0, false, position);
            groups(kind, 6, 22, position % 3 * 4, position);
            delta(kind, position % 3 + 1, position % 2 + 1, 20, position % 50 + 1, position + 1);
        }
    for (int64_t t : {0, 1, 3}) rotations(t, 65);
    attention(2, 2500, 70, 10, 5);
    attention(17, 20, 2000, 100, 0);  // longer than 32-bit sums of the largest integers take
    for (float size : {0.0f, 1e-40f, 1e38f, 1.0f / 0.0f}) attention(20, 130, 70, 10, 0, size);
}

// Without arguments: all shapes, for sanitizers. "threads": only what concerns threads. "bits": few
// shapes, on which all instruction sets give the bits of plain C++ with any number of threads. "own":
// the same, but each may have bits of its own.
int main(int argc, char** argv) {
    const bool threads_only = argc > 1 && !strcmp(argv[1], "threads");
    for (int isa = slotmoe_isa_count() - 1; isa >= 0; isa--) {
        const char* name = slotmoe_isa_name(isa);
        if (!slotmoe_isa_supported(isa)) continue;
        check(slotmoe_set_isa(name));
        if (argc > 1 && !threads_only) {
            const uint64_t wanted = bits(!strcmp(argv[1], "bits") ? "portable" : name, 1);
            for (int threads : {1, 4, 16})
                if (bits(name, threads) != wanted) {
                    printf("%s with %d threads differs\n", name, threads);
                    return 1;
                }
        } else if (threads_only) {
            slotmoe_set_threads(3);
            std::vector<std::thread> callers;
            for (int c = 0; c < 3; c++)
                callers.emplace_back([] {
                    std::vector<float> x(256, 1.0f), y(256), scale(256, 1.0f);
                    std::vector<int8_t> w(256 * 256, 1);
                    const Matrix m{kInt8, 256, 256, w.data(), scale.data(), nullptr};
                    for (int j = 0; j < 50; j++) check(slotmoe_linear(&m, x.data(), nullptr, 0, 1, 1, y.data()));
                });
            for (auto& c : callers) c.join();
            slotmoe_set_threads(2);
            experts(3, 2, 65, 40);
            encode(65, 130, 16, 32);
            attention(4, 200, 64, 16, 0);
            layer(kInt8, 65, 4, 7, 6, 70, 5, 17, 40);
            lists(5, 150, 200, 70, 6);
            streams(3, 4, 300, 8);
            compressed(kInt8, 4, true, 31);
            groups(kInt8, 6, 22, 6, 70);
            delta(kInt8, 2, 2, 24, 40, 9);
        } else {
            for (int threads = 1; threads <= 3; threads++) {
                slotmoe_set_threads(threads);
                all();
            }
        }
        printf("%s ok %016llx\n", name, static_cast<unsigned long long>(digest));
    }
}
