// What all shaders share.  Everything is reached by 64-bit addresses; the grid's z is a row (a token), or of many rows a
// tile of them, which share what is read of a matrix.  A row gets the bits that it has alone: a sum has one order, and is
// `precise`, so that no compiler makes another of it for another tile.
#extension GL_EXT_buffer_reference : require
#extension GL_EXT_control_flow_attributes : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require

layout(buffer_reference, std430, buffer_reference_align = 4) buffer Words { uint w[]; };
layout(buffer_reference, std430, buffer_reference_align = 4) buffer Floats { float f[]; };
layout(buffer_reference, std430, buffer_reference_align = 8) buffer Pairs { vec2 v[]; };
layout(buffer_reference, std430, buffer_reference_align = 8) buffer Longs { uint64_t a[]; };
layout(buffer_reference, std430, buffer_reference_align = 16) buffer Vectors { vec4 v[]; };
layout(buffer_reference, std430, buffer_reference_align = 16) buffer Quads { uvec4 q[]; };

const uint NONE = 0xffffffffu;
// What changes from step to step, `Io` of decoder.cpp.
layout(buffer_reference, std430, buffer_reference_align = 16) buffer Io {
  uint stop;  // the MoE layer that lacks an expert: nothing behind its choice runs
  uint count, start, stride;  // of rows; bytes to the first, and from one to the next
};
layout(buffer_reference, std430, buffer_reference_align = 16) buffer Row {
  int token;
  uint position;
  float factor;
  uint unused;
  uint64_t cache, layer_bytes;
  vec2 rope[];
};
Row row_of(Io io, uint t) { return Row(uint64_t(io) + io.start + uint64_t(t) * io.stride); }

const uint INT8 = 0u, NF4 = 1u, LUT4 = 2u, LUT3 = 3u, INT4 = 4u, MXFP4 = 5u, LUT2 = 6u, INT5 = 7u, INT6 = 8u;
const uint F32 = 9u, F16 = 10u, BF16 = 11u;  // `Kind` of quant/kernels/cpu/isa.h

uint size_of(uint kind) { return kind == INT8 ? 1u : kind == F32 ? 4u : 2u; }

const uint BITS[] = {8u, 4u, 4u, 3u, 4u, 4u, 2u, 5u, 6u};  // of codes
bool has_bytes(uint kind) { return kind == LUT4 || kind == LUT3 || kind >= INT5; }  // for scales, which ...
bool has_factors(uint kind) { return has_bytes(kind) || kind == LUT2; }             // ... are multiples of a row's

vec4 bytes_of(int w) {
  return vec4(bitfieldExtract(w, 0, 8), bitfieldExtract(w, 8, 8), bitfieldExtract(w, 16, 8), w >> 24);
}

// Elements 4 i to 4 i + 3 of a row-major kind.
vec4 four(uint kind, uint64_t base, uint i) {
  if (kind == INT8) return bytes_of(int(Words(base).w[i]));
  if (kind == F32) return Vectors(base).v[i];
  uint a = Words(base).w[2u * i], b = Words(base).w[2u * i + 1u];
  if (kind == F16) return vec4(unpackHalf2x16(a), unpackHalf2x16(b));
  return uintBitsToFloat(uvec4(a << 16, a & 0xffff0000u, b << 16, b & 0xffff0000u));
}

float add_product(float a, float b, float sum) {
  precise float y = fma(a, b, sum);
  return y;
}
float add_dot(vec4 a, vec4 b, float sum) {
  precise float y = fma(a.w, b.w, fma(a.z, b.z, fma(a.y, b.y, fma(a.x, b.x, sum))));
  return y;
}

uint saturated(float a, float b) { return packHalf2x16(clamp(vec2(a, b), -65504.0, 65504.0)); }

// By what sums of weights over two parts of a context are multiplied when they are added; `top` is the better of both.
vec2 joined(inout float top, float best) {
  float better = max(top, best);
  vec2 factors = exp(vec2(top, best) - better);
  top = better;
  return factors;
}
