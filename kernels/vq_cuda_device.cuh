// What the CUDA kernels share: the problem they are given, numbers of several types, and the instructions that C++ has no name for.
//
// The same files compile for a host over tests/cuda_shim (T2V_CUDA_SHIM), which runs every thread as a fiber and emulates what is in
// the second half of this file from the layouts that the PTX manual gives.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef T2V_CUDA_SHIM
#include "cuda_shim.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define T2V_LAUNCH(kernel, blocks, threads, shared, stream, ...) kernel<<<blocks, threads, shared, stream>>>(__VA_ARGS__)
#define T2V_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

#include "vq.h"

namespace t2v {

constexpr int kTile = 128;      // codes scored at once by a block
constexpr int kDepth = 32;      // coordinates of them that arrive at once
constexpr int kStages = 4;      // places of the ring that they arrive in
constexpr int kThreads = 128;   // of a block of the filter
constexpr int kWarp = 32;
constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr float kLowest = -3e38f;  // below every score, and finite: its last bits may be replaced
constexpr float kInfinity = HUGE_VALF;

enum class Type : int { kFp32, kBf16, kFp16 };

// Counted and found on the way. All bits are 0 at the start; rows are kept inverted (~row), so that the largest is the lowest row.
struct Status {
  uint32_t bad_latents, bad_code;       // inverted rows that hold NaN or infinity; 0: none
  uint32_t largest, norm, error;        // bits of floats >= 0: max |c - m|; then after scaling max norm(C), max norm(rounded C - C)
  uint32_t undecided;                   // rows that the filter leaves
};

struct Problem {
  const void* latents;    // [rows, dim]
  const float* codebook;  // [codes, dim]
  int64_t rows;
  int codes, dim;
  Type type;
  bool wide_latents, wide_codebook;  // aligned rows of a multiple of 8 (of 4) numbers: read 16 bytes at a time

  int64_t* out;       // [rows]: codes; between filter and refinement, of undecided rows, the candidates
  float* quantized;   // [rows, dim], or null
  float* atomic_sums; // [codes, dim], or null: sums in no fixed order
  int32_t* histogram; // [codes, slabs], or null: rows of each code in each slab of consecutive rows
  int slabs;
  int64_t slab_rows;

  // The codebook as the filter sees it.
  int tiles, chunks;  // ceil(codes / 128), ceil(dim / 32)
  float* mean;        // [chunks * 32]
  uint16_t* packed;   // fp16 [tiles, chunks, 128, 32], 16-byte pieces swizzled as in shared memory
  float* bias;        // [tiles * 128]: -norm(C)^2 / 2; of padding: kLowest

  Status* status;
  uint32_t* list;     // [rows]: the undecided rows
  int warp_codes;         // consecutive codes of a tile that one warp sees; each of its lanes of four is a class
};

// The power of two that brings the largest |c - m| into [1, 2), as far as fp32 has it.
__device__ inline float scale_of(uint32_t largest_bits) {
  if (largest_bits == 0) return 1;
  int exponent = static_cast<int>(largest_bits >> 23) - 127;
  exponent = exponent < -126 ? -126 : (exponent > 126 ? 126 : exponent);
  return __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);
}

// fp16 as bits; to nearest.
#ifdef T2V_CUDA_SHIM
using shim::from_fp16;
using shim::to_fp16;
#else
__device__ inline uint16_t to_fp16(float value) { return __half_as_ushort(__float2half_rn(value)); }
__device__ inline float from_fp16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
#endif

__device__ inline float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

struct alignas(16) Floats4 {
  float value[4];
};
struct alignas(16) Halves8 {
  uint16_t value[8];
};

__device__ inline float latent_at(const Problem& p, int64_t index) {
  if (p.type == Type::kFp32) return static_cast<const float*>(p.latents)[index];
  const uint16_t bits = static_cast<const uint16_t*>(p.latents)[index];
  return p.type == Type::kBf16 ? from_bf16(bits) : from_fp16(bits);
}

// Eight numbers of a row from `column`, a multiple of 8; zeros beyond the row's end.
__device__ inline void eight_latents(const Problem& p, int64_t row, int column, float (&out)[8]) {
  const int64_t index = row * p.dim + column;
  if (!p.wide_latents) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = column + i < p.dim ? latent_at(p, index + i) : 0.0f;
  } else if (column >= p.dim) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = 0;
  } else if (p.type == Type::kFp32) {
    const Floats4* from = reinterpret_cast<const Floats4*>(static_cast<const float*>(p.latents) + index);
    const Floats4 low = from[0], high = from[1];
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = low.value[i], out[4 + i] = high.value[i];
  } else {
    const Halves8 read = *reinterpret_cast<const Halves8*>(static_cast<const uint16_t*>(p.latents) + index);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = p.type == Type::kBf16 ? from_bf16(read.value[i]) : from_fp16(read.value[i]);
  }
}

// Where piece `piece` (0 to 3) of 8 numbers lies in a row of 32 of fp16: rows 0 to 7 then cover all banks of shared memory.
__device__ inline int swizzled(int row, int piece) { return piece ^ ((row >> 1) & 3); }

// ---- Instructions. Addresses of shared memory are 32-bit numbers.

#ifdef T2V_CUDA_SHIM
using shim::copy_async_16;
using shim::copy_async_commit;
using shim::copy_async_wait;
using shim::ldmatrix_x4;
using shim::mma_16816;
using shim::shared_address;
#else
__device__ inline uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

__device__ inline void copy_async_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(to), "l"(from) : "memory");
}

__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Wait until at most kNewest of the groups committed last are on their way.
template <int kNewest>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kNewest) : "memory");
}

__device__ inline void ldmatrix_x4(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// c += a b for fp16 a [16, 16] and b [16, 8], fp32 c [16, 8].
__device__ inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(kAll, value, mask);
  return value;
}

__device__ inline double warp_sum(double value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(kAll, value, mask);
  return value;
}

// What a warp writes for a row whose code is known: everything but, for lookups, nothing more than the code.
__device__ inline void emit_row(const Problem& p, int64_t row, int code, int lane) {
  if (lane == 0) {
    p.out[row] = code;
    if (p.histogram != nullptr) atomicAdd(p.histogram + static_cast<int64_t>(code) * p.slabs + row / p.slab_rows, 1);
  }
  if (p.quantized != nullptr) {
    const float* __restrict__ from = p.codebook + static_cast<int64_t>(code) * p.dim;
    float* __restrict__ to = p.quantized + row * p.dim;
    if (p.wide_codebook) {
      for (int d = 4 * lane; d < p.dim; d += 4 * kWarp) *reinterpret_cast<Floats4*>(to + d) = *reinterpret_cast<const Floats4*>(from + d);
    } else {
      for (int d = lane; d < p.dim; d += kWarp) to[d] = from[d];
    }
  }
  if (p.atomic_sums != nullptr)
    for (int d = lane; d < p.dim; d += kWarp)
      atomicAdd(p.atomic_sums + static_cast<int64_t>(code) * p.dim + d, latent_at(p, row * p.dim + d));
}

}  // namespace t2v
