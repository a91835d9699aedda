// cos and sin of RoPE's angles. The C libraries of systems round differently, so the bits would be each system's own:
// here every operation is named. Reduction and polynomials, in double precision, are those that glibc 2.28 and later
// compute by (of Arm's Optimized Routines, sincosf): so are the bits.
#include "api.h"

using namespace slotmoe;

namespace {

constexpr double kQuarterTurn = 0x1.921fb544p0, kRest = 0x1.0b4611a626331p-34;  // their sum is pi / 2; 33 and 53 bits
constexpr double kRestToDouble = 0x1.0b46p-34;  // what a double pi / 2 has of it: enough for small angles

struct Rotation {
    float cosine, sine;
};

Rotation rotation(float angle) {  // from 0 on, below 2^20
    const int32_t whole = int32_t(angle * (1 / (kQuarterTurn + kRest)) + 0.5);
    const double quarters = double(whole);
    const double rest = (angle - quarters * kQuarterTurn) - quarters * (angle < 120 ? kRestToDouble : kRest);
    const double square = rest * rest;
    const double s = (rest + rest * square * -0x1.555545995a603p-3) +
                     rest * square * square * (0x1.1107605230bc4p-7 + square * -0x1.994eb3774cf24p-13);
    const double c = ((1 + square * -0x1.ffffffd0c621cp-2) + square * square * 0x1.55553e1068f19p-5) +
                     square * square * square * (-0x1.6c087e89a359dp-10 + square * 0x1.99343027bf8c3p-16);
    const double x = whole & 1 ? s : c, y = whole & 1 ? c : s;
    return {float((whole + 1) & 2 ? -x : x), float(whole & 2 ? -y : y)};
}

}  // namespace

void slotmoe::rotations(float position, const float* frequencies, int64_t c, float factor, float* y) {
    for (int64_t j = 0; j < c; j++) {
        const Rotation r = rotation(position * frequencies[j]);
        y[2 * j] = r.cosine * factor, y[2 * j + 1] = r.sine * factor;
    }
}

// y [t, c]: those of positions [t].
EXPORT int slotmoe_rotations(const float* positions, const float* frequencies, int64_t t, int64_t c, float factor,
                             float* y) {
    for (int64_t i = 0; i < t; i++) rotations(positions[i], frequencies, c, factor, y + i * 2 * c);
    return kOk;
}
