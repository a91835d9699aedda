// The C ABI: splits the work over threads, owns the scratch. The Python side has checked every shape and size; what is
// checked here again is only what a wrong count would turn into a wild pointer.
//
// Every int function returns 0, or: 1 bad argument, 2 NaN or infinity in the source, 3 scale beyond fp16, 4 out of
// memory.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "api.h"

using namespace slotmoe;

constexpr int64_t kPassTokens = 512;  // tokens whose activations are held at once

// --- levels

namespace {

// The integers, offset and step that stand for the levels with the least squared error. 8 bits have room to spare over
// 16 levels, and a free step and offset about halve the error of step = max / 127.
Levels fit_levels(const float* levels, bool offsets) {
    double largest = 0;
    for (int i = 0; i < 16; i++) largest = std::fmax(largest, std::fabs(double(levels[i])));
    Levels best{};
    if (largest == 0) return best;
    double least = std::numeric_limits<double>::infinity();
    for (int o = offsets ? -16 : 0, last = -o; o <= last; o++)
        for (int d = 0; d <= 640; d++) {
            const double offset = o / 32.0, count = 95.0 + 0.05 * d;
            double error = 0;
            int8_t q[16];
            for (int i = 0; i < 16; i++) {
                const double v = levels[i] / largest * count - offset;
                double r = std::nearbyint(v);
                r = r < -128 ? -128 : r > 127 ? 127 : r;
                q[i] = int8_t(r);
                error += (r - v) * (r - v) / (count * count);
            }
            if (error < least) {
                least = error;
                memcpy(best.q, q, 16);
                best.offset = float(offset);
                best.step = largest / count;
            }
        }
    return best;
}

}  // namespace

// Held under the job: the last few level tables.
const Levels& slotmoe::levels_for(const Products& by, int64_t kind, const float* levels) {
    static const Levels whole[] = {{{-16, -14, -12, -10, -8, -6, -4, -2, 0, 2, 4, 6, 8, 10, 12, 14}, 0.0f, 1.0},
                                   {{-32, -28, -24, -20, -16, -12, -8, -4, 0, 4, 8, 12, 16, 20, 24, 28}, 0.0f, 1.0}};
    if (const int low = low_bits(kind)) return whole[low - 1];
    struct Entry {
        bool used = false, fine;
        float key[16];
        Levels value;
    };
    static Entry cache[8];
    static int next = 0;
    for (const Entry& e : cache)
        if (e.used && e.fine == by.fine && memcmp(e.key, levels, sizeof e.key) == 0) return e.value;
    Entry& e = cache[next];
    next = (next + 1) % 8;
    memcpy(e.key, levels, sizeof e.key);
    e.fine = by.fine;
    e.value = fit_levels(levels, !e.fine);
    e.used = true;
    return e.value;
}

bool slotmoe::finite(const float* levels) {
    return std::all_of(levels, levels + 16, [](float level) { return std::isfinite(level); });
}

// --- settings

EXPORT void slotmoe_set_threads(int n) { set_threads(n); }
EXPORT int slotmoe_threads() { return get_threads(); }
EXPORT void slotmoe_set_cpus(const int32_t* cpus, int count) { set_cpus(cpus, count); }

// Reads `bytes` once with every thread.
EXPORT uint64_t slotmoe_read(const void* memory, int64_t bytes) {
    uint64_t sums[kMaxThreads] = {}, total = 0;
    Job job;
    const Isa& isa = best_isa();
    job.parallel(up_to(bytes, 4096), [&](int thread, int64_t begin, int64_t end) {
        const int64_t last = end * 4096 < bytes ? end * 4096 : bytes;
        sums[thread] += isa.read(static_cast<const uint8_t*>(memory) + begin * 4096, last - begin * 4096);
    });
    for (uint64_t s : sums) total += s;
    return total;
}

// --- linear layers

// x [t, groups, k], normed in rows of k if there is a norm [k] -> y [t, n]: see Product.
EXPORT int slotmoe_linear(const Matrix* w, const float* x, const float* norm, float eps, int64_t t, int64_t groups,
                          float* y) {
    if (t < 0 || !w->valid() || groups < 1 || (groups > 1 && w->n % (groups * kTile))) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        for (int64_t first = 0; first < t; first += kPassTokens) {
            const int64_t rows = t - first < kPassTokens ? t - first : kPassTokens;
            const int64_t begin = first * groups * w->k, count = rows * groups;
            float* normed = norm ? job.scratch<float>(kStreams, count * w->k) : nullptr;
            if (norm) norm_rows(job, isa, x + begin, norm, count, w->k, eps, normed);
            multiply(job, isa, *w, norm ? normed : x + begin, rows, y + first * w->n, groups);
        }
    });
}

// Row-major int8 [n, k] -> tiles of 16 rows (isa.h), zeros in the padding.
EXPORT int slotmoe_pack_int8(const int8_t* w, int64_t n, int64_t k, int8_t* packed) {
    if (k < 1 || n < 1) return kBadArgument;
    const int64_t blocks = up_to(k, kBlock);
    return guarded([&](Job& job, const Isa&) {
        job.each(up_to(n, kTile) * blocks, [&](int, int64_t i) {
            const int64_t first = i / blocks * kTile, column = i % blocks * kBlock;
            int8_t* out = packed + i * kTile * kBlock;
            memset(out, 0, kTile * kBlock);
            for (int64_t lane = 0; lane < kTile && first + lane < n; lane++) {
                int8_t row[kBlock] = {};
                memcpy(row, w + (first + lane) * k + column, size_t(k - column < kBlock ? k - column : kBlock));
                for (int t = 0; t < kBlock / 4; t++) memcpy(out + 64 * t + 4 * lane, row + 4 * t, 4);
            }
        });
    });
}

EXPORT int slotmoe_rms_norm(const float* x, const float* weight, int64_t t, int64_t n, float eps, float* y) {
    if (t < 0 || n < 1) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) { norm_rows(job, isa, x, weight, t, n, eps, y); });
}

EXPORT int slotmoe_layer_norm(const float* x, const float* weight, const float* bias, int64_t t, int64_t n, float eps,
                              float* y) {
    if (t < 0 || n < 1) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        job.each(t, [&](int, int64_t i) { isa.layer_norm(x + i * n, weight, bias, n, eps, y + i * n); });
    });
}

// --- gated MLP: down(activation(gate x, up x))

namespace {

// Each row's share [t] of the result: the sigmoid of its product with `gate`.
void shares(const Isa& isa, const float* x, int64_t t, int64_t h, const float* gate, float* share) {
    isa.linear_dense(x, t, h, gate, Source::f32, 0, 1, share, 1);
    for (int64_t row = 0; row < t; row++) share[row] = float(1 / (1 + std::exp(-double(share[row]))));
}

// Tiles begin..end of `rows` results y [rows, h], times their share, and what is added to them.
void finish_tiles(int64_t begin, int64_t end, int64_t rows, int64_t h, const float* share, const float* residual,
                  const float* others, float* y) {
    const int64_t last = end * kTile < h ? end * kTile : h;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t j = row * h + begin * kTile; j < row * h + last; j++) {
            if (share) y[j] *= share[row];
            if (residual) y[j] = residual[j] + (others ? others[j] + y[j] : y[j]);
        }
}

// `mlp` of matrices that are not alike: unquantized ones among them.
void mlp_by_products(Job& job, const Isa& isa, const float* x, int64_t t, const Mlp* mlp, const float* residual,
                     const float* others, float* y) {
    const Matrix* w = mlp->matrix;
    const int64_t h = w[0].k, i = w[0].n;
    for (int64_t pass = 0; pass < t; pass += kPassTokens) {
        const int64_t rows = t - pass < kPassTokens ? t - pass : kPassTokens, at = pass * h;
        float *gate = job.scratch<float>(kGate, rows * i), *up = job.scratch<float>(kUp, rows * i);
        float* share = mlp->output_gate ? job.scratch<float>(kOuts, rows) : nullptr;
        multiply(job, {{job, isa, w[0], x + at, rows, gate},
                       {job, isa, w[1], x + at, rows, up, nullptr, kAct, kActFactor}});
        job.each(rows, [&](int, int64_t row) {
            isa.activate(gate + row * i, up + row * i, mlp->activation, gate + row * i, i);
            if (share) shares(isa, x + at + row * h, 1, h, mlp->output_gate, share + row);
        });
        const Product down(job, isa, w[2], gate, rows, y + at);
        job.parallel(down.tiles(), [&](int, int64_t begin, int64_t end) {
            down.run(begin, end);
            finish_tiles(begin, end, rows, h, share, residual ? residual + at : nullptr, others ? others + at : nullptr,
                         y + at);
        });
    }
}

}  // namespace

// One token or many: the arithmetic of a row is the same. With a residual [t, h], y = residual + (others + it), or
// without others y = residual + it.
void slotmoe::mlp(Job& job, const Isa& isa, const float* x, int64_t t, const Mlp* mlp, const float* residual,
                  const float* others, float* y) {
    if (!mlp->alike()) return mlp_by_products(job, isa, x, t, mlp, residual, others, y);
    const Matrix* w = mlp->matrix;
    const int64_t h = w[0].k, i = w[0].n, in_blocks = up_to(h, kBlock), out_blocks = up_to(i, kBlock);
    const Products& by = isa.products(h);
    const Levels levels = is_coded(w[0].kind) ? levels_for(by, w[0].kind, w[0].levels) : Levels{};
    for (int64_t pass = 0; pass < t; pass += kPassTokens) {
        const int64_t rows = t - pass < kPassTokens ? t - pass : kPassTokens;
        const Blocks x_blocks = scratch_blocks(job, kX, rows * in_blocks, by);
        double* x_factor = job.scratch<double>(kXFactor, rows);
        float* gate = job.scratch<float>(kGate, rows * i);
        float* up = job.scratch<float>(kUp, rows * i);
        const int64_t copies = rows == 1 ? job.threads() : 1;
        const Blocks act = scratch_blocks(job, kAct, copies * rows * out_blocks, by);
        double* act_factor = job.scratch<double>(kActFactor, copies * rows);
        float* share = job.scratch<float>(kOuts, rows);  // of each row's result
        job.parallel(rows, [&](int, int64_t begin, int64_t end) {
            by.quantize_rows(x + pass * h, h, begin, end, rows, levels.offset, x_blocks, x_factor);
            if (mlp->output_gate) shares(isa, x + (pass + begin) * h, end - begin, h, mlp->output_gate, share + begin);
        });
        job.parallel(up_to(i, kTile), [&](int, int64_t begin, int64_t end) {
            multiply_tiles(by, w[0], levels, x_blocks, x_factor, rows, begin, end, gate);
            multiply_tiles(by, w[1], levels, x_blocks, x_factor, rows, begin, end, up);
            const int64_t first = begin * kTile, n = (end * kTile < i ? end * kTile : i) - first;
            for (int64_t row = 0; row < rows; row++)
                isa.activate(gate + row * i + first, up + row * i + first, mlp->activation, gate + row * i + first, n);
        });
        if (rows > 1)
            job.parallel(rows, [&](int, int64_t begin, int64_t end) {
                by.quantize_rows(gate, i, begin, end, rows, levels.offset, act, act_factor);
            });
        bool held[kMaxThreads] = {};
        job.parallel(up_to(h, kTile), [&](int thread, int64_t begin, int64_t end) {
            const Blocks blocks = rows == 1 ? act + thread * out_blocks : act;
            double* factor = rows == 1 ? act_factor + thread : act_factor;
            // Each thread quantizes one token's activations for itself, once: cheaper than another phase.
            if (rows == 1 && !held[thread])
                held[thread] = true, by.quantize_rows(gate, i, 0, 1, 1, levels.offset, blocks, factor);
            multiply_tiles(by, w[2], levels, blocks, factor, rows, begin, end, y + pass * h);
            const int64_t at = pass * h;
            finish_tiles(begin, end, rows, h, mlp->output_gate ? share : nullptr, residual ? residual + at : nullptr,
                         others ? others + at : nullptr, y + at);
        });
    }
}

// residual and others may be null, but others need a residual: see `mlp`.
EXPORT int slotmoe_mlp(const Mlp* w, const float* x, int64_t t, const float* residual, const float* others, float* y) {
    if (t < 0 || !w->valid() || (others && !residual)) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        mlp(job, isa, x, t, w, residual, others, y);
    });
}

// --- experts

void slotmoe::weighted_sum(Job& job, const Isa& isa, const float* outs, const float* weights, int64_t t, int64_t k,
                           int64_t h, float* y) {
    job.each(t, [&](int, int64_t row) {
        isa.weighted_sum(outs + row * k * h, weights + row * k, k, h, y + row * h);
    });
}

// outs [t, k, h], weights [t, k] -> y [t, h].
EXPORT int slotmoe_weighted_sum(const float* outs, const float* weights, int64_t t, int64_t k, int64_t h, float* y) {
    if (t < 0 || k < 0 || h < 1) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        weighted_sum(job, isa, outs, weights, t, k, h, y);
    });
}

namespace {

struct Expert {
    CodedMatrix gate, up, down;
    const float *gate_bias, *up_bias, *down_bias;  // null without biases
};

// All codes, then all scales, then all biases: gate's, up's and down's.
Expert expert_at(const uint8_t* data, const Record& r) {
    const int64_t in_blocks = up_to(r.hidden, kBlock), in_tiles = up_to(r.intermediate, kTile);
    const int64_t out_blocks = up_to(r.intermediate, kBlock), out_tiles = up_to(r.hidden, kTile);
    const int64_t in = in_tiles * code_bytes(r.gate_up, in_blocks), out = out_tiles * code_bytes(r.down, out_blocks);
    const int64_t scales = in_tiles * scale_bytes(r.gate_up, in_blocks);
    const uint8_t* first = data + 2 * in + out;
    Expert expert{{r.gate_up, data, first, r.intermediate, in_blocks},
                  {r.gate_up, data + in, first + scales, r.intermediate, in_blocks},
                  {r.down, data + 2 * in, first + 2 * scales, r.hidden, out_blocks}};
    if (!r.biases) return expert;
    const uint8_t* last = first + 2 * scales + out_tiles * scale_bytes(r.down, out_blocks);
    expert.gate_bias = reinterpret_cast<const float*>(last);
    expert.up_bias = expert.gate_bias + r.intermediate;
    expert.down_bias = expert.up_bias + r.intermediate;
    return expert;
}

// y [n] plus a bias from `first` on, unless that is null.
void add(const float* bias, int64_t first, int64_t n, float* y) {
    for (int64_t i = 0; bias && i < n; i++) y[i] += bias[first + i];
}

// Rows first..first + n of an expert's gate and up, which become what goes into its down.
void activate(const Isa& isa, const Record& record, const Expert& expert, int64_t first, int64_t n, float* gate,
              float* up) {
    add(expert.gate_bias, first, n, gate);
    add(expert.up_bias, first, n, up);
    isa.activate(gate, up, record.activation, gate, n);
}

// One token through k experts: the output of expert e becomes row rows[e] of y [.., h].
void experts_of_token(Job& job, const Isa& isa, const float* x, const uint8_t* const* records, const int64_t* rows,
                      int64_t k, const Record& record, float* y) {
    const int64_t h = record.hidden, i = record.intermediate;
    const Products& by = isa.products(h);
    const Levels& in_levels = levels_for(by, record.gate_up, record.gate_up_levels);
    const Levels& out_levels = levels_for(by, record.down, record.down_levels);
    const int64_t in_tiles = up_to(i, kTile), in_blocks = up_to(h, kBlock);
    const int64_t out_tiles = up_to(h, kTile), act_blocks = up_to(i, kBlock);
    const Blocks x_blocks = scratch_blocks(job, kX, in_blocks, by);
    double* x_factor = job.scratch<double>(kXFactor, 1);
    float* gate = job.scratch<float>(kGate, k * i);
    float* up = job.scratch<float>(kUp, k * i);
    const Blocks act = scratch_blocks(job, kAct, job.threads() * act_blocks, by);

    by.quantize_rows(x, h, 0, 1, 1, in_levels.offset, x_blocks, x_factor);
    job.each_part(k, in_tiles, [&](int, int64_t e, int64_t begin, int64_t end) {
        const Expert expert = expert_at(records[e], record);
        by.coded_tiles(expert.gate, in_levels, x_blocks, x_factor, 1, begin, end, gate + e * i, i);
        by.coded_tiles(expert.up, in_levels, x_blocks, x_factor, 1, begin, end, up + e * i, i);
        const int64_t row = begin * kTile, count = (end * kTile < i ? end * kTile : i) - row;
        activate(isa, record, expert, row, count, gate + e * i + row, up + e * i + row);
    });
    // Expert by expert again: a thread reads long streams, and mostly activations that it has made itself.
    double factors[kMaxThreads];
    int64_t held[kMaxThreads] = {};  // whose activations, plus 1, a thread has quantized: cheaper than a phase for it
    job.each_part(k, out_tiles, [&](int thread, int64_t e, int64_t begin, int64_t end) {
        const Blocks blocks = act + thread * act_blocks;
        double* factor = factors + thread;
        if (held[thread] != e + 1)
            held[thread] = e + 1, by.quantize_rows(gate + e * i, i, 0, 1, 1, out_levels.offset, blocks, factor);
        const int64_t row = begin * kTile, count = (end * kTile < h ? end * kTile : h) - row;
        const Expert expert = expert_at(records[e], record);
        float* out = y + rows[e] * h;
        by.coded_tiles(expert.down, out_levels, blocks, factor, 1, begin, end, out, h);
        add(expert.down_bias, row, count, out + row);
    });
}

// One token's use of one expert: its token, and its row of the output.
struct Use {
    int64_t slot, token, out;
};

// The uses of one expert that a pass takes, [first, first + rows) of the pass.
struct Part {
    Expert expert;
    int64_t first, rows;
};

// A few experts, each weight decoded once for all its tokens. `uses` come expert by expert, `part_of` says whose each
// is.
void pass_experts(Job& job, const Isa& isa, const float* x, const Use* uses, const int32_t* part_of, int64_t rows,
                  const Part* parts, int64_t count, const Record& record, float* y) {
    const int64_t h = record.hidden, i = record.intermediate;
    const Products& by = isa.products(h);
    const Levels& in_levels = levels_for(by, record.gate_up, record.gate_up_levels);
    const Levels& out_levels = levels_for(by, record.down, record.down_levels);
    const int64_t in_tiles = up_to(i, kTile), in_blocks = up_to(h, kBlock), act_blocks = up_to(i, kBlock);
    const Blocks x_blocks = scratch_blocks(job, kX, rows * in_blocks, by);  // part by part, [B, rows] each
    double* x_factor = job.scratch<double>(kXFactor, rows);
    float* gate = job.scratch<float>(kGate, rows * i);
    float* up = job.scratch<float>(kUp, rows * i);
    const Blocks act = scratch_blocks(job, kAct, rows * act_blocks, by);
    double* act_factor = job.scratch<double>(kActFactor, rows);
    float* outs = job.scratch<float>(kOuts, rows * h);
    const auto quantize = [&](const float* in, int64_t k, int64_t row, float offset, Blocks blocks,
                              double* factor) {
        const Part& part = parts[part_of[row]];
        by.quantize_rows(in, k, 0, 1, part.rows, offset,
                          blocks + (part.first * up_to(k, kBlock) + row - part.first), factor + row);
    };
    job.each(rows, [&](int, int64_t row) {
        quantize(x + uses[row].token * h, h, row, in_levels.offset, x_blocks, x_factor);
    });
    job.each_part(count, in_tiles, [&](int, int64_t p, int64_t begin, int64_t end) {
        const Part& part = parts[p];
        const Blocks blocks = x_blocks + part.first * in_blocks;
        float *g = gate + part.first * i, *u = up + part.first * i;
        by.coded_tiles(part.expert.gate, in_levels, blocks, x_factor + part.first, part.rows, begin, end, g, i);
        by.coded_tiles(part.expert.up, in_levels, blocks, x_factor + part.first, part.rows, begin, end, u, i);
        const int64_t column = begin * kTile, columns = (end * kTile < i ? end * kTile : i) - column;
        for (int64_t at = column; at < part.rows * i; at += i)
            activate(isa, record, part.expert, column, columns, g + at, u + at);
    });
    job.each(rows, [&](int, int64_t row) {
        quantize(gate + row * i, i, row, out_levels.offset, act, act_factor);
    });
    job.each_part(count, up_to(h, kTile), [&](int, int64_t p, int64_t begin, int64_t end) {
        const Part& part = parts[p];
        by.coded_tiles(part.expert.down, out_levels, act + part.first * act_blocks, act_factor + part.first, part.rows,
                       begin, end, outs + part.first * h, h);
        const int64_t column = begin * kTile, columns = (end * kTile < h ? end * kTile : h) - column;
        for (int64_t row = part.first; row < part.first + part.rows; row++) {
            float* out = y + uses[row].out * h + column;
            memcpy(out, outs + row * h + column, size_t(columns) * sizeof(float));
            add(part.expert.down_bias, column, columns, out);
        }
    });
}

}  // namespace

void slotmoe::experts_by_slot(Job& job, const Isa& isa, const float* x, int64_t t, int64_t k, const int64_t* indices,
                              const int32_t* slots, const uint8_t* slab, int64_t stride, const Record& record,
                              float* y) {
    int64_t count = 0;
    if (t == 1) {
        const uint8_t** records = job.scratch<const uint8_t*>(kRecords, k);
        int64_t* rows = job.scratch<int64_t>(kUses, k);
        for (int64_t at = 0; at < k; at++)
            if (const int32_t slot = slots[indices[at]]; slot >= 0) {
                records[count] = slab + slot * stride;
                rows[count++] = at;
            }
        return experts_of_token(job, isa, x, records, rows, count, record, y);
    }
    Use* uses = job.scratch<Use>(kUses, t * k);
    for (int64_t at = 0; at < t * k; at++)
        if (const int32_t slot = slots[indices[at]]; slot >= 0) uses[count++] = {slot, at / k, at};
    std::sort(uses, uses + count,
              [](const Use& a, const Use& b) { return a.slot != b.slot ? a.slot < b.slot : a.out < b.out; });
    Part* parts = job.scratch<Part>(kParts, kPassTokens);
    int32_t* part_of = job.scratch<int32_t>(kPartOf, kPassTokens);
    for (int64_t first = 0; first < count; first += kPassTokens) {
        const int64_t rows = count - first < kPassTokens ? count - first : kPassTokens;
        int64_t experts = 0;
        for (int64_t row = 0; row < rows; row++) {
            const int64_t slot = uses[first + row].slot;
            if (row == 0 || slot != uses[first + row - 1].slot)
                parts[experts++] = {expert_at(slab + slot * stride, record), row, 0};
            parts[experts - 1].rows++;
            part_of[row] = int32_t(experts - 1);
        }
        pass_experts(job, isa, x, uses + first, part_of, rows, parts, experts, record, y);
    }
}

// The slab has `size` records, `stride` bytes apart.
EXPORT int slotmoe_experts_by_slot(const Record* record, const float* x, int64_t t, int64_t k, const int64_t* indices,
                                   const int32_t* slots, int64_t e, const uint8_t* slab, int64_t size, int64_t stride,
                                   float* y) {
    if (t < 0 || k < 0 || !record->valid()) return kBadArgument;
    for (int64_t at = 0; at < t * k; at++)
        if (indices[at] < 0 || indices[at] >= e || slots[indices[at]] >= size) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        experts_by_slot(job, isa, x, t, k, indices, slots, slab, stride, *record, y);
    });
}

// --- making weights

EXPORT int slotmoe_quantize_nf4(const void* src, int type, int64_t n, int64_t k, const float* levels, uint8_t* codes,
                                uint16_t* absmax) {
    if (type < 0 || type > 2 || n < 1 || k < 1 || !finite(levels)) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        int status[kMaxThreads] = {};
        job.parallel(up_to(n, kTile), [&](int thread, int64_t begin, int64_t end) {
            if (!status[thread])
                status[thread] = isa.quantize_nf4(src, Source(type), n, k, levels, begin, end, codes, absmax);
        });
        for (int s : status)
            if (s) return s;
        return kOk;
    });
}

EXPORT int slotmoe_quantize_int8(const void* src, int type, int64_t n, int64_t k, int8_t* q, float* scale) {
    if (type < 0 || type > 2 || n < 1 || k < 1) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        int status[kMaxThreads] = {};
        job.parallel(n, [&](int thread, int64_t begin, int64_t end) {
            if (!status[thread]) status[thread] = isa.quantize_int8(src, Source(type), k, begin, end, q, scale);
        });
        for (int s : status)
            if (s) return s;
        return kOk;
    });
}

EXPORT int slotmoe_coded_error(const Matrix* w, const void* src, int type, double* sums) {
    if (type < 0 || type > 2 || !w->valid() || !is_coded(w->kind)) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        job.parallel(w->tiles(), [&](int, int64_t begin, int64_t end) {
            isa.coded_error(src, Source(type), w->k, w->levels, w->as_coded(), begin, end, sums);
        });
    });
}

EXPORT int slotmoe_int8_error(const void* src, int type, int64_t n, int64_t k, const int8_t* q, const float* scale,
                              double* sums) {
    if (type < 0 || type > 2 || n < 1 || k < 1) return kBadArgument;
    return guarded([&](Job& job, const Isa& isa) {
        job.parallel(n, [&](int, int64_t begin, int64_t end) {
            isa.int8_error(src, Source(type), k, q, scale, begin, end, sums);
        });
    });
}
