#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
// A head's latent output, of the splits of a row's context, through its last V rows of kv_b: y [rows, H, V].
layout(local_size_x = 128) in;
layout(constant_id = 0) const uint R = 512u;
const uint VALUES = 32u, BLOCK = 16u;  // values of a workgroup; as in attend.comp
layout(buffer_reference, std430, buffer_reference_align = 8) readonly buffer Parameters {
  uint64_t sums, best, data, scale, y;
  uint kind, heads, splits, n, v;
};
layout(push_constant) uniform Push { Parameters s; Io io; uint serial; };
shared vec4 latent[R / 4u];
shared float parts[128];

void main() {
  uint i = gl_LocalInvocationIndex, head = gl_WorkGroupID.x, t = gl_WorkGroupID.z, length = io.position[t] + 1u;
  if (io.stop < serial) return;
  uint share = (length + s.splits * BLOCK - 1u) / (s.splits * BLOCK) * BLOCK, splits = (length + share - 1u) / share;
  uint first = (t * s.heads + head) * s.splits;
  float top = -3.0e38, total = 0.0;
  for (uint j = 0u; j < splits; j++) top = max(top, Pairs(s.best).v[first + j].x);
  for (uint j = 0u; j < splits; j++) {
    vec2 best = Pairs(s.best).v[first + j];
    total += best.y * exp(best.x - top);
  }
  for (uint c = i; c < R / 4u; c += 128u) {
    vec4 sum = vec4(0.0);
    for (uint j = 0u; j < splits; j++) {
      sum += Vectors(s.sums).v[(first + j) * (R / 4u) + c] * exp(Pairs(s.best).v[first + j].x - top);
    }
    latent[c] = sum / total;
  }
  for (uint at = 0u; at < VALUES; at += 8u) {
    uint value = gl_WorkGroupID.y * VALUES + at + i / 16u, row = head * (s.n + s.v) + s.n + value;
    float sum = 0.0;
    barrier();
    if (value < s.v) {
      uint64_t base = s.data + uint64_t(row) * R * size_of(s.kind);
      for (uint c = i % 16u; c < R / 4u; c += 16u) sum += dot(four(s.kind, base, c), latent[c]);
    }
    parts[i] = sum;
    barrier();
    if (i % 16u == 0u && value < s.v) {
      sum = 0.0;
      for (uint j = 0u; j < 16u; j++) sum += parts[i + j];
      if (s.kind == INT8) sum *= Floats(s.scale).f[row];
      Floats(s.y).f[(t * s.heads + head) * s.v + value] = sum;
    }
  }
}
