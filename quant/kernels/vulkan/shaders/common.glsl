// What all shaders share.  Everything is reached by 64-bit addresses; the grid's z is a row (a token), which gets the
// bits that it has alone, since nothing else depends on the number of rows.  A sum has one order, in shared memory.
#extension GL_EXT_buffer_reference : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require

layout(buffer_reference, std430, buffer_reference_align = 4) buffer Words { uint w[]; };
layout(buffer_reference, std430, buffer_reference_align = 4) buffer Floats { float f[]; };
layout(buffer_reference, std430, buffer_reference_align = 8) buffer Pairs { vec2 v[]; };
layout(buffer_reference, std430, buffer_reference_align = 8) buffer Longs { uint64_t a[]; };
layout(buffer_reference, std430, buffer_reference_align = 16) buffer Vectors { vec4 v[]; };
layout(buffer_reference, std430, buffer_reference_align = 16) buffer Quads { uvec4 q[]; };

const uint ROWS = 8u;
// What changes from step to step, `Io` of decoder.h.
layout(buffer_reference, std430, buffer_reference_align = 16) buffer Io {
  uint stop;  // the MoE layer that lacks an expert: nothing behind its choice runs
  int token[ROWS];
  uint position[ROWS];
  float factor[ROWS];
  uint64_t cache[ROWS], layer_bytes[ROWS];
  vec2 rope[];
};

const uint INT8 = 0u, NF4 = 1u, LUT4 = 2u, LUT3 = 3u, INT4 = 4u, MXFP4 = 5u, LUT2 = 6u, INT5 = 7u, INT6 = 8u;
const uint F32 = 9u, F16 = 10u, BF16 = 11u;  // `Kind` of quant/kernels/cpu/isa.h

uint size_of(uint kind) { return kind == INT8 ? 1u : kind == F32 ? 4u : 2u; }

// Elements 4 i to 4 i + 3 of a row-major kind.
vec4 four(uint kind, uint64_t base, uint i) {
  if (kind == INT8) {
    int w = int(Words(base).w[i]);
    return vec4(bitfieldExtract(w, 0, 8), bitfieldExtract(w, 8, 8), bitfieldExtract(w, 16, 8), w >> 24);
  }
  if (kind == F32) return Vectors(base).v[i];
  uint a = Words(base).w[2u * i], b = Words(base).w[2u * i + 1u];
  if (kind == F16) return vec4(unpackHalf2x16(a), unpackHalf2x16(b));
  return uintBitsToFloat(uvec4(a << 16, a & 0xffff0000u, b << 16, b & 0xffff0000u));
}
