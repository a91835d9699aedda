// A number for what Python declares again: the sizes of structures, and signatures.txt. Python computes it too
// (quant/kernels/cpu/bindings.py) and refuses a library that gives another.
#include "api.h"
#if __has_include("signatures.h")  // setup.py writes it; without setup.py the library is for no Python
#include "signatures.h"
#else
#define SLOTMOE_SIGNATURES 0
#endif

using namespace slotmoe;

namespace {

template <class... Structures>
constexpr int layout() {
    uint64_t number = SLOTMOE_SIGNATURES;
    ((number = (number * 31 + sizeof(Structures)) % 0x7fffffff), ...);
    return int(number);
}

}  // namespace

// The structures are those of STRUCTURES in weights.py, in its order, then those of bindings.py.
EXPORT int slotmoe_layout() {
    return layout<Matrix, Activation, Mlp, Indexer, Absorbed, Attention, Compressor, Compressed, Grouped, Delta, Router,
                  Hyper, Layer, Model, Record, Tokens>();
}
