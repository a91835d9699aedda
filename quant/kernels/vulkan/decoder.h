// A model's decode on a device: what runs is fixed when it is made, and recorded once for each stretch of it.
#pragma once
#include <map>
#include <tuple>
#include <vector>

#include "device.h"

namespace slotmoe::vulkan {

constexpr int64_t kRows = 8;  // tokens of a step at most, `ROWS` of the shaders

// The structures of the C ABI are of 64-bit fields.  Addresses are the device's, 0 for what is not there.
struct Matrix {
    int64_t kind, n, k;  // `Kind` of quant/kernels/cpu/isa.h; int8 is row-major here
    uint64_t data, scale, levels;
};

struct Layer {
    uint64_t input_norm, query_norm, latent_norm, next_norm;
    Matrix query, query_b, latent, kv_b, out, gate;  // as in `Attention` of quant/kernels/cpu/api.h
    uint64_t gate_bias;
    Matrix mlp_gate, mlp_up, mlp_down;  // dense, or the shared experts; n is 0 without them
};

struct Model {
    int64_t layers, hidden, vocabulary, heads, n, p, r, v, halves;
    double eps, latent_eps, scale;
    int64_t experts, groups, kept, top_k, group_best, scoring, normalized;
    double factor;
    int64_t intermediate, gate_up, down;  // the experts' width and kinds
    int64_t places[5];                    // in a record: up's codes, scales of gate and of up, codes and scales of down
    uint64_t levels;                      // [2, 16]
    Matrix embedding, head;
    uint64_t norm;
    const Layer* layer;
};

struct Span {
    uint64_t address;
    int64_t bytes;
};

// Mapped memory, to be read behind a step, but for the table, which is written between steps, and `normed`.
struct Views {
    uint64_t* table;             // [MoE layers, experts]: addresses of records, 0 for one that is not there
    const int32_t* stopped;      // [1]: the MoE layer whose choice lacked an expert, -1 for none
    const int32_t* indices;      // [MoE layers, kRows, top_k]
    const float* weights;        // the same
    const int32_t* chosen;       // [kRows]: of the greatest logit
    const float *logits, *hidden;  // [kRows, vocabulary], [kRows, hidden]
    uint64_t normed;             // [MoE layers, kRows, hidden]: what goes into experts, on the device
    int64_t begin, hidden_end, chosen_end, logits_end, bytes;
    const int64_t* gates;        // [MoE layers]: operations up to a layer's choice
    const Span* spans;           // of the sets
    int64_t sets;
};

// Operations [first, last) for so many rows: from `begin` or a gate to a gate or to what ends in `end`.  A row is a token,
// or for -1 what is in `hidden` [rows, hidden]; its position, the address of its sequence's latents, float16 [layers, ...,
// r + p], whose layers are so many bytes apart, and its rotations, [rows, p / 2, 2].  Rows may be of one sequence, in
// order.  A layer whose choice lacks an expert stops the rest; when it is there, a step from that layer's gate goes on.
// From `hidden_end` on, the head takes rows that are given in `hidden` alone.
struct Step {
    int64_t rows, first, last;
    const int64_t *tokens, *positions;
    const uint64_t* caches;
    const int64_t* layer_bytes;
    const float *rope, *query_scale, *hidden;  // scales [rows] are 1 for null
    uint64_t after;                            // a copy that must be over before, or 0
};

// What operations read and write, a bit each: memory that nothing else changes meanwhile is not in it.
enum Set { kIo, kTaken, kHidden, kLow, kQuery, kLatent, kQueries, kCaches, kSums, kValues, kBetween, kLogits, kNormed,
           kActivated, kChoice, kExperts, kShared, kScores, kTold, kSets };

struct Operation {
    uint64_t reads, writes;
    int64_t barrier;  // whether one stands before it
    int64_t shader;   // -1: a copy
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
    uint64_t submit(const Step& step);
    // What a submit of [first, last) runs, the copy of what comes with the step before it.
    std::vector<Operation> plan(int64_t first, int64_t last) const;

private:
    struct Task {
        uint64_t reads, writes;
        int shader = -1;
        uint32_t x = 0, y = 0, serial = 0;
        size_t parameters = 0;
        VkPipeline pipeline = VK_NULL_HANDLE;
        const Memory *from = nullptr, *to = nullptr;  // of a copy
        int64_t source = 0, target = 0, bytes = 0;
        bool each_row = false;
    };
    class Program;

    void check(const Model& model) const;
    void release();
    // Tasks of a submit, the copy of what comes with it first; `takes`: then rows of the residual stream are taken.
    std::vector<const Task*> between(int64_t first, int64_t last, bool takes) const;
    static std::vector<Operation> plan(const std::vector<const Task*>& tasks);
    VkCommandBuffer record(int64_t rows, int64_t first, int64_t last, bool takes) const;

    Device& device_;
    Memory *scratch_ = nullptr, *mapped_ = nullptr, *parameters_ = nullptr;
    std::vector<Task> tasks_;
    std::vector<int64_t> gates_;
    std::vector<Span> spans_;
    Views views_{};
    int64_t hidden_ = 0, rope_ = 0, tokens_ = 0;  // columns; rows of the embedding
    int64_t io_ = 0, table_ = 0;           // in mapped memory: what comes with a step, and in it the table
    int64_t taken_ = 0, told_ = 0;         // ... rows of the residual stream, what is told
    std::map<std::tuple<int64_t, int64_t, int64_t, bool>, VkCommandBuffer> recorded_;
    uint64_t last_ = 0;
};

}  // namespace slotmoe::vulkan
