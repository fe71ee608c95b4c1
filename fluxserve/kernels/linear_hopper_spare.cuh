// What the two spare warps of each program do while its other warps load and multiply. linear_hopper.cu includes this.
//
// Heads (`Centre`): the mean of v over all rows is taken off v before v is rounded to E4M3, in the same launch. v = x · Wᵀ + b
// is linear, so the mean of v follows from the mean of x:
//
//   1. sums       the columns of x, for each stream. A program adds its own rows; programs meet in 64-bit integers, whose sum
//                 does not depend on who comes first.
//   2. mean       W_v · sums / M, and b_v by each stream's share of the rows. A warp computes its own outputs.
//   3. restored   W_back · mean / s_out, which the projection behind attention adds to its bias.
//
// All programs are resident at once (one an SM, in pairs), so they may wait for each other between the parts. Columns of v
// come behind those of q and k in a launch, so their endings find the mean ready.
//
// Add (`Watched`): counts the E4M3 values that reached ±448, or are not finite, in every SAMPLE-th row.

#define SPARE 64        // threads
#define ROWS_AT_ONCE 4  // of x or of weights: as many loads as there are registers for
#define SUM_UNIT 16777216.0f  // 2^24 integers are 1: sums up to 2^39, to six decimals

// --- programs that wait for each other ----------------------------------------------------------------------------------

__device__ __forceinline__ void spare_sync() { asm volatile("bar.sync 3, 64;" ::: "memory"); }

__device__ __forceinline__ bool any_spare(bool mine) {
  u32 any;
  asm volatile(
      "{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nbar.red.or.pred q, 3, 64, p;\nselp.u32 %0, 1, 0, q;\n}"
      : "=r"(any)
      : "r"((u32)mine)
      : "memory");
  return any;
}

__device__ __forceinline__ int count_one(int *counter) {
  __threadfence();  // behind a barrier: of what every thread of it has written
  return atomicAdd(counter, 1) + 1;
}

__device__ __forceinline__ void await(const int *counter, int programs) {
  int there = 0;
  while (there < programs) asm volatile("ld.acquire.gpu.b32 %0, [%1];" : "=r"(there) : "l"(counter) : "memory");
}

// Whether this program is the last whose spare warps have arrived.
__device__ __forceinline__ bool arrive_spare(int *counter, u32 thread) {
  spare_sync();
  return any_spare(thread == 0 && count_one(counter) == (int)gridDim.x);
}

__device__ __forceinline__ void await_spare(const int *counter, u32 thread) {
  if (thread == 0) await(counter, gridDim.x);
  spare_sync();
}

// --- numbers ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void unpack_e4m3(float (&y)[4], u32 packed) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    u32 halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((u16)(packed >> 16 * i)));
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(y[2 * i]), "=f"(y[2 * i + 1])
        : "r"(halves));
  }
}

// Into L2. `bytes`: a multiple of 16.
__device__ __forceinline__ void prefetch(const void *from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Where number k of a vector lies in shared memory: a lane has 16 neighbours, and reads four at a time beside its neighbours'.
__device__ __forceinline__ u32 place(u32 k) { return k / 512 * 512 + k % 16 / 4 * 128 + k % 512 / 16 * 4 + k % 4; }

// Of the weights' rows, which lie as linear_hopper.py has arranged them, the output that row n is.
__device__ __forceinline__ u32 output_of(u32 n) { return n / 32 * 32 + n % 8 / 2 * 8 + n % 32 / 8 * 2 + n % 2; }

// Volatile, so that all of several are on their way before the first is used.
__device__ __forceinline__ uint4 ask_weights(const char *from) {
  uint4 raw;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w) : "l"(from));
  return raw;
}

// Four rows of weights, `stride` bytes apart, times the vector, which is 0 from `inner` on; lane i of the first four returns
// the sum of row i.
__device__ __forceinline__ float products(const float *vector, const char *rows, u32 stride, u32 inner, u32 lane) {
  float sums[ROWS_AT_ONCE] = {0, 0, 0, 0};
  vector += lane * 4;
#pragma unroll 1
  for (u32 first = 0; first < inner; first += 512) {
    uint4 raw[ROWS_AT_ONCE];
    const char *at = rows + (first + lane * 16 < inner ? first + lane * 16 : 0);
#pragma unroll
    for (int r = 0; r < ROWS_AT_ONCE; r++) raw[r] = ask_weights(at + r * stride);
#pragma unroll
    for (int part = 0; part < 4; part++) {
      float4 x = *(const float4 *)(vector + first + part * 128);
#pragma unroll
      for (int r = 0; r < ROWS_AT_ONCE; r++) {
        float w[4];
        unpack_e4m3(w, (&raw[r].x)[part]);
        sums[r] += w[0] * x.x + w[1] * x.y + w[2] * x.z + w[3] * x.w;
      }
    }
  }
#pragma unroll
  for (int apart = 16; apart; apart /= 2)
#pragma unroll
    for (int r = 0; r < ROWS_AT_ONCE; r++) sums[r] += __shfl_xor_sync(0xffffffff, sums[r], apart);
  return lane == 0 ? sums[0] : lane == 1 ? sums[1] : lane == 2 ? sums[2] : sums[3];
}

// --- the mean of v ------------------------------------------------------------------------------------------------------

#if HEADS

__device__ __forceinline__ void add_columns(const Parameters &p, u32 warp, u32 lane) {
#pragma unroll 1
  for (u32 column = warp * 256 + lane * 8; column < p.K; column += SPARE * 8) {
#pragma unroll 1
    for (u32 stream = 0; stream <= p.second; stream++) {
      u32 row = (stream ? p.split : 0) + blockIdx.x, end = stream < p.second ? p.split : p.M;
      float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll 1
      for (; row < end; row += ROWS_AT_ONCE * gridDim.x) {
        uint2 raw[ROWS_AT_ONCE];
        float scales[ROWS_AT_ONCE];
#pragma unroll
        for (int r = 0; r < ROWS_AT_ONCE; r++) {
          u32 at = row + r * gridDim.x;
          raw[r] = at < end ? *(const uint2 *)(p.centre.x + (u64)at * p.centre.x_stride + column) : make_uint2(0, 0);
          scales[r] = at < end && p.x_scale ? p.x_scale[at] : 1.0f;
        }
#pragma unroll
        for (int r = 0; r < ROWS_AT_ONCE; r++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            float y[4];
            unpack_e4m3(y, half ? raw[r].y : raw[r].x);
#pragma unroll
            for (int i = 0; i < 4; i++) sums[4 * half + i] += y[i] * scales[r];
          }
      }
      u64 *to = p.centre.sums + stream * p.K + column;
#pragma unroll
      for (int i = 0; i < 8; i++)
        asm volatile("red.global.add.u64 [%0], %1;" ::"l"(to + i), "l"(__float2ll_rn(sums[i] * SUM_UNIT)) : "memory");
    }
  }
}

__device__ __forceinline__ void mean_of_values(float *vector, const Parameters &p, u32 thread) {
  u32 warp = thread / 32, lane = thread % 32, d = p.heads / 3;
#pragma unroll 1
  for (u32 stream = 0; stream <= p.second; stream++) {
    u32 rows = !p.second ? p.M : stream ? p.M - p.split : p.split;
    const u64 *sums = p.centre.sums + stream * p.K;
    spare_sync();  // the vector has been read
    float unit = 1 / (SUM_UNIT * p.M);
#pragma unroll 1
    for (u32 first = thread; first < (p.K + 511) / 512 * 512; first += SPARE * ROWS_AT_ONCE) {
      u64 raw[ROWS_AT_ONCE];
#pragma unroll
      for (int i = 0; i < ROWS_AT_ONCE; i++) raw[i] = __ldcg(sums + min(first + i * SPARE, p.K - 1));
#pragma unroll
      for (int i = 0; i < ROWS_AT_ONCE; i++)
        vector[place(first + i * SPARE)] = first + i * SPARE < p.K ? (float)(long long)raw[i] * unit : 0.0f;
    }
    spare_sync();
#pragma unroll 1
    for (u32 n = (blockIdx.x * 2 + warp) * ROWS_AT_ONCE; n < d; n += gridDim.x * 2 * ROWS_AT_ONCE) {
      u32 first = stream * p.N + 2 * d;
      float product = products(vector, p.centre.w + (u64)(first + n) * p.K, p.K, p.K, lane);
      if (lane >= ROWS_AT_ONCE) continue;
      u32 output = output_of(n + lane);
      float value = product * p.w_scale[first + output] + p.bias[first + output] * rows / p.M;
      __stcg(p.centre.mean + output, stream ? __ldcg(p.centre.mean + output) + value : value);
    }
  }
}

__device__ __forceinline__ void restore(float *vector, const Parameters &p, u32 thread) {
  const Centre &c = p.centre;
  u32 warp = thread / 32, lane = thread % 32, d = p.heads / 3, step = gridDim.x * 2 * ROWS_AT_ONCE;
#pragma unroll 4
  for (u32 k = thread; k < (d + 511) / 512 * 512; k += SPARE) vector[place(k)] = k < d ? __ldcg(c.mean + k) * c.inverse : 0.0f;
  spare_sync();
#pragma unroll 1
  for (u32 n = (blockIdx.x * 2 + warp) * ROWS_AT_ONCE; n < c.back_streams * c.back_columns; n += step) {
    float product = products(vector, c.back + (u64)n * c.back_inner, c.back_inner, d, lane);
    if (lane >= ROWS_AT_ONCE) continue;
    u32 output = output_of(n + lane);
    c.restored[output] = product * c.back_scale[output];
  }
}

// Weights on their way to L2 while x is still being added up.
__device__ __forceinline__ void prefetch_weights(const Parameters &p, u32 warp) {
  const Centre &c = p.centre;
  u32 d = p.heads / 3, step = gridDim.x * 2 * ROWS_AT_ONCE, own = (blockIdx.x * 2 + warp) * ROWS_AT_ONCE;
#pragma unroll 1
  for (u32 stream = 0; stream <= p.second; stream++)
#pragma unroll 1
    for (u32 n = own; n < d; n += step)  // rows behind each other
      prefetch(c.w + (u64)(stream * p.N + 2 * d + n) * p.K, ROWS_AT_ONCE * p.K);
#pragma unroll 1
  for (u32 n = own; n < c.back_streams * c.back_columns; n += step)
#pragma unroll 1
    for (u32 r = 0; r < ROWS_AT_ONCE; r++) prefetch(c.back + (u64)(n + r) * c.back_inner, d);
}

// Counters, each left at 0: programs with their sums; with their part of the mean; warps that read the mean no more.
__device__ __forceinline__ void centre(float *vector, const Parameters &p, u32 thread) {
  int *arrived = p.centre.arrived;
  if (thread % 32 == 0) prefetch_weights(p, thread / 32);
  __syncwarp();
  add_columns(p, thread / 32, thread % 32);
  arrive_spare(arrived, thread);
  await_spare(arrived, thread);
  mean_of_values(vector, p, thread);
  if (arrive_spare(arrived + 1, thread)) {  // everybody has read the sums
#pragma unroll 1
    for (u32 i = thread; i < (p.second + 1) * p.K; i += SPARE) p.centre.sums[i] = 0;
    if (thread == 0) arrived[0] = 0;
  }
  await_spare(arrived + 1, thread);
  restore(vector, p, thread);
}

// Said once by a program's spare warps and once by the warp that prepares columns.
__device__ __forceinline__ void leave(const Parameters &p) {
  int *arrived = p.centre.arrived;
  if (count_one(arrived + 2) < 2 * (int)gridDim.x) return;
  arrived[1] = 0, arrived[2] = 0;
}

#endif

// --- values at the limit ------------------------------------------------------------------------------------------------

// Of four E4M3 numbers those of ±448, or NaN.
__device__ __forceinline__ int at_the_limit(u32 packed) { return __popc((packed & 0x7f7f7f7fu) + 0x02020202u & 0x80808080u); }

__device__ __forceinline__ void count_saturated(const Watched &w, u32 warp, u32 lane) {
  int count = 0;
#pragma unroll 1
  for (u32 row = (blockIdx.x * 2 + warp) * SAMPLE; row < w.rows; row += gridDim.x * 2 * SAMPLE) {
    const char *at = w.at + (u64)row * w.stride;
#pragma unroll 4
    for (u32 column = lane * 16; column < w.columns; column += 512) {
      uint4 raw = *(const uint4 *)(at + column);
      count += at_the_limit(raw.x) + at_the_limit(raw.y) + at_the_limit(raw.z) + at_the_limit(raw.w);
    }
  }
  count = __reduce_add_sync(0xffffffff, count);
  if (lane == 0 && count) atomicAdd(w.count, (u64)count);
}

__device__ __forceinline__ void spare(float *vector, const Parameters &p, u32 thread) {
#if HEADS
  if (!p.centre.mean) return;
  centre(vector, p, thread);
  spare_sync();
  if (thread == 0) leave(p);
#elif ENDING == 2
  for (int i = 0; i < 2; i++)
    if (p.watched[i].at) count_saturated(p.watched[i], thread / 32, thread % 32);
#endif
}
