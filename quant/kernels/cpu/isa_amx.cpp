#define SLOTMOE_VBMI
#define SLOTMOE_AMX
#include "isa_avx512.cpp"
