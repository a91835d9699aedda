#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
// The largest of a row's logits [rows, V], the first of equals; -1 where one is NaN.
layout(local_size_x = 256) in;
layout(buffer_reference, std430, buffer_reference_align = 8) readonly buffer Parameters {
  uint64_t logits, chosen;
  uint count;
};
layout(push_constant) uniform Push { Parameters s; Io io; uint serial, first; };
shared float best[256];
shared uint at[256];

void main() {
  uint i = gl_LocalInvocationIndex, t = gl_WorkGroupID.z + first;
  if (io.stop < serial) return;
  float top = -3.4e38;
  uint place = 0xfffffffeu;
  for (uint v = i; v < s.count; v += 256u) {
    float x = Floats(s.logits).f[t * s.count + v];
    if (isnan(x)) {
      place = 0xffffffffu;
      break;
    }
    if (x > top) {
      top = x;
      place = v;
    }
  }
  best[i] = top;
  at[i] = place;
  barrier();
  if (i > 0u) return;
  for (uint j = 1u; j < 256u && place != 0xffffffffu; j++) {
    if (at[j] == 0xffffffffu || best[j] > top || (best[j] == top && at[j] < place)) {
      top = best[j];
      place = at[j];
    }
  }
  Words(s.chosen).w[t] = place;
}
