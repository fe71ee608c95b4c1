// y = (x · Wᵀ) · row scale · column scale + bias and one of the endings of fluxserve/kernels/gemm/portable.py, in FP8, for sm_90a.
//
// Clusters of two programs share each tile of weights: either loads half of it for both (TMA multicast), so that a tile
// of 128 × 256 costs L2 the bytes of 128 + 128 rows and not of 128 + 256. One warpgroup of three loads, the other two
// multiply 64 × 256 each, and keep one group of products in flight. Persistent: while a tile is at its ending, the next
// one's operands arrive. Tiles that would leave most clusters idle in a last round are cut along K: parts of one tile's
// sums meet in `workspace`, where the cluster of the last part adds them in their order, always the same.
//
// Columns of W are permuted within each 4 · RUN (see hopper.py), so that the numbers which wgmma leaves in one
// thread are eight neighbours of a row: endings load and store 8 or 16 bytes at once, with no shared memory. What they need
// of the columns a warp has put into shared memory by then; what they read of memory is asked for while the last products
// are still under way.
//
// ENDING: 0 out = y; 1 gelu_tanh(y) · inverse; 2 out += gate · y; 3 RMSNorm, RoPE and factors of q, k, v for the first
// `heads` columns, and those behind them, if there are any, as 1, into `hidden`; 4 silu(gates) · values · inverse, half as
// wide as y; 5 as 3, with 4 for 1. NAME: the kernel's. VECTOR, SPARE_BYTES, SAMPLE: as
// hopper.py says.
//
// Two of the loading warpgroup's warps are free: hopper_spare.cuh says what they do meanwhile.

#define ROWS 128
#define COLUMNS 256
#define INNER 128
#define STAGES 4
#define A_BYTES (ROWS * INNER)
#define B_BYTES (COLUMNS * INNER)
#define HEAD 128
#define GROUP 12
#define RUN 8
#define HEADS (ENDING == 3 || ENDING == 5)
#define LEAST_STEPS 8  // of K that are worth a cluster of their own

// Registers of a thread that loads, and of one that multiplies. A block starts with 168 for each of its 384 threads; a
// warpgroup that asked for more than those would wait for ever.
#if HEADS
#define FEW 56  // the spare warps compute
#define MANY 224
#else
#define FEW 40
#define MANY 232
#endif
static_assert(128 * FEW + 256 * MANY <= 384 * 168, "registers of a block");

#include "sm90.cuh"

// How the mean of v leaves attention's input and comes back behind it; see hopper_spare.cuh. mean: null if it stays.
struct Centre {
  const int *due;
  const char *x, *w, *back;
  const float *back_scale;
  float *mean, *restored;
  u64 *sums;
  int *arrived;
  float inverse;
  int x_stride, back_columns, back_inner, back_streams;
};

// E4M3 rows in which values at the limit are counted. at: null if none are.
struct Watched {
  const char *at;
  u64 *count;
  int rows, columns, stride;
};

struct Parameters {
  const float *x_scale, *w_scale, *bias;
  void *out;
  const float *gate, *factors, *cos, *sin;
  void *hidden;
  float4 *workspace;
  int *arrived;
  const float *restored;
  float inverse, epsilon;
  int M, N, K, split, second, out_stride, hidden_stride, heads;
  Centre centre;
  Watched watched[2];
};

// What a launch consists of: `whole` tiles are dealt out in rounds, the rest is cut into `parts` along K.
struct Plan {
  int pairs, pairs_first, tiles, whole, parts, clusters, cluster, rank;
};

struct Item {
  int tile, part, begin, end;  // end 0: nothing left
};

struct Tile {
  int row, end, column, stream;
};

// In bands of GROUP columns, so that the tiles which are under way together are about as many rows as columns, and share
// most of what they read in L2.
__device__ __forceinline__ Tile tile_of(const Parameters &p, const Plan &plan, int index) {
  int columns = p.N / COLUMNS, group = index / (GROUP * plan.pairs), within = index % (GROUP * plan.pairs);
  int width = min(GROUP, columns - group * GROUP), pair = within / width, in_second = pair >= plan.pairs_first;
  Tile t;
  t.row = (in_second ? p.split + (pair - plan.pairs_first) * 2 * ROWS : pair * 2 * ROWS) + plan.rank * ROWS;
  t.end = in_second ? p.M : p.split;
  t.column = (group * GROUP + within % width) * COLUMNS;
  t.stream = in_second ? p.second : 0;
  return t;
}

__device__ __forceinline__ Plan plan_of(const Parameters &p) {
  Plan plan;
  plan.rank = blockIdx.x & 1, plan.cluster = blockIdx.x / 2, plan.clusters = gridDim.x / 2;
  plan.pairs_first = (p.split + 2 * ROWS - 1) / (2 * ROWS);
  plan.pairs = plan.pairs_first + (p.M - p.split + 2 * ROWS - 1) / (2 * ROWS);
  plan.tiles = plan.pairs * (p.N / COLUMNS);
  int rest = plan.tiles % plan.clusters, steps = (p.K + INNER - 1) / INNER;
  plan.parts = rest ? min(plan.clusters / rest, max(1, steps / LEAST_STEPS)) : 1;
  plan.whole = plan.parts > 1 ? plan.tiles - rest : plan.tiles;
  return plan;
}

__device__ __forceinline__ Item item_of(const Plan &plan, const Parameters &p, int round) {
  int index = plan.cluster + round * plan.clusters, steps = (p.K + INNER - 1) / INNER;
  if (index < plan.whole) return {index, plan.parts - 1, 0, steps};
  if (plan.parts == 1 || round != plan.whole / plan.clusters) return {0, 0, 0, 0};
  int tile = plan.whole + plan.cluster / plan.parts, part = plan.cluster % plan.parts;
  if (tile >= plan.tiles) return {0, 0, 0, 0};
  return {tile, part, steps * part / plan.parts, steps * (part + 1) / plan.parts};
}

// --- wgmma --------------------------------------------------------------------------------------------------------------

#define D1(i) "+f"(d[i])
#define D4(i) D1(i), D1(i + 1), D1(i + 2), D1(i + 3)
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define D64(i) D16(i), D16(i + 16), D16(i + 32), D16(i + 48)

__device__ __forceinline__ void multiply(float (&d)[128], u64 a, u64 b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
      "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,"
      "%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,"
      "%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,"
      "%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
      "}, %128, %129, p, 1, 1;\n}"
      : D64(0), D64(64)
      : "l"(a), "l"(b), "r"(accumulate));
}

__device__ __forceinline__ void multiply_begin(float (&d)[128]) {
#pragma unroll
  for (int i = 0; i < 128; i++) asm volatile("" : "+f"(d[i])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

template <int LEFT> __device__ __forceinline__ void multiply_wait(float (&d)[128]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#pragma unroll
  for (int i = 0; i < 128; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#include "hopper_epilogues.cuh"
#include "hopper_spare.cuh"

// --- the kernel ---------------------------------------------------------------------------------------------------------

struct Shared {
  alignas(1024) char a[STAGES][A_BYTES];
  alignas(1024) char b[STAGES][B_BYTES];
  Columns columns[2];
  alignas(16) char spare[SPARE_BYTES];
  u64 full[STAGES], empty[STAGES], columns_full[2], columns_empty[2];
};

// The last part of a tile finishes it.
__device__ __forceinline__ bool finishes(const Item &item, const Plan &plan) { return item.part == plan.parts - 1; }

__device__ __forceinline__ void produce(
    Shared &s, const TensorMap *x, const TensorMap *w, const Parameters &p, const Plan &plan) {
  int rank = plan.rank;
  u32 at = 0;
  for (int round = 0;; round++) {
    Item item = item_of(plan, p, round);
    if (!item.end) break;
    Tile t = tile_of(p, plan, item.tile);
    int row_b = t.stream * p.N + t.column + rank * (COLUMNS / 2);
    for (int step = item.begin; step < item.end; step++, at++) {
      int k = step * INNER;
      int stage = at % STAGES;
      barrier_wait(&s.empty[stage], at / STAGES & 1 ^ 1);
      barrier_expect(&s.full[stage], A_BYTES + B_BYTES);
      load(s.a[stage], x, &s.full[stage], k, t.row);
      load_for_both(s.b[stage] + rank * (B_BYTES / 2), w, &s.full[stage], k, row_b);
    }
  }
}

// One warp: what the endings of this program's tiles need of their columns, a tile ahead.
__device__ __forceinline__ void prepare(Shared &s, const Parameters &p, const Plan &plan) {
  u32 at = 0;
  for (int round = 0;; round++) {
    Item item = item_of(plan, p, round);
    if (!item.end) break;
    if (!finishes(item, plan)) continue;
    barrier_wait(&s.columns_empty[at % 2], at / 2 & 1 ^ 1);
    Tile t = tile_of(p, plan, item.tile);
    if (is_centred(p, t) && *p.centre.due) {
      if (threadIdx.x % 32 == 0) await(COUNTER(1), gridDim.x);
      __syncwarp();
    }
    keep_columns(s.columns[at % 2], p, t, threadIdx.x % 32);
    barrier_arrive(&s.columns_full[at % 2]);
    at++;
  }
#if HEADS
  __syncwarp();
  if (p.centre.mean && *p.centre.due && threadIdx.x % 32 == 0) leave(p);
#endif
}

__device__ __forceinline__ void release(Shared &s, int stage) {
  if (threadIdx.x % 128 < 2) barrier_arrive(&s.empty[stage], threadIdx.x % 128);  // a thread for each of the cluster
}

// The sums of a warpgroup's part, for whoever finishes the tile.
__device__ __forceinline__ void hand_over(const float (&d)[128], const Parameters &p, int slot, int part, int parts, int group) {
  int thread = threadIdx.x % 128;
  float4 *to = p.workspace + (slot * (parts - 1) + part) * 32 * 128 + thread;
#pragma unroll
  for (int i = 0; i < 32; i++) __stcg(to + i * 128, make_float4(d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]));
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
  if (thread == 0) {
    __threadfence();  // behind the barrier: of what all 128 have written
    atomicAdd(p.arrived + slot, 1);
  }
}

// All other parts of the tile, in their order. The counter is left at 0 for the next launch.
__device__ __forceinline__ void take_over(float (&d)[128], const Parameters &p, int slot, int parts, int group) {
  int thread = threadIdx.x % 128;
  if (thread == 0) {
    int there = 0;
    while (there < parts - 1) asm volatile("ld.acquire.gpu.b32 %0, [%1];" : "=r"(there) : "l"(p.arrived + slot) : "memory");
    p.arrived[slot] = 0;
  }
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
  for (int part = 0; part < parts - 1; part++) {
    const float4 *from = p.workspace + (slot * (parts - 1) + part) * 32 * 128 + thread;
#pragma unroll
    for (int first = 0; first < 32; first += 16) {  // so many under way at once as there are registers for
      float4 more[16];
#pragma unroll
      for (int i = 0; i < 16; i++) more[i] = __ldcg(from + (first + i) * 128);
#pragma unroll
      for (int i = 0; i < 16; i++) {
        float *sums = d + 4 * (first + i);
        sums[0] += more[i].x, sums[1] += more[i].y, sums[2] += more[i].z, sums[3] += more[i].w;
      }
    }
  }
}

__device__ __forceinline__ void consume(Shared &s, const Parameters &p, const Plan &plan, int group) {
  int lane = threadIdx.x % 32, row_of_thread = group * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;
  u32 at = 0, finished = 0;
  float d[128];
  for (int round = 0;; round++) {
    Item item = item_of(plan, p, round);
    if (!item.end) break;
    Tile t = tile_of(p, plan, item.tile);
    for (int step = item.begin; step < item.end; step++, at++) {
      int stage = at % STAGES;
      barrier_wait(&s.full[stage], at / STAGES & 1);
      u64 a = descriptor(s.a[stage] + group * 64 * INNER), b = descriptor(s.b[stage]);
      multiply_begin(d);
#pragma unroll
      for (int i = 0; i < INNER / 32; i++) multiply(d, a + i * 2, b + i * 2, step > item.begin || i > 0);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      if (step > item.begin) {
        multiply_wait<1>(d);
        release(s, (at - 1) % STAGES);
      }
    }
    int row = t.row + row_of_thread;
    bool whole = item.tile < plan.whole;
    Ahead ahead;
    if (whole) ask(ahead, p, t, row, lane);
    multiply_wait<0>(d);
    release(s, (at - 1) % STAGES);
    if (!whole) {
      int slot = ((item.tile - plan.whole) * 2 + plan.rank) * 2 + group;
      if (item.part < plan.parts - 1) {
        hand_over(d, p, slot, item.part, plan.parts, group);
        continue;
      }
      take_over(d, p, slot, plan.parts, group);
      ask(ahead, p, t, row, lane);
    }
    int kept = finished % 2;
    barrier_wait(&s.columns_full[kept], finished / 2 & 1);
    finish(d, ahead, s.columns[kept], p, t, row, lane);
    __syncwarp();
    if (lane == 0) barrier_arrive(&s.columns_empty[kept]);
    finished++;
  }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    NAME(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const __grid_constant__ Parameters p) {
  extern __shared__ __align__(1024) char memory[];
  Shared &s = *(Shared *)memory;
  Plan plan = plan_of(p);
  if (threadIdx.x == 0) {
    expect(&x), expect(&w);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], 4);  // two warpgroups of each of two programs
    }
    for (int i = 0; i < 2; i++) {
      barrier_init(&s.columns_full[i], 32);
      barrier_init(&s.columns_empty[i], 8);  // warps that multiply
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEW));
    if (threadIdx.x == 0) produce(s, &x, &w, p, plan);
    if (threadIdx.x / 32 == 1) prepare(s, p, plan);
    if (threadIdx.x >= 64) spare(s.spare, p, threadIdx.x - 64);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MANY));
    // The same for all of a warp, and said so: what follows from it then lives in uniform registers.
    consume(s, p, plan, __shfl_sync(0xffffffff, threadIdx.x / 128, 0) - 1);
  }
  __syncwarp();
  cluster_sync();  // nobody leaves while the other may still write to it
}
