// DeepSeek-V4's attention, and the residual streams around a layer's blocks, of a few tokens.
#include <cmath>
#include <cstring>

#include "attend.h"

using namespace slotmoe;

bool Compressor::valid(const Tokens& tokens, int64_t p) const {
    if (ratio < 1 || width < p || group < 0 || group >= kGroups) return false;
    const Group& of = tokens.groups[group];
    return kv.valid() && gate.valid() && gate.n == kv.n && kv.n == columns() && of.table &&
           of.rows.row_bytes >= latent_bytes(width, 0) && of.open.row_bytes >= 8 * columns();
}

bool Compressed::valid(const Tokens& tokens) const {
    if (heads < 1 || z < 1 || p < 0 || p % 2 || p > z || window < 1 || tokens.rows.row_bytes < latent_bytes(z, 0))
        return false;
    if (!query.valid() || !query_b.valid() || !key.valid() || !out_a.valid() || !out_b.valid() || !gate.valid())
        return false;
    if (groups < 1 || out_a.n % groups || heads * z != groups * out_a.k || !tokens.table) return false;
    if (!compressor) return !index_keys && !indexer;
    if (!compressor->valid(tokens, p) || !tokens.compressed_table) return false;
    if (!indexer) return !index_keys;
    return index_keys && index_keys->valid(tokens, p) && indexer->valid() && indexer->width == index_keys->width &&
           index_keys->ratio == compressor->ratio;
}

namespace {

struct Floats {  // of one compressor
    float *kv, *gate;
};

// What a token adds to the rows of a compressor that are open.
void keep_open(const Compressor& c, const Tokens& tokens, int64_t token, const Floats& made) {
    const Store& open = tokens.groups[c.group].open;
    float* row = reinterpret_cast<float*>(open.at(token, c.layer, tokens.positions[token]));
    const size_t bytes = size_t(c.columns()) * 4;
    memcpy(row, made.kv + token * c.columns(), bytes);
    memcpy(row + c.columns(), made.gate + token * c.columns(), bytes);
}

// The row that a token completes, if it does: of the rows of its window and, where windows overlap, of the first half of
// the columns of those of the window before. work [2, rows, width] is working memory.
void complete(const Isa& isa, const Compressor& c, const Tokens& tokens, int64_t token, int64_t p, float eps,
              float* work) {
    const int64_t position = tokens.positions[token], rows = c.rows(), width = c.width;
    if ((position + 1) % c.ratio) return;
    const Group& group = tokens.groups[c.group];
    float *kv = work, *gate = work + rows * width;
    for (int64_t i = 0; i < rows; i++) {
        const int64_t at = position + 1 - rows + i;
        if (at < 0) {  // the first window has none before it
            for (int64_t j = 0; j < width; j++) kv[i * width + j] = 0.0f, gate[i * width + j] = -INFINITY;
            continue;
        }
        const float* row = reinterpret_cast<const float*>(group.open.at(token, c.layer, at));
        row += c.overlaps && i >= c.ratio ? width : 0;
        memcpy(kv + i * width, row, size_t(width) * 4);
        memcpy(gate + i * width, row + c.columns(), size_t(width) * 4);
    }
    isa.compress(kv, gate, c.bias, rows, width, kv);
    isa.rms_norm(kv, c.norm, width, eps, kv);
    rotate(kv + width - p, group.table + token * p, p / 2, false, kv + width - p);
    isa.store_latent(kv, width, 0, group.rows.at(token, c.layer, position / c.ratio));
}

// Each group of heads out [t, groups, ..] times its own rows of out_a -> y [t, out_a.n].
void project_groups(Job& job, const Isa& isa, const Compressed& a, int64_t t, const float* out, float* y) {
    const Matrix& w = a.out_a;
    const int64_t rows = w.n / a.groups;
    if (rows % kTile == 0) return multiply(job, isa, w, out, t, y, a.groups);
    // Groups share tiles, which no real model's do: each multiplies all of them.
    float* group_out = job.scratch<float>(kBlockOut, t * w.k);
    float* all = job.scratch<float>(kUp, t * w.n);
    for (int64_t group = 0; group < a.groups; group++) {
        for (int64_t token = 0; token < t; token++)
            memcpy(group_out + token * w.k, out + (token * a.groups + group) * w.k, size_t(w.k) * 4);
        multiply(job, isa, w, group_out, t, all);
        for (int64_t token = 0; token < t; token++)
            memcpy(y + token * w.n + group * rows, all + token * w.n + group * rows, size_t(rows) * 4);
    }
}

// x [t, hidden], what the layer's attention reads -> y [t, hidden].
void compressed_attention(Job& job, const Isa& isa, const Compressed& a, int64_t layer, int64_t t, const float* x,
                          const Tokens& tokens, float* y) {
    const int64_t heads = a.heads, z = a.z, p = a.p, q_rank = a.query.n;
    const float* table = a.compressor ? tokens.compressed_table : tokens.table;
    float* low = job.scratch<float>(kQueryLatent, t * q_rank);
    float* q = job.scratch<float>(kQuery, t * heads * z);
    float* key = job.scratch<float>(kRow, t * z);
    multiply(job, isa, a.query, x, t, low);
    multiply(job, isa, a.key, x, t, key);
    const Compressor* compressors[] = {a.compressor, a.index_keys};
    const int64_t count = a.index_keys ? 2 : a.compressor ? 1 : 0;
    Floats made[2];
    int64_t most = 1;  // floats that the completion of a row takes
    for (int64_t i = 0; i < count; i++) {
        const Compressor& c = *compressors[i];
        made[i].kv = job.scratch<float>(i ? kIndexKey : kGate, 2 * t * c.columns());
        made[i].gate = made[i].kv + t * c.columns();
        multiply(job, isa, c.kv, x, t, made[i].kv);
        multiply(job, isa, c.gate, x, t, made[i].gate);
        most = 2 * c.rows() * c.width > most ? 2 * c.rows() * c.width : most;
    }
    job.each(t, [&](int, int64_t token) {
        isa.rms_norm(low + token * q_rank, a.query_norm, q_rank, a.eps, low + token * q_rank);
        float* row = key + token * z;
        isa.rms_norm(row, a.key_norm, z, a.eps, row);
        rotate(row + z - p, table + token * p, p / 2, false, row + z - p);
        isa.store_latent(row, z, 0, tokens.rows.at(token, layer, tokens.positions[token]));
        for (int64_t i = 0; i < count; i++) keep_open(*compressors[i], tokens, token, made[i]);
    });
    multiply(job, isa, a.query_b, low, t, q);
    float* work = job.scratch<float>(kUp, most * job.threads());
    job.each(t * count, [&](int thread, int64_t i) {
        complete(isa, *compressors[i % count], tokens, i / count, p, a.eps, work + thread * most);
    });
    job.each(t * heads, [&](int, int64_t i) {
        float* head = q + i * z;
        isa.rms_norm(head, nullptr, z, a.eps, head);
        rotate(head + z - p, table + i / heads * p, p / 2, false, head + z - p);
    });

    int64_t* counts = job.scratch<int64_t>(kIndexCounts, t);  // compressed rows that a token could see
    const uint8_t** keys = job.scratch<const uint8_t*>(kCaches, t);
    int64_t longest = 0;
    for (int64_t token = 0; token < t; token++) {
        counts[token] = a.compressor ? (tokens.positions[token] + 1) / a.compressor->ratio : 0;
        longest = counts[token] > longest ? counts[token] : longest;
        if (a.indexer) keys[token] = tokens.groups[a.index_keys->group].rows.at(token, a.index_keys->layer, 0);
    }
    const int64_t topk = a.indexer ? a.indexer->topk : 0;
    int32_t* chosen = job.scratch<int32_t>(kChosen, t * topk);
    if (a.indexer)
        choose(job, isa, *a.indexer, t, x, low, table, p, a.indexer->width - p, keys,
               tokens.groups[a.index_keys->group].rows.row_bytes, counts, chosen);
    const int64_t length = a.window + (topk && topk < longest ? topk : longest);
    int32_t* lists = job.scratch<int32_t>(kLists, t * length);
    float* out = job.scratch<float>(kLatentOut, t * heads * z);
    attend(job, isa, t, t == 1, [&](int64_t token) {
        const int64_t position = tokens.positions[token], first = tokens.rows.first[token];
        const int64_t seen = position + 1 < a.window ? position + 1 : a.window;
        const bool some = topk && counts[token] > topk;
        const int64_t others = some ? topk : counts[token];
        int32_t* list = lists + token * length;
        for (int64_t i = 0; i < seen; i++) list[i] = int32_t(position + 1 - seen - first + i);
        const int32_t behind = int32_t(position + 1 - first);
        for (int64_t i = 0; i < others; i++) list[seen + i] = behind + (some ? chosen[token * topk + i] : int32_t(i));
        Mla m = mla_for(q + token * heads * z, out + token * heads * z, tokens.rows.at(token, layer, first), heads,
                        seen + others, tokens.rows.row_bytes, z, 0, a.scale);
        m.list = list, m.split = behind, m.sinks = a.sinks;
        if (others) {
            const Store& rows = tokens.groups[a.compressor->group].rows;
            m.others = rows.at(token, a.compressor->layer, 0), m.others_stride = rows.row_bytes;
        }
        return m;
    });
    job.each(t * heads, [&](int, int64_t i) {
        rotate(out + i * z + z - p, table + i / heads * p, p / 2, false, out + i * z + z - p, true);
    });
    float* low_out = job.scratch<float>(kValues, t * a.out_a.n);
    project_groups(job, isa, a, t, out, low_out);
    multiply(job, isa, a.out_b, low_out, t, y);
}

}  // namespace

void slotmoe::compressed_layer(Job& job, const Isa& isa, const Layer& layer, int64_t index, int64_t t, const float* h,
                               const Tokens& tokens, float* y, float* x, float* post, float* comb, float* logits) {
    const Compressed& a = *layer.compressed;
    const int64_t hidden = a.key.k, m = layer.attention_mixing->m;
    float* block = job.scratch<float>(kBlockOut, t * hidden);
    hyper_in(job, isa, *layer.attention_mixing, h, t, hidden, x, post, comb);
    norm_rows(job, isa, x, a.input_norm, t, hidden, a.eps, x);
    compressed_attention(job, isa, a, index, t, x, tokens, block);
    hyper_out(job, isa, block, h, post, comb, t, m, hidden, y);
    hyper_in(job, isa, *layer.mlp_mixing, y, t, hidden, x, post, comb);
    norm_rows(job, isa, x, a.next_norm, t, hidden, a.eps, x);
    multiply(job, isa, a.gate, x, t, logits);
}
