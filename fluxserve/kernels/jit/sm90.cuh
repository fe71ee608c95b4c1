// What Hopper's copies and products are made with: barriers in shared memory, tiles by TMA, for clusters of two programs.

#include "common.cuh"

struct alignas(64) TensorMap {
  char opaque[128];
};

__device__ __forceinline__ u32 address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u64 *b, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(b)), "r"(count));
}

__device__ __forceinline__ void barrier_expect(u64 *b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(b)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(u64 *b, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
          address(b)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void barrier_arrive(u64 *b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(b)) : "memory");
}

// Nothing was written that the other side reads, so this releases nothing: a release for the cluster would be a fence for
// the whole GPU.
__device__ __forceinline__ void barrier_arrive(u64 *b, u32 rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(address(b)),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A map is a parameter, and takes its time to arrive where the copy engine looks for it.
__device__ __forceinline__ void expect(const TensorMap *map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

__device__ __forceinline__ void load(void *to, const TensorMap *from, u64 *b, int inner, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          address(to)),
      "l"(from), "r"(address(b)), "r"(inner), "r"(row)
      : "memory");
}

__device__ __forceinline__ void load_for_both(void *to, const TensorMap *from, u64 *b, int inner, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(address(to)),
      "l"(from), "r"(address(b)), "r"(inner), "r"(row), "h"((u16)3)
      : "memory");
}

// K-major rows of 128 bytes in the 128-byte swizzle: eight of them are 1,024 bytes.
__device__ __forceinline__ u64 descriptor(const void *tile) {
  return (u64)((address(tile) & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
