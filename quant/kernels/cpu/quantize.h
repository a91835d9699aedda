// Making NF4 and int8 weights, byte for byte as bitsandbytes and torch do in fp32, and what that costs.
//
// Shapes: src [N, K] row-major f32, f16 or bf16; NF4 codes [tiles, B, 512], absmax fp16 [tiles, B, 16]; int8 q [N, K],
// scale [N].
namespace slotmoe {
namespace {

constexpr int kNotFinite = 2, kScaleOverflow = 3;

// n <= 64 values from element `at`, the rest zeros.
inline void load_source(const void* src, Source type, int64_t at, int64_t n, float* v) {
    if (n < kBlock) memset(v, 0, kBlock * sizeof(float));
    if (type == Source::f32) {
        memcpy(v, static_cast<const float*>(src) + at, size_t(n) * 4);
        return;
    }
    uint16_t raw[kBlock] = {};
    memcpy(raw, static_cast<const uint16_t*>(src) + at, size_t(n) * 2);
    if (type == Source::f16)
        for (int i = 0; i < kBlock; i += 16) Lanes::store(v + i, Lanes::load_half(raw + i));
    else
        for (int i = 0; i < kBlock; i++) v[i] = bits_float(uint32_t(raw[i]) << 16);
}

int quantize_nf4(const void* src, Source type, int64_t n, int64_t k, const float* levels, int64_t begin, int64_t end,
                 uint8_t* codes, uint16_t* absmax) {
    const int64_t blocks = (k + kBlock - 1) / kBlock;
    float middle[15];
    for (int i = 0; i < 15; i++) middle[i] = (levels[i] + levels[i + 1]) / 2.0f;
    for (int64_t tile = begin; tile < end; tile++)
        for (int64_t b = 0; b < blocks; b++) {
            uint8_t* out = codes + (tile * blocks + b) * 512;
            alignas(64) float scales[kTile] = {};
            memset(out, 0x77, 512);
            for (int64_t lane = 0; lane < kTile && tile * kTile + lane < n; lane++) {
                const int64_t columns = k - b * kBlock < kBlock ? k - b * kBlock : kBlock;
                alignas(64) float v[kBlock];
                load_source(src, type, (tile * kTile + lane) * k + b * kBlock, columns, v);
                const uint32_t top = max_bits(v, kBlock);
                if (top >= kInfinityBits) return kNotFinite;
                const float largest = bits_float(top);
                if (largest >= 65520.0f) return kScaleOverflow;
                scales[lane] = largest;
                const float inverse = 1.0f / (largest < 1e-38f ? 1e-38f : largest);
                int32_t code[kBlock];
                for (int i = 0; i < kBlock; i++) {
                    float s = v[i] * inverse;
                    s = s < -1.0f ? -1.0f : s;
                    v[i] = s > 1.0f ? 1.0f : s;
                    code[i] = 0;
                }
                for (int l = 0; l < 15; l++)
                    for (int i = 0; i < kBlock; i++) code[i] += middle[l] < v[i];
                uint8_t byte[kBlock];
                for (int i = 0; i < kBlock; i++) byte[i] = uint8_t(code[i]);
                for (int t = 0; t < 8; t++) {
                    uint32_t high, low;
                    memcpy(&high, byte + 8 * t, 4);
                    memcpy(&low, byte + 8 * t + 4, 4);
                    const uint32_t both = high << 4 | low;  // codes are below 16, so bytes do not mix
                    memcpy(out + 64 * t + 4 * lane, &both, 4);
                }
            }
            Lanes::store_half(absmax + (tile * blocks + b) * kTile, Lanes::load(scales));
        }
    return 0;
}

int quantize_int8(const void* src, Source type, int64_t k, int64_t begin, int64_t end, int8_t* q, float* scale) {
    for (int64_t row = begin; row < end; row++) {
        alignas(64) float v[kBlock];
        uint32_t top = 0;
        for (int64_t c = 0; c < k; c += kBlock) {
            load_source(src, type, row * k + c, k - c < kBlock ? k - c : kBlock, v);
            const uint32_t bits = max_bits(v, kBlock);
            top = bits > top ? bits : top;
        }
        if (top >= kInfinityBits) return kNotFinite;
        const float s = bits_float(top) / 127.0f;
        scale[row] = s;
        for (int64_t c = 0; c < k; c += kBlock) {
            const int64_t n = k - c < kBlock ? k - c : kBlock;
            int8_t out[kBlock] = {};
            load_source(src, type, row * k + c, n, v);
            if (s > 0.0f)  // a row of zeros, or of denormals too small to scale, stays 0
                for (int i = 0; i < kBlock; i++) {
                    float r = v[i] / s;
                    r = r < -127.0f ? -127.0f : r;
                    r = r > 127.0f ? 127.0f : r;
                    out[i] = int8_t(int32_t(round_even(r)));
                }
            memcpy(q + row * k + c, out, size_t(n));
        }
    }
    return 0;
}

// Sums of squared differences and of squared weights in float64. Eight of each, always added in the same order, so that
// every instruction set and number of threads gives the same bits. Compilers don't find these vectors by themselves.
struct Squares {
    typedef float Floats __attribute__((vector_size(32)));
    typedef double Doubles __attribute__((vector_size(64)));
    Doubles error = {}, weight = {};

    void add(const float* wanted, const float* found) {  // 64 of each
        for (int i = 0; i < kBlock; i += 8) {
            Floats a, b;
            memcpy(&a, wanted + i, sizeof a);
            memcpy(&b, found + i, sizeof b);
            const Doubles w = __builtin_convertvector(a, Doubles), e = w - __builtin_convertvector(b, Doubles);
            error += e * e;
            weight += w * w;
        }
    }
    void store(double* out) const {
        out[0] = out[1] = 0;
        for (int j = 0; j < 8; j++) out[0] += error[j], out[1] += weight[j];
    }
};

// The codes of one row's 64 columns of a block, for all rows: what was just stored in pieces is slow to load whole.
inline void unpack_codes(int64_t kind, const uint8_t* in, uint8_t (*codes)[kBlock]) {
    const auto word = [&](int at, int lane) {  // of four columns
        uint32_t w;
        memcpy(&w, in + 64 * at + 4 * lane, 4);
        return w;
    };
    const int bits = kBits[kind], low = bits == 2 ? 2 : bits > 4 ? bits - 4 : 0, each = low ? 4 / low : 0;
    const uint32_t mask = 0x01010101u * uint32_t((1 << (bits > 4 ? 4 : bits)) - 1);
    for (int t = 0; t < 8; t++)
        for (int lane = 0; lane < kTile; lane++) {
            const int group = t / 4 * 3;
            uint32_t both;
            if (bits == 2)
                both = word(t / 2, lane) >> t % 2 * 4;
            else if (bits != 3)
                both = word(t, lane);
            else if (t % 4 < 3)
                both = word(group + t % 4, lane);
            else
                both = (word(group, lane) >> 6 & 0x03030303) | (word(group + 1, lane) >> 4 & 0x0c0c0c0c) |
                       (word(group + 2, lane) >> 2 & 0x30303030);
            uint32_t first = (bits < 4 ? both : both >> 4) & mask, second = (bits < 4 ? both >> bits : both) & mask;
            if (bits > 4) {
                const uint32_t rest = word(8 + t / each, lane) >> t % each * 2 * low, ones = 0x01010101u * ((1u << low) - 1);
                first = first << low | (rest & ones), second = second << low | (rest >> low & ones);
            }
            memcpy(codes[lane] + 8 * t, &first, 4);
            memcpy(codes[lane] + 8 * t + 4, &second, 4);
        }
}

// The scales of 64 columns of a tile's rows, those of its first and its last 32.
inline void load_scales(const CodedMatrix& w, int64_t tile, int64_t b, float (*scales)[kTile]) {
    const uint8_t* p = w.tile_scales(tile);
    if (w.kind == kNf4 || w.kind == kInt4) {
        const int parts = w.kind == kInt4 ? 2 : 1;
        const uint16_t* of_block = reinterpret_cast<const uint16_t*>(p) + kTile * parts * b;
        for (int half = 0; half < 2; half++)
            Lanes::store(scales[half], Lanes::load_half(of_block + kTile * (half % parts)));
        return;
    }
    if (w.kind == kMxfp4) {
        Lanes::F exponents[2];
        Lanes::load_exponents(p + 32 * b, exponents);
        for (int half = 0; half < 2; half++)
            Lanes::store(scales[half], Lanes::times(Lanes::start(1), exponents[half]));
        return;
    }
    Lanes::F of_block[2];
    if (w.kind == kLut2)
        Lanes::load_int4s(p + 64 + 16 * b, of_block);
    else
        Lanes::load_int8s(p + 64 + 32 * b, of_block);
    for (int half = 0; half < 2; half++)
        Lanes::store(scales[half], Lanes::mul(Lanes::load(reinterpret_cast<const float*>(p)), of_block[half]));
}

void coded_error(const void* src, Source type, int64_t k, const float* levels, const CodedMatrix& w, int64_t begin,
                 int64_t end, double* sums) {
    for (int64_t tile = begin; tile < end; tile++) {
        Squares squares;
        for (int64_t b = 0; b < w.blocks; b++) {
            const int64_t columns = k - b * kBlock < kBlock ? k - b * kBlock : kBlock;
            alignas(64) float scales[2][kTile];
            alignas(64) uint8_t codes[kTile][kBlock];
            load_scales(w, tile, b, scales);
            unpack_codes(w.kind, w.tile_codes(tile) + code_bytes(w.kind, b), codes);
            for (int64_t lane = 0; lane < kTile && tile * kTile + lane < w.n; lane++) {
                alignas(64) float v[kBlock], out[kBlock];
                alignas(64) int32_t code[kBlock];
                load_source(src, type, (tile * kTile + lane) * k + b * kBlock, columns, v);
                const int low = low_bits(w.kind);
                for (int i = 0; i < kBlock; i++) code[i] = codes[lane][i] >> low;
                for (int i = 0; i < kBlock; i++) out[i] = float(codes[lane][i] & ((1 << low) - 1));
                for (int i = 0; i < kBlock; i += 16) {
                    const typename Lanes::F level = Lanes::add(Lanes::pick(levels, code + i), Lanes::load(out + i));
                    Lanes::store(out + i, Lanes::mul(level, Lanes::broadcast(scales[i / 32][lane])));
                }
                for (int64_t i = columns; i < kBlock; i++) out[i] = 0;  // codes of the padding mean nothing
                squares.add(v, out);
            }
        }
        squares.store(sums + 2 * tile);
    }
}

void int8_error(const void* src, Source type, int64_t k, const int8_t* q, const float* scale, int64_t begin,
                int64_t end, double* sums) {
    for (int64_t row = begin; row < end; row++) {
        Squares squares;
        for (int64_t c = 0; c < k; c += kBlock) {
            const int64_t n = k - c < kBlock ? k - c : kBlock;
            alignas(64) float v[kBlock], w[kBlock];
            int8_t in[kBlock] = {};
            load_source(src, type, row * k + c, n, v);
            memcpy(in, q + row * k + c, size_t(n));
            for (int i = 0; i < kBlock; i++) w[i] = float(in[i]) * scale[row];
            squares.add(v, w);
        }
        squares.store(sums + 2 * row);
    }
}

}  // namespace
}  // namespace slotmoe
