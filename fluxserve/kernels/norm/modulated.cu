// LayerNorm, modulate, quantise: see norm.py. A warp has a row, and all of it in its registers; shift and scale of all
// streams lie in shared memory, read once by each block and used for every row that its warps take.
//
// D: columns. QUANTISED: 1 data in E4M3 with row_scale; 0 data in BF16. WARPS: of a block.

#include "common.cuh"

#define CHUNK 256  // columns that a warp reads at once, eight a lane
#define CHUNKS ((D + CHUNK - 1) / CHUNK)
#define AHEAD (CHUNKS <= 16)  // there are registers for the next row too
#define E4M3_MAX 448.0f

struct Parameters {
  const void *x;
  const float *shift, *scale;
  void *data;
  float *row_scale;
  float epsilon, smallest;
  int rows, split, streams, x_stride, data_stride, stream_stride;
};

// Eight neighbours in two halves that lie apart, so that a warp's reads of 16 bytes a lane are side by side.
struct Steering {
  float4 factor[2][D / 8], shift[2][D / 8];
};

__device__ __forceinline__ void keep(Steering &s, const Parameters &p, int stream) {
  for (int i = threadIdx.x; i < D / 4; i += blockDim.x) {
    float4 f = ((const float4 *)(p.scale + stream * p.stream_stride))[i];
    s.factor[i % 2][i / 2] = make_float4(1 + f.x, 1 + f.y, 1 + f.z, 1 + f.w);
    s.shift[i % 2][i / 2] = ((const float4 *)(p.shift + stream * p.stream_stride))[i];
  }
}

// A lane's share of a row, if there is one.
__device__ __forceinline__ void ask(uint4 (&raw)[CHUNKS], const Parameters &p, int row, int lane) {
  const u16 *from = (const u16 *)p.x + (long)row * p.x_stride + lane * 8;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    raw[c] = row < p.rows && c * CHUNK + lane * 8 < D ? *(const uint4 *)(from + c * CHUNK) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ float sum_of_warp(float v) {
#pragma unroll
  for (int apart = 16; apart; apart /= 2) v += __shfl_xor_sync(0xffffffff, v, apart);
  return v;
}

__device__ __forceinline__ float largest_of_warp(float v) {
#pragma unroll
  for (int apart = 16; apart; apart /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffff, v, apart));
  return v;
}

__device__ __forceinline__ void steer(float (&h)[8], const Steering &s, int group, float inverse) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float4 factor = s.factor[half][group], shift = s.shift[half][group];
    float *y = h + 4 * half;
    y[0] = y[0] * inverse * factor.x + shift.x, y[1] = y[1] * inverse * factor.y + shift.y;
    y[2] = y[2] * inverse * factor.z + shift.z, y[3] = y[3] * inverse * factor.w + shift.w;
  }
}

__device__ __forceinline__ void finish(float (&h)[CHUNKS][8], const Parameters &p, int row, int lane) {
  float factor = 1;
  if (QUANTISED) {
    float largest = 0;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(h[c][i]));
    float s = fmaxf(largest_of_warp(largest), p.smallest) / E4M3_MAX;
    if (lane == 0) p.row_scale[row] = s;
    factor = 1 / s;
  }
  char *to = (char *)p.data + ((long)row * p.data_stride + lane * 8) * (QUANTISED ? 1 : 2);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    if (c * CHUNK + lane * 8 >= D) continue;
    float *y = h[c];
    if (QUANTISED) {
#pragma unroll
      for (int i = 0; i < 8; i++) y[i] *= factor;
      *(uint2 *)(to + c * CHUNK) = make_uint2(pack_e4m3(y[0], y[1], y[2], y[3]), pack_e4m3(y[4], y[5], y[6], y[7]));
    } else {
      *(uint4 *)(to + c * CHUNK * 2) =
          make_uint4(pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3]), pack_bf16(y[4], y[5]), pack_bf16(y[6], y[7]));
    }
  }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) layer_norm(const __grid_constant__ Parameters p) {
  extern __shared__ __align__(16) char memory[];
  Steering *steering = (Steering *)memory;
  int lane = threadIdx.x % 32, row = blockIdx.x + gridDim.x * (threadIdx.x / 32);
  uint4 raw[CHUNKS];
  if (AHEAD) ask(raw, p, row, lane);
  for (int stream = 0; stream < p.streams; stream++) keep(steering[stream], p, stream);
  __syncthreads();
  for (; row < p.rows; row += gridDim.x * WARPS) {
    float h[CHUNKS][8], sum = 0, square = 0;
    if (!AHEAD) ask(raw, p, row, lane);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const u32 words[4] = {raw[c].x, raw[c].y, raw[c].z, raw[c].w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        h[c][2 * i] = first_bf16(words[i]), h[c][2 * i + 1] = second_bf16(words[i]);
        sum += h[c][2 * i] + h[c][2 * i + 1];
      }
    }
    if (AHEAD) ask(raw, p, row + gridDim.x * WARPS, lane);  // the next row comes while this one is at its sums
    float mean = sum_of_warp(sum) / D;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < 8; i++) {
        h[c][i] = c * CHUNK + lane * 8 < D ? h[c][i] - mean : 0.0f;
        square += h[c][i] * h[c][i];
      }
    float inverse = rsqrtf(sum_of_warp(square) / D + p.epsilon);
    const Steering &s = steering[row < p.split ? 0 : p.streams - 1];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
      if (c * CHUNK + lane * 8 < D) steer(h[c], s, c * (CHUNK / 8) + lane, inverse);
    finish(h, p, row, lane);
  }
}
