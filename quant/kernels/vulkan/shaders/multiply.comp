#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
// Products of a token's rows with matrices of any kind, 16 rows of one to 128 threads, of which 8 share a row.  Where
// uses are weighted a workgroup computes all of them, LANES at once, and sums them in order.
layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint LANES = 1u;
layout(constant_id = 2) const uint USES = 1u;
struct Part {
  uint64_t data[2], scale[2];  // the second is multiplied by the silu of the first, where pair; with records places in them
  uint64_t levels, x, gain, y, add, normed;
  uint64_t records, indices;   // addresses by expert; [rows, uses]
  uint64_t weights, others;    // y = add + (the sum of uses by weight + others)
  uint kind, n, k, pair, uses;
  uint x_row, x_use, y_row, y_use;  // floats from row to row, and from use to use
  float eps;
};
layout(buffer_reference, std430, buffer_reference_align = 8) readonly buffer Parameters { uint count; Part parts[]; };
layout(push_constant) uniform Push { Parameters p; Io io; uint serial; };
shared float table[16], sums[256 * LANES], squares[128 * LANES], results[16 * USES];

// Of row 16 tile + i / 8, columns that are i % 8's.
float plain(uint kind, uint64_t base, uint k, uint64_t x, uint64_t gain, uint lane, inout float square) {
  float sum = 0.0;
  bool whole = kind == INT8 && k % 16u == 0u;
  for (uint c = 4u * lane; c < k / 4u; c += 32u) {
    uvec4 q = uvec4(0u);
    if (whole) q = Quads(base).q[c / 4u];
    for (uint j = 0u; j < 4u && c + j < k / 4u; j++) {
      vec4 v = Vectors(x).v[c + j], w;
      if (whole) {
        int bytes = int(q[j]);
        w = vec4(bitfieldExtract(bytes, 0, 8), bitfieldExtract(bytes, 8, 8), bitfieldExtract(bytes, 16, 8), bytes >> 24);
      } else {
        w = four(kind, base, c + j);
      }
      if (gain != 0ul) {
        square += dot(v, v);
        v *= Vectors(gain).v[c + j];
      }
      sum += dot(w, v);
    }
  }
  return sum;
}

// Of a tile's row i % 16, columns that are i / 16's: codec.py has the layout.
float coded(uint kind, uint64_t codes, uint64_t scales, uint tile, uint k, uint64_t x, uint64_t gain, uint i,
            inout float square) {
  const uint BITS[] = {8u, 4u, 4u, 3u, 4u, 4u, 2u, 5u, 6u};
  uint lane = i % 16u, blocks = (k + 63u) / 64u, bits = BITS[kind];
  bool bytes = kind == LUT4 || kind == LUT3 || kind >= INT5, rows_factor = bytes || kind == LUT2;
  codes += uint64_t(tile) * blocks * 128u * bits;
  scales += uint64_t(tile) * (bytes ? (blocks + 2u) * 32u : kind == LUT2 ? (blocks + 4u) * 16u : blocks * (kind == INT4 ? 64u : 32u));
  float sum = 0.0;
  for (uint at = i / 16u; at * 8u < k; at += 8u) {
    uint block = at / 8u, part = at % 8u, half_ = part / 4u, words = block * 32u * bits + lane;
    // Of a byte the codes of column j and j + 4, and in what stands apart their lowest bits.
    uint w, first = 4u, second = 0u, apart = 0u, lowest = 0u, first_low = 0u, second_low = 0u;
    if (bits == 3u) {
      uint group = words + half_ * 48u, a = part % 4u;
      first = 0u;
      second = 3u;
      if (a < 3u) {
        w = Words(codes).w[group + a * 16u];
      } else {
        uint b = Words(codes).w[group + 16u], c = Words(codes).w[group + 32u];
        w = Words(codes).w[group] >> 6 & 0x03030303u | b >> 4 & 0x0c0c0c0cu | c >> 2 & 0x30303030u;
      }
    } else if (bits == 2u) {
      w = Words(codes).w[words + part / 2u * 16u];
      first = part % 2u * 4u;
      second = first + 2u;
    } else {
      w = Words(codes).w[words + part * 16u];
      apart = bits - 4u;
      if (bits == 5u) {
        lowest = Words(codes).w[words + 128u + half_ * 16u];
        first_low = part % 4u * 2u;
        second_low = first_low + 1u;
      } else if (bits == 6u) {
        lowest = Words(codes).w[words + 128u + part / 2u * 16u];
        first_low = part % 2u * 4u;
        second_low = first_low + 2u;
      }
    }
    vec4 v = Vectors(x).v[2u * at], u = vec4(0.0);
    if (at * 8u + 4u < k) u = Vectors(x).v[2u * at + 1u];
    if (gain != 0ul) {
      square += dot(v, v) + dot(u, u);
      v *= Vectors(gain).v[2u * at];
      if (at * 8u + 4u < k) u *= Vectors(gain).v[2u * at + 1u];
    }
    float product = 0.0;
    uint mask = (1u << min(bits, 4u)) - 1u, low_mask = (1u << apart) - 1u;
    for (uint j = 0u; j < 4u; j++) {
      uint a = w >> 8u * j + first & mask, b = w >> 8u * j + second & mask;
      if (apart > 0u) {
        a = a << apart | lowest >> 8u * j + first_low & low_mask;
        b = b << apart | lowest >> 8u * j + second_low & low_mask;
        product = fma(float(int(a) - int(8u << apart)), v[j], product);
        product = fma(float(int(b) - int(8u << apart)), u[j], product);
      } else {
        product = fma(table[a], v[j], product);
        product = fma(table[b], u[j], product);
      }
    }
    uint number = kind == NF4 || kind == LUT2 ? block * 16u + lane : block * 32u + half_ * 16u + lane;
    float scale;
    if (kind == NF4 || kind == INT4) {
      vec2 both = unpackHalf2x16(Words(scales).w[number / 2u]);
      scale = number % 2u == 1u ? both.y : both.x;
    } else {
      uint s = number + (rows_factor ? 64u : 0u), word = Words(scales).w[s / 4u] >> 8u * (s % 4u) & 255u;
      if (kind == LUT2) {
        scale = float(bitfieldExtract(int(word), int(half_ * 4u), 4));
      } else {
        scale = bytes ? float(bitfieldExtract(int(word), 0, 8)) : uintBitsToFloat(word == 0u ? 0x00400000u : word << 23);
      }
    }
    sum = fma(product, scale, sum);
  }
  return rows_factor ? sum * Floats(scales).f[lane] : sum;
}

uint workgroups(uint number) {
  uint tiles = (p.parts[number].n + 15u) / 16u;
  return p.parts[number].weights != 0ul ? tiles : tiles * p.parts[number].uses;
}

void main() {
  uint i = gl_LocalInvocationIndex % 128u, lane = gl_LocalInvocationIndex / 128u, t = gl_WorkGroupID.z;
  uint at = gl_WorkGroupID.x, number = 0u;
  if (io.stop < serial) return;
  while (at >= workgroups(number)) at -= workgroups(number++);
  uint kind = p.parts[number].kind, n = p.parts[number].n, k = p.parts[number].k, uses = p.parts[number].uses;
  uint pair = p.parts[number].pair, tiles = (n + 15u) / 16u, tile = at % tiles, row = tile * 16u + i;
  uint64_t gain = p.parts[number].gain, weights = p.parts[number].weights;
  bool is_coded = kind >= NF4 && kind <= INT6;
  if (is_coded) {
    if (i < 16u) table[i] = Floats(p.parts[number].levels).f[i];
    barrier();
  }
  uint slot = is_coded ? i % 16u * 8u + i / 16u : i, sums0 = lane * 256u, squares0 = lane * 128u;
  uint first = weights != 0ul ? lane : at / tiles, end = weights != 0ul ? (uses + LANES - 1u) / LANES * LANES : first + 1u;
  for (uint use = first; use < end; use += LANES) {
    uint64_t x = p.parts[number].x + 4u * (uint64_t(t) * p.parts[number].x_row + use * p.parts[number].x_use);
    if (use < uses) {
      uint64_t record = 0ul;
      if (p.parts[number].records != 0ul) {
        uint expert = Words(p.parts[number].indices).w[t * uses + use];
        record = Longs(p.parts[number].records).a[expert];
      }
      for (uint m = 0u; m <= pair; m++) {
        float sum = 0.0, square = 0.0;
        uint64_t data = record + p.parts[number].data[m];
        if (is_coded) {
          sum = coded(kind, data, record + p.parts[number].scale[m], tile, k, x, gain, i, square);
        } else if (tile * 16u + i / 8u < n) {
          sum = plain(kind, data + uint64_t(tile * 16u + i / 8u) * k * size_of(kind), k, x, gain, i % 8u, square);
        }
        sums[sums0 + m * 128u + slot] = sum;
        squares[squares0 + slot] = square;
      }
    }
    barrier();
    float factor = 1.0;
    if (gain != 0ul) {
      uint full = i < 16u && row < n ? i : 0u;  // whichever has all columns: the bits are the same
      float total = 0.0;
      for (uint j = 0u; j < 8u; j++) total += squares[squares0 + full * 8u + j];
      factor = inversesqrt(total / float(k) + p.parts[number].eps);
    }
    if (i < 16u && row < n && use < uses) {
      float v = 0.0, u = 0.0;
      for (uint j = 0u; j < 8u; j++) v += sums[sums0 + i * 8u + j];
      v *= factor;
      if (kind == INT8) v *= Floats(p.parts[number].scale[0]).f[row];
      if (pair == 1u) {
        for (uint j = 0u; j < 8u; j++) u += sums[sums0 + 128u + i * 8u + j];
        u *= factor;
        if (kind == INT8) u *= Floats(p.parts[number].scale[1]).f[row];
        v = v / (1.0 + exp(-v)) * u;
      }
      if (weights == 0ul) {
        uint place = t * p.parts[number].y_row + use * p.parts[number].y_use + row;
        if (p.parts[number].add != 0ul) v += Floats(p.parts[number].add).f[place];
        Floats(p.parts[number].y).f[place] = v;
      } else {
        results[use * 16u + i] = v;
      }
    }
    if (p.parts[number].normed != 0ul && at == 0u) {
      Vectors y = Vectors(p.parts[number].normed + 4u * uint64_t(t) * p.parts[number].x_row);
      for (uint c = i; c < k / 4u; c += 128u) y.v[c] = Vectors(x).v[c] * factor * Vectors(gain).v[c];
    }
    barrier();
  }
  if (weights != 0ul && lane == 0u && i < 16u && row < n) {
    uint place = t * p.parts[number].y_row + row;
    float total = 0.0;
    for (uint use = 0u; use < uses; use++) total += results[use * 16u + i] * Floats(weights).f[t * uses + use];
    if (p.parts[number].others != 0ul) total += Floats(p.parts[number].others).f[place];
    Floats(p.parts[number].y).f[place] = Floats(p.parts[number].add).f[place] + total;
  }
}
