// MLA's absorbed kv_b_proj: per head, a few vectors times an int8 matrix in plain fp32, so nothing is rounded on the way.
// The weights are row-major as in the export: int8 [heads * (N + V), R], one scale a row; 3% of what a token reads.
//
// Shapes: q [heads, N]; latent [heads, R]; value [heads, V]; rows of head h start at h * (N + V).
namespace slotmoe {
namespace {

constexpr int kRows = 4;  // rows that are added to the output together, so that it is loaded and stored a quarter as often

// out[h] = sum over n < N of q[h][n] * scale[row] * w[row], heads begin..end.
void absorb_query(const float* q, const int8_t* w, const float* scale, int64_t n, int64_t per_head, int64_t r, int64_t begin,
                  int64_t end, float* out) {
    for (int64_t h = begin; h < end; h++) {
        float* o = out + h * r;
        memset(o, 0, size_t(r) * sizeof(float));
        const int8_t* rows = w + h * per_head * r;
        const float *x = q + h * n, *s = scale + h * per_head;
        int64_t i = 0;
        for (; i + kRows <= n; i += kRows) {
            const float a = x[i] * s[i], b = x[i + 1] * s[i + 1], c = x[i + 2] * s[i + 2], d = x[i + 3] * s[i + 3];
            const int8_t* p = rows + i * r;
            for (int64_t j = 0; j < r; j++)
                o[j] += (a * float(p[j]) + b * float(p[r + j])) + (c * float(p[2 * r + j]) + d * float(p[3 * r + j]));
        }
        for (; i < n; i++)
            for (int64_t j = 0; j < r; j++) o[j] += x[i] * s[i] * float(rows[i * r + j]);
    }
}

// out[h][v] = scale[row] * (latent[h] . w[row]) for the rows past the first N, heads begin..end.
void absorb_value(const float* latent, const int8_t* w, const float* scale, int64_t n, int64_t per_head, int64_t r, int64_t begin,
                  int64_t end, float* out) {
    const int64_t values = per_head - n, whole = r / 16 * 16;
    for (int64_t h = begin; h < end; h++) {
        const float* x = latent + h * r;
        for (int64_t v = 0; v < values; v++) {
            const int64_t row = h * per_head + n + v;
            const int8_t* p = w + row * r;
            float sums[16] = {};
            for (int64_t j = 0; j < whole; j += 16)
                for (int i = 0; i < 16; i++) sums[i] += x[j + i] * float(p[j + i]);
            for (int64_t j = whole; j < r; j++) sums[j - whole] += x[j] * float(p[j]);
            float total = 0.0f;
            for (const float sum : sums) total += sum;
            out[h * values + v] = total * scale[row];
        }
    }
}

}  // namespace
}  // namespace slotmoe
