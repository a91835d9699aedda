#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
// Products of a token's rows with matrices of any kind, 16 rows of one to 128 threads, of which 8 share a row.  Where
// uses are weighted a workgroup computes all of them, LANES at once, and sums them in order.  Of many rows a tile of TILE
// rows, or of uses of one expert, shares what is read of COUNT times 16 rows of the matrix.
layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint LANES = 1u;
layout(constant_id = 2) const uint USES = 1u;
layout(constant_id = 3) const uint TILE = 1u;
layout(constant_id = 4) const uint COUNT = 1u;
struct Part {
  uint64_t data[2], scale[2];  // the second is multiplied by the silu of the first, where pair; with records places in them
  uint64_t levels, x, gain, y, add, normed;
  uint64_t records, indices;   // addresses by expert; [rows, uses], of tiles experts [tiles] of ...
  uint64_t places;             // ... uses [tiles, TILE], each in its place, as sort.comp has them
  uint64_t weights, others;    // y = add + (the sum of uses by weight + others)
  uint kind, n, k, pair, uses;
  uint x_row, x_use, y_row, y_use;  // floats from row to row, and from use to use
  float eps;
};
layout(buffer_reference, std430, buffer_reference_align = 8) readonly buffer Parameters { uint count; Part parts[]; };
layout(push_constant) uniform Push { Parameters p; Io io; uint serial, first_row; };
const uint RESULTS = (TILE + 7u) / 8u;  // of a thread
shared float table[16], sums[128 * LANES * TILE], squares[128 * LANES * RESULTS], results[16 * USES];
float sum[COUNT * TILE], square;          // of a thread's columns
uint from[TILE];                          // where in x rows begin

// Of rows 16 (tile + m) + i / 8, columns that are i % 8's.
void plain(uint kind, uint64_t base, uint n, uint tile, uint k, uint64_t x, uint64_t gain, uint i) {
  bool whole = kind == INT8 && k % 16u == 0u;
  uint64_t row[COUNT];
  [[unroll]] for (uint m = 0u; m < COUNT; m++) {
    row[m] = base + uint64_t(min((tile + m) * 16u + i / 8u, n - 1u)) * k * size_of(kind);
  }
  for (uint c = 4u * (i % 8u); c < k / 4u; c += 32u) {
    uvec4 q[COUNT];
    if (whole) {
      [[unroll]] for (uint m = 0u; m < COUNT; m++) q[m] = Quads(row[m]).q[c / 4u];
    }
    for (uint j = 0u; j < 4u && c + j < k / 4u; j++) {
      vec4 w[COUNT], g = vec4(1.0);
      [[unroll]] for (uint m = 0u; m < COUNT; m++) w[m] = whole ? bytes_of(int(q[m][j])) : four(kind, row[m], c + j);
      if (gain != 0ul) g = Vectors(gain).v[c + j];
      [[unroll]] for (uint r = 0u; r < TILE; r++) {
        precise vec4 v = Vectors(x).v[from[r] + c + j];
        if (TILE == 1u && gain != 0ul) square = add_dot(v, v, square);
        v *= g;
        [[unroll]] for (uint m = 0u; m < COUNT; m++) sum[m * TILE + r] = add_dot(w[m], v, sum[m * TILE + r]);
      }
    }
  }
}

// Eight columns' weights of a tile's row, of each the scale: codec.py has the layout.
float decoded(uint kind, uint64_t codes, uint64_t scales, uint block, uint part, uint lane, out vec4 w0, out vec4 w1) {
  uint bits = BITS[kind], half_ = part / 4u, words = block * 32u * bits + lane;
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
  uint mask = (1u << min(bits, 4u)) - 1u, low_mask = (1u << apart) - 1u;
  for (uint j = 0u; j < 4u; j++) {
    uint a = w >> 8u * j + first & mask, b = w >> 8u * j + second & mask;
    if (apart > 0u) {
      a = a << apart | lowest >> 8u * j + first_low & low_mask;
      b = b << apart | lowest >> 8u * j + second_low & low_mask;
      w0[j] = float(int(a) - int(8u << apart));
      w1[j] = float(int(b) - int(8u << apart));
    } else {
      w0[j] = table[a];
      w1[j] = table[b];
    }
  }
  uint number = kind == NF4 || kind == LUT2 ? block * 16u + lane : block * 32u + half_ * 16u + lane;
  float scale;
  if (kind == NF4 || kind == INT4) {
    vec2 both = unpackHalf2x16(Words(scales).w[number / 2u]);
    scale = number % 2u == 1u ? both.y : both.x;
  } else {
    uint s = number + (has_factors(kind) ? 64u : 0u), word = Words(scales).w[s / 4u] >> 8u * (s % 4u) & 255u;
    if (kind == LUT2) {
      scale = float(bitfieldExtract(int(word), int(half_ * 4u), 4));
    } else {
      scale = kind != MXFP4 ? float(bitfieldExtract(int(word), 0, 8)) : uintBitsToFloat(word == 0u ? 0x00400000u : word << 23);
    }
  }
  return scale;
}

// Of rows 16 (tile + m) + i % 16, columns that are i / 16's.
void coded(uint kind, uint64_t codes, uint64_t scales, uint n, uint tile, uint k, uint64_t x, uint64_t gain, uint i) {
  uint blocks = (k + 63u) / 64u, lane = i % 16u;
  uint size = has_bytes(kind) ? (blocks + 2u) * 32u : kind == LUT2 ? (blocks + 4u) * 16u : blocks * (kind == INT4 ? 64u : 32u);
  uint64_t code_at[COUNT], scale_at[COUNT];
  [[unroll]] for (uint m = 0u; m < COUNT; m++) {
    uint number = min(tile + m, (n - 1u) / 16u);
    code_at[m] = codes + uint64_t(number) * blocks * 128u * BITS[kind];
    scale_at[m] = scales + uint64_t(number) * size;
  }
  for (uint at = i / 16u; at * 8u < k; at += 8u) {
    vec4 w0[COUNT], w1[COUNT], g0 = vec4(1.0), g1 = vec4(1.0);
    float scale[COUNT];
    bool more = at * 8u + 4u < k;
    [[unroll]] for (uint m = 0u; m < COUNT; m++) {
      scale[m] = decoded(kind, code_at[m], scale_at[m], at / 8u, at % 8u, lane, w0[m], w1[m]);
    }
    if (gain != 0ul) {
      g0 = Vectors(gain).v[2u * at];
      if (more) g1 = Vectors(gain).v[2u * at + 1u];
    }
    [[unroll]] for (uint r = 0u; r < TILE; r++) {
      precise vec4 v = Vectors(x).v[from[r] + 2u * at], u = vec4(0.0);
      if (more) u = Vectors(x).v[from[r] + 2u * at + 1u];
      if (TILE == 1u && gain != 0ul) square = add_dot(u, u, add_dot(v, v, square));
      v *= g0;
      u *= g1;
      [[unroll]] for (uint m = 0u; m < COUNT; m++) {
        precise float product = add_dot(w1[m], u, add_dot(w0[m], v, 0.0));
        sum[m * TILE + r] = add_product(product, scale[m], sum[m * TILE + r]);
      }
    }
  }
  if (!has_factors(kind)) return;
  [[unroll]] for (uint m = 0u; m < COUNT; m++) {
    float factor = Floats(scale_at[m]).f[lane];
    [[unroll]] for (uint r = 0u; r < TILE; r++) sum[m * TILE + r] *= factor;
  }
}

uint workgroups(uint number) {
  uint groups = (p.parts[number].n + 16u * COUNT - 1u) / (16u * COUNT);
  return p.parts[number].weights != 0ul || TILE > 1u ? groups : groups * p.parts[number].uses;
}

// Of row r of a tile: the use (of those without experts the row), NONE where there is none, and where in its x it begins.
uint place_of(uint number, uint r, uint use) {
  uint row = (gl_WorkGroupID.z + first_row) * TILE + r;
  if (p.parts[number].places != 0ul) return Words(p.parts[number].places).w[row];
  return row < io.count ? row * p.parts[number].uses + use : NONE;
}
uint start_of(uint number, uint place, uint by_row, uint by_use) {
  uint uses = p.parts[number].uses;
  return place / uses * by_row + place % uses * by_use;
}
uint start_in_x(uint number, uint r, uint use) {
  uint place = place_of(number, r, use);
  if (place == NONE) place = place_of(number, 0u, use);  // which is there
  return start_of(number, place, p.parts[number].x_row, p.parts[number].x_use) / 4u;
}

float factor_of(uint number, uint at) {
  precise float total = 0.0;
  for (uint j = 0u; j < 8u; j++) total += squares[at + j];
  return inversesqrt(total / float(p.parts[number].k) + p.parts[number].eps);
}

void main() {
  uint i = gl_LocalInvocationIndex % 128u, lane = gl_LocalInvocationIndex / 128u, z = gl_WorkGroupID.z + first_row;
  uint at = gl_WorkGroupID.x, number = 0u;
  if (io.stop < serial) return;
  while (at >= workgroups(number)) at -= workgroups(number++);
  uint kind = p.parts[number].kind, n = p.parts[number].n, k = p.parts[number].k, uses = p.parts[number].uses;
  uint groups = (n + 16u * COUNT - 1u) / (16u * COUNT), tile = at % groups * COUNT;
  uint64_t x = p.parts[number].x, gain = p.parts[number].gain, weights = p.parts[number].weights;
  bool is_coded = kind >= NF4 && kind <= INT6;
  if (is_coded) {
    if (i < 16u) table[i] = Floats(p.parts[number].levels).f[i];
    barrier();
  }
  uint slot = is_coded ? i % 16u * 8u + i / 16u : i, sums0 = lane * 128u, squares0 = lane * 128u;
  uint first = weights != 0ul ? lane : at / groups, end = weights != 0ul ? (uses + LANES - 1u) / LANES * LANES : first + 1u;
  // Loops end below: lavapipe goes through one that ends above once more with no thread, and its barriers hide another's lack.
  uint use = first;
  do {
    uint64_t record = 0ul;
    if (p.parts[number].records != 0ul && use < uses) {
      uint expert = Words(p.parts[number].indices).w[TILE == 1u ? z * uses + use : z];
      if (expert != NONE) record = Longs(p.parts[number].records).a[expert];
      if (TILE > 1u && record == 0ul) return;  // no such tile, or not this time
    }
    [[unroll]] for (uint r = 0u; r < TILE; r++) from[r] = start_in_x(number, r, use);
    square = 0.0;
    if (TILE > 1u && gain != 0ul) {  // as `plain` and `coded` do it
      uint width = is_coded ? 2u : 4u;
      for (uint o = i; o < 8u * TILE; o += 128u) {
        uint start = start_in_x(number, o / 8u, use);
        float total = 0.0;
        for (uint c = width * (o % 8u); c < k / 4u; c += 8u * width) {
          for (uint j = start + c; j < start + min(c + width, k / 4u); j++) total = add_dot(Vectors(x).v[j], Vectors(x).v[j], total);
        }
        squares[o] = total;
      }
    }
    precise float held[COUNT * RESULTS];
    uint half_ = 0u;
    do {
      [[unroll]] for (uint c = 0u; c < COUNT * TILE; c++) sum[c] = 0.0;
      uint64_t data = record + p.parts[number].data[half_], scale = p.parts[number].scale[half_];
      if (use < uses) {
        if (is_coded) {
          coded(kind, data, record + scale, n, tile, k, x, gain, i);
        } else {
          plain(kind, data, n, tile, k, x, gain, i);
        }
      }
      if (TILE == 1u && half_ == 0u) squares[squares0 + slot] = square;
      [[unroll]] for (uint m = 0u; m < COUNT; m++) {
        barrier();
        [[unroll]] for (uint r = 0u; r < TILE; r++) sums[sums0 + r * 128u + slot] = sum[m * TILE + r];
        barrier();
        [[unroll]] for (uint h = 0u; h < RESULTS; h++) {
          uint o = h * 128u + i, r = o / 16u, row = (tile + m) * 16u + o % 16u, place = NONE;
          if (o < 16u * TILE && use < uses && row < n) place = place_of(number, r, use);
          if (place == NONE) continue;
          precise float v = 0.0;
          for (uint j = 0u; j < 8u; j++) v += sums[sums0 + o * 8u + j];
          if (gain != 0ul) v *= factor_of(number, squares0 + r * 8u);
          if (kind == INT8) v *= Floats(scale).f[row];
          if (half_ == 1u) v = held[m * RESULTS + h] / (1.0 + exp(-held[m * RESULTS + h])) * v;
          held[m * RESULTS + h] = v;
          if (half_ < p.parts[number].pair) continue;
          uint there = start_of(number, place, p.parts[number].y_row, p.parts[number].y_use) + row;
          if (weights != 0ul) {
            results[use * 16u + o] = v;
          } else {
            if (p.parts[number].add != 0ul) v += Floats(p.parts[number].add).f[there];
            Floats(p.parts[number].y).f[there] = v;
          }
        }
      }
    } while (half_++ < p.parts[number].pair);
    if (p.parts[number].normed != 0ul && at == 0u) {
      for (uint r = 0u; r < TILE && z * TILE + r < io.count; r++) {
        uint start = (z * TILE + r) * (p.parts[number].x_row / 4u);
        float factor = factor_of(number, squares0 + r * 8u);
        for (uint c = i; c < k / 4u; c += 128u) {
          precise vec4 v = Vectors(x).v[start + c] * factor * Vectors(gain).v[c];
          Vectors(p.parts[number].normed).v[start + c] = v;
        }
      }
    }
  } while ((use += LANES) < end);
  barrier();
  if (weights != 0ul && lane == 0u && i < 16u && tile * 16u + i < n) {
    uint place = z * p.parts[number].y_row + tile * 16u + i;
    precise float total = 0.0;
    for (uint use = 0u; use < uses; use++) total = fma(results[use * 16u + i], Floats(weights).f[z * uses + use], total);
    if (p.parts[number].others != 0ul) total += Floats(p.parts[number].others).f[place];
    total += Floats(p.parts[number].add).f[place];
    Floats(p.parts[number].y).f[place] = total;
  }
}
