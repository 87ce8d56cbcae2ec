// What the implementations on a CPU share: the codebook as a filter sees it, and how candidates become codes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define T2V_X86 1
#endif

#include "vq.h"

namespace t2v {

// Compiled anew, with its caller's instructions, wherever it is used.
#define T2V_INLINE inline __attribute__((always_inline))

constexpr int kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline float round_to_bf16(float value) {  // to nearest, ties to even; of finite numbers
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bf16_pair(float low, float high) {
  uint32_t a, b;
  std::memcpy(&a, &low, 4);
  std::memcpy(&b, &high, 4);
  return (a >> 16) | (b & 0xFFFF0000);
}

template <class T>
struct Aligned {  // 64 bytes
  explicit Aligned(size_t count) : data(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64))) {
    if (data == nullptr) throw std::bad_alloc();
  }
  Aligned(const Aligned&) = delete;
  ~Aligned() { std::free(data); }
  T* data;
};

// While it lives, this thread's arithmetic keeps subnormal numbers, whatever torch.set_flush_denormal says: what is exact depends on it.
class KeepSubnormals {
#ifdef T2V_X86
 public:
  KeepSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }
  ~KeepSubnormals() { _mm_setcsr(before_); }
  KeepSubnormals(const KeepSubnormals&) = delete;

 private:
  unsigned before_;
#endif
};

// How numbers are rounded for the filter.
enum class Precision { kFp32, kBf16, kSplitBf16 /* the sum of two bf16 */ };

// The codebook's centre and scale, and bounds on what rounding it does. Norms are of numbers after scaling, and from above.
struct Codebook {
  Codebook(const float* rows, int64_t codes, int64_t dim, Precision precision, int depth)
      : rows(rows), codes(codes), dim(dim), precision(precision), depth(depth), mean(dim) {
    std::vector<double> sum(dim, 0.0);
    for (int64_t code = 0; code < codes; ++code)
      for (int64_t d = 0; d < dim; ++d) sum[d] += rows[code * dim + d];
    for (int64_t d = 0; d < dim; ++d) mean[d] = static_cast<float>(sum[d] / static_cast<double>(codes));
    float largest = 0;
    for (int64_t code = 0; code < codes; ++code)
      for (int64_t d = 0; d < dim; ++d) largest = std::max(largest, std::fabs(rows[code * dim + d] - mean[d]));
    usable = std::isfinite(largest);
    // A power of two, so that scaling rounds nothing (but what underflows): the largest number comes to lie in [1, 2).
    const int exponent = largest > 0 && usable ? std::ilogb(largest) : 0;
    scale = std::ldexp(1.0f, std::clamp(-exponent, -126, 126));
  }

  // A number of the codebook as the filter sees it: the sum of `high` and `low`; the latter is 0 but for split bf16.
  struct Seen {
    double exact;
    float high, low;
  };
  Seen see(int64_t code, int64_t d) const {
    Seen seen{(static_cast<double>(rows[code * dim + d]) - mean[d]) * scale, 0, 0};
    seen.high = static_cast<float>(seen.exact);
    if (precision != Precision::kFp32) seen.high = round_to_bf16(seen.high);
    if (precision == Precision::kSplitBf16) seen.low = round_to_bf16(static_cast<float>(seen.exact - seen.high));
    return seen;
  }

  // Bound of each score's error for latents whose norm after scaling is at most `norm`, of which rounding cut off at most `residual`.
  // `terms` bounds the sum of the magnitudes of a score's terms.
  double error_bound(double norm, double residual, double& terms) const {
    const double seen = norm + residual, code = largest_norm + largest_error;
    terms = 0.5 * largest_norm * largest_norm + seen * code * (precision == Precision::kSplitBf16 ? 1.02 : 1.0);
    const double dropped = precision == Precision::kSplitBf16 ? 0x1.04p-16 * seen * code : 0;  // low times low: each at most 2^-8 of its number
    return (residual * largest_norm + seen * largest_error + dropped + (depth + 4) * 0x1p-23 * terms + 1e-32 * (1 + seen)) * (1 + 1e-6);
  }

  // Twice the bound for a latent of which `square` and `residual` are the squared norms, summed in fp32, of what it is after scaling and of
  // what rounding cut off; false if its scores mean nothing, because they may overflow or the latent is not finite.
  bool bound(float square, float residual, float& two_error) const {
    const double slack = 1 + static_cast<double>(dim + 32) * 0x1p-23;  // of the sums, in fp32
    const double norm = std::sqrt(square * slack);
    double terms;
    const double error = error_bound(norm, std::sqrt(residual * slack) + norm * 0x1p-23 /* centring rounds */, terms);
    const bool sound = usable && terms < 1e37;  // also false for NaN
    two_error = sound ? static_cast<float>((2 * error + 0x1p-22 * terms /* best - two_error rounds */) * (1 + 1e-6)) : 0;
    return sound;
  }

  const float* rows;  // [codes, dim]
  int64_t codes, dim;
  Precision precision;
  int depth;  // additions that a product goes through at most
  std::vector<float> mean;
  float scale = 1;
  double largest_norm = 0, largest_error = 0;
  bool usable = true;  // else nothing is filtered
};

// |x - c|^2 in double, to a relative (D + 4) 2^-53: all terms are positive and each step rounds by at most 2^-53.
T2V_INLINE double squared_distance(const float* x, const float* c, int64_t dim) {
  using Doubles = double __attribute__((vector_size(64)));
  using Floats = float __attribute__((vector_size(32)));
  Doubles sums[4] = {};
  int64_t d = 0;
  for (; d + 32 <= dim; d += 32)
    for (int i = 0; i < 4; ++i) {
      Floats a, b;
      std::memcpy(&a, x + d + 8 * i, 32);
      std::memcpy(&b, c + d + 8 * i, 32);
      const Doubles difference = __builtin_convertvector(a, Doubles) - __builtin_convertvector(b, Doubles);
      sums[i] += difference * difference;
    }
  for (; d + 8 <= dim; d += 8) {
    Floats a, b;
    std::memcpy(&a, x + d, 32);
    std::memcpy(&b, c + d, 32);
    const Doubles difference = __builtin_convertvector(a, Doubles) - __builtin_convertvector(b, Doubles);
    sums[0] += difference * difference;
  }
  sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = 0;
  for (; d < dim; ++d) sum += (static_cast<double>(x[d]) - c[d]) * (static_cast<double>(x[d]) - c[d]);
  for (int i = 0; i < 8; ++i) sum += sums[0][i];
  return sum;
}

// The nearest of the codes offered, of equally near ones the lowest; codes may come in any order.
class Nearest {
 public:
  T2V_INLINE Nearest(const float* x, const Codebook& book) : x_(x), book_(book), slack_(1 + 2.5 * static_cast<double>(book.dim + 4) * 0x1p-52) {}

  T2V_INLINE void offer(int64_t code) {
    const double distance = squared_distance(x_, book_.rows + code * book_.dim, book_.dim);
    if (code_ >= 0) {
      if (distance > distance_ * slack_) return;
      if (distance * slack_ >= distance_) {  // too close to tell in double
        const float *row = book_.rows + code * book_.dim, *best = book_.rows + code_ * book_.dim;
        const bool same = std::memcmp(row, best, book_.dim * sizeof(float)) == 0;
        const int order = same ? 0 : compare_distances(x_, row, best, book_.dim);
        if (order > 0 || (order == 0 && code > code_)) return;
      }
    }
    code_ = code;
    distance_ = distance;
  }

  int64_t code() const { return code_; }

 private:
  const float* x_;
  const Codebook& book_;
  double slack_;
  int64_t code_ = -1;
  double distance_ = 0;
};

inline bool is_finite(const float* x, int64_t dim) {
  float sum = 0;
  for (int64_t d = 0; d < dim; ++d) sum += x[d] - x[d];  // 0, or NaN
  return sum == 0;
}

// The codes of one latent that may be the nearest.
struct Candidates {
  static constexpr int kMost = 80;  // more are not listed: then every code is a candidate

  void start() { count = 0, all = false; }

  // Takes those of codes [first, first + width) whose score reaches `threshold`, which never falls.
  T2V_INLINE void offer(const float* found, int32_t first, int width, float threshold) {
    for (int i = 0; i < width && !all; ++i) {
      if (!(found[i] >= threshold)) continue;
      if (count == kMost) keep(threshold);
      all = count == kMost;
      if (!all) score[count] = found[i], code[count++] = first + i;
    }
  }

  // Drops those that no longer reach the threshold.
  void keep(float threshold) {
    int kept = 0;
    for (int i = 0; i < count; ++i)
      if (score[i] >= threshold) score[kept] = score[i], code[kept++] = code[i];
    count = kept;
  }

  // The nearest, or -1 if the latent is not finite; `looked_at` grows by the number of distances it took.
  T2V_INLINE int64_t decide(const Codebook& book, const float* x, bool filtered, float threshold, int64_t& looked_at) {
    if (!filtered) {
      if (!is_finite(x, book.dim)) return -1;
      all = true;
    }
    if (!all) {
      keep(threshold);
      if (count == 1) return code[0];
    }
    Nearest nearest(x, book);
    const int64_t several = all ? book.codes : count;
    for (int64_t i = 0; i < several; ++i) nearest.offer(all ? i : code[i]);
    looked_at += several;
    return nearest.code();
  }

  int count = 0;
  bool all = false;
  int32_t code[kMost];
  float score[kMost];
};

}  // namespace t2v
