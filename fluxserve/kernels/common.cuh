// What every CUDA kernel here needs: how launches follow each other, how numbers are packed.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

// All that kernels before this one wrote is there, and nobody reads any more what this one writes.
__device__ __forceinline__ void await_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }

// E4M3 saturates at ±448.
__device__ __forceinline__ u32 pack_e4m3(float a, float b, float c, float d) {
  u16 low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return (u32)high << 16 | low;
}

__device__ __forceinline__ u32 pack_bf16(float a, float b) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(b), "f"(a));
  return packed;
}

__device__ __forceinline__ float first_bf16(u32 pair) { return __uint_as_float(pair << 16); }

__device__ __forceinline__ float second_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
