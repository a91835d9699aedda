#if defined(SLOTMOE_SHADERS) && __has_include(<vulkan/vulkan_core.h>)
#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "../cpu/api.h"
#include "shaders.h"

namespace slotmoe::vulkan {
namespace {

enum ShaderName { kEmbed, kMultiply, kQueriesOf, kHeads, kAttend, kValuesOf, kRoute, kSort, kSum };
#define SLOTMOE_SHADER(name) {name##_spirv, sizeof(name##_spirv)}
const Shader kShaders[] = {SLOTMOE_SHADER(embed),  SLOTMOE_SHADER(multiply), SLOTMOE_SHADER(queries),
                           SLOTMOE_SHADER(heads),  SLOTMOE_SHADER(attend), SLOTMOE_SHADER(values),   SLOTMOE_SHADER(route),
                           SLOTMOE_SHADER(sort),   SLOTMOE_SHADER(sum)};
#undef SLOTMOE_SHADER

constexpr int64_t kMostExperts = 1024, kMostShared = 32768;  // of route.comp; bytes of a workgroup
constexpr uint32_t kTileRows = 16, kTileCount = 4;           // TILE and COUNT of multiply.comp
constexpr double kSeconds = 0.05;                            // of a part of a step

int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t size_of(int64_t kind) { return kind == kInt8 ? 1 : kind == kF32 ? 4 : 2; }
constexpr uint64_t set(Set of) { return uint64_t{1} << of; }

// Bytes of a matrix's elements or codes, and of its scales.
int64_t data_bytes(const Matrix& w) {
    if (!is_coded(w.kind)) return w.n * w.k * size_of(w.kind);
    return up(w.n, kTile) / kTile * code_bytes(w.kind, up(w.k, kBlock) / kBlock);
}
int64_t scale_bytes(const Matrix& w) {
    if (w.kind == kInt8) return 4 * w.n;
    return is_coded(w.kind) ? up(w.n, kTile) / kTile * slotmoe::scale_bytes(w.kind, up(w.k, kBlock) / kBlock) : 0;
}

[[noreturn]] void refuse(const std::string& text) { throw Failure{kBadArgument, text}; }
void require(bool right, const char* text) {
    if (!right) refuse(text);
}

// What comes with a step, as the shaders read it: then the table, then its rows.
struct Io {
    uint32_t stop, count, start, stride;
};
struct Row {
    int32_t token;
    uint32_t position;
    float factor;
    uint32_t unused;
    uint64_t cache, layer_bytes;  // rotations [p / 2, 2] follow
};
static_assert(sizeof(Io) == 16 && sizeof(Row) == 32, "as common.glsl has them");
constexpr uint32_t kNone = 0xffffffff;

// Parameters of the shaders, as they have them.
struct Part {
    uint64_t data[2], scale[2], levels, x, gain, y, add, normed, records, indices, places, weights, others;
    uint32_t kind, n, k, pair, uses, x_row, x_use, y_row, y_use;
    float eps;
};
static_assert(sizeof(Part) == 160);
struct EmbedParameters {
    uint64_t data, scale, given, y;
    uint32_t kind, columns, tokens;
};
struct QueriesParameters {
    uint64_t q, latent, norm, data, scale, y;
    uint32_t kind, heads, n, p, r, v, halves, layer;
    float eps;
};
struct HeadsParameters {
    uint64_t q, keys, query_norm, key_norm, biases, y;
    uint32_t heads, groups, p, halves, norm_last, norm_row, layer;
    float eps;
};
struct AttendParameters {
    uint64_t q, sums, best;
    uint32_t heads, groups, splits, layer;
    float scale;
};
struct ValuesParameters {
    uint64_t sums, best, data, scale, y;
    uint32_t kind, heads, splits, n, v;
};
struct RouteParameters {
    uint64_t logits, bias, table, weights, indices, told_weights, told_indices, told_stop;
    uint32_t groups, kept, top_k, group_best, sigmoid, normalized, layer;
    float factor;
};
struct SortParameters {
    uint64_t indices, experts, places;
    uint32_t top_k, tiles;
};
struct SumParameters {
    uint64_t outputs, weights, others, add, y;
    uint32_t uses, columns;
};

}  // namespace

// What is built up while a decoder is made.
class Decoder::Program {
public:
    explicit Program(Decoder& decoder) : decoder_(decoder) {}

    template <class T>
    Task& add(ShaderName shader, const T* blocks, size_t count, uint64_t reads, uint64_t writes, const Way& few, const Way& many) {
        Task task{reads | set(kIo), writes};
        task.shader = shader;
        task.serial = serial;
        task.ways[0] = few;
        task.ways[1] = decoder_.rows_ > kRows ? many : Way{};
        for (Way& way : task.ways) {
            if (way.x) way.pipeline = decoder_.device_.pipeline(kShaders[shader], way.constants);
        }
        parameters.resize(up(static_cast<int64_t>(parameters.size()), 16));
        task.parameters = parameters.size();
        if constexpr (std::is_same_v<T, Part>) {
            const uint64_t number = count;
            const auto* bytes = reinterpret_cast<const uint8_t*>(&number);
            parameters.insert(parameters.end(), bytes, bytes + sizeof(number));
        }
        const auto* bytes = reinterpret_cast<const uint8_t*>(blocks);
        parameters.insert(parameters.end(), bytes, bytes + count * sizeof(T));
        decoder_.tasks_.push_back(task);
        return decoder_.tasks_.back();
    }
    template <class T>
    Task& add(ShaderName shader, const T& block, uint64_t reads, uint64_t writes, const Way& few, const Way& many) {
        return add(shader, &block, 1, reads, writes, few, many);
    }
    enum Ways { kFew = 1, kMany = 2, kBoth = 3 };
    Task& multiply(const std::vector<Part>& parts, uint64_t reads, uint64_t writes, int ways = kBoth) {
        Way few, many;
        uint32_t lanes = 1, uses = 1;
        double work = 0;
        for (const Part& part : parts) {
            few.x += up(part.n, kTile) / kTile * (part.weights ? 1 : part.uses);
            many.x += up(part.n, kTile * kTileCount) / (kTile * kTileCount);
            if (part.weights) uses = part.uses;
            work += (1.0 + part.pair) * part.n * part.k * kTileRows;
        }
        while (lanes < uses && 256 * lanes <= static_cast<uint32_t>(decoder_.device_.limits().threads)) lanes *= 2;
        few.constants = {128 * lanes, lanes, uses, 1, 1};
        many.constants = {128, 1, 1, kTileRows, kTileCount};
        many.per = kTileRows;
        Task& task = add(kMultiply, parts.data(), parts.size(), reads, writes, ways & kFew ? few : Way{}, ways & kMany ? many : Way{});
        task.work = work;
        return task;
    }
    int64_t here() const { return static_cast<int64_t>(decoder_.tasks_.size()); }

    uint32_t serial = 0;  // choices of experts before
    std::vector<uint8_t> parameters;

private:
    Decoder& decoder_;
};

namespace {

Part part_of(const Matrix& matrix, uint64_t x, uint64_t y) {
    Part part{};
    part.data[0] = matrix.data;
    part.scale[0] = matrix.scale;
    part.levels = matrix.levels;
    part.kind = static_cast<uint32_t>(matrix.kind);
    part.n = part.y_row = static_cast<uint32_t>(matrix.n);
    part.k = part.x_row = static_cast<uint32_t>(matrix.k);
    part.x = x;
    part.y = y;
    part.uses = 1;
    return part;
}

Part normed(Part part, uint64_t gain, double eps) {
    part.gain = gain;
    part.eps = static_cast<float>(eps);
    return part;
}

Part pair_of(const Matrix& gate, const Matrix& up, uint64_t x, uint64_t y) {
    Part part = part_of(gate, x, y);
    part.data[1] = up.data;
    part.scale[1] = up.scale;
    part.pair = 1;
    return part;
}

}  // namespace

void Decoder::check(const Model& m) const {
    require(m.at_once >= 1, "a part of a step has no products");
    require(m.frequencies, "a model lacks its rotations");
    require(m.rows >= kRows && m.rows <= kMostRows, "a step has 8 to 4096 rows at most");
    const int64_t sizes[] = {m.layers, m.hidden, m.heads, m.n + m.p, m.p, m.r, m.v};
    for (const int64_t size : sizes) require(size >= 1 && size < 1 << 24, "a size of the model is out of range");
    require(m.hidden % 4 == 0 && m.n % 4 == 0 && m.r % 4 == 0 && m.v % 4 == 0 && m.p % 2 == 0,
            "hidden size and widths of heads must be multiples of 4");
    require(32 * (m.key_groups ? 2 * m.r : m.r + m.p) + 1024 <= kMostShared && m.p <= 256, "latent rows are too wide");
    require(m.key_groups ? m.heads % m.key_groups == 0 && m.r == m.v && m.n + m.p == m.r : m.n >= 1, "heads are of widths that do not fit");
    const auto span = [&](uint64_t address, int64_t bytes) {
        require(address % 16 == 0, "an address is not a multiple of 16");
        device_.holding(address, bytes);
    };
    const auto matrix = [&](const Matrix& w, int64_t n, int64_t k, bool rows_alone = false) {
        require(w.kind >= kInt8 && w.kind <= kBf16 && !(rows_alone && is_coded(w.kind)), "a matrix is of a kind that is not served here");
        require(w.n == n && w.k == k, "a matrix has another shape than the model says");
        require(k % 4 == 0, "the columns of a matrix must be a multiple of 4");
        span(w.data, data_bytes(w));
        if (const int64_t bytes = scale_bytes(w)) span(w.scale, bytes);
        if (is_coded(w.kind)) span(w.levels, 64);
    };
    const auto norm = [&](uint64_t address, int64_t columns) { span(address, 4 * columns); };
    bool routed = false;
    for (int64_t l = 0; l < m.layers; l++) {
        const Layer& layer = m.layer[l];
        const int64_t width = m.heads * (m.n + m.p);
        norm(layer.input_norm, m.hidden);
        norm(layer.next_norm, m.hidden);
        if (m.key_groups) {
            matrix(layer.query, width, m.hidden);
            matrix(layer.latent, m.key_groups * m.r, m.hidden);
            matrix(layer.kv_b, m.key_groups * m.r, m.hidden);
            if (layer.query_norm) norm(layer.query_norm, m.norm_row ? width : m.r);
            if (layer.latent_norm) norm(layer.latent_norm, m.norm_row ? m.key_groups * m.r : m.r);
            if (layer.biases) norm(layer.biases, (m.heads + 2 * m.key_groups) * m.r);
        } else if (layer.query_b.n) {
            matrix(layer.query, layer.query_b.k, m.hidden);
            matrix(layer.query_b, width, layer.query.n);
            norm(layer.query_norm, layer.query.n);
        } else {
            matrix(layer.query, width, m.hidden);
        }
        if (!m.key_groups) {
            norm(layer.latent_norm, m.r);
            matrix(layer.latent, m.r + m.p, m.hidden);
            matrix(layer.kv_b, m.heads * (m.n + m.v), m.r, true);
        }
        matrix(layer.out, m.hidden, m.heads * m.v);
        const Matrix& gate = layer.mlp_gate;
        if (layer.gate.n) {
            routed = true;
            matrix(layer.gate, m.experts, m.hidden);
            if (layer.gate_bias) norm(layer.gate_bias, m.experts);
        } else {
            require(gate.n, "a layer has neither experts nor an MLP");
        }
        if (gate.n) {
            require(gate.kind == layer.mlp_up.kind, "gate and up of an MLP are of two kinds");
            matrix(gate, gate.n, m.hidden);
            matrix(layer.mlp_up, gate.n, m.hidden);
            matrix(layer.mlp_down, m.hidden, gate.n);
        }
    }
    if (routed) {
        require(m.experts >= 1 && m.experts <= kMostExperts && m.groups >= 1 && m.experts % m.groups == 0 && m.kept >= 1 &&
                    m.kept <= m.groups && m.top_k >= 1 && m.top_k <= m.kept * (m.experts / m.groups) && m.top_k <= 128 &&
                    m.group_best >= 1 && m.group_best <= 2 && m.scoring >= 0 && m.scoring <= 1,
                "the router is of a kind that is not served here");
        require(is_coded(m.gate_up) && is_coded(m.down), "experts are of a kind that is not served here");
        require(m.intermediate >= 1 && m.intermediate % 4 == 0, "the experts' width must be a multiple of 4");
        for (const int64_t place : m.places) require(place >= 0 && place % 4 == 0, "a part of a record is not at a multiple of 4");
        span(m.levels, 128);
    }
    if (m.embedding.n) matrix(m.embedding, m.vocabulary, m.hidden, true);
    if (m.head.n) {
        require(m.vocabulary >= 1, "the model has no vocabulary");
        matrix(m.head, m.vocabulary, m.hidden);
        norm(m.norm, m.hidden);
    }
}

Decoder::Decoder(Device& device, const Model& m) : device_(device) {
    check(m);
    try {
        const int64_t T = rows_ = m.rows, D = m.hidden, H = m.heads, G = m.key_groups, K = m.top_k, E = m.experts;
        const int64_t W = G ? 2 * m.r : m.r + m.p;  // of a row of the cache
        int64_t low = 0, between = 0, moe = 0;
        for (int64_t l = 0; l < m.layers; l++) {
            if (m.layer[l].query_b.n) low = std::max(low, m.layer[l].query.n);
            between = std::max(between, m.layer[l].mlp_gate.n);
            moe += m.layer[l].gate.n != 0;
        }
        // A long context is split the more, the fewer heads there are.
        const int64_t splits = std::clamp<int64_t>(1024 / H, 16, 64);
        hidden_ = D;
        frequencies_.assign(m.frequencies, m.frequencies + m.p / 2);
        rope_scale_ = static_cast<float>(m.rope_scale);
        at_once_ = m.at_once;
        tokens_ = m.embedding.n;
        start_ = up(sizeof(Io) + 8 * moe * E, 16);
        stride_ = up(sizeof(Row) + 4 * m.p, 16);
        const int64_t io_bytes = start_ + T * stride_, tiles = T * K / kTileRows + E;

        // Memory of each set, on the device or mapped.
        spans_.resize(kSets);
        int64_t size = 0;
        const auto scratch = [&](Set of, int64_t bytes) {
            spans_[of] = {static_cast<uint64_t>(size), bytes};
            size += up(std::max<int64_t>(bytes, 16), 256);
        };
        const auto rows = [&](Set of, int64_t columns) { scratch(of, 4 * T * columns); };
        scratch(kIo, io_bytes);
        rows(kHidden, D);
        rows(kLow, low);
        rows(kQuery, H * (m.n + m.p));
        rows(kLatent, G ? G * W : W);
        rows(kQueries, std::max(H * W, T > kRows ? K * D : 0));  // or outputs of uses
        scratch(kSums, 4 * H * (m.r + 2) * std::max(kRows * splits, T));
        rows(kValues, H * m.v);
        rows(kBetween, D);
        rows(kLogits, E);
        scratch(kNormed, moe ? 4 * D * ((moe - 1) * kRows + T) : 0);
        rows(kActivated, std::max(between, T > kRows ? K * m.intermediate : 0));  // or of experts in tiles
        scratch(kExperts, 4 * kRows * K * m.intermediate);
        rows(kChoice, 2 * K);
        scratch(kOrder, T > kRows ? 4 * tiles * (1 + kTileRows) : 0);
        rows(kShared, D);
        scratch(kScores, m.head.n ? 4 * kRows * m.vocabulary : 0);
        scratch_ = device_.allocate(kDevice, size, nullptr);
        for (Span& span : spans_) span.address += span.bytes ? scratch_->address : 0;

        taken_ = up(io_bytes, 256);
        told_ = taken_ + up(4 * T * D, 256);
        const int64_t choices = up(4 * moe * T * K, 256);
        const int64_t told_weights = 256 + choices, told_hidden = told_weights + choices;
        const int64_t told_logits = told_hidden + up(4 * T * D, 256);
        const int64_t told_bytes = told_logits + 4 * kRows * (m.head.n ? m.vocabulary : 0);
        mapped_ = device_.allocate(kMapped, told_ + told_bytes, nullptr);
        std::memset(mapped_->mapped, 0, mapped_->bytes);
        spans_[kTaken] = {mapped_->address + taken_, 4 * T * D};
        spans_[kTold] = {mapped_->address + told_, told_bytes};

        const auto at = [&](Set of) { return spans_[of].address; };
        const auto device_offset = [&](Set of) { return static_cast<int64_t>(at(of) - scratch_->address); };
        const uint64_t told = spans_[kTold].address, best = at(kSums) + 4 * H * m.r * std::max(kRows * splits, T);
        const uint64_t indices = at(kChoice), weights = indices + 4 * T * K;
        const auto number = [](int64_t n) { return static_cast<uint32_t>(n); };
        Program program(*this);
        tasks_.push_back({set(kTaken), set(kIo), mapped_, scratch_, 0, device_offset(kIo), start_, stride_});
        views_.begin = program.here();

        const Way wide{number(up(D / 4, 64) / 64)}, one{1};
        const EmbedParameters embed{m.embedding.data, m.embedding.scale, at(kTaken), at(kHidden), number(m.embedding.kind),
                                    number(D), number(m.embedding.n)};
        program.add(kEmbed, embed, set(kTaken), set(kHidden), wide, wide);
        for (int64_t l = 0; l < m.layers; l++) {
            const Layer& layer = m.layer[l];
            Part query = normed(part_of(layer.query, at(kHidden), at(layer.query_b.n ? kLow : kQuery)), layer.input_norm, m.eps);
            Part latent = normed(part_of(layer.latent, at(kHidden), at(kLatent)), layer.input_norm, m.eps);
            std::vector<Part> parts{query, latent};
            if (G) {
                parts.push_back(normed(part_of(layer.kv_b, at(kHidden), at(kLatent) + 4 * G * m.r), layer.input_norm, m.eps));
                parts[1].y_row = parts[2].y_row = number(G * W);
            }
            program.multiply(parts, set(kHidden), set(layer.query_b.n ? kLow : kQuery) | set(kLatent));
            if (layer.query_b.n) {
                Part second = normed(part_of(layer.query_b, at(kLow), at(kQuery)), layer.query_norm, m.latent_eps);
                program.multiply({second}, set(kLow), set(kQuery));
            }
            const Matrix kv_b = G ? Matrix{} : layer.kv_b;
            const QueriesParameters queries{at(kQuery), at(kLatent), layer.latent_norm, kv_b.data, kv_b.scale, at(kQueries),
                                            number(kv_b.kind), number(H), number(m.n), number(m.p), number(m.r), number(m.v),
                                            number(m.halves), number(l), static_cast<float>(m.latent_eps)};
            const uint32_t parts_of_r = number(up(m.r / 4, 64) / 64);
            const uint64_t made = set(kQueries) | set(kCaches);
            if (G) {
                const HeadsParameters heads{at(kQuery), at(kLatent), layer.query_norm, layer.latent_norm, layer.biases,
                                            at(kQueries), number(H), number(G), number(m.p), number(m.halves),
                                            number(m.norm_last), number(m.norm_row), number(l), static_cast<float>(m.eps)};
                const Way each{number(H + 2 * G), 1, 1, {number(m.r)}};
                program.add(kHeads, heads, set(kQuery) | set(kLatent), made, each, each);
            } else {
                program.add(kQueriesOf, queries, set(kQuery) | set(kLatent), made, {number(H + 1), parts_of_r, 1, {1}},
                            {number(H) + kTileRows, parts_of_r, kTileRows, {kTileRows}})
                    .work = static_cast<double>(kTileRows) * H * m.n * m.r;
            }
            const uint32_t groups = number(std::max<int64_t>(G, 1)), of_heads = groups * number(up(H / groups, 8) / 8);
            const AttendParameters attend{at(kQueries), at(kSums), best, number(H), groups, number(splits), number(l),
                                          static_cast<float>(m.scale)};
            const uint32_t r = number(m.r), p = number(W - m.r), of_v = G ? 1 : number(up(m.v, 32) / 32);
            program.add(kAttend, attend, made, set(kSums), {of_heads, number(splits), 1, {r, p, 0, G > 0}},
                        {of_heads, 1, 1, {r, p, 1, G > 0}})
                .work_by_context = static_cast<double>(H) * (m.r + W);
            const ValuesParameters values{at(kSums), best, kv_b.data, kv_b.scale, at(kValues), number(kv_b.kind), number(H),
                                          number(splits), number(m.n), number(m.v)};
            program.add(kValuesOf, values, set(kSums), set(kValues), {number(H), of_v, 1, {r, 1}},
                        {number(H), of_v, kTileRows, {r, kTileRows}})
                .work = static_cast<double>(kTileRows) * H * m.v * m.r;
            Part out = part_of(layer.out, at(kValues), at(kBetween));
            out.add = at(kHidden);
            program.multiply({out}, set(kValues) | set(kHidden), set(kBetween));

            const bool has_mlp = layer.mlp_gate.n;
            Part activated{}, down{};
            if (has_mlp) {
                activated = normed(pair_of(layer.mlp_gate, layer.mlp_up, at(kBetween), at(kActivated)), layer.next_norm, m.eps);
                down = part_of(layer.mlp_down, at(kActivated), at(layer.gate.n ? kShared : kHidden));
            }
            if (!layer.gate.n) {
                down.add = at(kBetween);
                program.multiply({activated}, set(kBetween), set(kActivated));
                program.multiply({down}, set(kActivated) | set(kBetween), set(kHidden));
                continue;
            }
            const uint64_t table = at(kIo) + sizeof(Io) + 8 * program.serial * E;
            const uint64_t told_choice = 4 * program.serial * T * K;
            Part gate = normed(part_of(layer.gate, at(kBetween), at(kLogits)), layer.next_norm, m.eps);
            gate.normed = at(kNormed) + 4 * program.serial * kRows * D;
            parts.assign(1, gate);
            if (has_mlp) parts.push_back(activated);
            program.multiply(parts, set(kBetween), set(kLogits) | set(kNormed) | set(kActivated));
            if (has_mlp) program.multiply({down}, set(kActivated), set(kShared), Program::kMany);
            const RouteParameters route{at(kLogits), layer.gate_bias, table, weights, indices, told + told_weights + told_choice,
                                        told + 256 + told_choice, told, number(m.groups), number(m.kept), number(K),
                                        number(m.group_best), number(m.scoring), number(m.normalized), program.serial,
                                        static_cast<float>(m.factor)};
            program.add(kRoute, route, set(kLogits), set(kChoice) | set(kIo) | set(kTold),
                        {1, 1, 1, {number(E)}}, {1, 1, 1, {number(E)}});
            program.serial++;
            gates_.push_back(program.here());
            const uint64_t places = at(kOrder) + 4 * tiles;
            const SortParameters sort{indices, at(kOrder), places, number(K), number(tiles)};
            program.add(kSort, sort, set(kChoice), set(kOrder), {}, {1, 1, kMostRows, {number(E), kTileRows}});

            Matrix coded{m.gate_up, m.intermediate, D, 0, static_cast<uint64_t>(m.places[1]), m.levels}, other = coded;
            other.data = m.places[0];
            other.scale = m.places[2];
            Part experts = pair_of(coded, other, gate.normed, at(kExperts));
            coded = {m.down, D, m.intermediate, static_cast<uint64_t>(m.places[3]), static_cast<uint64_t>(m.places[4]),
                     m.levels + 64};
            Part outputs = part_of(coded, at(kExperts), at(kHidden));
            for (Part* part : {&experts, &outputs}) {
                part->records = table;
                part->indices = indices;
                part->uses = number(K);
                part->y_use = part->n;
                part->y_row = number(K) * part->n;
            }
            outputs.x_use = outputs.k;
            outputs.x_row = number(K) * outputs.k;
            outputs.y_row = outputs.n;
            outputs.weights = weights;
            outputs.others = has_mlp ? at(kShared) : 0;
            outputs.add = at(kBetween);
            parts.assign(1, experts);
            if (has_mlp) parts.push_back(down);
            const uint64_t shared = has_mlp ? set(kShared) : 0;
            program.multiply(parts, set(kNormed) | set(kChoice) | set(kActivated), set(kExperts) | shared, Program::kFew);
            program.multiply({outputs}, set(kExperts) | set(kChoice) | set(kBetween) | shared, set(kHidden), Program::kFew);

            const SumParameters sum{at(kQueries), weights, outputs.others, outputs.add, at(kHidden), number(K), number(D)};
            outputs.weights = outputs.add = outputs.others = 0;
            experts.y = outputs.x = at(kActivated);
            outputs.y = at(kQueries);
            outputs.y_row = number(K) * outputs.n;
            for (Part* part : {&experts, &outputs}) {
                part->indices = at(kOrder);
                part->places = places;
            }
            program.multiply({experts}, set(kNormed) | set(kOrder), set(kActivated), Program::kMany);
            program.multiply({outputs}, set(kActivated) | set(kOrder), set(kQueries), Program::kMany);
            for (auto task = tasks_.end() - 2; task != tasks_.end(); task++) {
                task->uses = number(K);
                task->more = number(E);
            }
            sums_.push_back(program.here());
            program.add(kSum, sum, set(kQueries) | set(kChoice) | set(kBetween) | shared, set(kHidden), {}, wide);
        }
        tasks_.push_back({set(kHidden), set(kTold), scratch_, mapped_, device_offset(kHidden), told_ + told_hidden, 0, 4 * D});
        views_.hidden_end = views_.logits_end = program.here();
        if (m.head.n) {
            program.multiply({normed(part_of(m.head, at(kHidden), at(kScores)), m.norm, m.eps)}, set(kHidden), set(kScores),
                             Program::kFew);
            tasks_.push_back({set(kScores), set(kTold), scratch_, mapped_, device_offset(kScores), told_ + told_logits, 0,
                              4 * m.vocabulary});
            views_.logits_end = program.here();
        }
        parameters_ = device_.allocate(kDevice, static_cast<int64_t>(program.parameters.size()), nullptr);
        device_.transfer(true, parameters_->address, reinterpret_cast<char*>(program.parameters.data()), 1, parameters_->bytes, 0,
                         0);

        char* mapped = static_cast<char*>(mapped_->mapped);
        views_.table = reinterpret_cast<uint64_t*>(mapped + sizeof(Io));
        views_.stopped = reinterpret_cast<int32_t*>(mapped + told_);
        views_.indices = reinterpret_cast<int32_t*>(mapped + told_ + 256);
        views_.weights = reinterpret_cast<float*>(mapped + told_ + told_weights);
        views_.hidden = reinterpret_cast<float*>(mapped + told_ + told_hidden);
        views_.logits = reinterpret_cast<float*>(mapped + told_ + told_logits);
        views_.normed = at(kNormed);
        views_.bytes = scratch_->bytes + parameters_->bytes;
        views_.gates = gates_.data();
        views_.sums = sums_.data();
        views_.spans = spans_.data();
        views_.sets = kSets;
    } catch (...) {
        release();
        throw;
    }
}

Decoder::~Decoder() { release(); }

void Decoder::release() {
    for (auto& item : recorded_) device_.forget(item.second);
    for (Memory* memory : {scratch_, mapped_, parameters_}) {
        if (memory) device_.free(memory);
    }
}

uint32_t Decoder::Task::depth(int64_t rows) const {
    const uint32_t per = ways[rows > kRows].per;
    return (static_cast<uint32_t>(rows) * uses + per - 1) / per + more;
}

std::vector<Decoder::Piece> Decoder::between(int64_t rows, int64_t first, int64_t last, bool takes) const {
    const int64_t end = rows > kRows ? views_.hidden_end : static_cast<int64_t>(tasks_.size());
    if (first < views_.begin || first >= last || last > end) refuse("there are no such operations");
    std::vector<Piece> pieces;
    for (int64_t at = 0; at < last; at = at + 1 < first && at + 1 >= views_.begin + takes ? first : at + 1) {
        const Task& task = tasks_[at];
        if (task.shader < 0 || task.ways[rows > kRows].x) pieces.push_back({&task, 0, task.depth(rows)});
    }
    return pieces;
}

std::vector<Operation> Decoder::plan(const std::vector<Piece>& pieces) const {
    Hazards hazards;
    std::vector<Operation> planned;
    for (const auto& [task, first, count] : pieces) {
        planned.push_back({task->reads, task->writes, hazards.barrier_before(task->reads, task->writes), task->shader,
                           task - tasks_.data()});
    }
    return planned;
}

std::vector<Operation> Decoder::plan(int64_t rows, int64_t first, int64_t last) const {
    return plan(between(rows, first, last, false));
}

VkCommandBuffer Decoder::record(int64_t rows, const std::vector<Piece>& pieces) const {
    const auto planned = plan(pieces);
    const VkCommandBuffer buffer = device_.begin();
    const Functions& vk = device_.vk();
    VkMemoryBarrier2 memory{VK_STRUCTURE_TYPE_MEMORY_BARRIER_2};
    memory.srcStageMask = VK_PIPELINE_STAGE_2_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_2_COPY_BIT;
    memory.srcAccessMask = VK_ACCESS_2_SHADER_STORAGE_WRITE_BIT | VK_ACCESS_2_TRANSFER_WRITE_BIT;
    memory.dstStageMask = memory.srcStageMask;
    memory.dstAccessMask = VK_ACCESS_2_SHADER_STORAGE_READ_BIT | VK_ACCESS_2_SHADER_STORAGE_WRITE_BIT |
                           VK_ACCESS_2_TRANSFER_READ_BIT | VK_ACCESS_2_TRANSFER_WRITE_BIT;
    VkDependencyInfo barrier{VK_STRUCTURE_TYPE_DEPENDENCY_INFO};
    barrier.memoryBarrierCount = 1;
    barrier.pMemoryBarriers = &memory;
    VkPipeline bound = VK_NULL_HANDLE;
    for (size_t i = 0; i < planned.size(); i++) {
        const Task& task = *pieces[i].task;
        if (planned[i].barrier) vk.CmdPipelineBarrier2(buffer, &barrier);
        if (task.shader < 0) {
            const VkBufferCopy region{static_cast<VkDeviceSize>(task.source), static_cast<VkDeviceSize>(task.target),
                                      static_cast<VkDeviceSize>(task.bytes + task.row_bytes * rows)};
            vk.CmdCopyBuffer(buffer, task.from->buffer, task.to->buffer, 1, &region);
            continue;
        }
        const Way& way = task.ways[rows > kRows];
        if (way.pipeline != bound) vk.CmdBindPipeline(buffer, VK_PIPELINE_BIND_POINT_COMPUTE, bound = way.pipeline);
        const struct {
            uint64_t parameters, io;
            uint32_t serial, first;
        } push{parameters_->address + task.parameters, spans_[kIo].address, task.serial, pieces[i].first};
        static_assert(sizeof(push) == Device::kPushBytes);
        vk.CmdPushConstants(buffer, device_.layout(), VK_SHADER_STAGE_COMPUTE_BIT, 0, sizeof(push), &push);
        vk.CmdDispatch(buffer, way.x, way.y, pieces[i].count);
    }
    memory.dstStageMask = VK_PIPELINE_STAGE_2_HOST_BIT;  // what the host is told
    memory.dstAccessMask = VK_ACCESS_2_HOST_READ_BIT;
    vk.CmdPipelineBarrier2(buffer, &barrier);
    device_.check(vk.EndCommandBuffer(buffer), "recording");
    return buffer;
}

void Decoder::run_parts(const Step& step, const std::vector<Piece>& pieces) {
    const double context = 1.0 + *std::max_element(step.positions, step.positions + step.rows);
    const auto* stopped = reinterpret_cast<const volatile int32_t*>(static_cast<char*>(mapped_->mapped) + told_);
    uint32_t done = 0;  // of the next piece
    for (size_t at = 0; at < pieces.size() && *stopped < 0;) {
        std::vector<Piece> part;
        double left = at_once_;
        while (at < pieces.size() && left > 0) {
            const auto& [task, first, all] = pieces[at];
            const double work = task->work + context * task->work_by_context;
            const uint32_t count = work * (all - done) <= left ? all - done : std::max(1u, static_cast<uint32_t>(left / work));
            part.push_back({task, done, count});
            left -= work * count;
            done = done + count < all ? done + count : 0;
            at += done == 0;
        }
        const VkCommandBuffer buffer = record(step.rows, part);
        const auto start = std::chrono::steady_clock::now();
        device_.wait(device_.submit(buffer), INT64_MAX);
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
        device_.forget(buffer);
        if (left <= 0) at_once_ *= std::clamp(kSeconds / taken.count(), 0.25, 4.0);
    }
}

void Decoder::run(const Step& step) {
    const int64_t rows = step.rows;
    if (rows < 1 || rows > rows_) refuse("a step has 1 to " + std::to_string(rows_) + " rows");
    const bool layers = step.first < views_.hidden_end;  // else it needs the rows alone, or goes on with what is there
    require(!layers || (step.tokens && step.positions && step.caches && step.layer_bytes), "a step lacks a list");
    char* mapped = static_cast<char*>(mapped_->mapped);
    const auto number = [](int64_t n) { return static_cast<uint32_t>(n); };
    *reinterpret_cast<Io*>(mapped) = {kNone, number(rows), number(start_), number(stride_)};
    for (int64_t t = 0; t < rows; t++) {
        Row& row = *reinterpret_cast<Row*>(mapped + start_ + t * stride_);
        row.token = -1;
        if (!layers) continue;
        require(step.positions[t] >= 0 && step.positions[t] < INT32_MAX, "a position is out of range");
        require(step.caches[t] % 4 == 0 && step.layer_bytes[t] >= 0 && step.layer_bytes[t] % 4 == 0, "a cache is not at multiples of 4");
        require(step.tokens[t] >= 0 ? step.tokens[t] < tokens_ : step.hidden != nullptr,
                "a row has neither a token of the vocabulary nor a residual stream");
        row = {static_cast<int32_t>(std::max<int64_t>(step.tokens[t], -1)), static_cast<uint32_t>(step.positions[t]),
               step.query_scale ? step.query_scale[t] : 1.0f, 0, step.caches[t], static_cast<uint64_t>(step.layer_bytes[t])};
        rotations(static_cast<float>(step.positions[t]), frequencies_.data(), static_cast<int64_t>(frequencies_.size()), rope_scale_,
                  reinterpret_cast<float*>(&row + 1));
    }
    const bool takes = !layers && step.hidden;  // rows of the residual stream, for the head
    if (step.hidden) std::memcpy(mapped + taken_, step.hidden, 4 * rows * hidden_);
    *reinterpret_cast<int32_t*>(mapped + told_) = -1;
    if (rows > kRows) return run_parts(step, between(rows, step.first, step.last, takes));
    VkCommandBuffer& buffer = recorded_[{rows, step.first, step.last, takes}];
    if (!buffer) buffer = record(rows, between(rows, step.first, step.last, takes));
    device_.wait(device_.submit(buffer), INT64_MAX);
}

}  // namespace slotmoe::vulkan
#endif
