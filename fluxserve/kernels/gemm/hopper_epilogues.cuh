// What follows a product in hopper.cu, which includes this: from a thread's sums to what is stored.
//
// A thread has two rows, 8 apart, and of every 4 · RUN columns RUN neighbours: number g · 2 · RUN + i / 2 · 4 + half · 2 +
// i % 2 of its 128 is column g · 4 · RUN + lane % 4 · RUN + i of row `half`.

#define GROUPS (COLUMNS / 4 / RUN)
#define SUM(g, half, i) d[(g) * 2 * RUN + (i) / 2 * 4 + (half) * 2 + (i) % 2]

// Of a tile's columns. factor: of the heads' numbers. The gate is in scale and bias already.
struct Columns {
  float scale[COLUMNS], bias[COLUMNS], factor[COLUMNS];
};

// What an ending reads of memory for each row: its scale; the residual stream or the angles of RoPE.
struct Ahead {
  float x[2];
#if ENDING == 2
  uint4 residual[2][GROUPS];
#elif HEADS
  float cos[2][16], sin[2][16];
#endif
};

__device__ __forceinline__ bool has_heads(const Parameters &p, const Tile &t) { return HEADS && t.column < p.heads; }

// Which of q, k and v: 0, 1, 2.
__device__ __forceinline__ int part_of(const Parameters &p, int column) { return column / (p.heads / 3); }

// Whether a tile is of v, and v's mean is taken off.
__device__ __forceinline__ bool is_centred(const Parameters &p, const Tile &t) {
  return HEADS && p.centre.mean && has_heads(p, t) && part_of(p, t.column) == 2;
}

__device__ __forceinline__ void keep_columns(Columns &c, const Parameters &p, const Tile &t, int lane) {
#pragma unroll
  for (int i = lane * 4; i < COLUMNS; i += 128) {
    int column = t.column + i;
    float4 scale = *(const float4 *)(p.w_scale + t.stream * p.N + column);
    float4 bias = *(const float4 *)(p.bias + t.stream * p.N + column);
    if (is_centred(p, t)) {  // written in this launch: not by way of the L1 cache
      float4 mean = __ldcg((const float4 *)(p.centre.mean + column - p.heads / 3 * 2));
      bias.x -= mean.x, bias.y -= mean.y, bias.z -= mean.z, bias.w -= mean.w;
    }
    if (ENDING == 2 && p.restored) {
      float4 more = *(const float4 *)(p.restored + t.stream * p.N + column);
      bias.x += more.x, bias.y += more.y, bias.z += more.z, bias.w += more.w;
    }
    if (ENDING == 2) {
      float4 gate = *(const float4 *)(p.gate + t.stream * p.N + column);
      scale.x *= gate.x, scale.y *= gate.y, scale.z *= gate.z, scale.w *= gate.w;
      bias.x *= gate.x, bias.y *= gate.y, bias.z *= gate.z, bias.w *= gate.w;
    }
    *(float4 *)(c.scale + i) = scale;
    *(float4 *)(c.bias + i) = bias;
    if (HEADS && has_heads(p, t))
      *(float4 *)(c.factor + i) = *(const float4 *)(p.factors + (t.stream * 3 + part_of(p, column)) * HEAD + i % HEAD);
  }
}

// Of one of a thread's two rows: there are not registers for both before its sums begin to leave.
__device__ __forceinline__ void ask_angles(Ahead &a, const Parameters &p, const Tile &t, int row, int lane, int half) {
#if HEADS
  bool turned = row + half * 8 < t.end && has_heads(p, t) && part_of(p, t.column) < 2;
  long at = (long)(row + half * 8) * (HEAD / 2) + lane % 4 * RUN;
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    int column = i / RUN * 4 * RUN + i % RUN;
    float4 cos = make_float4(1, 1, 1, 1), sin = make_float4(0, 0, 0, 0);  // v is not turned
    if (turned) cos = *(const float4 *)(p.cos + at + column), sin = *(const float4 *)(p.sin + at + column);
    a.cos[half][i] = cos.x, a.cos[half][i + 1] = cos.y, a.cos[half][i + 2] = cos.z, a.cos[half][i + 3] = cos.w;
    a.sin[half][i] = sin.x, a.sin[half][i + 1] = sin.y, a.sin[half][i + 2] = sin.z, a.sin[half][i + 3] = sin.w;
  }
#endif
}

__device__ __forceinline__ void ask(Ahead &a, const Parameters &p, const Tile &t, int row, int lane) {
  ask_angles(a, p, t, row, lane, 0);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int at_row = row + half * 8;
    bool there = at_row < t.end;
    a.x[half] = p.x_scale && there ? p.x_scale[at_row] : 1.0f;
#if ENDING == 2
    const u16 *from = (const u16 *)p.out + (long)at_row * p.out_stride + t.column + lane % 4 * RUN;
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
      a.residual[half][g] = there ? *(const uint4 *)(from + g * 4 * RUN) : make_uint4(0, 0, 0, 0);
#endif
  }
}

// Products of a thread → what they stand for, in place.
__device__ __forceinline__ void scale(float (&d)[128], const Ahead &a, const Columns &c, int lane) {
#pragma unroll
  for (int g = 0; g < GROUPS; g++)
#pragma unroll
    for (int i = 0; i < RUN; i += 4) {
      int column = g * 4 * RUN + lane % 4 * RUN + i;
      float4 w = *(const float4 *)(c.scale + column), b = *(const float4 *)(c.bias + column);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        SUM(g, half, i) = SUM(g, half, i) * a.x[half] * w.x + b.x;
        SUM(g, half, i + 1) = SUM(g, half, i + 1) * a.x[half] * w.y + b.y;
        SUM(g, half, i + 2) = SUM(g, half, i + 2) * a.x[half] * w.z + b.z;
        SUM(g, half, i + 3) = SUM(g, half, i + 3) * a.x[half] * w.w + b.w;
      }
    }
}

__device__ __forceinline__ void neighbours(float (&y)[RUN], const float (&d)[128], int g, int half) {
#pragma unroll
  for (int i = 0; i < RUN; i++) y[i] = SUM(g, half, i);
}

__device__ __forceinline__ void store_e4m3(void *out, long at, const float (&y)[RUN], bool there) {
  u32 packed[] = {pack_e4m3(y[0], y[1], y[2], y[3]), pack_e4m3(y[4], y[5], y[6], y[7])};
  if (!there) return;
  *(uint2 *)((char *)out + at) = make_uint2(packed[0], packed[1]);
}

__device__ __forceinline__ void store_bf16(void *out, long at, const float (&y)[RUN]) {
  *(uint4 *)((u16 *)out + at) =
      make_uint4(pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3]), pack_bf16(y[4], y[5]), pack_bf16(y[6], y[7]));
}

// The GPU's own, right to 2^-11.
__device__ __forceinline__ float tanh_of(float u) {
  float t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(u));
  return t;
}

// gelu_tanh(y) · inverse.
__device__ __forceinline__ float gelu_tanh(float y, float half_inverse) {
  float u = y * (0.7978845608028654f + 0.035677408136300125f * y * y), h = y * half_inverse;
  return h + h * tanh_of(u);
}

// y / (1 + exp(-y)) · inverse.
__device__ __forceinline__ float silu(float y, float half_inverse) {
  float h = y * half_inverse;
  return h + h * tanh_of(0.5f * y);
}

// Two heads to a tile. A head's pairs stand 64 columns apart, and in the same thread.
__device__ __forceinline__ void store_heads(
    float (&d)[128], Ahead &a, const Columns &c, const Parameters &p, const Tile &t, int row, int lane) {
#if HEADS
  const int groups = GROUPS / 4;  // of half a head
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int head = 0; head < 2; head++) {
      int part = part_of(p, t.column + head * HEAD), at_row = row + half * 8;
      float square = 0;
      if (half == 0 && head == 1) ask_angles(a, p, t, row, lane, 1);
#pragma unroll
      for (int i = 0; i < 32; i++) {
        float y = SUM(2 * head * groups + i / RUN, half, i % RUN);
        square += y * y;
      }
      square += __shfl_xor_sync(0xffffffff, square, 1);
      square += __shfl_xor_sync(0xffffffff, square, 2);
      float inverse = part < 2 ? rsqrtf(square / HEAD + p.epsilon) : 1.0f;
#pragma unroll
      for (int g = 0; g < groups; g++) {
        int column = head * HEAD + g * 4 * RUN + lane % 4 * RUN;
#pragma unroll
        for (int i = 0; i < RUN; i++) {
          float &first = SUM(2 * head * groups + g, half, i), &second = SUM((2 * head + 1) * groups + g, half, i);
          float real = first * inverse * c.factor[column + i], other = second * inverse * c.factor[column + HEAD / 2 + i];
          float cos = a.cos[half][g * RUN + i], sin = a.sin[half][g * RUN + i];
          first = real * cos - other * sin, second = other * cos + real * sin;
        }
        float y[RUN];
        long at = (long)at_row * p.out_stride + t.column + column;
        neighbours(y, d, 2 * head * groups + g, half);
        store_e4m3(p.out, at, y, at_row < t.end);
        neighbours(y, d, (2 * head + 1) * groups + g, half);
        store_e4m3(p.out, at + HEAD / 2, y, at_row < t.end);
      }
    }
#endif
}

__device__ __forceinline__ void store_gelu(
    const float (&d)[128], const Parameters &p, void *out, int stride, int tile_column, const Tile &t, int row, int lane) {
  float half_inverse = 0.5f * p.inverse;
#pragma unroll
  for (int g = 0; g < GROUPS; g++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int at_row = row + half * 8;
      float y[RUN];
      neighbours(y, d, g, half);
#pragma unroll
      for (int i = 0; i < RUN; i++) y[i] = gelu_tanh(y[i], half_inverse);
      store_e4m3(out, (long)at_row * stride + tile_column + g * 4 * RUN + lane % 4 * RUN, y, at_row < t.end);
    }
}

// Of 8 · RUN columns the first half are gates, the others the values that they are multiplied with: neighbouring groups of
// the same thread. `tile_column`: of the product.
__device__ __forceinline__ void store_swiglu(
    const float (&d)[128], const Parameters &p, void *out, int stride, int tile_column, const Tile &t, int row, int lane) {
  float half_inverse = 0.5f * p.inverse;
#pragma unroll
  for (int g = 0; g < GROUPS; g += 2)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int at_row = row + half * 8;
      float gates[RUN], values[RUN];
      neighbours(gates, d, g, half);
      neighbours(values, d, g + 1, half);
#pragma unroll
      for (int i = 0; i < RUN; i++) values[i] *= silu(gates[i], half_inverse);
      store_e4m3(out, (long)at_row * stride + tile_column / 2 + g / 2 * 4 * RUN + lane % 4 * RUN, values, at_row < t.end);
    }
}

__device__ __forceinline__ void store_rows(const float (&d)[128], const Ahead &a, const Parameters &p, const Tile &t, int row, int lane) {
#pragma unroll
  for (int g = 0; g < GROUPS; g++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int at_row = row + half * 8;
      float y[RUN];
      neighbours(y, d, g, half);
#if ENDING == 2
#pragma unroll
      for (int i = 0; i < RUN / 2; i++) {
        u32 pair = (&a.residual[half][g].x)[i];
        y[2 * i] += first_bf16(pair), y[2 * i + 1] += second_bf16(pair);
      }
#endif
      if (at_row < t.end) store_bf16(p.out, (long)at_row * p.out_stride + t.column + g * 4 * RUN + lane % 4 * RUN, y);
    }
}

__device__ __forceinline__ void finish(
    float (&d)[128], Ahead &a, const Columns &c, const Parameters &p, const Tile &t, int row, int lane) {
  scale(d, a, c, lane);
  if (has_heads(p, t))
    store_heads(d, a, c, p, t, row, lane);
  else if (ENDING == 1)
    store_gelu(d, p, p.out, p.out_stride, t.column, t, row, lane);
  else if (ENDING == 3)
    store_gelu(d, p, p.hidden, p.hidden_stride, t.column - p.heads, t, row, lane);
  else if (ENDING == 4)
    store_swiglu(d, p, p.out, p.out_stride, t.column, t, row, lane);
  else if (ENDING == 5)
    store_swiglu(d, p, p.hidden, p.hidden_stride, t.column - p.heads, t, row, lane);
  else
    store_rows(d, a, p, t, row, lane);
}
