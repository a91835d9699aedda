// AVX-512 with VNNI and VBMI: isa_avx512.cpp with another look-up of codes.
#define SLOTMOE_VBMI
#include "isa_avx512.cpp"
