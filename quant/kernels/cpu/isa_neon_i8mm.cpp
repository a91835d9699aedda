// NEON with products of four bytes and of matrices of bytes: isa_neon.cpp with sdot and smmla.
#define SLOTMOE_DOT
#define SLOTMOE_I8MM
#include "isa_neon.cpp"
