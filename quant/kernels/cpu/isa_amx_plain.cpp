#define SLOTMOE_PLAIN_TILES
#include "isa_amx.cpp"
