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

#define SPARE 64  // threads
#define CHUNK 512  // columns of a row that a warp reads at once, 16 a lane
#define AT_ONCE 4  // rows that it reads at once
#define STAGE (AT_ONCE * CHUNK)
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

// --- copies under way in shared memory, where they cost no registers ------------------------------------------------------

__device__ __forceinline__ void copy_16(void *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void copy_4(void *to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address(to)), "l"(from) : "memory");
}

// `count` pieces of work, one after the other, through a ring of DEPTH places: ask(place) begins the copies of the next piece
// that nobody has asked for, use(place) finds the next that nobody has used.
template <int DEPTH, typename Ask, typename Use> __device__ __forceinline__ void staged(u32 count, Ask ask, Use use) {
#pragma unroll 1
  for (u32 i = 0; i < DEPTH; i++) {
    if (i < count) ask(i);
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  u32 place = 0;
#pragma unroll 1
  for (u32 left = count; left; left--) {
    asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
    use(place);
    if (left > DEPTH) ask(place);
    asm volatile("cp.async.commit_group;" ::: "memory");
    place = place + 1 == DEPTH ? 0 : place + 1;
  }
}

// --- the mean of v ------------------------------------------------------------------------------------------------------

#if HEADS

// Where number k of a vector lies in shared memory: a lane has 16 neighbours, and reads four at a time beside its neighbours'.
__device__ __forceinline__ u32 place_of(u32 k) { return k / CHUNK * CHUNK + k % 16 / 4 * 128 + k % CHUNK / 16 * 4 + k % 4; }

// Of the weights' rows, which lie as linear_hopper.py has arranged them, the output that row n is.
__device__ __forceinline__ u32 output_of(u32 n) { return n / 32 * 32 + n % 8 / 2 * 8 + n % 32 / 8 * 2 + n % 2; }

__device__ __forceinline__ u32 chunks_of(u32 inner) { return (inner + CHUNK - 1) / CHUNK; }

// Fills the vector with value(k), and with 0 from `inner` on to the end of its last chunk.
template <typename Value> __device__ __forceinline__ void fill(float *vector, u32 inner, u32 thread, Value value) {
#pragma unroll 1
  for (u32 first = thread; first < chunks_of(inner) * CHUNK; first += SPARE * 8) {
    float raw[8];
#pragma unroll
    for (int i = 0; i < 8; i++) raw[i] = value(min(first + i * SPARE, inner - 1));
#pragma unroll
    for (int i = 0; i < 8; i++) vector[place_of(first + i * SPARE)] = first + i * SPARE < inner ? raw[i] : 0.0f;
  }
}

// A matrix of `rows` rows of E4M3, `stride` bytes apart, times the vector of `inner` numbers. A warp takes every
// (2 · programs)-th four rows; finish(row, product) is called by the lane that has a row's product.
template <typename Finish>
__device__ __forceinline__ void multiply_rows(
    char *memory, const char *matrix, u32 rows, u32 stride, u32 inner, u32 warp, u32 lane, Finish finish) {
  u32 width = chunks_of(inner) * CHUNK, own = (blockIdx.x * 2 + warp) * AT_ONCE, step = gridDim.x * 2 * AT_ONCE;
  u32 groups = own < rows ? (rows - own + step - 1) / step : 0;
  char *stages = memory + VECTOR * 4 + warp * 3 * STAGE + lane * 16;
  u32 asked = 0, used = 0, row = own;
  float sums[AT_ONCE] = {0, 0, 0, 0};
  matrix += (u64)own * stride + lane * 16;
  auto ask = [&](u32 place) {
    const char *from = asked + lane * 16 < inner ? matrix + asked : matrix - lane * 16;
#pragma unroll
    for (u32 r = 0; r < AT_ONCE; r++) copy_16(stages + place * STAGE + r * CHUNK, from + r * stride);
    asked += CHUNK;
    if (asked == width) asked = 0, matrix += (u64)step * stride;
  };
  staged<3>(groups * (width / CHUNK), ask, [&](u32 place) {
#pragma unroll
    for (u32 part = 0; part < 4; part++) {
      float4 x = *((const float4 *)memory + used / 4 + part * 32 + lane);
#pragma unroll
      for (u32 r = 0; r < AT_ONCE; r++) {
        float w[4];
        unpack_e4m3(w, *(const u32 *)(stages + place * STAGE + r * CHUNK + part * 4));
        sums[r] += w[0] * x.x + w[1] * x.y + w[2] * x.z + w[3] * x.w;
      }
    }
    used += CHUNK;
    if (used != width) return;
#pragma unroll
    for (int apart = 16; apart; apart /= 2)
#pragma unroll
      for (u32 r = 0; r < AT_ONCE; r++) sums[r] += __shfl_xor_sync(0xffffffff, sums[r], apart);
    float product = lane == 0 ? sums[0] : lane == 1 ? sums[1] : lane == 2 ? sums[2] : sums[3];
    if (lane < AT_ONCE) finish(row + lane, product);
#pragma unroll
    for (u32 r = 0; r < AT_ONCE; r++) sums[r] = 0;
    used = 0, row += step;
  });
}

// Adds up the columns from `column` on of every program-th row of x from `row` to `end`: 16 a lane, of which none is counted
// that K does not have.
__device__ __forceinline__ void add_rows(
    char *stages, const Parameters &p, u32 row, u32 end, u32 column, u64 *to, u32 lane) {
  u32 step = gridDim.x, asked = row;
  const char *x = p.centre.x + (column < p.K ? column : 0);
  float sums[16];
#pragma unroll
  for (int i = 0; i < 16; i++) sums[i] = 0;
  auto ask = [&](u32 place) {
    char *at = stages + place * (STAGE + 16);
#pragma unroll
    for (u32 r = 0; r < AT_ONCE; r++, asked += step) {
      u32 there = min(asked, end - 1);
      copy_16(at + 16 + r * CHUNK + lane * 16, x + (u64)there * p.centre.x_stride);
      if (lane == r && p.x_scale) copy_4(at + r * 4, p.x_scale + there);
    }
  };
  staged<6>((end - row + AT_ONCE * step - 1) / (AT_ONCE * step), ask, [&](u32 place) {
    const char *at = stages + place * (STAGE + 16);
    __syncwarp();  // scales came by other lanes
#pragma unroll 1
    for (u32 r = 0; r < AT_ONCE; r++, row += step) {
      float scale = row >= end ? 0.0f : p.x_scale ? *(const float *)(at + r * 4) : 1.0f;
#pragma unroll
      for (u32 part = 0; part < 4; part++) {
        float y[4];
        unpack_e4m3(y, *(const u32 *)(at + 16 + r * CHUNK + lane * 16 + part * 4));
#pragma unroll
        for (u32 j = 0; j < 4; j++) sums[4 * part + j] += y[j] * scale;
      }
    }
    __syncwarp();  // before they are written over
  });
  if (column >= p.K) return;
#pragma unroll
  for (int j = 0; j < 16; j++)
    asm volatile("red.global.add.u64 [%0], %1;" ::"l"(to + column + j), "l"(__float2ll_rn(sums[j] * SUM_UNIT)) : "memory");
}

__device__ __forceinline__ void add_columns(char *memory, const Parameters &p, u32 warp, u32 lane) {
  char *stages = memory + warp * 6 * (STAGE + 16);
#pragma unroll 1
  for (u32 first = warp * CHUNK; first < p.K; first += 2 * CHUNK)
#pragma unroll 1
    for (u32 stream = 0; stream <= p.second; stream++) {
      u32 row = (stream ? p.split : 0) + blockIdx.x, end = stream < p.second ? p.split : p.M;
      if (row < end) add_rows(stages, p, row, end, first + lane * 16, p.centre.sums + stream * p.K, lane);
    }
}

// In parts of VECTOR columns, and stream by stream; each but the first adds to what the same lane wrote before.
__device__ __forceinline__ void mean_of_values(char *memory, const Parameters &p, u32 thread) {
  u32 d = p.heads / 3;
#pragma unroll 1
  for (u32 stream = 0; stream <= p.second; stream++) {
    u32 first = stream * p.N + 2 * d;
    float unit = 1 / (SUM_UNIT * p.M), share = (float)(!p.second ? p.M : stream ? p.M - p.split : p.split) / p.M;
#pragma unroll 1
    for (u32 column = 0; column < p.K; column += VECTOR) {
      const u64 *sums = p.centre.sums + stream * p.K + column;
      u32 inner = min(p.K - column, VECTOR);
      spare_sync();  // what lies there has been read
      fill((float *)memory, inner, thread, [&](u32 k) { return (float)(long long)__ldcg(sums + k) * unit; });
      spare_sync();
      const char *w = p.centre.w + (u64)first * p.K + column;
      multiply_rows(memory, w, d, p.K, inner, thread / 32, thread % 32, [&](u32 row, float product) {
        u32 output = output_of(row);
        float *mean = p.centre.mean + output, value = product * p.w_scale[first + output];
        __stcg(mean, (column ? value : value + p.bias[first + output] * share) + (stream || column ? __ldcg(mean) : 0.0f));
      });
    }
  }
}

__device__ __forceinline__ void restore(char *memory, const Parameters &p, u32 thread) {
  const Centre &c = p.centre;
  u32 d = p.heads / 3, rows = c.back_streams * c.back_columns;
#pragma unroll 1
  for (u32 column = 0; column < d; column += VECTOR) {
    u32 inner = min(d - column, VECTOR);
    spare_sync();
    fill((float *)memory, inner, thread, [&](u32 k) { return __ldcg(c.mean + column + k) * c.inverse; });
    spare_sync();
    multiply_rows(memory, c.back + column, rows, c.back_inner, inner, thread / 32, thread % 32, [&](u32 row, float product) {
      u32 output = output_of(row);
      c.restored[output] = product * c.back_scale[output] + (column ? c.restored[output] : 0.0f);
    });
  }
}

// Weights on their way to L2 while x is still being added up.
__device__ __forceinline__ void prefetch_weights(const Parameters &p, u32 warp) {
  const Centre &c = p.centre;
  u32 d = p.heads / 3, step = gridDim.x * 2 * AT_ONCE, own = (blockIdx.x * 2 + warp) * AT_ONCE;
#pragma unroll 1
  for (u32 stream = 0; stream <= p.second; stream++)
#pragma unroll 1
    for (u32 n = own; n < d; n += step)  // rows behind each other
      prefetch(c.w + (u64)(stream * p.N + 2 * d + n) * p.K, AT_ONCE * p.K);
#pragma unroll 1
  for (u32 n = own; n < c.back_streams * c.back_columns; n += step)
#pragma unroll 1
    for (u32 r = 0; r < AT_ONCE; r++) prefetch(c.back + (u64)(n + r) * c.back_inner, d);
}

// Counters, each left at 0: programs with their sums; with their part of the mean; warps that read the mean no more.
__device__ __forceinline__ void centre(char *memory, const Parameters &p, u32 thread) {
  int *arrived = p.centre.arrived;
  if (thread % 32 == 0) prefetch_weights(p, thread / 32);
  __syncwarp();
  add_columns(memory, p, thread / 32, thread % 32);
  arrive_spare(arrived, thread);
  await_spare(arrived, thread);
  mean_of_values(memory, p, thread);
  if (arrive_spare(arrived + 1, thread)) {  // everybody has read the sums
#pragma unroll 1
    for (u32 i = thread; i < (p.second + 1) * p.K; i += SPARE) p.centre.sums[i] = 0;
    if (thread == 0) arrived[0] = 0;
  }
  await_spare(arrived + 1, thread);
  restore(memory, p, thread);
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

__device__ __forceinline__ void spare(char *memory, const Parameters &p, u32 thread) {
#if HEADS
  if (!p.centre.mean) return;
  centre(memory, p, thread);
  spare_sync();
  if (thread == 0) leave(p);
#elif ENDING == 2
  for (int i = 0; i < 2; i++)
    if (p.watched[i].at) count_saturated(p.watched[i], thread / 32, thread % 32);
#endif
}
