// What the two spare warps of each program do while its other warps load and multiply. hopper.cu includes this.
//
// Heads (`Centre`): when it is due, the mean of v over its rows is computed before any v is stored, and taken off in the same
// launch. v = x · Wᵀ + b is linear, so the mean of v follows from the mean of x:
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
#define RING 3  // pieces of weights under way
#define X_RING 6  // pieces of x
#define PIECE 2048  // bytes of a warp's piece: 16 rows of 128 columns of weights, or 4 rows of 512 columns of x
#define SUM_UNIT 16777216.0f  // 2^24 integers are 1: sums up to 2^39, to six decimals
#define LONGEST_SUM 64  // rows of x that are added up in half precision, whose errors are random and average out

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

// Counters lie 128 bytes apart: a line that is polled is one that others add to slowly.
#define COUNTER(i) (p.centre.arrived + 32 * (i))

__device__ __forceinline__ int count_one(int *counter) {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");  // behind a barrier: of what every thread of it has written
  return atomicAdd(counter, 1) + 1;
}

// Polls with pauses, and without ordering anything until it has seen enough: every poll that did would empty the L1 cache.
__device__ __forceinline__ void await(const int *counter, int programs) {
  int there;
  while (true) {
    asm volatile("ld.relaxed.gpu.b32 %0, [%1];" : "=r"(there) : "l"(counter) : "memory");
    if (there >= programs) break;
    __nanosleep(100);
  }
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
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

// Two E4M3 numbers, the lower 16 bits or the upper, as two halves, exactly.
__device__ __forceinline__ u32 unpack_e4m3(u32 packed, int upper) {
  u32 halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((u16)(packed >> 16 * upper)));
  return halves;
}

__device__ __forceinline__ u32 two_halves(float low, float high) {
  u32 halves;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(high), "f"(low));
  return halves;
}

__device__ __forceinline__ float half_of(u32 halves, int upper) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((u16)(halves >> 16 * upper)));
  return y;
}

__device__ __forceinline__ void add_product(u32 &sum, u32 a, u32 b) {
  asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
}

// d += a · b: 16 rows times 8 columns, 16 numbers each, halves; sums in float32.
__device__ __forceinline__ void multiply_halves(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
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

// Of the weights' rows, which lie as hopper.py has arranged them, the output that row n is.
__device__ __forceinline__ u32 output_of(u32 n) { return n / 32 * 32 + n % 8 / 2 * 8 + n % 32 / 8 * 2 + n % 2; }

// A vector of float32 as the sum of two of halves: 22 bits. The second begins 16 bytes further on, in other banks.
struct Vector {
  u16 high[VECTOR], gap[8], low[VECTOR];
};

struct Spare {
  alignas(16) Vector vector;
  alignas(16) char pieces[2][RING][PIECE];
};
static_assert(sizeof(Spare) <= SPARE_BYTES, "memory of the spare warps");
static_assert(2 * X_RING * (PIECE + 16) <= SPARE_BYTES, "the same for x");

// Fills the vector with value(k), and with 0 from `inner` on to the end of the last 128 columns that are read.
template <typename Value> __device__ __forceinline__ void fill(Vector &vector, u32 inner, u32 thread, Value value) {
  u32 width = (inner + 127) / 128 * 128;
#pragma unroll 1
  for (u32 first = thread * 2; first < width; first += SPARE * 2 * 8) {
    float2 raw[8];
#pragma unroll
    for (u32 i = 0; i < 8; i++) raw[i] = value(min(first + i * SPARE * 2, inner - 2));
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
      u32 k = first + i * SPARE * 2;
      if (k >= width) break;
      float2 y = k < inner ? raw[i] : make_float2(0, 0);
      u32 high = two_halves(y.x, y.y);
      *(u32 *)(vector.high + k) = high;
      *(u32 *)(vector.low + k) = two_halves(y.x - half_of(high, 0), y.y - half_of(high, 1));
    }
  }
}

// A matrix of `rows` rows of E4M3, `stride` bytes apart, times the vector of `inner` numbers. A warp takes every
// (2 · programs)-th 16 rows; finish(row, product) is called by the lane that has a row's product.
//
// Numbers along K may come in any order, as long as weights and vector have the same: so a lane's share of 64 columns are 16
// neighbours of rows lane / 4 and lane / 4 + 8, four for each of four products. The vector's two halves are the first two of
// the product's eight columns; what is in the others is nothing to anybody.
template <typename Finish>
__device__ __forceinline__ void multiply_rows(
    Spare &s, const char *matrix, u32 rows, u32 stride, u32 inner, u32 warp, u32 lane, Finish finish) {
  u32 width = (inner + 127) / 128 * 128, row = (blockIdx.x * 2 + warp) * 16, step = gridDim.x * 2 * 16;
  u32 groups = row < rows ? (rows - row + step - 1) / step : 0, asked = 0, used = 0;
  char *pieces = s.pieces[warp][0] + lane * 16;
  const u16 *vector = (lane / 4 % 2 ? s.vector.low : s.vector.high) + lane % 4 * 16;
  float sums[4] = {0, 0, 0, 0};
  matrix += (u64)(row + lane / 4) * stride;
  auto ask = [&](u32 place) {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      u32 column = asked + half * 64 + lane % 4 * 16;
      const char *from = matrix + (column < inner ? column : 0);
      copy_16(pieces + place * PIECE + half * 1024, from);
      copy_16(pieces + place * PIECE + half * 1024 + 512, from + 8 * stride);
    }
    asked += 128;
    if (asked == width) asked = 0, matrix += (u64)step * stride;
  };
  staged<RING>(groups * (width / 128), ask, [&](u32 place) {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
      uint4 upper = *(const uint4 *)(pieces + place * PIECE + half * 1024);
      uint4 lower = *(const uint4 *)(pieces + place * PIECE + half * 1024 + 512);
#pragma unroll
      for (u32 j = 0; j < 4; j += 2) {
        uint4 x = *(const uint4 *)(vector + used + half * 64 + j * 4);
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
          u32 a = (&upper.x)[j + i], b = (&lower.x)[j + i];
          multiply_halves(
              sums, unpack_e4m3(a, 0), unpack_e4m3(b, 0), unpack_e4m3(a, 1), unpack_e4m3(b, 1), (&x.x)[2 * i], (&x.x)[2 * i + 1]);
        }
      }
    }
    used += 128;
    if (used != width) return;
    if (lane % 4 == 0) finish(row + lane / 4, sums[0] + sums[1]), finish(row + lane / 4 + 8, sums[2] + sums[3]);
    sums[0] = sums[1] = sums[2] = sums[3] = 0;
    used = 0, row += step;
  });
}

// Adds up every program-th row of x from `row` to `end`, at most LONGEST_SUM of them: 512 columns from `first` on, 16 a lane,
// of which none is counted that K does not have.
__device__ __forceinline__ void add_rows(
    char *pieces, const Parameters &p, u32 row, u32 end, u32 first, u64 *to, u32 lane) {
  u32 step = gridDim.x, asked = row, sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  const char *x = p.centre.x + (first + lane * 16 < p.K ? first + lane * 16 : 0);
  auto ask = [&](u32 place) {
    char *at = pieces + place * (PIECE + 16);
#pragma unroll
    for (u32 r = 0; r < 4; r++, asked += step) {
      u32 there = min(asked, end - 1);
      copy_16(at + 16 + r * 512 + lane * 16, x + (u64)there * (u32)p.centre.x_stride);
      if (lane == r && p.x_scale) copy_4(at + r * 4, p.x_scale + there);
    }
  };
  staged<X_RING>((end - row + 4 * step - 1) / (4 * step), ask, [&](u32 place) {
    const char *at = pieces + place * (PIECE + 16);
    __syncwarp();  // scales came by other lanes
#pragma unroll
    for (u32 r = 0; r < 4; r++, row += step) {
      float scale = row >= end ? 0.0f : p.x_scale ? *(const float *)(at + r * 4) : 1.0f;
      uint4 raw = *(const uint4 *)(at + 16 + r * 512 + lane * 16);
#pragma unroll
      for (u32 i = 0; i < 8; i++) add_product(sums[i], unpack_e4m3((&raw.x)[i / 2], i % 2), two_halves(scale, scale));
    }
    __syncwarp();  // before they are written over
  });
  // By way of shared memory, so that a warp adds to neighbours.
  float *all = (float *)pieces;
#pragma unroll
  for (u32 i = 0; i < 4; i++)
    *(float4 *)(all + lane * 16 + i * 4) = make_float4(
        half_of(sums[2 * i], 0), half_of(sums[2 * i], 1), half_of(sums[2 * i + 1], 0), half_of(sums[2 * i + 1], 1));
  __syncwarp();
#pragma unroll 4
  for (u32 i = lane; i < 512 && first + i < p.K; i += 32)
    asm volatile("red.global.add.u64 [%0], %1;" ::"l"(to + first + i), "l"(__float2ll_rn(all[i] * SUM_UNIT)) : "memory");
  __syncwarp();
}

// A warp takes every second 512 columns. Programs begin at different ones, so that they don't all add to the same at once.
__device__ __forceinline__ void add_columns(char *memory, const Parameters &p, u32 warp, u32 lane) {
  char *pieces = memory + warp * X_RING * (PIECE + 16);
  u32 some = gridDim.x * LONGEST_SUM, parts = (p.K + 511) / 512;
#pragma unroll 1
  for (u32 i = warp; i < parts; i += 2)
#pragma unroll 1
    for (u32 stream = 0; stream <= p.second; stream++) {
      u32 end = stream < p.second ? p.split : p.M, first = (i + blockIdx.x) % parts * 512;
#pragma unroll 1
      for (u32 row = (stream ? p.split : 0) + blockIdx.x; row < end; row += some)
        add_rows(pieces, p, row, min(end, row + some), first, p.centre.sums + stream * p.K, lane);
    }
}

// In parts of VECTOR columns, and stream by stream; each but the first adds to what the same lane wrote before.
__device__ __forceinline__ void mean_of_values(Spare &s, const Parameters &p, u32 thread) {
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
      fill(s.vector, inner, thread, [&](u32 k) {
        ulonglong2 pair = __ldcg((const ulonglong2 *)(sums + k));
        return make_float2((float)(long long)pair.x * unit, (float)(long long)pair.y * unit);
      });
      spare_sync();
      const char *w = p.centre.w + (u64)first * p.K + column;
      multiply_rows(s, w, d, p.K, inner, thread / 32, thread % 32, [&](u32 row, float product) {
        u32 output = output_of(row);
        float *mean = p.centre.mean + output, value = product * p.w_scale[first + output];
        value += column ? 0.0f : p.bias[first + output] * share;
        __stcg(mean, stream || column ? value + __ldcg(mean) : value);
      });
    }
  }
}

// A 16th of the mean in units of attention's output, so that one of thousands of spreads fits in halves.
__device__ __forceinline__ void restore(Spare &s, const Parameters &p, u32 thread) {
  const Centre &c = p.centre;
  u32 d = p.heads / 3, rows = c.back_streams * c.back_columns;
  float unit = c.inverse / 16;
#pragma unroll 1
  for (u32 column = 0; column < d; column += VECTOR) {
    u32 inner = min(d - column, VECTOR);
    spare_sync();
    fill(s.vector, inner, thread, [&](u32 k) {
      float2 pair = __ldcg((const float2 *)(c.mean + column + k));
      return make_float2(pair.x * unit, pair.y * unit);
    });
    spare_sync();
    multiply_rows(s, c.back + column, rows, c.back_inner, inner, thread / 32, thread % 32, [&](u32 row, float product) {
      u32 output = output_of(row);
      float value = product * 16 * c.back_scale[output];
      c.restored[output] = column ? value + c.restored[output] : value;
    });
  }
}

// Weights on their way to L2 while x is still being added up.
__device__ __forceinline__ void prefetch_weights(const Parameters &p, u32 warp) {
  const Centre &c = p.centre;
  u32 d = p.heads / 3, step = gridDim.x * 2 * 16, own = (blockIdx.x * 2 + warp) * 16;
#pragma unroll 1
  for (u32 stream = 0; stream <= p.second; stream++)
#pragma unroll 1
    for (u32 n = own; n < d; n += step)  // rows behind each other
      prefetch(c.w + (u64)(stream * p.N + 2 * d + n) * p.K, 16 * p.K);
#pragma unroll 1
  for (u32 n = own; n < c.back_streams * c.back_columns; n += step)
#pragma unroll 1
    for (u32 r = 0; r < 16; r++) prefetch(c.back + (u64)(n + r) * c.back_inner, d);
}

// Counters, each left at 0: programs with their sums; with their part of the mean; warps that read the mean no more.
__device__ __forceinline__ void centre(char *memory, const Parameters &p, u32 thread) {
  if (thread % 32 == 0) prefetch_weights(p, thread / 32);
  __syncwarp();
  add_columns(memory, p, thread / 32, thread % 32);
  arrive_spare(COUNTER(0), thread);
  await_spare(COUNTER(0), thread);
  mean_of_values(*(Spare *)memory, p, thread);
  if (arrive_spare(COUNTER(1), thread)) {  // everybody has read the sums
#pragma unroll 1
    for (u32 i = thread; i < (p.second + 1) * p.K; i += SPARE) p.centre.sums[i] = 0;
    if (thread == 0) *COUNTER(0) = 0;
  }
  await_spare(COUNTER(1), thread);
  restore(*(Spare *)memory, p, thread);
}

// Said once by a program's spare warps and once by the warp that prepares columns.
__device__ __forceinline__ void leave(const Parameters &p) {
  if (count_one(COUNTER(2)) < 2 * (int)gridDim.x) return;
  *COUNTER(1) = 0, *COUNTER(2) = 0;
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
  if (!p.centre.mean || !*p.centre.due) return;
  centre(memory, p, thread);
  spare_sync();
  if (thread == 0) leave(p);
#elif ENDING == 2
  for (int i = 0; i < 2; i++)
    if (p.watched[i].at) count_saturated(p.watched[i], thread / 32, thread % 32);
#endif
}
