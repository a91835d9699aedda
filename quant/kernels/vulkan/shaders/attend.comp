#version 460
#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
// Eight heads of a group of a row over one split of its context: sums [rows, H, splits, R], best score and total weight [rows, H,
// splits].  Where the context is split depends on its length alone.  Of many rows a workgroup goes through all splits,
// one after the other, and puts them together as values.comp does: sums [rows, H, R].  Latents are one group's, whose rows
// are keys and in R columns values; KEYS_LAST has the key in P columns behind them.
layout(local_size_x = 128) in;
layout(constant_id = 0) const uint R = 512u;
layout(constant_id = 1) const uint P = 64u;
layout(constant_id = 2) const uint WHOLE = 0u;
layout(constant_id = 3) const uint KEYS_LAST = 0u;
const uint HEADS = 8u, BLOCK = 16u, W = R + P, PAIRS = (R / 2u + 127u) / 128u;
layout(buffer_reference, std430, buffer_reference_align = 8) readonly buffer Parameters {
  uint64_t q, sums, best;
  uint heads, groups, splits, layer;
  float scale;
};
layout(push_constant) uniform Push { Parameters s; Io io; uint serial, first_row; };
shared float q[HEADS * W], score[HEADS * BLOCK], weight[HEADS * BLOCK];

void main() {
  uint i = gl_LocalInvocationIndex, t = gl_WorkGroupID.z + first_row;
  Row about = row_of(io, t);
  uint length = about.position + 1u, share = (length + s.splits * BLOCK - 1u) / (s.splits * BLOCK) * BLOCK;
  uint split = WHOLE == 1u ? 0u : gl_WorkGroupID.y, splits = WHOLE == 1u ? s.splits : split + 1u;
  if (io.stop < serial || split * share >= length) return;
  uint share_of = s.heads / s.groups, parts = (share_of + HEADS - 1u) / HEADS, group = gl_WorkGroupID.x / parts;
  uint before = gl_WorkGroupID.x % parts * HEADS, first_head = group * share_of + before, heads = min(HEADS, share_of - before);
  uint64_t rows = about.cache + (s.layer * s.groups + group) * about.layer_bytes;
  for (uint c = i; c < HEADS * W; c += 128u) {
    q[c] = c < heads * W ? Floats(s.q).f[(t * s.heads + first_head) * W + c] * s.scale : 0.0;
  }
  uint mine = i % HEADS, row = i / HEADS;  // a thread scores one row for one head
  precise float total = 0.0, bests[HEADS], tops[HEADS], all_total = 0.0;
  precise vec2 sums[HEADS * PAIRS], all[HEADS * PAIRS];
  for (uint c = 0u; c < HEADS * PAIRS; c++) all[c] = vec2(0.0);
  for (uint h = 0u; h < HEADS; h++) tops[h] = -3.0e38;
  for (; split < splits && split * share < length; split++) {
    total = 0.0;
    for (uint c = 0u; c < HEADS * PAIRS; c++) sums[c] = vec2(0.0);
    for (uint h = 0u; h < HEADS; h++) bests[h] = -3.0e38;
    uint end = min(length, (split + 1u) * share);
    for (uint first = split * share; first < end; first += BLOCK) {
      barrier();
      precise float x = -3.0e38;
      if (first + row < end) {
        Words words = Words(rows + 2u * uint64_t(first + row) * W);
        x = 0.0;
        [[dont_unroll]] for (uint c = KEYS_LAST * R / 2u; c < W / 2u; c++) {
          vec2 pair = unpackHalf2x16(words.w[c]);
          x = fma(pair.x, q[mine * W + 2u * c], x);
          x = fma(pair.y, q[mine * W + 2u * c + 1u], x);
        }
      }
      score[row * HEADS + mine] = x;
      barrier();
      float decay[HEADS];
      for (uint h = 0u; h < HEADS; h++) {
        float better = bests[h];
        [[dont_unroll]] for (uint j = 0u; j < BLOCK; j++) better = max(better, score[j * HEADS + h]);
        decay[h] = exp(bests[h] - better);
        bests[h] = better;
      }
      weight[row * HEADS + mine] = first + row < end ? exp(x - bests[mine]) : 0.0;
      barrier();
      total *= decay[mine];
      [[dont_unroll]] for (uint j = 0u; j < BLOCK; j++) total += weight[j * HEADS + mine];
      uint count = min(BLOCK, end - first);
      for (uint c = 0u; c < PAIRS; c++) {
        uint column = c * 128u + i;
        if (column >= R / 2u) break;
        for (uint h = 0u; h < HEADS; h++) sums[h * PAIRS + c] *= decay[h];
        [[dont_unroll]] for (uint j = 0u; j < count; j++) {
          vec2 pair = unpackHalf2x16(Words(rows + 2u * uint64_t(first + j) * W).w[column]);
          for (uint h = 0u; h < HEADS; h++) {
            sums[h * PAIRS + c] = fma(vec2(weight[j * HEADS + h]), pair, sums[h * PAIRS + c]);
          }
        }
      }
    }
    if (WHOLE == 1u) {
      for (uint h = 0u; h < HEADS; h++) {
        vec2 factors = joined(tops[h], bests[h]);
        if (h == mine) all_total = fma(total, factors.y, all_total * factors.x);
        for (uint c = h * PAIRS; c < (h + 1u) * PAIRS; c++) all[c] = fma(sums[c], factors.yy, all[c] * factors.x);
        bests[h] = tops[h];
      }
    }
  }
  if (WHOLE == 1u) {
    total = all_total;
    for (uint c = 0u; c < HEADS * PAIRS; c++) sums[c] = all[c];
  }
  for (uint h = 0u; h < heads; h++) {
    uint at = t * s.heads + first_head + h;
    if (WHOLE == 0u) at = at * s.splits + gl_WorkGroupID.y;
    for (uint c = 0u; c < PAIRS; c++) {
      uint column = c * 128u + i;
      if (column < R / 2u) Pairs(s.sums).v[at * (R / 2u) + column] = sums[h * PAIRS + c];
    }
    if (i == h) Pairs(s.best).v[at] = vec2(bests[h], total);  // thread h scores for head h
  }
}
