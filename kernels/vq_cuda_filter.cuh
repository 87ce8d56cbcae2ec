// The filter: scores by fp16 tensor cores, and for each row either its code or the few codes that the error bound leaves.
//
//   latents [BM rows] -> centred, scaled, fp16, in shared memory for good; 2E of each row from its measured norms
//   packed codes -> cp.async ring of 4 x (128 codes x 32 coordinates) -> ldmatrix -> mma.sync, accumulators started at the bias
//     -> in registers, for each row and class of codes: best score, second best score, place of the best
//   end of the codes: classes of a row -> one code within 2E of the best -> code, quantized row, count
//                                      -> several                       -> list of undecided rows, with their candidates
//
// A class is what one lane of the four that share a row sees in one of the warps that share a tile: 8 or 16 classes a row.
#pragma once

#include "vq_cuda_device.cuh"

namespace t2v {

// The shape of a block: kWarpsDown x kWarpsAcross warps, each with kRowTiles x 16 rows and kColumnTiles x 8 codes of a tile.
template <int kRowTiles_, int kColumnTiles_, int kWarpsDown_, int kWarpsAcross_>
struct Shape {
  static constexpr int kRowTiles = kRowTiles_, kColumnTiles = kColumnTiles_, kWarpsDown = kWarpsDown_, kWarpsAcross = kWarpsAcross_;
  static constexpr int kRows = kWarpsDown * kRowTiles * 16;
  static constexpr int kWarpCodes = kColumnTiles * 8;
  static constexpr int kClasses = 4 * kWarpsAcross;
  static_assert(kWarpsDown * kWarpsAcross * kWarp == kThreads && kWarpCodes * kWarpsAcross == kTile && kRows <= kThreads);
  static_assert(kColumnTiles <= 8, "the place of a score in its tile takes four bits");
};
using Shape128 = Shape<4, 8, 2, 2>;
using Shape64 = Shape<2, 8, 2, 2>;
using Shape32 = Shape<2, 4, 1, 4>;

constexpr int kStageBytes = kTile * kDepth * 2;

// Of shared memory: ring, biases of each stage's tile, 2E and factor of each row, latents.
constexpr int kBiasAt = kStages * kStageBytes, kReachAt = kBiasAt + kStages * kTile * 4;
template <class S>
constexpr int kFactorAt = kReachAt + S::kRows * 4;
template <class S>
constexpr int kLatentsAt = kFactorAt<S> + S::kRows * 4;
template <class S>
constexpr int filter_shared_bytes(int chunks) {
  return kLatentsAt<S> + chunks * S::kRows * kDepth * 2;
}
constexpr float kUnfiltered = kInfinity, kBad = -1;  // instead of 2E: the scores mean nothing; the latent holds NaN or infinity

// The bound of docs/kernel_cuda.md, doubled and rounded up: scores of a row with these sums of squares may differ from the exact ones by E.
__device__ inline float twice_error(const Problem& p, float squares, float errors, float code_norm, float code_error) {
  const float slack = 1 + (p.dim + 32) * 0x1p-23f;  // of sums of squares in fp32
  const float norm = sqrtf(squares * slack) + 1e-20f;  // squares below 2^-149 are lost
  const float residual = sqrtf(errors * slack) + norm * 0x1p-23f + 1e-20f;  // + rounding of x - m
  const float seen_norm = norm + residual;
  const float terms = 0.5f * code_norm * code_norm + seen_norm * (code_norm + code_error);
  const float error = residual * code_norm + seen_norm * code_error + (p.dim + 48) * 0x1p-21f * terms + 1e-30f * (1 + seen_norm);
  return 2 * error * (1 + 1e-5f);
}

// Four lanes bring a row into shared memory, 32 rows at a time.
template <class S>
__device__ inline void load_latents(const Problem& p, unsigned char* shared) {
  const uint32_t largest_bits = p.status->largest;
  const float scale = scale_of(largest_bits), code_norm = __uint_as_float(p.status->norm), code_error = __uint_as_float(p.status->error);
  const bool usable = __uint_as_float(largest_bits) < kInfinity;
  const int lane = threadIdx.x % 4;
  for (int base = 0; base < S::kRows; base += kThreads / 4) {
    const int local = base + threadIdx.x / 4;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * S::kRows + local;
    float factor = 1;  // a power of two that keeps the row within fp16; its biases are multiplied by it as well
    float squares, errors, largest, nothing;
    while (true) {
      squares = errors = largest = nothing = 0;
#pragma unroll 4
      for (int chunk = 0; chunk < p.chunks; ++chunk) {
        const int column = chunk * kDepth + lane * 8;
        float x[8] = {};
        if (row < p.rows) eight_latents(p, row, column, x);
        const Floats4* mean = reinterpret_cast<const Floats4*>(p.mean + column);
        const Floats4 low = mean[0], high = mean[1];
        Halves8 rounded;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float value = row < p.rows ? (x[i] - (i < 4 ? low.value[i % 4] : high.value[i % 4])) * scale * factor : 0.0f;
          rounded.value[i] = to_fp16(value);
          const float error = value - from_fp16(rounded.value[i]);
          nothing += x[i] - x[i];  // 0, or NaN
          largest = fmaxf(largest, fabsf(value));
          squares += value * value;
          errors += error * error;
        }
        *reinterpret_cast<Halves8*>(shared + kLatentsAt<S> + (chunk * S::kRows + local) * kDepth * 2 + swizzled(local, lane) * 16) = rounded;
      }
#pragma unroll
      for (int mask = 1; mask <= 2; mask *= 2) {
        squares += __shfl_xor_sync(kAll, squares, mask);
        errors += __shfl_xor_sync(kAll, errors, mask);
        nothing += __shfl_xor_sync(kAll, nothing, mask);
        largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, mask));
      }
      const bool again = factor == 1 && largest > 32768.0f && largest < 0x1p74f && nothing == 0;
      if (again) factor = __uint_as_float((14 + 254 - (__float_as_uint(largest) >> 23)) << 23);  // brings the largest below 2^15
      if (!__any_sync(kAll, again)) break;
    }
    if (lane != 0) continue;
    float reach = kUnfiltered;
    if (nothing != 0) reach = kBad;  // NaN is not equal to 0
    else if (usable && largest <= 32768.0f) reach = twice_error(p, squares, errors, code_norm, code_error);
    reinterpret_cast<float*>(shared + kReachAt)[local] = reach;
    reinterpret_cast<float*>(shared + kFactorAt<S>)[local] = factor;
  }
}

// What a thread knows of each of its rows: scores with their place in the tile in the last four bits, the tile of the best.
template <class S>
struct Leaders {
  float best[S::kRowTiles][2], second[S::kRowTiles][2];
  int tile[S::kRowTiles][2];

  __device__ Leaders() {
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) best[i][0] = best[i][1] = second[i][0] = second[i][1] = kLowest, tile[i][0] = tile[i][1] = 0;
  }

  __device__ void note(const float (&scores)[S::kRowTiles][S::kColumnTiles][4], int now) {
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float before = best[i][half];
        float first = before, next = second[i][half];
#pragma unroll
        for (int j = 0; j < S::kColumnTiles; ++j)
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            const float score = __uint_as_float((__float_as_uint(scores[i][j][2 * half + odd]) & ~15u) | (2 * j + odd));
            next = fmaxf(next, fminf(first, score));
            first = fmaxf(first, score);
          }
        best[i][half] = first;
        second[i][half] = next;
        if (first != before) tile[i][half] = now;
      }
  }
};

// From the classes of a row to its code, or to candidates.
template <class S>
__device__ inline void decide(const Problem& p, unsigned char* shared, const Leaders<S>& leaders) {
  float* best = reinterpret_cast<float*>(shared);  // [classes, rows], where the ring was; so the following
  float* second = best + S::kClasses * S::kRows;
  int* place = reinterpret_cast<int*>(second + S::kClasses * S::kRows);
  int* chosen = reinterpret_cast<int*>(shared + kFactorAt<S>);  // [rows]: the code, or -1
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int down = warp / S::kWarpsAcross, across = warp % S::kWarpsAcross;
#pragma unroll
  for (int i = 0; i < S::kRowTiles; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = (across * 4 + lane % 4) * S::kRows + (down * S::kRowTiles + i) * 16 + half * 8 + lane / 4;
      const int in_tile = static_cast<int>(__float_as_uint(leaders.best[i][half]) & 15u);
      best[at] = leaders.best[i][half];
      second[at] = leaders.second[i][half];
      place[at] = leaders.tile[i][half] * kTile + across * S::kWarpCodes + in_tile / 2 * 8 + lane % 4 * 2 + in_tile % 2;
    }
  __syncthreads();
  const int local = threadIdx.x;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * S::kRows + local;
  bool undecided = false;
  if (local < S::kRows) {
    int code = -1;
    if (row < p.rows) {
      const float reach = reinterpret_cast<const float*>(shared + kReachAt)[local];
      if (reach == kBad) {
        p.out[row] = -1;
        atomicMax(&p.status->bad_latents, ~static_cast<uint32_t>(row));
      } else {
        float top = best[local];
        for (int c = 1; c < S::kClasses; ++c) top = fmaxf(top, best[c * S::kRows + local]);
        const float threshold = top - reach;
        int near = 0, other = -1, classes = 0;
        bool hidden = reach == kUnfiltered;
        for (int c = 0; c < S::kClasses; ++c) {
          const int at = c * S::kRows + local;
          if (reach == kUnfiltered) classes |= 1 << c;
          else if (best[at] >= threshold) other = code, code = place[at], classes |= 1 << c, ++near;
          hidden |= second[at] >= threshold;
        }
        undecided = hidden || near != 1;
        // Two candidates, or (negative) the classes whose codes all are.
        if (undecided) p.out[row] = !hidden && near == 2 ? code | static_cast<int64_t>(other) << 32 : ~static_cast<int64_t>(classes);
        if (undecided) code = -1;
      }
    }
    chosen[local] = code;
  }
  const unsigned many = __ballot_sync(kAll, undecided);
  if (many != 0) {
    uint32_t first = 0;
    if (lane == 0) first = atomicAdd(&p.status->undecided, static_cast<uint32_t>(__popc(many)));
    first = __shfl_sync(kAll, first, 0);
    if (undecided) p.list[first + __popc(many & ((1u << lane) - 1))] = static_cast<uint32_t>(row);
  }
  __syncthreads();
  for (int i = warp; i < S::kRows; i += kThreads / kWarp)
    if (chosen[i] >= 0) emit_row(p, static_cast<int64_t>(blockIdx.x) * S::kRows + i, chosen[i], lane);
}

template <class S>
__global__ void __launch_bounds__(kThreads, 2) filter_kernel(const Problem p) {
  T2V_SHARED(shared);
  if (p.status->bad_code != 0) return;  // an error will be raised; the numbers would only take time
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int down = warp / S::kWarpsAcross, across = warp % S::kWarpsAcross;
  const uint32_t ring = shared_address(shared);

  // What arrives next: the packed codes lie in global memory as the ring takes them, one stage after another.
  const uint16_t* from = p.packed + threadIdx.x * 8;
  const float* bias_from = p.bias + threadIdx.x * 4;
  int arriving_chunk = 0, arriving_tile = 0, arriving_slot = 0;
  const auto send = [&] {
    if (arriving_tile < p.tiles) {
#pragma unroll
      for (int i = 0; i < kStageBytes / (16 * kThreads); ++i)
        copy_async_16(ring + arriving_slot * kStageBytes + (i * kThreads + threadIdx.x) * 16, from + i * kThreads * 8);
      if (arriving_chunk == 0 && threadIdx.x < kTile / 4)
        copy_async_16(ring + kBiasAt + (arriving_slot * kTile + threadIdx.x * 4) * 4, bias_from + arriving_tile * kTile);
      from += kTile * kDepth;
      if (++arriving_chunk == p.chunks) arriving_chunk = 0, ++arriving_tile;
      arriving_slot = (arriving_slot + 1) % kStages;
    }
    copy_async_commit();  // an empty group where nothing is left, so that groups can be counted
  };
  for (int i = 0; i + 1 < kStages; ++i) send();
  load_latents<S>(p, shared);

  // The row that this lane names to ldmatrix, and its places for the two halves (16 coordinates) of a stage.
  const int row = down * S::kRowTiles * 16 + lane % 16;
  const uint32_t latents_start = shared_address(shared + kLatentsAt<S>) + row * kDepth * 2;
  const uint32_t latents_at[2] = {latents_start + swizzled(row, lane / 16) * 16, latents_start + swizzled(row, lane / 16 + 2) * 16};
  const int code = across * S::kWarpCodes + lane % 8 + lane / 16 * 8;
  const uint32_t codes_start = ring + code * kDepth * 2;
  const uint32_t codes_at[2] = {codes_start + swizzled(code, lane / 8 % 2) * 16, codes_start + swizzled(code, lane / 8 % 2 + 2) * 16};

  Leaders<S> leaders;
  float scores[S::kRowTiles][S::kColumnTiles][4];
  int slot = 0;
  for (int tile = 0; tile < p.tiles; ++tile) {
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      copy_async_wait<kStages - 2>();
      __syncthreads();  // this stage is there for all, and nobody reads the one before any more
      send();
      if (chunk == 0) {
        const float* bias = reinterpret_cast<const float*>(shared + kBiasAt) + slot * kTile + across * S::kWarpCodes + lane % 4 * 2;
        const float* factor = reinterpret_cast<const float*>(shared + kFactorAt<S>) + down * S::kRowTiles * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < S::kRowTiles; ++i) {
          const float upper = factor[i * 16], lower = factor[i * 16 + 8];
#pragma unroll
          for (int j = 0; j < S::kColumnTiles; ++j) {
            scores[i][j][0] = bias[j * 8] * upper, scores[i][j][1] = bias[j * 8 + 1] * upper;
            scores[i][j][2] = bias[j * 8] * lower, scores[i][j][3] = bias[j * 8 + 1] * lower;
          }
        }
      }
// All fragments of the stage are asked for before the first product, which then need not wait for the second half of them.
      uint32_t a[2][S::kRowTiles][4], b[2][S::kColumnTiles / 2][4];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint32_t rows_from = latents_at[step] + chunk * (S::kRows * kDepth * 2), codes_from = codes_at[step] + slot * kStageBytes;
#pragma unroll
        for (int i = 0; i < S::kRowTiles; ++i) ldmatrix_x4(a[step][i], rows_from + i * (16 * kDepth * 2));
#pragma unroll
        for (int j = 0; j < S::kColumnTiles / 2; ++j) ldmatrix_x4(b[step][j], codes_from + j * (16 * kDepth * 2));
      }
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int i = 0; i < S::kRowTiles; ++i)
#pragma unroll
          for (int j = 0; j < S::kColumnTiles; ++j) mma_16816(scores[i][j], a[step][i], b[step][j / 2][j % 2 * 2], b[step][j / 2][j % 2 * 2 + 1]);
      slot = (slot + 1) % kStages;
    }
    leaders.note(scores, tile);
  }
  copy_async_wait<0>();
  __syncthreads();  // nobody reads the ring any more
  decide<S>(p, shared, leaders);
}

}  // namespace t2v
