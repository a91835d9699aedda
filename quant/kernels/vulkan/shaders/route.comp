#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
// The best experts of a row by its logits [rows, E], of equals the lowest first, and their weights; of both a copy for
// the host.  It stops the rest where the table has no address for one.
layout(local_size_x = 128) in;
layout(constant_id = 0) const uint E = 64u;
layout(buffer_reference, std430, buffer_reference_align = 8) readonly buffer Parameters {
  uint64_t logits, bias, table, weights, indices, told_weights, told_indices, told_stop;
  uint groups, kept, top_k, group_best, sigmoid, normalized, layer;
  float factor;
};
layout(push_constant) uniform Push { Parameters s; Io io; uint serial, first; };
shared float scores[E], choice[E], group[E], chosen[E];

void main() {
  uint i = gl_LocalInvocationIndex, t = gl_WorkGroupID.z + first, width = E / s.groups;
  if (io.stop < serial) return;
  float top = -3.0e38, total = 0.0;
  for (uint e = i; e < E; e += 128u) choice[e] = Floats(s.logits).f[t * E + e];
  barrier();
  if (s.sigmoid == 0u) {
    for (uint e = 0u; e < E; e++) top = max(top, choice[e]);
  }
  for (uint e = i; e < E; e += 128u) {
    scores[e] = s.sigmoid == 1u ? 1.0 / (1.0 + exp(-choice[e])) : exp(choice[e] - top);
  }
  barrier();
  if (s.sigmoid == 0u) {
    for (uint e = 0u; e < E; e++) total += scores[e];
  } else {
    total = 1.0;
  }
  barrier();
  for (uint e = i; e < E; e += 128u) {
    scores[e] /= total;
    float c = scores[e] + (s.bias == 0ul ? 0.0 : Floats(s.bias).f[e]);
    choice[e] = c >= -3.0e38 ? c : -3.0e38;  // NaN too
  }
  barrier();
  for (uint g = i; g < s.groups; g += 128u) {
    float best = -3.4e38, second = -3.4e38;
    for (uint e = g * width; e < (g + 1u) * width; e++) {
      second = max(second, min(best, choice[e]));
      best = max(best, choice[e]);
    }
    group[g] = s.group_best == 2u ? best + second : best;
  }
  barrier();
  for (uint e = i; e < E; e += 128u) {
    uint mine = e / width, ahead = 0u;
    for (uint g = 0u; g < s.groups; g++) {
      if (group[g] > group[mine] || (group[g] == group[mine] && g < mine)) ahead++;
    }
    chosen[e] = ahead < s.kept ? choice[e] : -3.4e38;
  }
  barrier();
  for (uint e = i; e < E; e += 128u) {
    uint ahead = 0u;
    for (uint o = 0u; o < E; o++) {
      if (chosen[o] > chosen[e] || (chosen[o] == chosen[e] && o < e)) ahead++;
    }
    if (ahead < s.top_k) {
      Words(s.indices).w[t * s.top_k + ahead] = Words(s.told_indices).w[t * s.top_k + ahead] = e;
      group[ahead] = scores[e];
      if (Longs(s.table).a[e] == 0ul) io.stop = Words(s.told_stop).w[0] = s.layer;
    }
  }
  barrier();
  if (i < s.top_k) {
    float sum = 0.0;
    for (uint k = 0u; k < s.top_k; k++) sum += group[k];
    float w = s.normalized == 1u ? group[i] / (sum + 1e-20) : group[i];
    w *= s.factor;
    Floats(s.weights).f[t * s.top_k + i] = Floats(s.told_weights).f[t * s.top_k + i] = w;
  }
}
