// What follows a product in linear_hopper.cu, which includes this: from a thread's sums to what is stored.

__device__ __forceinline__ void load8(float (&to)[8], const float *from) {
  float4 a = ((const float4 *)from)[0], b = ((const float4 *)from)[1];
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

__device__ __forceinline__ u32 pack_e4m3(float a, float b, float c, float d) {
  u16 low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return (u32)high << 16 | low;
}

__device__ __forceinline__ void store8_e4m3(void *out, long at, const float (&y)[8]) {
  uint2 packed = make_uint2(pack_e4m3(y[0], y[1], y[2], y[3]), pack_e4m3(y[4], y[5], y[6], y[7]));
  *(uint2 *)((char *)out + at) = packed;
}

__device__ __forceinline__ u32 pack_bf16(float a, float b) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(b), "f"(a));
  return packed;
}

__device__ __forceinline__ void store8_bf16(void *out, long at, const float (&y)[8]) {
  uint4 packed = make_uint4(pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3]), pack_bf16(y[4], y[5]), pack_bf16(y[6], y[7]));
  *(uint4 *)((u16 *)out + at) = packed;
}

__device__ __forceinline__ void add8_bf16(float (&y)[8], const void *from, long at) {
  uint4 packed = *(const uint4 *)((const u16 *)from + at);
  const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    y[2 * i] += __uint_as_float(words[i] << 16);
    y[2 * i + 1] += __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ float gelu_tanh(float y) {
  float u = y * (0.7978845608028654f + 0.035677408136300125f * y * y), t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(u));
  return 0.5f * y + 0.5f * y * t;
}

// Products of a thread → what they stand for, in place. Eight neighbours of row r, then of row r + 8, of each 32 columns.
__device__ __forceinline__ void scale(float (&d)[128], const Parameters &p, const Tile &t, const float (&x)[2], int lane) {
#pragma unroll
  for (int g = 0; g < 8; g++) {
    int of_stream = t.stream * p.N + t.column + g * 32 + lane % 4 * 8;
    float w[8], b[8];
    load8(w, p.w_scale + of_stream);
    load8(b, p.bias + of_stream);
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float &y = d[g * 16 + i / 2 * 4 + half * 2 + i % 2];
        y = y * x[half] * w[i] + b[i];
      }
  }
}

__device__ __forceinline__ void neighbours(float (&y)[8], const float (&d)[128], int g, int half) {
#pragma unroll
  for (int i = 0; i < 8; i++) y[i] = d[g * 16 + i / 2 * 4 + half * 2 + i % 2];
}

// Both heads of a tile together, because they turn by the same angles: cos and sin are read once for both.
__device__ __forceinline__ void store_heads(float (&d)[128], const Parameters &p, const Tile &t, int row, int lane) {
  int lane_column = lane % 4 * 8, which[2];
#pragma unroll
  for (int head = 0; head < 2; head++) which[head] = (t.column + head * HEAD) / (p.N / 3);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float inverse[2];
#pragma unroll
    for (int head = 0; head < 2; head++) {
      float square = 0;
#pragma unroll
      for (int i = 0; i < 32; i++) {
        float y = d[head * 64 + i / 2 * 4 + half * 2 + i % 2];
        square += y * y;
      }
      square += __shfl_xor_sync(0xffffffff, square, 1);
      square += __shfl_xor_sync(0xffffffff, square, 2);
      inverse[head] = which[head] < 2 ? rsqrtf(square / HEAD + p.epsilon) : 1.0f;
    }
    int at_row = row + half * 8;
    if (at_row >= t.end) continue;
#pragma unroll
    for (int g = 0; g < 2; g++) {
      float c[8], s[8];
      if (which[0] < 2) {  // which only grows
        load8(c, p.cos + (long)at_row * (HEAD / 2) + g * 32 + lane_column);
        load8(s, p.sin + (long)at_row * (HEAD / 2) + g * 32 + lane_column);
      }
#pragma unroll
      for (int head = 0; head < 2; head++) {
        const float *factors = p.factors + (t.stream * 3 + which[head]) * HEAD + g * 32 + lane_column;
        float first[8], second[8], f[8];
        neighbours(first, d, head * 4 + g, half);
        neighbours(second, d, head * 4 + g + 2, half);
        load8(f, factors);
#pragma unroll
        for (int i = 0; i < 8; i++) first[i] *= inverse[head] * f[i];
        load8(f, factors + HEAD / 2);
#pragma unroll
        for (int i = 0; i < 8; i++) second[i] *= inverse[head] * f[i];
        if (which[head] < 2) {
#pragma unroll
          for (int i = 0; i < 8; i++) {
            float real = first[i], imaginary = second[i];
            first[i] = real * c[i] - imaginary * s[i];
            second[i] = imaginary * c[i] + real * s[i];
          }
        }
        long at = (long)at_row * p.out_stride + t.column + head * HEAD + g * 32 + lane_column;
        store8_e4m3(p.out, at, first);
        store8_e4m3(p.out, at + HEAD / 2, second);
      }
    }
  }
}

__device__ __forceinline__ void store(float (&d)[128], const Parameters &p, const Tile &t, int row, int lane) {
#pragma unroll
  for (int g = 0; g < 8; g++) {
    int column = t.column + g * 32 + lane % 4 * 8;
    float gate[8];
    if (ENDING == 2) load8(gate, p.gate + t.stream * p.N + column);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int at_row = row + half * 8;
      if (at_row >= t.end) continue;
      long at = (long)at_row * p.out_stride + column;
      float y[8];
      neighbours(y, d, g, half);
      if (ENDING == 1) {
#pragma unroll
        for (int i = 0; i < 8; i++) y[i] = gelu_tanh(y[i]) * p.inverse;
        store8_e4m3(p.out, at, y);
      } else {
        if (ENDING == 2) {
#pragma unroll
          for (int i = 0; i < 8; i++) y[i] *= gate[i];
          add8_bf16(y, p.out, at);
        }
        store8_bf16(p.out, at, y);
      }
    }
  }
}
