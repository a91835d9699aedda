#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
// A head's latent output, of the splits of a row's context, through its last V rows of kv_b: y [rows, H, V].  Of a tile
// of rows it is put together already.  Without kv_b, that output is what values make: y [rows, H, R].
layout(local_size_x = 128) in;
layout(constant_id = 0) const uint R = 512u;
layout(constant_id = 1) const uint TILE = 1u;
const uint VALUES = 32u, BLOCK = 16u;  // values of a workgroup; as in attend.comp
layout(buffer_reference, std430, buffer_reference_align = 8) readonly buffer Parameters {
  uint64_t sums, best, data, scale, y;
  uint kind, heads, splits, n, v;
};
layout(push_constant) uniform Push { Parameters s; Io io; uint serial, first_row; };
shared vec4 latent[R / 4u];
shared float parts[128 * TILE], totals[TILE];

void main() {
  uint i = gl_LocalInvocationIndex, head = gl_WorkGroupID.x, t = (gl_WorkGroupID.z + first_row) * TILE;
  if (io.stop < serial) return;
  if (TILE == 1u) {
    uint length = row_of(io, t).position + 1u, share = (length + s.splits * BLOCK - 1u) / (s.splits * BLOCK) * BLOCK;
    uint first = (t * s.heads + head) * s.splits, splits = (length + share - 1u) / share;
    for (uint c = i; c < R / 4u; c += 128u) {
      float top = -3.0e38;
      precise float total = 0.0;
      precise vec4 sum = vec4(0.0);
      for (uint j = 0u; j < splits; j++) {
        vec2 best = Pairs(s.best).v[first + j], factors = joined(top, best.x);
        total = fma(best.y, factors.y, total * factors.x);
        sum = fma(Vectors(s.sums).v[(first + j) * (R / 4u) + c], vec4(factors.y), sum * factors.x);
      }
      if (s.data == 0ul) Vectors(s.y).v[(t * s.heads + head) * (R / 4u) + c] = sum / total;
      latent[c] = sum;
      if (c == 0u) totals[0] = total;
    }
  } else if (i < TILE && t + i < io.count) {
    totals[i] = Pairs(s.best).v[(t + i) * s.heads + head].y;
  }
  for (uint c = i; s.data == 0ul && TILE > 1u && c < TILE * (R / 4u); c += 128u) {
    uint from = (t + c / (R / 4u)) * s.heads + head, place = from * (R / 4u) + c % (R / 4u);
    if (t + c / (R / 4u) < io.count) Vectors(s.y).v[place] = Vectors(s.sums).v[place] / Pairs(s.best).v[from].y;
  }
  if (s.data == 0ul) return;
  for (uint at = 0u; at < VALUES; at += 8u) {
    uint value = gl_WorkGroupID.y * VALUES + at + i / 16u, row = head * (s.n + s.v) + s.n + value;
    float sums[TILE];
    [[unroll]] for (uint r = 0u; r < TILE; r++) sums[r] = 0.0;
    barrier();
    if (value < s.v) {
      uint64_t base = s.data + uint64_t(row) * R * size_of(s.kind);
      for (uint c = i % 16u; c < R / 4u; c += 16u) {
        vec4 w = four(s.kind, base, c);
        [[unroll]] for (uint r = 0u; r < TILE; r++) {
          uint from = min(t + r, io.count - 1u) * s.heads + head;
          sums[r] = add_dot(w, TILE == 1u ? latent[c] : Vectors(s.sums).v[from * (R / 4u) + c], sums[r]);
        }
      }
    }
    [[unroll]] for (uint r = 0u; r < TILE; r++) parts[r * 128u + i] = sums[r];
    barrier();
    for (uint r = i % 16u; r < TILE && t + r < io.count && value < s.v; r += 16u) {
      precise float sum = 0.0;
      for (uint j = 0u; j < 16u; j++) sum += parts[r * 128u + i / 16u * 16u + j];
      if (s.kind == INT8) sum *= Floats(s.scale).f[row];
      Floats(s.y).f[((t + r) * s.heads + head) * s.v + value] = sum / totals[r];
    }
  }
}
