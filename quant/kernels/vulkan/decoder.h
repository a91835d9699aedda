// A model's decode on a device: what runs is fixed when it is made, and recorded once for each stretch of it.
#pragma once
#include <map>
#include <tuple>
#include <vector>

#include "device.h"

namespace slotmoe::vulkan {

constexpr int64_t kRows = 8;         // of a step that is recorded once, and of the head; more go in tiles
constexpr int64_t kMostRows = 4096;  // tokens of a step

// The structures of the C ABI are of 64-bit fields.  Addresses are the device's, 0 for what is not there.
struct Matrix {
    int64_t kind, n, k;  // `Kind` of quant/kernels/cpu/isa.h; int8 is row-major here
    uint64_t data, scale, levels;
};

struct Layer {
    uint64_t input_norm, query_norm, latent_norm, next_norm;
    Matrix query, query_b, latent, kv_b, out, gate;  // as in `Attention` of quant/kernels/cpu/api.h
    uint64_t gate_bias, biases;                      // biases of queries, keys and values, [heads + 2 groups, r]
    Matrix mlp_gate, mlp_up, mlp_down;  // dense, or the shared experts; n is 0 without them
};

struct Model {
    double at_once;  // products that the first part of a step of many rows has
    int64_t rows, layers, hidden, vocabulary, heads, n, p, r, v, halves;
    // Grouped queries: `latent` makes keys and `kv_b` values, r wide each, of so many groups; 0 for latent attention.
    // Norms are of each head or of the whole row, before rotations or behind them.
    int64_t key_groups, norm_last, norm_row;
    double eps, latent_eps, scale, rope_scale;
    int64_t experts, groups, kept, top_k, group_best, scoring, normalized;
    double factor;
    int64_t intermediate, gate_up, down;  // the experts' width and kinds
    int64_t places[5];                    // in a record: up's codes, scales of gate and of up, codes and scales of down
    uint64_t levels;                      // [2, 16]
    Matrix embedding, head;
    uint64_t norm;
    const Layer* layer;
    const float* frequencies;  // [p / 2], in this process: angles of a position's rotations, which rope_scale multiplies
};

struct Span {
    uint64_t address;
    int64_t bytes;
};

// Mapped memory, to be read behind a step, but for the table, which is written between steps, and `normed`.
struct Views {
    uint64_t* table;             // [MoE layers, experts]: addresses of records, 0 for one that is not there
    const int32_t* stopped;      // [1]: the MoE layer whose choice lacked an expert, -1 for none
    const int32_t* indices;      // [MoE layers, rows, top_k], of the model's rows, as those of `hidden`
    const float* weights;        // the same
    const float *logits, *hidden;  // [kRows, vocabulary], [kRows, hidden]
    uint64_t normed;             // [MoE layers, kRows, hidden]: what goes into experts, on the device; of more
                                 // rows a layer's reach into the next one's
    int64_t begin, hidden_end, logits_end, bytes;
    const int64_t *gates, *sums;  // [MoE layers]: operations up to a layer's choice, and up to the sum of its experts
    const Span* spans;           // of the sets
    int64_t sets;
};

// Operations [first, last) for so many rows: from `begin` or a gate to a gate or to what ends in `end`.  A row is a token,
// or for -1 what is in `hidden` [rows, hidden]; its position, the address of its sequence's latents, float16 [layers, ...,
// r + p], whose layers are so many bytes apart.  Rows may be of one sequence, in order.  A layer whose choice lacks an expert stops the rest; when it is there, a step from that layer's gate goes on.
// From `hidden_end` on, the head takes rows that are given in `hidden` alone.
// More than kRows rows end in `hidden_end` at most, and go in several submits, each of a part that takes 50 ms by what the
// last took, so that no watchdog ends one; behind `submit` all but the last are over.  From a gate on, experts that the
// table lacks are left out: layers go on right behind the gate once for each part of their experts, up to `sums`, and on
// from there.
struct Step {
    int64_t rows, first, last;
    const int64_t *tokens, *positions;
    const uint64_t* caches;
    const int64_t* layer_bytes;
    const float *query_scale, *hidden;  // scales [rows] are 1 for null
};

// What operations read and write, a bit each: memory that nothing else changes meanwhile is not in it.
enum Set { kIo, kTaken, kHidden, kLow, kQuery, kLatent, kQueries, kCaches, kSums, kValues, kBetween, kLogits, kNormed,
           kActivated, kChoice, kOrder, kExperts, kShared, kScores, kTold, kSets };

struct Operation {
    uint64_t reads, writes;
    int64_t barrier;  // whether one stands before it
    int64_t shader;   // -1: a copy
    int64_t at;       // the operation's number
};

// Finds where barriers are needed: before what reads or writes what was written since the last one, and before what
// writes what was read.
class Hazards {
public:
    bool barrier_before(uint64_t reads, uint64_t writes) {
        const bool needed = ((reads | writes) & written_) || (writes & read_);
        if (needed) read_ = written_ = 0;
        read_ |= reads;
        written_ |= writes;
        return needed;
    }

private:
    uint64_t read_ = 0, written_ = 0;
};

class Decoder {
public:
    Decoder(Device& device, const Model& model);
    ~Decoder();
    Decoder(const Decoder&) = delete;

    const Views& views() const { return views_; }
    void run(const Step& step);  // behind it all is done
    // What steps of [first, last) run, the copy of what comes with the step before it.
    std::vector<Operation> plan(int64_t rows, int64_t first, int64_t last) const;

private:
    struct Way {  // of few rows, or in tiles: workgroups, and what the grid's z has one for so many of; x is 0 for none
        uint32_t x = 0, y = 1, per = 1;
        Constants constants;
        VkPipeline pipeline = VK_NULL_HANDLE;
    };
    struct Task {
        uint64_t reads, writes;
        const Memory *from = nullptr, *to = nullptr;  // of a copy
        int64_t source = 0, target = 0, bytes = 0, row_bytes = 0;
        int shader = -1;
        Way ways[2];
        uint32_t serial = 0, uses = 1, more = 0;  // z has `more` beside what `uses` of each row need
        double work = 0, work_by_context = 0;     // products of one of z, and for each position of the context
        size_t parameters = 0;

        uint32_t depth(int64_t rows) const;
    };
    struct Piece {
        const Task* task;
        uint32_t first, count;  // of z
    };
    class Program;

    void check(const Model& model) const;
    void release();
    // Tasks of a step, the copy of what comes with it first; `takes`: then rows of the residual stream are taken.
    std::vector<Piece> between(int64_t rows, int64_t first, int64_t last, bool takes) const;
    std::vector<Operation> plan(const std::vector<Piece>& pieces) const;
    VkCommandBuffer record(int64_t rows, const std::vector<Piece>& pieces) const;
    void run_parts(const Step& step, const std::vector<Piece>& pieces);

    Device& device_;
    Memory *scratch_ = nullptr, *mapped_ = nullptr, *parameters_ = nullptr;
    std::vector<Task> tasks_;
    std::vector<int64_t> gates_, sums_;
    std::vector<Span> spans_;
    Views views_{};
    int64_t rows_ = 0, hidden_ = 0, tokens_ = 0;  // of a step at most; columns; rows of the embedding
    std::vector<float> frequencies_;
    float rope_scale_ = 1;
    int64_t start_ = 0, stride_ = 0;  // in mapped memory, where what comes with a step is: its rows, of which each
    int64_t taken_ = 0, told_ = 0;    // ... rows of the residual stream, what is told
    double at_once_ = 0;              // products of a part of a step in tiles
    std::map<std::tuple<int64_t, int64_t, int64_t, bool>, VkCommandBuffer> recorded_;
};

}  // namespace slotmoe::vulkan
