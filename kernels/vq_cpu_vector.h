// The filter on vector units: panels of 32 codes side by side, a few latents at once, x.c - |c|^2/2 in registers.
#pragma once

#include "vq_cpu_common.h"

namespace t2v {
namespace vector {

constexpr int kPanel = 2 * kLanes;  // codes of a panel: two vectors
constexpr int kMostRows = 12;       // latents scored at once

using Vector = float __attribute__((vector_size(4 * kLanes)));

struct Book : Codebook {
  Book(const float* rows, int64_t codes, int64_t dim, Precision precision)
      : Codebook(rows, codes, dim, precision, static_cast<int>(dim)), steps(precision == Precision::kBf16 ? (dim + 1) / 2 : dim),
        panels((codes + kPanel - 1) / kPanel), bias(panels * kPanel), packed(panels * kPanel * steps) {}

  int64_t parts() const { return panels; }  // that `pack` takes, in any order

  T2V_INLINE void pack(int64_t panel, double& norm, double& error) {
    std::memset(packed.data + panel * steps * kPanel, 0, steps * kPanel * sizeof(float));
    for (int64_t place = 0; place < kPanel; ++place) {
      const int64_t code = panel * kPanel + place;
      bias.data[code] = -kInfinity;
      if (code >= codes) continue;
      double squares = 0, errors = 0;
      float before = 0;
      for (int64_t d = 0; d < dim; ++d) {
        const Seen seen = see(code, d);
        squares += seen.exact * seen.exact;
        errors += (seen.exact - seen.high) * (seen.exact - seen.high);
        if (precision == Precision::kFp32) {
          packed.data[(panel * steps + d) * kPanel + place] = seen.high;
        } else if (d % 2 == 1 || d + 1 == dim) {
          const uint32_t pair = d % 2 == 1 ? bf16_pair(before, seen.high) : bf16_pair(seen.high, 0);
          std::memcpy(&packed.data[(panel * steps + d / 2) * kPanel + place], &pair, 4);
        }
        before = seen.high;
      }
      bias.data[code] = static_cast<float>(-0.5 * squares);
      norm = std::max(norm, std::sqrt(squares) * (1 + 1e-6));
      error = std::max(error, std::sqrt(errors) * (1 + 1e-6));
    }
  }

  int64_t steps, panels;
  Aligned<float> bias;    // [panels, 32]: -|c|^2/2; of padding: -infinity
  Aligned<float> packed;  // [panels, steps, 32]: a number, or two of bf16
};

// Latents that are scored together.
struct Work {
  explicit Work(const Book& book) : latents(kMostRows * book.steps), candidates(kMostRows) {
    std::memset(latents.data, 0, kMostRows * book.steps * sizeof(float));
  }
  Aligned<float> latents;  // [12, steps]
  float best[kMostRows], threshold[kMostRows], two_error[kMostRows];
  bool filtered[kMostRows];
  Aligned<Candidates> candidates;
};

T2V_INLINE Vector load(const float* at) {
  Vector vector;
  std::memcpy(&vector, at, sizeof vector);
  return vector;
}

T2V_INLINE void add_products(const float* codes, const float* latent, Vector& low, Vector& high) {
  const Vector value = *latent - Vector{};  // that is, repeated: what is subtracted is 0
  low += load(codes) * value;
  high += load(codes + kLanes) * value;
}

namespace portable {
inline bool reaches(Vector low, Vector high, float threshold) {
  const auto some = (low >= threshold) | (high >= threshold);
  int any = 0;
  for (int i = 0; i < kLanes; ++i) any |= some[i];
  return any != 0;
}
#define T2V_ROWS 2
#define T2V_ADD add_products
#define T2V_REACHES reaches
#include "vq_cpu_vector.inc"
}  // namespace portable

#ifdef T2V_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
T2V_INLINE bool reaches(Vector low, Vector high, float threshold) {
  __m256 parts[4];
  std::memcpy(parts, &low, sizeof low);
  std::memcpy(parts + 2, &high, sizeof high);
  const __m256 largest = _mm256_max_ps(_mm256_max_ps(parts[0], parts[1]), _mm256_max_ps(parts[2], parts[3]));
  return _mm256_movemask_ps(_mm256_cmp_ps(largest, _mm256_set1_ps(threshold), _CMP_GE_OQ)) != 0;
}
#define T2V_ROWS 3
#define T2V_ADD add_products
#define T2V_REACHES reaches
#include "vq_cpu_vector.inc"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq")
namespace avx512 {
T2V_INLINE bool reaches(Vector low, Vector high, float threshold) {
  return _mm512_cmp_ps_mask(_mm512_max_ps((__m512)low, (__m512)high), _mm512_set1_ps(threshold), _CMP_GE_OQ) != 0;
}
#define T2V_ROWS 12
#define T2V_ADD add_products
#define T2V_REACHES reaches
#include "vq_cpu_vector.inc"
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")
namespace bf16 {
T2V_INLINE void add_pairs(const float* codes, const float* latent, Vector& low, Vector& high) {
  int32_t pair;
  std::memcpy(&pair, latent, 4);
  const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
  low = (Vector)_mm512_dpbf16_ps((__m512)low, (__m512bh)_mm512_load_si512(codes), value);
  high = (Vector)_mm512_dpbf16_ps((__m512)high, (__m512bh)_mm512_load_si512(codes + kLanes), value);
}
#define T2V_ROWS 12
#define T2V_ADD add_pairs
#define T2V_REACHES avx512::reaches
#include "vq_cpu_vector.inc"
}  // namespace bf16
#pragma GCC pop_options
#endif

}  // namespace vector
}  // namespace t2v
