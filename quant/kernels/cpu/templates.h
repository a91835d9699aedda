// Everything that is written once and compiled per instruction set, in terms of `Lanes`, which the including file
// defines. No standard library templates here: the linker could keep the copy that was compiled for a CPU we do not run
// on.
#include "rows.h"

#include "matmul.h"

#include "fine.h"
#ifdef SLOTMOE_AMX
#include "fine_amx.h"
#define SLOTMOE_FINE {true, quantize_fine, coded_tiles<FineBlock>, int8_by_tiles}
#else
#define SLOTMOE_FINE_COLUMNS INT64_MAX
#define SLOTMOE_FINE {true, quantize_fine, nullptr, fine_tiles}
#endif

#include "attention.h"

#include "dense.h"

#include "streams.h"

#include "delta.h"

#include "quantize.h"

#include "encode.h"

#include "choices.h"

namespace slotmoe {

extern const Isa SLOTMOE_ISA = {
    SLOTMOE_ISA_NAME, SLOTMOE_FINE_COLUMNS, {false, quantize_rows, coded_tiles<ActBlock>, int8_tiles}, SLOTMOE_FINE,
    linear_dense,     rms_norm,      layer_norm,
    activate,         weighted_sum,  learn,        survey,       hyper_coefficients, hyper_out,   compress,
    convolve,         delta_block,   decays,
    gated,            mla_queries,   mla_pack,
    mla_chunks,       mla_merge,     mla_scratch, index_scores,       store_latent,
    quantize_nf4,     quantize_int8, coded_error, int8_error,         read_memory,
    {encoder<4>(), encoder<8>(), encoder<16>(), encoder<32>(), encoder<64>()},
};

}  // namespace slotmoe
