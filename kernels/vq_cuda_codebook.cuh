// The codebook, made ready for the filter: centred, scaled, rounded to fp16, packed; and bounds on what the rounding did.
//
//   codebook [K, D] -> mean of up to 128 rows -> largest |c - m| -> scale -> fp16 tiles of 128 codes x 32 coordinates, biases, norms
#pragma once

#include "vq_cuda_device.cuh"

namespace t2v {

constexpr int kMeanRows = 8, kMeanSamples = 128;

// m: any vector is right; the mean keeps an offset from making every score alike. A block does 32 columns, its 8 warps share the rows.
__global__ void mean_kernel(const Problem p) {
  T2V_SHARED(shared);
  double* partial = reinterpret_cast<double*>(shared);  // [8, 32]
  const int lane = threadIdx.x % kWarp, part = threadIdx.x / kWarp;
  const int column = static_cast<int>(blockIdx.x) * kWarp + lane;
  const int samples = p.codes < kMeanSamples ? p.codes : kMeanSamples;
  double sum = 0;
  if (column < p.dim)
    for (int i = part; i < samples; i += kMeanRows) {
      const int64_t code = static_cast<int64_t>(i) * p.codes / samples;
      sum += p.codebook[code * p.dim + column];
    }
  partial[part * kWarp + lane] = sum;
  __syncthreads();
  if (part != 0) return;
  for (int i = 1; i < kMeanRows; ++i) sum += partial[i * kWarp + lane];
  p.mean[column] = static_cast<float>(sum / samples);  // of padding: 0
}

// The largest |c - m|, and whether a row holds NaN or infinity: a warp a code.
__global__ void largest_kernel(const Problem p) {
  const int lane = threadIdx.x % kWarp;
  const int warps = static_cast<int>(gridDim.x * blockDim.x / kWarp);
  float largest = 0;
  for (int code = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / kWarp); code < p.codes; code += warps) {
    const float* row = p.codebook + static_cast<int64_t>(code) * p.dim;
    bool bad = false;
    for (int d = lane; d < p.dim; d += kWarp) {
      bad |= !(fabsf(row[d]) < kInfinity);
      largest = fmaxf(largest, fabsf(row[d] - p.mean[d]));
    }
    if (bad) atomicMax(&p.status->bad_code, ~static_cast<uint32_t>(code));
  }
  for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, mask));
  if (lane == 0) atomicMax(&p.status->largest, __float_as_uint(largest));  // floats >= 0 are ordered as their bits are
}

// A warp packs a code; those after the last are zeros, with a bias below every score.
__global__ void pack_kernel(const Problem p) {
  const int lane = threadIdx.x % kWarp;
  const int code = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / kWarp);
  if (code >= p.tiles * kTile) return;
  const double scale = scale_of(p.status->largest);
  const int tile = code / kTile, row = code % kTile;
  const bool real = code < p.codes;
  double squares = 0, errors = 0;
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    const int d = chunk * kDepth + lane;
    double exact = 0;
    if (real && d < p.dim) exact = (static_cast<double>(p.codebook[static_cast<int64_t>(code) * p.dim + d]) - p.mean[d]) * scale;
    const uint16_t bits = to_fp16(static_cast<float>(exact));
    const double error = from_fp16(bits) - exact;
    squares += exact * exact;
    errors += error * error;
    const int64_t place = ((static_cast<int64_t>(tile) * p.chunks + chunk) * kTile + row) * kDepth + swizzled(row, lane / 8) * 8 + lane % 8;
    p.packed[place] = bits;
  }
  squares = warp_sum(squares);
  errors = warp_sum(errors);
  if (lane != 0) return;
  p.bias[code] = real ? static_cast<float>(-0.5 * squares) : kLowest;
  atomicMax(&p.status->norm, __float_as_uint(static_cast<float>(sqrt(squares) * (1 + 1e-6))));
  atomicMax(&p.status->error, __float_as_uint(static_cast<float>(sqrt(errors) * (1 + 1e-6))));
}

}  // namespace t2v
