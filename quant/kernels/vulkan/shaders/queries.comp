#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
// Of a tile of rows' q [H (N + P)] and latent [R + P]: each head's absorbed query and rotated part, y [rows, H, R + P];
// behind the heads a workgroup a row norms the latent, rotates the key and writes both into the cache, float16.
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint TILE = 1u;
layout(buffer_reference, std430, buffer_reference_align = 8) readonly buffer Parameters {
  uint64_t q, latent, norm, data, scale, y;
  uint kind, heads, n, p, r, v, halves, layer;
  float eps;
};
layout(push_constant) uniform Push { Parameters s; Io io; uint serial, first_row; };
shared float sums[64];

// Column c of what is rotated.
float turned(uint64_t x, float factor, Row about, uint c) {
  uint count = s.p / 2u, pair = s.halves == 1u ? c % count : c / 2u;
  uint first = s.halves == 1u ? pair : 2u * pair, second = s.halves == 1u ? pair + count : 2u * pair + 1u;
  precise float a = Floats(x).f[first] * factor, b = Floats(x).f[second] * factor;
  vec2 turn = about.rope[pair];
  precise float y = c == first ? fma(a, turn.x, -(b * turn.y)) : fma(a, turn.y, b * turn.x);
  return y;
}

void main() {
  uint i = gl_LocalInvocationIndex, head = gl_WorkGroupID.x, t = (gl_WorkGroupID.z + first_row) * TILE;
  uint width = s.r + s.p, last = io.count - 1u;
  if (io.stop < serial) return;
  if (head < s.heads) {
    uint c = gl_WorkGroupID.y * 64u + i, first = head * (s.n + s.v);
    if (c < s.r / 4u) {
      precise vec4 sum[TILE];
      [[unroll]] for (uint r = 0u; r < TILE; r++) sum[r] = vec4(0.0);
      for (uint j = 0u; j < s.n; j++) {
        vec4 w = four(s.kind, s.data + uint64_t(first + j) * s.r * size_of(s.kind), c);
        float scale = s.kind == INT8 ? Floats(s.scale).f[first + j] : 1.0;
        [[unroll]] for (uint r = 0u; r < TILE; r++) {
          uint row = min(t + r, last);
          precise float x = Floats(s.q).f[(row * s.heads + head) * (s.n + s.p) + j] * row_of(io, row).factor * scale;
          sum[r] = fma(vec4(x), w, sum[r]);
        }
      }
      [[unroll]] for (uint r = 0u; r < TILE; r++) {
        Floats y = Floats(s.y + 4u * (uint64_t(t + r) * s.heads + head) * width);
        for (uint j = 0u; j < 4u && t + r <= last; j++) y.f[4u * c + j] = sum[r][j];
      }
    }
    for (uint at = i; at < TILE * s.p && gl_WorkGroupID.y == 0u; at += 64u) {
      uint row = t + at / s.p, place = row * s.heads + head;
      if (row > last) break;
      uint64_t q = s.q + 4u * (uint64_t(place) * (s.n + s.p) + s.n);
      Floats(s.y).f[place * width + s.r + at % s.p] = turned(q, row_of(io, row).factor, row_of(io, row), at % s.p);
    }
  } else if (gl_WorkGroupID.y == 0u && t + head - s.heads <= last) {
    t += head - s.heads;
    Row about = row_of(io, t);
    uint64_t x = s.latent + 4u * uint64_t(t) * width;
    precise float square = 0.0, total = 0.0;
    for (uint c = i; c < s.r; c += 64u) square = fma(Floats(x).f[c], Floats(x).f[c], square);
    sums[i] = square;
    barrier();
    for (uint j = 0u; j < 64u; j++) total += sums[j];
    float factor = inversesqrt(total / float(s.r) + s.eps);
    uint64_t row = about.cache + s.layer * about.layer_bytes + 2u * uint64_t(about.position) * width;
    for (uint c = i; c < s.r / 2u; c += 64u) {
      float a = Floats(x).f[2u * c] * factor * Floats(s.norm).f[2u * c];
      float b = Floats(x).f[2u * c + 1u] * factor * Floats(s.norm).f[2u * c + 1u];
      Words(row).w[c] = saturated(a, b);
    }
    x += 4u * s.r;
    for (uint c = i; c < s.p / 2u; c += 64u) {
      Words(row).w[s.r / 2u + c] = saturated(turned(x, 1.0, about, 2u * c), turned(x, 1.0, about, 2u * c + 1u));
    }
  }
}
