// AVX2 with AVX-VNNI: isa_avx2.cpp with one instruction for four products of bytes a lane.
#define SLOTMOE_AVXVNNI
#include "isa_avx2.cpp"
