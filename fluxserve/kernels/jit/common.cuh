// How numbers are packed, for every CUDA kernel here.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

// E4M3 saturates at ±448. Volatile, so that it is never moved behind a condition: each conversion writes half a register,
// and a register that is only written under a condition is kept from one tile to the next.
__device__ __forceinline__ u32 pack_e4m3(float a, float b, float c, float d) {
  u16 low, high;
  asm volatile("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm volatile("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return (u32)high << 16 | low;
}

__device__ __forceinline__ u32 pack_bf16(float a, float b) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(b), "f"(a));
  return packed;
}

__device__ __forceinline__ float first_bf16(u32 pair) { return __uint_as_float(pair << 16); }

__device__ __forceinline__ float second_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
