#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
// y [rows, D] = add + (the sum of uses [rows, K, D] by weight, in order, + others).
layout(local_size_x = 64) in;
layout(buffer_reference, std430, buffer_reference_align = 8) readonly buffer Parameters {
  uint64_t outputs, weights, others, add, y;
  uint uses, columns;
};
layout(push_constant) uniform Push { Parameters s; Io io; uint serial, first_row; };

void main() {
  uint t = gl_WorkGroupID.z + first_row, c = gl_GlobalInvocationID.x, count = s.columns / 4u;
  if (io.stop < serial || c >= count) return;
  precise vec4 total = vec4(0.0);
  for (uint use = t * s.uses; use < (t + 1u) * s.uses; use++) {
    total = fma(Vectors(s.outputs).v[use * count + c], vec4(Floats(s.weights).f[use]), total);
  }
  if (s.others != 0ul) total += Vectors(s.others).v[t * count + c];
  total += Vectors(s.add).v[t * count + c];
  Vectors(s.y).v[t * count + c] = total;
}
