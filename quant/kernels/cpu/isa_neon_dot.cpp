// NEON with products of four bytes: isa_neon.cpp with sdot.
#define SLOTMOE_DOT
#include "isa_neon.cpp"
