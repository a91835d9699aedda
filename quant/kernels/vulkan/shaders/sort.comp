#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
// Uses of experts by expert, in order, in tiles that are of one: of each tile the expert and of each of its places the
// use, NONE where there is none.
layout(local_size_x = 128) in;
layout(constant_id = 0) const uint E = 64u;
layout(constant_id = 1) const uint TILE = 1u;
layout(buffer_reference, std430, buffer_reference_align = 8) readonly buffer Parameters {
  uint64_t indices, experts, places;  // [rows, K]; [tiles]; [tiles, TILE]
  uint top_k, tiles;
};
layout(push_constant) uniform Push { Parameters s; Io io; uint serial, first_row; };
shared uint taken[E];

void main() {
  uint i = gl_LocalInvocationIndex, uses = io.count * s.top_k, all = 0u;
  if (io.stop < serial) return;
  for (uint e = i; e < E; e += 128u) {
    uint count = 0u;
    for (uint use = 0u; use < uses; use++) count += uint(Words(s.indices).w[use] == e);
    taken[e] = (count + TILE - 1u) / TILE;
  }
  barrier();
  for (uint e = i; e < E; e += 128u) {
    uint tile = 0u;
    for (uint before = 0u; before < e; before++) tile += taken[before];
    uint at = tile * TILE, end = at + taken[e] * TILE;
    for (uint use = 0u; use < uses; use++) {
      if (Words(s.indices).w[use] == e) Words(s.places).w[at++] = use;
    }
    for (; at < end; at++) Words(s.places).w[at] = NONE;
    for (; tile * TILE < end; tile++) Words(s.experts).w[tile] = e;
  }
  for (uint e = 0u; e < E; e++) all += taken[e];
  for (uint tile = all + i; tile < s.tiles; tile += 128u) Words(s.experts).w[tile] = NONE;
}
