// What the filter leaves undecided: a warp a row.
//
//   two candidates     -> distances in double -> too close: integers -> code, quantized row, count
//   classes of codes   -> |x - c|^2 in fp32, four codes at a time -> those that may be the nearest so far: as above
#pragma once

#include "vq_cuda_device.cuh"

namespace t2v {

constexpr int kRefineThreads = 256;

// The nearest of the codes offered, of equally near ones the lowest; as Nearest in vq_cpu_common.h, by a warp whose lanes all hold the same.
class WarpNearest {
 public:
  __device__ WarpNearest(const Problem& p, int64_t row, int lane)
      : p_(p), start_(row * p.dim), lane_(lane), slack_(1 + 2.5 * static_cast<double>(p.dim + 4) * 0x1p-52) {}

  __device__ void offer(int code) {
    const float* c = p_.codebook + static_cast<int64_t>(code) * p_.dim;
    double distance = 0;
    for (int d = lane_; d < p_.dim; d += kWarp) {
      const double difference = static_cast<double>(latent_at(p_, start_ + d)) - static_cast<double>(c[d]);
      distance += difference * difference;
    }
    distance = warp_sum(distance);
    if (code_ >= 0) {
      if (distance > distance_ * slack_) return;
      if (distance * slack_ >= distance_) {  // too close to tell in double
        const int order = compare(c, p_.codebook + static_cast<int64_t>(code_) * p_.dim);
        if (order > 0 || (order == 0 && code > code_)) return;
      }
    }
    code_ = code;
    distance_ = distance;
  }

  __device__ int code() const { return code_; }

 private:
  // Sign of |x - a|^2 - |x - b|^2: each lane adds its coordinates, then digits are added.
  __device__ int compare(const float* a, const float* b) const {
    bool differs = false;
    for (int d = lane_; d < p_.dim; d += kWarp) differs |= a[d] != b[d];
    if (!__any_sync(kAll, differs)) return 0;
    ExactSum sum;
    for (int d = lane_; d < p_.dim; d += kWarp)
      if (a[d] != b[d]) sum.add_difference(latent_at(p_, start_ + d), a[d], b[d]);
    for (int i = 0; i < ExactSum::kDigits; ++i) {
      long long digit = sum.digit(i);
      for (int mask = 16; mask > 0; mask /= 2) digit += __shfl_xor_sync(kAll, digit, mask);
      sum.digit(i) = digit;
    }
    return sum.sign();
  }

  const Problem& p_;
  int64_t start_;
  int lane_;
  double slack_;
  int code_ = -1;
  double distance_ = 0;
};

// All codes of the classes in `classes`.
__device__ inline void offer_classes(const Problem& p, int64_t row, int lane, float scale, unsigned classes, WarpNearest& nearest) {
  // A distance in fp32 is within a relative (D + 4) 2^-24 where nothing underflows; see docs/kernel_cuda.md.
  const float slack = 1 + (p.dim + 4) * 0x1p-22f;
  float limit = kInfinity;
  for (int first = 0; first < p.codes; first += kTile)
    for (unsigned left = classes; left != 0; left &= left - 1) {
      const int which = __ffs(static_cast<int>(left)) - 1;
      for (int i = 0; i < p.warp_codes; i += 16) {
        const int base = first + which / 4 * p.warp_codes + i + which % 4 * 2;
        if (base >= p.codes) continue;
        int code[4];
        float distance[4] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          code[j] = base + j / 2 * 8 + j % 2;
          if (code[j] >= p.codes) code[j] = base;  // once more is harmless
        }
        for (int d = lane; d < p.dim; d += kWarp) {
          const float x = latent_at(p, row * p.dim + d);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float difference = (x - p.codebook[static_cast<int64_t>(code[j]) * p.dim + d]) * scale;
            distance[j] += difference * difference;
          }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) distance[j] = warp_sum(distance[j]);
#pragma unroll 1
        for (int j = 0; j < 4; ++j) {
          if (j > 0 && code[j] == base) continue;
          // What overflowed may be near all the same.
          if (distance[j] > limit && distance[j] < kInfinity) continue;
          nearest.offer(code[j]);
          limit = fminf(limit, distance[j] * slack + 1e-33f);
        }
      }
    }
}

__global__ void __launch_bounds__(kRefineThreads) refine_kernel(const Problem p) {
  if (p.status->bad_code != 0) return;
  const int lane = threadIdx.x % kWarp;
  const uint32_t count = p.status->undecided, warps = gridDim.x * (kRefineThreads / kWarp);
  const float scale = scale_of(p.status->largest);
  for (uint64_t i = blockIdx.x * (kRefineThreads / kWarp) + threadIdx.x / kWarp; i < count; i += warps) {
    const int64_t row = p.list[i];
    const int64_t left = p.out[row];
    WarpNearest nearest(p, row, lane);
    if (left >= 0) {
      nearest.offer(static_cast<int>(left & 0x7FFFFFFF));
      nearest.offer(static_cast<int>(left >> 32));
    } else {
      offer_classes(p, row, lane, scale, static_cast<unsigned>(~left), nearest);
    }
    __syncwarp();  // all have read what lane 0 now replaces
    emit_row(p, row, nearest.code(), lane);
  }
}

}  // namespace t2v
