// What goes on around the layers of DeepSeek-V4 in fp32: hyper-connections between the residual streams (arXiv
// 2512.24880), and the compressors' weighted sums of a window's rows.
//
// Shapes: M streams h [M, D]; comb [M, M]; a window's kv, gate and bias [J, Z].
namespace slotmoe {
namespace {

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_float(-x)); }

// Each row or, `across`, each column of comb [m, m] divided by its sum.
void normalize(float* comb, int64_t m, bool across, float eps) {
    const int64_t step = across ? m : 1, next = across ? 1 : m;
    for (int64_t i = 0; i < m; i++) {
        float sum = 0.0f;
        for (int64_t j = 0; j < m; j++) sum += comb[i * next + j * step];
        for (int64_t j = 0; j < m; j++) comb[i * next + j * step] /= sum + eps;
    }
}

// mixes [rows], which are fn times the streams, and the sum of the squares of the streams' `columns` values -> pre [m],
// what the streams are added up with, post [m], what the block's result is added to them with, and comb [m, m], what
// they are mixed with: its rows and columns add up to 1, after some iterations of Sinkhorn's and Knopp's. Without post
// there is pre alone.
void hyper_coefficients(const Hyper& hyper, const float* mixes, float square, int64_t columns, float* pre, float* post,
                        float* comb) {
    const int64_t m = hyper.m;
    const float norm = 1.0f / __builtin_sqrtf(square / float(columns) + hyper.eps);
    const auto mixed = [&](int64_t row, int part) { return mixes[row] * norm * hyper.scale[part] + hyper.base[row]; };
    for (int64_t i = 0; i < m; i++) pre[i] = sigmoid(mixed(i, 0)) + hyper.hc_eps;
    if (!post) return;
    for (int64_t i = 0; i < m; i++) post[i] = 2.0f * sigmoid(mixed(m + i, 1));
    for (int64_t i = 0; i < m; i++) {
        float* row = comb + i * m;
        float largest = row[0] = mixed((2 + i) * m, 2), sum = 0.0f;
        for (int64_t j = 1; j < m; j++) {
            row[j] = mixed((2 + i) * m + j, 2);
            largest = row[j] > largest ? row[j] : largest;
        }
        for (int64_t j = 0; j < m; j++) sum += row[j] = exp_float(row[j] - largest);
        for (int64_t j = 0; j < m; j++) row[j] = row[j] / sum + hyper.hc_eps;
    }
    normalize(comb, m, true, hyper.hc_eps);
    for (int64_t i = 1; i < hyper.iterations; i++)
        normalize(comb, m, false, hyper.hc_eps), normalize(comb, m, true, hyper.hc_eps);
}

// out[k] = post[k] * y + sum over j of comb[j, k] * h[j].
void hyper_out(const float* y, const float* h, const float* post, const float* comb, int64_t m, int64_t d, float* out) {
    int64_t i = 0;
    for (; i + 16 <= d; i += 16)
        for (int64_t k = 0; k < m; k++) {
            auto sum = Lanes::mul(Lanes::broadcast(post[k]), Lanes::load(y + i));
            for (int64_t j = 0; j < m; j++)
                sum = Lanes::fma(Lanes::broadcast(comb[j * m + k]), Lanes::load(h + j * d + i), sum);
            Lanes::store(out + k * d + i, sum);
        }
    for (; i < d; i++)
        for (int64_t k = 0; k < m; k++) {
            float sum = post[k] * y[i];
            for (int64_t j = 0; j < m; j++) sum += comb[j * m + k] * h[j * d + i];
            out[k * d + i] = sum;
        }
}

// y [Z] = sum over the rows of kv times the softmax, over them, of gate + bias. A row whose gate is -infinity counts
// for nothing, whatever its kv is.
void compress(const float* kv, const float* gate, const float* bias, int64_t rows, int64_t z, float* y) {
    for (int64_t column = 0; column < z; column += 16) {
        const int64_t lanes = z - column < 16 ? z - column : 16;
        const auto load = [&](const float* from, int64_t row) {
            alignas(64) float few[16] = {};
            if (lanes == 16) return Lanes::load(from + row * z + column);
            memcpy(few, from + row * z + column, size_t(lanes) * 4);
            return Lanes::load(few);
        };
        const auto gated = [&](int64_t row) { return Lanes::add(load(gate, row), load(bias, row)); };
        F most = gated(0), sum = Lanes::zero(), total = Lanes::zero();
        for (int64_t row = 1; row < rows; row++) most = Lanes::max(gated(row), most);
        most = Lanes::mul(most, Lanes::broadcast(-1.0f));
        for (int64_t row = 0; row < rows; row++) {
            const F x = Lanes::add(gated(row), most);
            const F weight = exp_lanes(x), least = Lanes::broadcast(-87.0f);
            sum = Lanes::where_greater(least, x, sum, Lanes::add(sum, weight));
            total = Lanes::where_greater(least, x, total, Lanes::fma(weight, load(kv, row), total));
        }
        alignas(64) float out[16];
        Lanes::store(out, Lanes::div(total, sum));
        memcpy(y + column, out, size_t(lanes) * 4);
    }
}

}  // namespace
}  // namespace slotmoe
