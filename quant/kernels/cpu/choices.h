// Inner loops of choices.cpp. A product is rounded before it is added to a weight: each instruction set decides alike.
namespace slotmoe {
namespace {

// From w [m, n], n a multiple of 16, is taken rate times y [m] times x [n]; then y is w times next [n].
void learn(const float* x, float rate, const float* next, int64_t n, int64_t m, float* w, float* y) {
    alignas(64) float lanes[16];
    for (int64_t i = 0; i < m; i++) {
        F sum = Lanes::zero(), by = Lanes::broadcast(-rate * y[i]);
        for (int64_t j = 0; j < n; j += 16, w += 16) {
            const F value = Lanes::add(Lanes::load(w), Lanes::mul(by, Lanes::load(x + j)));
            Lanes::store(w, value);
            sum = Lanes::add(sum, Lanes::mul(Lanes::load(next + j), value));
        }
        Lanes::store(lanes, sum);
        y[i] = 0.0f;
        for (const float lane : lanes) y[i] += lane;
    }
}

// The largest of x [n] to `top`; the places of those that are as large or above a cut so far below it, the first `most`
// of them, to `ids`, and how many there are; the sum of exp((x - top) * inverse) of the others, within 1e-5 of it.
double survey(const float* x, int64_t n, float inverse, float reach, int64_t most, int64_t* ids, int64_t* found,
              float* top) {
    alignas(64) float row[16], lanes[16];
    const auto at = [&](int64_t i) {
        if (i + 16 <= n) return Lanes::load(x + i);
        for (int j = 0; j < 16; j++) row[j] = i + j < n ? x[i + j] : -__builtin_inff();
        return Lanes::load(row);
    };
    F a = at(0), b = a;
    for (int64_t i = 0; i < n; i += 32) a = Lanes::max(at(i), a), b = Lanes::max(at(i + 16), b);
    Lanes::store(lanes, Lanes::max(a, b));
    *top = lanes[0], *found = 0;
    for (const float lane : lanes) *top = lane > *top ? lane : *top;
    const F cut = Lanes::broadcast(__builtin_fminf(*top - reach, __builtin_nextafterf(*top, -__builtin_inff()))), down = Lanes::broadcast(-*top), by = Lanes::broadcast(inverse);
    double sum = 0.0;
    for (int64_t first = 0; first < n; first += 2048) {  // few terms a lane, which is a float
        F part = Lanes::zero();
        for (int64_t i = first; i < first + 2048 && i < n; i += 16) {
            const F value = at(i), weight = exp_lanes(Lanes::mul(Lanes::add(value, down), by));
            part = Lanes::add(part, Lanes::where_greater(value, cut, Lanes::zero(), weight));
            for (uint32_t bits = Lanes::greater(value, cut); bits; bits &= bits - 1, ++*found)
                if (*found < most) ids[*found] = i + __builtin_ctz(bits);
        }
        Lanes::store(lanes, part);
        for (const float lane : lanes) sum += lane;
    }
    return sum;
}

}  // namespace
}  // namespace slotmoe
