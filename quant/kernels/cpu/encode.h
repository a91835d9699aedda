// Choosing scales and codes of a table of levels: weight = level * scale. 16 rows are 16 lanes, so that each row's sums
// are taken in the order of its columns, without fused multiply-adds where bytes must not depend on the instruction set.
//
// Shapes: a panel [block, 16] holds `block` columns of 16 rows; N rows, K columns; L levels, ascending, 4 to 64 of them.
// 32 or 64 are the whole numbers from -L / 2.
namespace slotmoe {
namespace {

constexpr int kRefits = 4;  // of a scale to its codes

template <int L>
struct Grid {
    float level[L + 16], code_of[L + 16], middle[L + 16];  // a search loads 16 from any of the lower half
    explicit Grid(const float* levels) : level{}, code_of{}, middle{} {
        for (int i = 0; i < L; i++) level[i] = levels[i], code_of[i] = float(i);
        for (int i = 0; i + 1 < L; i++) middle[i] = (levels[i] + levels[i + 1]) / 2.0f;
    }
    F nearest(F z) const { return L > 16 ? whole(z) : find(z, level); }
    F code(F z) const { return L > 16 ? Lanes::add(whole(z), Lanes::broadcast(L / 2)) : find(z, code_of); }

private:
    static F whole(F z) {
        const F least = Lanes::max(z, Lanes::broadcast(-L / 2)), shift = Lanes::broadcast(12582912.0f);
        const F most = Lanes::min(least, Lanes::broadcast(L / 2 - 1));
        return Lanes::add(Lanes::add(most, shift), Lanes::broadcast(-12582912.0f));  // as in round_even
    }
    F find(F z, const float* values) const {
#ifdef SLOTMOE_SEARCH
        return SLOTMOE_SEARCH<L>(z, middle, values);
#else
        F v = Lanes::broadcast(values[0]);
#pragma GCC unroll 16
        for (int i = 0; i + 1 < L; i++)
            v = Lanes::where_greater(z, Lanes::broadcast(middle[i]), Lanes::broadcast(values[i + 1]), v);
        return v;
#endif
    }
};

inline F inverse_or_zero(F scale) {
    const F zero = Lanes::zero(), size = Lanes::max(scale, Lanes::mul(scale, Lanes::broadcast(-1.0f)));
    return Lanes::where_greater(size, zero, Lanes::div(Lanes::broadcast(1.0f), scale), zero);
}

// Columns begin..begin + block of the rows of a tile; what is beyond n rows or k columns is zero.
inline void load_panel(const void* src, Source type, int64_t n, int64_t k, int64_t row, int64_t begin, int64_t block,
                       float* panel) {
    alignas(64) float v[kBlock];
    const int64_t columns = k - begin < block ? k - begin : block;
    for (int64_t lane = 0; lane < kTile; lane++) {
        if (row + lane < n)
            load_source(src, type, (row + lane) * k + begin, columns, v);
        else
            memset(v, 0, sizeof v);
        for (int64_t j = 0; j < block; j++) panel[j * kTile + lane] = v[j];
    }
}

// The scale of least squared error of each lane's block: of the starts, each a factor that brings the block, its largest
// magnitude 1, to the levels, the one whose codes have the best scale; then codes and scale in turn. NaN for a block with
// NaN or infinity.
template <int L>
inline F fit(const float* panel, const float* weights, int64_t block, const Grid<L>& grid, const float* starts,
             int64_t count) {
    alignas(64) float v[kBlock * kTile];
    const F zero = Lanes::zero();
    F top = zero, bad = zero;
    for (int64_t j = 0; j < block; j++) {
        const F x = Lanes::load(panel + j * kTile);
        top = Lanes::max(top, Lanes::max(x, Lanes::mul(x, Lanes::broadcast(-1.0f))));
        bad = Lanes::add(bad, Lanes::mul(x, zero));
    }
    const F most = Lanes::where_greater(top, Lanes::broadcast(1e-30f), top, zero), inverse = inverse_or_zero(most);
    for (int64_t j = 0; j < block; j++)
        Lanes::store(v + j * kTile, Lanes::mul(Lanes::load(panel + j * kTile), inverse));
    F gain = zero, best = zero;
    for (int64_t c = 0; c < count + kRefits; c++) {
        const F factor = c < count ? Lanes::broadcast(starts[c]) : inverse_or_zero(best);
        F xl = zero, ll = zero;
        for (int64_t j = 0; j < block; j++) {
            const F x = Lanes::load(v + j * kTile), level = grid.nearest(Lanes::mul(x, factor));
            const F weighted = Lanes::mul(level, Lanes::broadcast(weights[j]));
            xl = Lanes::add(xl, Lanes::mul(x, weighted));
            ll = Lanes::add(ll, Lanes::mul(level, weighted));
        }
        const F scale = Lanes::div(xl, ll), found = Lanes::mul(xl, scale);
        best = Lanes::where_greater(found, gain, scale, best);
        gain = Lanes::where_greater(found, gain, found, gain);
    }
    return Lanes::add(Lanes::mul(best, most), bad);
}

template <int L>
void fit_rows(const void* src, Source type, int64_t n, int64_t k, const float* weights, const float* levels,
              const float* starts, int64_t count, int64_t block, int64_t begin, int64_t end, float* scales) {
    const Grid<L> grid(levels);
    const int64_t blocks = (k + block - 1) / block;
    alignas(64) float panel[kBlock * kTile], found[kTile], padded[kBlock];
    for (int64_t row = begin * kTile; row < end * kTile && row < n; row += kTile)
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t columns = k - b * block < block ? k - b * block : block;
            for (int64_t j = 0; j < block; j++) padded[j] = j < columns ? weights[b * block + j] : 0.0f;
            load_panel(src, type, n, k, row, b * block, block, panel);
            Lanes::store(found, fit(panel, padded, block, grid, starts, count));
            for (int64_t lane = 0; lane < kTile && row + lane < n; lane++)
                scales[(row + lane) * blocks + b] = found[lane];
        }
}

template <int L>
void code_rows(const void* src, Source type, int64_t n, int64_t k, const float* scales, const float* levels,
               int64_t block, int64_t begin, int64_t end, uint8_t* codes) {
    const Grid<L> grid(levels);
    const int64_t blocks = (k + block - 1) / block;
    alignas(64) float panel[kBlock * kTile], scale[kTile];
    for (int64_t row = begin * kTile; row < end * kTile && row < n; row += kTile)
        for (int64_t b = 0; b < blocks; b++) {
            load_panel(src, type, n, k, row, b * block, block, panel);
            for (int64_t lane = 0; lane < kTile; lane++)
                scale[lane] = row + lane < n ? scales[(row + lane) * blocks + b] : 0.0f;
            const F inverse = inverse_or_zero(Lanes::load(scale));
            for (int64_t j = 0; j < block; j++)
                Lanes::store(panel + j * kTile, grid.code(Lanes::mul(Lanes::load(panel + j * kTile), inverse)));
            for (int64_t lane = 0; lane < kTile && row + lane < n; lane++)
                for (int64_t j = 0; j < block; j++)
                    codes[((row + lane) * blocks + b) * block + j] = uint8_t(panel[j * kTile + lane]);
        }
}

// Below, columns are rows: x [S, N], S <= kTogether columns in blocks, tiles begin..end of its 16 columns; N is a
// multiple of 16. scales [S / block, N] are whole numbers up to `most` times a row's factor.
constexpr int64_t kTogether = 128;

inline F stored(F scale, F factor, float most) {
    const F units = Lanes::div(scale, Lanes::where_greater(factor, Lanes::zero(), factor, Lanes::broadcast(1.0f)));
    const F whole = Lanes::min(Lanes::max(units, Lanes::broadcast(-most)), Lanes::broadcast(most));
    const F shift = Lanes::broadcast(12582912.0f);  // as in round_even
    return Lanes::mul(Lanes::add(Lanes::add(whole, shift), Lanes::broadcast(-12582912.0f)), factor);
}

// Add changes of columns from `at` on, times what their rows of a matrix [s, s] say, to columns first..last of a panel,
// one change after the other.
constexpr int kColumns = 8;  // whose sums or changes the registers hold, so that the rest is loaded once for all
template <int Count>
inline void spread(float* panel, const F* changes, const float* matrix, int64_t s, int64_t at, int64_t first,
                   int64_t last) {
    for (int64_t l = first; l < last; l++) {
        F sum = Lanes::load(panel + l * kTile);
        for (int j = 0; j < Count; j++)
            sum = Lanes::fma(changes[j], Lanes::broadcast(matrix[(at + j) * s + l]), sum);
        Lanes::store(panel + l * kTile, sum);
    }
}

// Columns first..first + block in order: `column(j)` settles one and says what it changes behind it.
template <class Column>
inline void settle(float* panel, const float* matrix, int64_t s, int64_t first, int64_t block, Column column) {
    for (int64_t at = first; at < first + block; at += kColumns) {
        F changes[kColumns];
        for (int j = 0; j < kColumns; j++) {
            changes[j] = column(at + j);
            spread<1>(panel, changes + j, matrix, s, at + j, at + j + 1, at + kColumns);
        }
        spread<kColumns>(panel, changes, matrix, s, at, at + kColumns, s);
    }
}

// Round column after column of x, each one's error moved to those behind it: u is upper triangular, the inverse
// Hessian's factor. A block gets its best scale when it is reached. q gets what the codes stand for.
template <int L>
void feed_back(const float* x, int64_t s, int64_t n, const float* u, const float* factors, int64_t most,
               const float* levels, const float* starts, int64_t count, int64_t block, int64_t begin, int64_t end,
               float* scales, float* q) {
    const Grid<L> grid(levels);
    alignas(64) float panel[kTogether * kTile], weights[kTogether];
    for (int64_t j = 0; j < s; j++) weights[j] = 1.0f / (u[j * s + j] * u[j * s + j]);
    for (int64_t i = begin * kTile; i < end * kTile; i += kTile) {
        for (int64_t j = 0; j < s; j++) Lanes::store(panel + j * kTile, Lanes::load(x + j * n + i));
        for (int64_t at = 0; at < s; at += block) {
            const F best = fit(panel + at * kTile, weights + at, block, grid, starts, count);
            const F scale = stored(best, Lanes::load(factors + i), float(most)), inverse = inverse_or_zero(scale);
            Lanes::store(scales + at / block * n + i, scale);
            settle(panel, u, s, at, block, [&](int64_t j) {
                const F v = Lanes::load(panel + j * kTile);
                const F made = Lanes::mul(grid.nearest(Lanes::mul(v, inverse)), scale);
                const F gain = Lanes::fma(v, Lanes::broadcast(-1.0f), made);
                Lanes::store(q + j * n + i, made);
                return Lanes::mul(gain, Lanes::broadcast(1.0f / u[j * s + j]));
            });
        }
    }
}

// One pass over the columns of q: each block gets a better scale for its codes if there is one, then each column the
// code of least error for its gradient, which is (W - Q) H.
template <int L>
void descend(const float* gradient, int64_t s, int64_t n, const float* h, const float* factors, int64_t most,
             const float* levels, int64_t block, int64_t begin, int64_t end, float* scales, float* q) {
    const Grid<L> grid(levels);
    const F zero = Lanes::zero();
    alignas(64) float panel[kTogether * kTile], pull[kTogether * kTile], values[kBlock * kTile];
    for (int64_t i = begin * kTile; i < end * kTile; i += kTile) {
        for (int64_t j = 0; j < s; j++) Lanes::store(panel + j * kTile, Lanes::load(gradient + j * n + i));
        for (int64_t at = 0; at < s; at += block) {
            F scale = Lanes::load(scales + at / block * n + i), inverse = inverse_or_zero(scale), slope = zero, curve = zero;
            for (int64_t j = 0; j < block; j++)
                Lanes::store(values + j * kTile, Lanes::mul(Lanes::load(q + (at + j) * n + i), inverse));
            for (int64_t l = at; l < s; l += kColumns) {
                F sum[kColumns];
                for (F& one : sum) one = zero;
                for (int64_t j = 0; j < block; j++) {
                    const F value = Lanes::load(values + j * kTile);
                    for (int t = 0; t < kColumns; t++)
                        sum[t] = Lanes::fma(value, Lanes::broadcast(h[(l + t) * s + at + j]), sum[t]);
                }
                for (int t = 0; t < kColumns; t++) Lanes::store(pull + (l + t) * kTile, sum[t]);
            }
            for (int64_t l = at; l < at + block; l++) {
                const F value = Lanes::load(values + (l - at) * kTile);
                slope = Lanes::fma(value, Lanes::load(panel + l * kTile), slope);
                curve = Lanes::fma(value, Lanes::load(pull + l * kTile), curve);
            }
            F best = Lanes::fma(slope, inverse_or_zero(curve), scale);
            best = stored(best, Lanes::load(factors + i), float(most));
            F step = Lanes::fma(scale, Lanes::broadcast(-1.0f), best);
            const F cost = Lanes::mul(step, Lanes::fma(slope, Lanes::broadcast(-2.0f), Lanes::mul(step, curve)));
            step = Lanes::where_greater(zero, cost, step, zero);
            step = Lanes::where_greater(Lanes::mul(best, best), zero, step, zero);  // a scale of 0 stays none
            const F moved = Lanes::mul(step, step);
            scale = Lanes::where_greater(moved, zero, best, scale), inverse = inverse_or_zero(scale);
            Lanes::store(scales + at / block * n + i, scale);
            for (int64_t l = at; l < s; l++) {
                const F minus = Lanes::mul(step, Lanes::broadcast(-1.0f));
                float* seen = panel + l * kTile;
                Lanes::store(seen, Lanes::fma(Lanes::load(pull + l * kTile), minus, Lanes::load(seen)));
            }
            settle(panel, h, s, at, block, [&](int64_t j) {
                const F scaled = Lanes::mul(Lanes::load(values + (j - at) * kTile), scale);
                const F before = Lanes::where_greater(moved, zero, scaled, Lanes::load(q + j * n + i));
                const F slope_j = Lanes::mul(Lanes::load(panel + j * kTile), Lanes::broadcast(1.0f / h[j * s + j]));
                const F made = Lanes::mul(grid.nearest(Lanes::mul(Lanes::add(before, slope_j), inverse)), scale);
                Lanes::store(q + j * n + i, made);
                return Lanes::fma(made, Lanes::broadcast(-1.0f), before);
            });
        }
    }
}

template <int L>
constexpr Encoder encoder() {
    return {fit_rows<L>, code_rows<L>, feed_back<L>, descend<L>};
}

}  // namespace
}  // namespace slotmoe
