// softmax(q · kᵀ · s_q · s_k / √d) · v · s_v / s_out in E4M3 for heads of 128, for sm_90a; see attention_hopper.py.
//
// A program takes 128 rows of one head, two warpgroups 64 each; clusters of two programs share every tile of keys and of
// values, each loading half of it for both (TMA multicast). While one tile's weights are made of its scores, the tensor
// cores are at the sum over the values of the tile before. All clusters have as many tiles: rows that one leaves half done
// were begun by the next, which has left its part in `workspace`.
//
// Weights are relative to a maximum that follows a row's own only when it falls three binades behind, so that no
// exponential waits for one. Each tile is summed by itself, then added in float32: the tensor cores' accumulator keeps 13
// bits and cuts the rest, which over thousands of keys is a bias wherever values have a mean.
//
// Weights are the A operand as they are: wgmma leaves scores of keys 2q, 2q + 1 and 8 + 2q, 9 + 2q of each 16 in the
// thread that must hold the A operand's 4q … 4q + 3. So values come with their keys in that order within each 16, and
// transposed, because an E4M3 operand must have its inner dimension in a row; their dimensions are permuted so that a
// thread's results are sixteen neighbours. Keys behind the last are masked, values behind it are zeros.

#include "hopper.cuh"

#define ROWS 128
#define KEYS 128
#define DIM 128
#define STAGES 4
#define TILE_BYTES (KEYS * DIM)
#define LOG2_OF_448 8.807354922f
#define HEADROOM 3.0f  // binades
#define SPLIT 32  // numbers weighed before the sum over values is waited for

struct Parameters {
  const float *scales;
  void *out;
  float4 *workspace;
  int *arrived;
  float base;  // log2(e) / √d
  int rows, heads, out_stride;
};

// Units are pairs of blocks of rows, all of one head before the next, and each has its keys in `tiles`, `valid` in the last.
// A cluster takes tiles `begin` to `end` of all units' tiles.
struct Work {
  int rank, pairs, tiles, valid, begin, end;
};

struct Shared {
  alignas(1024) char q[2][2][ROWS / 2 * DIM];
  alignas(1024) char k[STAGES][TILE_BYTES];
  alignas(1024) char v[STAGES][TILE_BYTES];
  u64 q_full[2], q_empty[2], k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

__device__ __forceinline__ Work work_of(const Parameters &p) {
  Work w;
  int cluster = blockIdx.x / 2, clusters = gridDim.x / 2;
  w.rank = blockIdx.x & 1, w.pairs = (p.rows + 2 * ROWS - 1) / (2 * ROWS);
  w.tiles = (p.rows + KEYS - 1) / KEYS, w.valid = p.rows - (w.tiles - 1) * KEYS;
  int units = w.pairs * p.heads;
  bool cut = units >= clusters;  // then none is cut twice
  w.begin = cut ? (int)((long)units * w.tiles * cluster / clusters) : min(cluster, units) * w.tiles;
  w.end = cut ? (int)((long)units * w.tiles * (cluster + 1) / clusters) : min(cluster + 1, units) * w.tiles;
  return w;
}

// --- wgmma --------------------------------------------------------------------------------------------------------------

#define F1(d, i) "+f"(d[i])
#define F4(d, i) F1(d, i), F1(d, i + 1), F1(d, i + 2), F1(d, i + 3)
#define F16(d, i) F4(d, i), F4(d, i + 4), F4(d, i + 8), F4(d, i + 12)
#define F64(d) F16(d, 0), F16(d, 16), F16(d, 32), F16(d, 48)
#define REGISTERS                                                                                                          \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,"   \
  "%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,"  \
  "%60,%61,%62,%63}"

// d (+)= a · bᵀ over 32 numbers: 64 rows of a in shared memory, 128 of b.
__device__ __forceinline__ void multiply(float (&d)[64], u64 a, u64 b, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " REGISTERS
               ", %64, %65, p, 1, 1;\n}"
               : F64(d)
               : "l"(a), "l"(b), "r"(accumulate));
}

// The same with a in registers.
__device__ __forceinline__ void multiply(float (&d)[64], const u32 *a, u64 b, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 " REGISTERS
               ", {%64,%65,%66,%67}, %68, p, 1, 1;\n}"
               : F64(d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

__device__ __forceinline__ void touch(float (&d)[64]) {
#pragma unroll
  for (int i = 0; i < 64; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// All but the latest LEFT groups of products are done, those into d among them.
template <int LEFT> __device__ __forceinline__ void wait_for(float (&d)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
  touch(d);
}

__device__ __forceinline__ void begin_scores(float (&scores)[64], const char *q, const char *k) {
  touch(scores);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  u64 a = descriptor(q), b = descriptor(k);
#pragma unroll
  for (int i = 0; i < DIM / 32; i++) multiply(scores, a + i * 2, b + i * 2, i > 0);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void begin_sums(float (&sums)[64], u32 (&weights)[16], const char *v) {
  touch(sums);
#pragma unroll
  for (int i = 0; i < 16; i++) asm volatile("" : "+r"(weights[i])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  u64 b = descriptor(v);
#pragma unroll
  for (int i = 0; i < KEYS / 32; i++) multiply(sums, weights + 4 * i, b + i * 2, i > 0);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// --- the kernel ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void produce(
    Shared &s, const TensorMap *rows, const TensorMap *values, const Parameters &p, const Work &w) {
  u32 at = 0, index = 0;
  for (int step = w.begin; step < w.end; index++) {
    int unit = step / w.tiles, tile = step % w.tiles, stop = min(w.tiles, tile + w.end - step);
    int head = unit / w.pairs, row = unit % w.pairs * 2 * ROWS + w.rank * ROWS, half = w.rank * KEYS / 2;
    u64 *q_full = &s.q_full[index % 2];
    barrier_wait(&s.q_empty[index % 2], index / 2 & 1 ^ 1);
    barrier_expect(q_full, ROWS * DIM);
    for (int group = 0; group < 2; group++) load(s.q[index % 2][group], rows, q_full, head * DIM, row + group * ROWS / 2);
    step += stop - tile;
#pragma unroll 1  // or there are not registers enough
    for (; tile < stop; tile++, at++) {
      int stage = at % STAGES;
      barrier_wait(&s.k_empty[stage], at / STAGES & 1 ^ 1);
      barrier_expect(&s.k_full[stage], TILE_BYTES);
      load_for_both(s.k[stage] + half * DIM, rows, &s.k_full[stage], (p.heads + head) * DIM, tile * KEYS + half);
      barrier_wait(&s.v_empty[stage], at / STAGES & 1 ^ 1);
      barrier_expect(&s.v_full[stage], TILE_BYTES);
      load_for_both(s.v[stage] + half * KEYS, values, &s.v_full[stage], tile * KEYS, head * DIM + half);
    }
  }
}

// Where a warpgroup is: which of its tiles, of which of its units; whether the next keys, the next values were seen to be there.
struct Place {
  u32 at, index;
  int tile, unit;
  bool keys, values;
};

// Of a thread's two rows, 8 apart. A weight is 2^(score · factor + shift).
struct Softmax {
  float shift[2], total[2];
};

__device__ __forceinline__ void release(u64 *barrier) {
  if (threadIdx.x % 128 < 2) barrier_arrive(barrier, threadIdx.x % 128);  // a thread for each of the cluster
}

// Number i of 64 is of row i / 2 % 2 and column i / 4 · 8 + lane % 4 · 2 + i % 2.
__device__ __forceinline__ void mask(float (&scores)[64], int valid, int lane) {
#pragma unroll
  for (int i = 0; i < 64; i++)
    if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= valid) scores[i] = __int_as_float(0xff800000);  // minus infinity
}

// Scores → logarithms of weights. Whether any is too large for E4M3, of this thread's.
__device__ __forceinline__ bool shift_scores(float (&scores)[64], const Softmax &x, float factor) {
  int top[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 64; i += 2) {
    scores[i] = scores[i] * factor + x.shift[i / 2 % 2], scores[i + 1] = scores[i + 1] * factor + x.shift[i / 2 % 2];
    top[i / 2 % 2] = __vimax3_s32(top[i / 2 % 2], __float_as_int(scores[i]), __float_as_int(scores[i + 1]));
  }
  return max(top[0], top[1]) > __float_as_int(LOG2_OF_448);
}

// Logarithms of weights → the same for a larger maximum of their rows; grown: what all before is to be multiplied with.
__device__ __forceinline__ void rebase(float (&scores)[64], Softmax &x, float (&grown)[2], bool fresh) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float most = scores[2 * half];
#pragma unroll
    for (int i = 0; i < 64; i++)
      if (i / 2 % 2 == half) most = fmaxf(most, scores[i]);
    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
    float down = fresh || most > LOG2_OF_448 ? most - (LOG2_OF_448 - HEADROOM) : 0.0f;
    x.shift[half] -= down, grown[half] = exp2f(-down);
    x.total[half] = fresh ? 0.0f : x.total[half] * grown[half];
#pragma unroll
    for (int i = 0; i < 64; i++)
      if (i / 2 % 2 == half) scores[i] -= down;
  }
}

// A logarithm → a weight, still as a number of 32 bits.
__device__ __forceinline__ void weigh_one(float (&scores)[64], Softmax &x, int i) {
  asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(scores[i]));
  x.total[i / 2 % 2] += scores[i];
}

template <int FROM, int TO> __device__ __forceinline__ void weigh(float (&scores)[64], Softmax &x) {
#pragma unroll
  for (int i = FROM; i < TO; i++) weigh_one(scores, x, i);
}

// Weights as the A operand.
__device__ __forceinline__ void pack(u32 (&weights)[16], const float (&scores)[64], int group) {
#pragma unroll
  for (int i = 4 * group; i < 4 * group + 4; i++) {
    const float *y = scores + i / 4 * 16 + i / 2 % 2 * 8 + i % 2 * 2;
    weights[i] = pack_e4m3(y[0], y[1], y[4], y[5]);
  }
}

__device__ __forceinline__ void store(
    const float (&sums)[64], const Softmax &x, const Parameters &p, const Work &w, int unit, int group) {
  int head = unit / w.pairs, row = unit % w.pairs * 2 * ROWS + w.rank * ROWS + group * ROWS / 2, lane = threadIdx.x % 32;
  row += threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float total = x.total[half];
    total += __shfl_xor_sync(0xffffffff, total, 1);
    total += __shfl_xor_sync(0xffffffff, total, 2);
    float factor = __fdividef(p.scales[2] * p.scales[3], total);
    int at_row = row + half * 8;
    if (at_row >= p.rows) continue;
    char *to = (char *)p.out + (long)at_row * p.out_stride + head * DIM + lane % 4 * 16;
#pragma unroll
    for (int block = 0; block < 2; block++) {
      float y[16];
#pragma unroll
      for (int i = 0; i < 16; i++) y[i] = sums[(block * 8 + i / 2) * 4 + half * 2 + i % 2] * factor;
      *(uint4 *)(to + block * 64) = make_uint4(pack_e4m3(y[0], y[1], y[2], y[3]), pack_e4m3(y[4], y[5], y[6], y[7]),
          pack_e4m3(y[8], y[9], y[10], y[11]), pack_e4m3(y[12], y[13], y[14], y[15]));
    }
  }
}

#define PLACES 17  // float4 that a thread leaves for another

__device__ __forceinline__ void hand_over(const float (&sums)[64], const Softmax &x, const Parameters &p, int group) {
  int slot = blockIdx.x * 2 + group, thread = threadIdx.x % 128;
  float4 *to = p.workspace + slot * PLACES * 128 + thread;
#pragma unroll
  for (int i = 0; i < 16; i++) __stcg(to + i * 128, make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
  __stcg(to + 16 * 128, make_float4(x.shift[0], x.shift[1], x.total[0], x.total[1]));
  __threadfence();
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
  if (thread == 0) atomicAdd(p.arrived + slot, 1);
}

// What the next cluster has of the same rows; it began with that. The count is left at 0 for the next launch.
__device__ __forceinline__ void take_over(float (&sums)[64], Softmax &x, const Parameters &p, int group) {
  int slot = (blockIdx.x + 2) * 2 + group, thread = threadIdx.x % 128;
  if (thread == 0) {
    int there = 0;
    while (!there) asm volatile("ld.acquire.gpu.b32 %0, [%1];" : "=r"(there) : "l"(p.arrived + slot) : "memory");
    p.arrived[slot] = 0;
  }
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
  const float4 *from = p.workspace + slot * PLACES * 128 + thread;
  float4 other = __ldcg(from + 16 * 128);
  float common[2] = {fminf(x.shift[0], other.x), fminf(x.shift[1], other.y)};
  float own[2] = {exp2f(common[0] - x.shift[0]), exp2f(common[1] - x.shift[1])};
  float its[2] = {exp2f(common[0] - other.x), exp2f(common[1] - other.y)};
  x.total[0] = x.total[0] * own[0] + other.z * its[0], x.total[1] = x.total[1] * own[1] + other.w * its[1];
#pragma unroll
  for (int i = 0; i < 16; i++) {
    float4 more = __ldcg(from + i * 128);
    float *mine = sums + 4 * i;
    mine[0] = mine[0] * own[0] + more.x * its[0], mine[1] = mine[1] * own[0] + more.y * its[0];
    mine[2] = mine[2] * own[1] + more.z * its[1], mine[3] = mine[3] * own[1] + more.w * its[1];
  }
}

// The rows' sums are complete, or as complete as they get here.
__device__ __forceinline__ void finish(float (&sums)[64], Softmax &x, const Parameters &p, const Work &w, const Place &at, int group) {
  if (at.index == 0 && w.begin % w.tiles) {
    hand_over(sums, x, p, group);
  } else {
    if (at.tile != w.tiles - 1) take_over(sums, x, p, group);
    store(sums, x, p, w, at.unit, group);
  }
}

// The sum over a tile's values, whose weights are there, and the next tile's weights. No product stands in a branch, or the
// compiler would wait for each: behind the last tile follow scores that nobody reads.
__device__ __forceinline__ void step(float (&scores)[64], float (&sums)[64], float (&tile)[64], u32 (&weights)[16], Softmax &x,
    Place &at, u32 count, float factor, Shared &s, const Parameters &p, const Work &w, int group) {
  bool more = at.at + 1 < count, last = at.tile == w.tiles - 1 || !more;
  u32 next = at.at + 1, q = at.index + last;
  int next_tile = last ? 0 : at.tile + 1;
  float keep = at.tile == 0 || at.at == 0 ? 0.0f : 1.0f;
  if (more && last) barrier_wait(&s.q_full[q % 2], q / 2 & 1);
  if (more && !at.keys) barrier_wait(&s.k_full[next % STAGES], next / STAGES & 1);
  begin_scores(scores, s.q[q % 2][group], s.k[next % STAGES]);
  if (!at.values) barrier_wait(&s.v_full[at.at % STAGES], at.at / STAGES & 1);
  begin_sums(tile, weights, s.v[at.at % STAGES]);
  Softmax before = x;
  float grown[2] = {1.0f, 1.0f};
  if (last) x = {};
  wait_for<1>(scores);
  if (more) release(&s.k_empty[next % STAGES]);
  if (more && next_tile == w.tiles - 1 && threadIdx.x % 128 == 0) barrier_arrive(&s.q_empty[q % 2]);
  if (next_tile == w.tiles - 1 && w.valid < KEYS) mask(scores, w.valid, threadIdx.x % 32);
  at.keys = barrier_test(&s.k_full[(next + 1) % STAGES], (next + 1) / STAGES & 1);
  at.values = barrier_test(&s.v_full[next % STAGES], next / STAGES & 1);
  bool larger = __any_sync(0xffffffff, shift_scores(scores, x, factor)) || last;
  if (larger) rebase(scores, x, grown, last);
  weigh<0, SPLIT>(scores, x);
  if (x.total[0] < 0 || x.total[1] < 0) asm volatile("trap;");  // never; but it keeps the exponentials before the wait
  wait_for<0>(tile);
  release(&s.v_empty[at.at % STAGES]);
#pragma unroll
  for (int i = 0; i < 64; i++) {
    if (i % 2 == 0) weigh_one(scores, x, SPLIT + i / 2);
    asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(sums[i]) : "f"(keep), "f"(tile[i]));
    if (i % 16 == 8 && i / 16 < SPLIT / 16) pack(weights, scores, i / 16);
  }
#pragma unroll
  for (int i = SPLIT / 16; i < 4; i++) pack(weights, scores, i);
  if (last) {
    finish(sums, before, p, w, at, group);
  } else if (larger) {
#pragma unroll
    for (int i = 0; i < 64; i++) sums[i] *= grown[i / 2 % 2];
  }
  at.at = next, at.index = q, at.tile = next_tile, at.unit += last;
}

__device__ __forceinline__ void consume(Shared &s, const Parameters &p, const Work &w, int group) {
  float scores[64], sums[64] = {}, tile[64], factor = p.scales[0] * p.scales[1] * p.base, grown[2];
  u32 weights[16], count = w.end - w.begin;
  if (!count) return;
  Softmax x = {};
  Place at = {0, 0, w.begin % w.tiles, w.begin / w.tiles, false, false};
  barrier_wait(&s.q_full[0], 0);
  barrier_wait(&s.k_full[0], 0);
  begin_scores(scores, s.q[0][group], s.k[0]);
  wait_for<0>(scores);
  release(&s.k_empty[0]);
  if (at.tile == w.tiles - 1 && threadIdx.x % 128 == 0) barrier_arrive(&s.q_empty[0]);
  if (at.tile == w.tiles - 1 && w.valid < KEYS) mask(scores, w.valid, threadIdx.x % 32);
  shift_scores(scores, x, factor);
  rebase(scores, x, grown, true);
  weigh<0, 64>(scores, x);
#pragma unroll
  for (int i = 0; i < 4; i++) pack(weights, scores, i);
  while (at.at < count) step(scores, sums, tile, weights, x, at, count, factor, s, p, w, group);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1) attention(
    const __grid_constant__ TensorMap rows, const __grid_constant__ TensorMap values, const __grid_constant__ Parameters p) {
  extern __shared__ __align__(1024) char memory[];
  Shared &s = *(Shared *)memory;
  Work w = work_of(p);
  if (threadIdx.x == 0) {
    expect(&rows), expect(&values);
    for (int i = 0; i < 2; i++) {
      barrier_init(&s.q_full[i], 1);
      barrier_init(&s.q_empty[i], 2);
    }
    for (int i = 0; i < STAGES; i++) {
      barrier_init(&s.k_full[i], 1);
      barrier_init(&s.v_full[i], 1);
      barrier_init(&s.k_empty[i], 4);  // two warpgroups of each of two programs
      barrier_init(&s.v_empty[i], 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) produce(s, &rows, &values, p, w);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume(s, p, w, __shfl_sync(0xffffffff, threadIdx.x / 128, 0) - 1);
  }
  __syncwarp();
  cluster_sync();  // nobody leaves while the other may still write to it
}
