#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
// Of grouped queries each head's, behind as many zeros as a value has, to y [rows, H, 2 Z]; and each group's key and value,
// which go to the cache: a row there is a value and a key.  They get their biases and norms, and are rotated.
layout(local_size_x = 64) in;
layout(constant_id = 0) const uint Z = 128u;
layout(buffer_reference, std430, buffer_reference_align = 8) readonly buffer Parameters {
  uint64_t q, keys, query_norm, key_norm, biases, y;  // [rows, H, Z]; [rows, 2 G, Z]: keys, then values
  uint heads, groups, p, halves, norm_last, norm_row, layer;  // norms come behind rotations, are of all heads
  float eps;
};
layout(push_constant) uniform Push { Parameters s; Io io; uint serial, first_row; };
shared float x[Z], sums[64];

// Column c, rotated among those that are.
float turned(Row about, uint rotated, uint c) {
  if (c >= rotated) return x[c];
  uint count = rotated / 2u, pair = s.halves == 1u ? c % count : c / 2u;
  uint first = s.halves == 1u ? pair : 2u * pair, second = s.halves == 1u ? pair + count : 2u * pair + 1u;
  vec2 turn = about.rope[pair];
  precise float y = c == first ? fma(x[first], turn.x, -(x[second] * turn.y)) : fma(x[first], turn.y, x[second] * turn.x);
  return y;
}

void main() {
  uint i = gl_LocalInvocationIndex, part = gl_WorkGroupID.x, t = gl_WorkGroupID.z + first_row;
  if (io.stop < serial) return;
  Row about = row_of(io, t);
  bool is_query = part < s.heads, is_value = part >= s.heads + s.groups;
  uint group = (part - s.heads) % s.groups, rotated = is_value ? 0u : s.p;
  // What is normed together: all queries, or keys, or one head's.
  uint all = is_query ? s.heads : s.groups, head = is_query ? part : group, apart = s.norm_row == 1u ? 0u : head;
  uint width = s.norm_row == 1u ? all * Z : Z, own = (head - apart) * Z, biased = (part - head + apart) * Z;
  uint64_t from = is_query ? s.q : s.keys + (is_value ? 4u * s.groups * Z : 0u);
  from += 4u * uint64_t(t * (is_query ? all : 2u * all) + apart) * Z;
  uint64_t gain = is_value ? 0ul : is_query ? s.query_norm : s.key_norm;
  if (gain != 0ul) gain += 4u * own;
  precise float square = 0.0, total = 0.0;
  for (uint c = i; c < width; c += 64u) {
    float value = Floats(from).f[c] + (s.biases == 0ul ? 0.0 : Floats(s.biases).f[biased + c]);
    square = fma(value, value, square);
    if (c >= own && c < own + Z) x[c - own] = value;
  }
  sums[i] = square;
  barrier();
  for (uint j = 0u; j < 64u; j++) total += sums[j];
  float factor = inversesqrt(total / float(width) + s.eps);
  for (uint c = i; c < Z && gain != 0ul && s.norm_last == 0u; c += 64u) x[c] = x[c] * factor * Floats(gain).f[c];
  barrier();
  uint64_t row = about.cache + (s.layer * s.groups + group) * about.layer_bytes + 4u * uint64_t(about.position) * Z;
  for (uint c = 2u * i; c < Z; c += 128u) {
    vec2 y = vec2(turned(about, rotated, c), turned(about, rotated, c + 1u));
    if (gain != 0ul && s.norm_last == 1u) y *= factor * vec2(Floats(gain).f[c], Floats(gain).f[c + 1u]);
    if (is_query) {
      uint at = (t * s.heads + part) * Z + c / 2u;
      Pairs(s.y).v[at] = vec2(0.0);
      Pairs(s.y).v[at + Z / 2u] = y;
    } else {
      Words(row).w[(is_value ? 0u : Z / 2u) + c / 2u] = saturated(y.x, y.y);
    }
  }
}
