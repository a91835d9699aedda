#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
// A row's token in the table, or what was given in its place, to y [rows, D].
layout(local_size_x = 64) in;
layout(buffer_reference, std430, buffer_reference_align = 8) readonly buffer Parameters {
  uint64_t data, scale, given, y;
  uint kind, columns, tokens;
};
layout(push_constant) uniform Push { Parameters p; Io io; uint serial, first; };

void main() {
  uint t = gl_WorkGroupID.z + first, i = gl_GlobalInvocationID.x, count = p.columns / 4u;
  if (i >= count) return;
  Vectors y = Vectors(p.y);
  int token = row_of(io, t).token;
  if (token < 0 || token >= p.tokens) {
    y.v[t * count + i] = Vectors(p.given).v[t * count + i];
    return;
  }
  vec4 x = four(p.kind, p.data + uint64_t(token) * p.columns * size_of(p.kind), i);
  y.v[t * count + i] = p.kind == INT8 ? x * Floats(p.scale).f[token] : x;
}
