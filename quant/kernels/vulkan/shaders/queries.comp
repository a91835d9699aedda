#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
// Of a row's q [H (N + P)] and latent [R + P]: each head's absorbed query and rotated part, y [rows, H, R + P]; the
// last workgroup norms the latent, rotates the key and writes both into the cache, float16.
layout(local_size_x = 64) in;
layout(buffer_reference, std430, buffer_reference_align = 8) readonly buffer Parameters {
  uint64_t q, latent, norm, data, scale, y;
  uint kind, heads, n, p, r, v, halves, layer;
  float eps;
};
layout(push_constant) uniform Push { Parameters s; Io io; uint serial; };
shared float sums[64], turned[256];

void rotate(uint64_t x, float factor, uint t) {
  uint i = gl_LocalInvocationIndex, count = s.p / 2u;
  for (uint c = i; c < count; c += 64u) {
    uint first = s.halves == 1u ? c : 2u * c, second = s.halves == 1u ? c + count : 2u * c + 1u;
    float a = Floats(x).f[first] * factor, b = Floats(x).f[second] * factor;
    vec2 turn = io.rope[t * count + c];
    turned[first] = a * turn.x - b * turn.y;
    turned[second] = a * turn.y + b * turn.x;
  }
  barrier();
}

uint saturated(float a, float b) { return packHalf2x16(clamp(vec2(a, b), -65504.0, 65504.0)); }

void main() {
  uint i = gl_LocalInvocationIndex, head = gl_WorkGroupID.x, t = gl_WorkGroupID.z, width = s.r + s.p;
  if (io.stop < serial) return;
  if (head < s.heads) {
    uint64_t q = s.q + 4u * (uint64_t(t) * s.heads + head) * (s.n + s.p);
    uint64_t y = s.y + 4u * (uint64_t(t) * s.heads + head) * width;
    float factor = io.factor[t];
    uint c = gl_WorkGroupID.y * 64u + i, first = head * (s.n + s.v);
    if (c < s.r / 4u) {
      vec4 sum = vec4(0.0);
      for (uint j = 0u; j < s.n; j++) {
        float x = Floats(q).f[j] * factor;
        if (s.kind == INT8) x *= Floats(s.scale).f[first + j];
        sum += x * four(s.kind, s.data + uint64_t(first + j) * s.r * size_of(s.kind), c);
      }
      for (uint j = 0u; j < 4u; j++) Floats(y).f[4u * c + j] = sum[j];
    }
    if (gl_WorkGroupID.y == 0u) {
      rotate(q + 4u * s.n, factor, t);
      for (uint j = i; j < s.p; j += 64u) Floats(y).f[s.r + j] = turned[j];
    }
  } else if (gl_WorkGroupID.y == 0u) {
    uint64_t x = s.latent + 4u * uint64_t(t) * width;
    float square = 0.0, total = 0.0;
    for (uint c = i; c < s.r; c += 64u) square += Floats(x).f[c] * Floats(x).f[c];
    sums[i] = square;
    barrier();
    for (uint j = 0u; j < 64u; j++) total += sums[j];
    float factor = inversesqrt(total / float(s.r) + s.eps);
    uint64_t row = io.cache[t] + s.layer * io.layer_bytes[t] + 2u * uint64_t(io.position[t]) * width;
    for (uint c = i; c < s.r / 2u; c += 64u) {
      float a = Floats(x).f[2u * c] * factor * Floats(s.norm).f[2u * c];
      float b = Floats(x).f[2u * c + 1u] * factor * Floats(s.norm).f[2u * c + 1u];
      Words(row).w[c] = saturated(a, b);
    }
    rotate(x + 4u * s.r, 1.0, t);
    for (uint c = i; c < s.p / 2u; c += 64u) Words(row).w[s.r / 2u + c] = saturated(turned[2u * c], turned[2u * c + 1u]);
  }
}
