// Counts, and sums whose every bit is the same in every run: rows are sorted by code, and added in their order.
//
//   rows of each code in each slab of rows (counted by whoever decided the code) -> within a code: first place of each slab
//     -> over codes: first place of each code, counts -> a warp a slab puts its rows in their places, in order
//     -> a team of threads a piece of the places: sums of runs of a code; what continues a run of an earlier piece: apart
//     -> a code whose run spans pieces: adds what is apart, in order
#pragma once

#include "vq_cuda_device.cuh"

namespace t2v {

constexpr int kScanThreads = 1024;

struct Sorting {
  uint32_t* total;  // [codes]: rows of a code
  uint32_t* first;  // [codes + 1]: places before a code's
  uint32_t* order;  // [rows]: rows by code
  float* heads;     // [pieces, dim]: what a piece adds to a run that started in an earlier one
  float *counts, *sums;  // [codes], [codes, dim]: results
  int64_t piece;    // places of a piece
  int64_t pieces;
  int team;         // threads that share a piece, a power of two
};

__device__ inline uint32_t warp_prefix(uint32_t value, int lane) {  // with the lane's own
#pragma unroll
  for (int by = 1; by < kWarp; by *= 2) {
    const uint32_t other = __shfl_up_sync(kAll, value, by);
    if (lane >= by) value += other;
  }
  return value;
}

// Within a code, from counts to places: a warp a code.
__global__ void scan_slabs_kernel(const Problem p, const Sorting sorting) {
  const int code = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / kWarp), lane = threadIdx.x % kWarp;
  if (code >= p.codes) return;
  int32_t* counts = p.histogram + static_cast<int64_t>(code) * p.slabs;
  uint32_t before = 0;
  for (int start = 0; start < p.slabs; start += kWarp) {
    const uint32_t own = start + lane < p.slabs ? counts[start + lane] : 0;
    const uint32_t sum = warp_prefix(own, lane);
    if (start + lane < p.slabs) counts[start + lane] = static_cast<int32_t>(before + sum - own);
    before += __shfl_sync(kAll, sum, kWarp - 1);
  }
  if (lane == 0) sorting.total[code] = before;
}

// Over codes, in one block.
__global__ void __launch_bounds__(kScanThreads) scan_codes_kernel(const Problem p, const Sorting sorting) {
  T2V_SHARED(shared);
  uint32_t* sums = reinterpret_cast<uint32_t*>(shared);  // [32]: of each warp
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int each = (p.codes + kScanThreads - 1) / kScanThreads;
  const int begin = min(p.codes, static_cast<int>(threadIdx.x) * each), end = min(p.codes, begin + each);
  uint32_t own = 0;
  for (int code = begin; code < end; ++code) own += sorting.total[code];
  const uint32_t prefix = warp_prefix(own, lane);
  if (lane == kWarp - 1) sums[warp] = prefix;
  __syncthreads();
  uint32_t before = prefix - own;
  for (int i = 0; i < warp; ++i) before += sums[i];
  for (int code = begin; code < end; ++code) {
    sorting.first[code] = before;
    before += sorting.total[code];
  }
  if (threadIdx.x == kScanThreads - 1) sorting.first[p.codes] = before;
}

// Where sums are added in no fixed order, there is one slab.
__global__ void counts_kernel(const Problem p, float* counts) {
  const int code = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (code < p.codes) counts[code] = static_cast<float>(p.histogram[code]);
}

// A warp walks through its slab, 32 rows at a time; rows of one code keep their order.
__global__ void scatter_kernel(const Problem p, const Sorting sorting) {
  const int64_t slab = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (slab >= p.slabs || p.status->bad_code != 0) return;
  const int64_t end = min((slab + 1) * p.slab_rows, p.rows);
  for (int64_t start = slab * p.slab_rows; start < end; start += kWarp) {
    const int64_t row = start + lane;
    const int code = row < end ? static_cast<int>(p.out[row]) : -1;
    const unsigned same = __match_any_sync(kAll, code);
    int32_t* next = p.histogram + static_cast<int64_t>(code < 0 ? 0 : code) * p.slabs + slab;  // only this warp's
    const int rank = __popc(same & ((1u << lane) - 1));
    if (code >= 0) sorting.order[sorting.first[code] + static_cast<uint32_t>(*next) + rank] = static_cast<uint32_t>(row);
    __syncwarp();  // all have read the place that now moves
    if (code >= 0 && rank == 0) *next += __popc(same);
    __syncwarp();
  }
}

// The sums of a piece. A run's first part goes to the sums, what continues a run of an earlier piece is kept apart.
__global__ void __launch_bounds__(256) segments_kernel(const Problem p, const Sorting sorting) {
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * (256 / sorting.team) + threadIdx.x / sorting.team;
  if (piece >= sorting.pieces || p.status->bad_code != 0) return;
  const int64_t begin = piece * sorting.piece;
  const int64_t end = min(begin + sorting.piece, static_cast<int64_t>(sorting.first[p.codes]));
  for (int d = threadIdx.x % sorting.team; d < p.dim; d += sorting.team)
    for (int64_t i = begin; i < end;) {
      const int64_t code = p.out[sorting.order[i]];
      const int64_t stop = min(end, static_cast<int64_t>(sorting.first[code + 1]));
      const bool starts = sorting.first[code] >= begin;
      float sum = 0;
      for (; i + 4 <= stop; i += 4) {
        float value[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) value[j] = latent_at(p, static_cast<int64_t>(sorting.order[i + j]) * p.dim + d);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum += value[j];
      }
      for (; i < stop; ++i) sum += latent_at(p, static_cast<int64_t>(sorting.order[i]) * p.dim + d);
      (starts ? sorting.sums + code * p.dim : sorting.heads + piece * p.dim)[d] = sum;
    }
}

// A block a code: its count, zeros where it has no rows, and the parts of its run that lie in further pieces.
__global__ void join_kernel(const Problem p, const Sorting sorting) {
  const int64_t code = blockIdx.x;
  const int64_t begin = sorting.first[code], end = sorting.first[code + 1];
  const int64_t first = begin / sorting.piece, last = end > begin ? (end - 1) / sorting.piece : first;
  if (threadIdx.x == 0) sorting.counts[code] = static_cast<float>(end - begin);
  if (end > begin && first == last) return;
  for (int d = threadIdx.x; d < p.dim; d += blockDim.x) {
    float sum = end > begin ? sorting.sums[code * p.dim + d] : 0.0f;
    for (int64_t piece = first + 1; piece <= last; ++piece) sum += sorting.heads[piece * p.dim + d];
    sorting.sums[code * p.dim + d] = sum;
  }
}

}  // namespace t2v
