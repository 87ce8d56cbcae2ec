// Nearest codebook rows on a CPU: fused, exact, with no N x K buffer.
//
//   codebook [K, D] -> centred, scaled, rounded, packed in panels of 32 codes      (once a call)
//   12 latents -> centred, scaled, rounded -> for each panel: x.c - |c|^2/2 in registers
//              -> for each of 16 lanes: best score, second best score, cell of the best
//              -> codes within twice the error bound of the best: one -> done; several -> vq.h decides without rounding
//
// What is rounded where, and why no row can be decided wrongly: docs/kernel.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "vq.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define T2V_X86 1
#endif

namespace t2v {
namespace {

constexpr int kLanes = 16;
constexpr int kPanel = 2 * kLanes;  // codes side by side in a panel: two vectors
constexpr int kMaxRows = 12;        // latents scored at once

using Vector = float __attribute__((vector_size(4 * kLanes)));
using Integers = int32_t __attribute__((vector_size(4 * kLanes)));

enum class Path { kPortable, kAvx2, kAvx512, kBf16 };

float round_to_bf16(float value) {  // to nearest, ties to even; of finite numbers
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t bf16_pair(float low, float high) {
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

// The codebook as the filter sees it. All norms are of numbers after scaling and are bounds from above.
struct Codebook {
  Codebook(const float* rows, int64_t codes, int64_t dim, bool bf16)
      : rows(rows), codes(codes), dim(dim), bf16(bf16), steps(bf16 ? (dim + 1) / 2 : dim), panels((codes + kPanel - 1) / kPanel),
        mean(dim), bias(panels * kPanel), packed(panels * kPanel * steps) {
    centre();
    for (int64_t i = 0; i < panels * kPanel; ++i) bias.data[i] = -std::numeric_limits<float>::infinity();
    std::memset(packed.data, 0, panels * kPanel * steps * sizeof(float));
    for (int64_t code = 0; code < codes; ++code) pack(code);
  }

  void centre() {
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

  void pack(int64_t code) {
    double squares = 0, errors = 0;
    const int64_t panel = code / kPanel, place = code % kPanel;
    float before = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const double exact = (static_cast<double>(rows[code * dim + d]) - mean[d]) * scale;
      float seen = static_cast<float>(exact);
      if (bf16) seen = round_to_bf16(seen);
      squares += exact * exact;
      errors += (exact - seen) * (exact - seen);
      if (!bf16) {
        packed.data[(panel * steps + d) * kPanel + place] = seen;
      } else if (d % 2 == 1 || d + 1 == dim) {
        const uint32_t pair = d % 2 == 1 ? bf16_pair(before, seen) : bf16_pair(seen, 0);
        std::memcpy(&packed.data[(panel * steps + d / 2) * kPanel + place], &pair, 4);
      }
      before = seen;
    }
    bias.data[code] = static_cast<float>(-0.5 * squares);
    largest_norm = std::max(largest_norm, std::sqrt(squares) * (1 + 1e-6));
    largest_error = std::max(largest_error, std::sqrt(errors) * (1 + 1e-6));
  }

  const float* rows;
  int64_t codes, dim;
  bool bf16;
  int64_t steps, panels;
  std::vector<float> mean;
  Aligned<float> bias;    // [panels, 32]: -|c|^2/2; of padding: -infinity
  Aligned<float> packed;  // [panels, steps, 32]: a number, or two of bf16
  float scale = 1;
  double largest_norm = 0, largest_error = 0;
  bool usable = true;  // else nothing is filtered
};

// A latent as the filter sees it, and how far its scores may be from the exact ones.
struct Prepared {
  double error = 0;      // of each score
  bool finite = true;    // the latent itself
  bool filtered = true;  // else its scores mean nothing: overflow
};

inline __attribute__((always_inline)) Prepared prepare(const Codebook& book, const float* x, float* out) {
  float squares[kLanes] = {}, errors[kLanes] = {}, bad[kLanes] = {};
  const int64_t dim = book.dim;
  for (int64_t start = 0; start < dim; start += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, dim - start);
    float seen[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) {
      const float value = (x[start + i] - book.mean[start + i]) * book.scale;
      bad[i] += x[start + i] - x[start + i];  // 0, or NaN
      seen[i] = book.bf16 ? round_to_bf16(value) : value;
      squares[i] += value * value;
      errors[i] += (value - seen[i]) * (value - seen[i]);
    }
    if (!book.bf16) {
      std::memcpy(out + start, seen, count * sizeof(float));
    } else {
      for (int64_t i = 0; i < count; i += 2) {
        const uint32_t pair = bf16_pair(seen[i], i + 1 < count ? seen[i + 1] : 0);
        std::memcpy(out + (start + i) / 2, &pair, 4);
      }
    }
  }
  double square = 0, error = 0, nothing = 0;
  for (int i = 0; i < kLanes; ++i) square += squares[i], error += errors[i], nothing += bad[i];
  Prepared prepared;
  prepared.finite = nothing == 0;
  const double slack = 1 + static_cast<double>(dim + 32) * 0x1p-23;  // of the sums above, in fp32
  const double norm = std::sqrt(square * slack);
  const double residual = std::sqrt(error * slack) + norm * 0x1p-23;  // + rounding of the centred latent itself
  const double seen_norm = norm + residual, code_norm = book.largest_norm + book.largest_error;
  const double terms = 0.5 * book.largest_norm * book.largest_norm + seen_norm * code_norm;  // bounds the sum of |terms| of a score
  prepared.error = (residual * book.largest_norm + seen_norm * book.largest_error + static_cast<double>(dim + 2) * 0x1p-22 * terms +
                    1e-32 * (1 + seen_norm)) * (1 + 1e-6);
  prepared.filtered = book.usable && terms < 1e37;  // also false for NaN
  return prepared;
}

// What a scan leaves of each of its latents.
struct Found {
  alignas(64) float best[kMaxRows][kLanes];
  alignas(64) float second[kMaxRows][kLanes];
  alignas(64) int32_t cell[kMaxRows][kLanes];  // code = cell * 16 + lane
};

inline __attribute__((always_inline)) void note(Found& found, int row, Vector score, int32_t cell) {
  Vector best, second;
  Integers where;
  std::memcpy(&best, found.best[row], sizeof best);
  std::memcpy(&second, found.second[row], sizeof second);
  std::memcpy(&where, found.cell[row], sizeof where);
  const Integers better = score > best;
  const Vector lower = better ? best : score;
  second = lower > second ? lower : second;
  best = better ? score : best;
  where = better ? Integers{} + cell : where;
  std::memcpy(found.best[row], &best, sizeof best);
  std::memcpy(found.second[row], &second, sizeof second);
  std::memcpy(found.cell[row], &where, sizeof where);
}

template <int kRows>
inline __attribute__((always_inline)) void scan_fp32(const Codebook& book, const float* x, Found& found) {
  const int64_t steps = book.steps;
  for (int64_t panel = 0; panel < book.panels; ++panel) {
    const Vector* codes = reinterpret_cast<const Vector*>(book.packed.data + panel * steps * kPanel);
    const Vector* bias = reinterpret_cast<const Vector*>(book.bias.data + panel * kPanel);
    Vector low[kRows], high[kRows];
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) low[row] = bias[0], high[row] = bias[1];
    for (int64_t d = 0; d < steps; ++d) {
      const Vector c0 = codes[2 * d], c1 = codes[2 * d + 1];
#pragma GCC unroll 12
      for (int row = 0; row < kRows; ++row) {
        const Vector value = Vector{} + x[row * steps + d];
        low[row] += c0 * value;
        high[row] += c1 * value;
      }
    }
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      note(found, row, low[row], static_cast<int32_t>(2 * panel));
      note(found, row, high[row], static_cast<int32_t>(2 * panel + 1));
    }
  }
}

// The same code, compiled for each kind of processor.
void scan_portable(const Codebook& book, const float* x, Found& found) { scan_fp32<2>(book, x, found); }
Prepared prepare_portable(const Codebook& book, const float* x, float* out) { return prepare(book, x, out); }
#ifdef T2V_X86
#define T2V_AVX2 __attribute__((target("avx2,fma")))
#define T2V_AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq")))
T2V_AVX2 void scan_avx2(const Codebook& book, const float* x, Found& found) { scan_fp32<3>(book, x, found); }
T2V_AVX2 Prepared prepare_avx2(const Codebook& book, const float* x, float* out) { return prepare(book, x, out); }
T2V_AVX512 void scan_avx512(const Codebook& book, const float* x, Found& found) { scan_fp32<12>(book, x, found); }
T2V_AVX512 Prepared prepare_avx512(const Codebook& book, const float* x, float* out) { return prepare(book, x, out); }

__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16"))) void scan_bf16(const Codebook& book, const float* x, Found& found) {
  const int64_t steps = book.steps;
  for (int64_t panel = 0; panel < book.panels; ++panel) {
    const float* codes = book.packed.data + panel * steps * kPanel;
    __m512 low[kMaxRows], high[kMaxRows];
#pragma GCC unroll 12
    for (int row = 0; row < kMaxRows; ++row) {
      low[row] = _mm512_load_ps(book.bias.data + panel * kPanel);
      high[row] = _mm512_load_ps(book.bias.data + panel * kPanel + kLanes);
    }
    for (int64_t d = 0; d < steps; ++d) {
      const __m512bh c0 = (__m512bh)_mm512_load_si512(codes + 2 * d * kLanes);
      const __m512bh c1 = (__m512bh)_mm512_load_si512(codes + (2 * d + 1) * kLanes);
#pragma GCC unroll 12
      for (int row = 0; row < kMaxRows; ++row) {
        int32_t pair;
        std::memcpy(&pair, x + row * steps + d, 4);
        const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
        low[row] = _mm512_dpbf16_ps(low[row], c0, value);
        high[row] = _mm512_dpbf16_ps(high[row], c1, value);
      }
    }
#pragma GCC unroll 12
    for (int row = 0; row < kMaxRows; ++row) {
      note(found, row, (Vector)low[row], static_cast<int32_t>(2 * panel));
      note(found, row, (Vector)high[row], static_cast<int32_t>(2 * panel + 1));
    }
  }
}
#endif

struct Scan {
  int rows;
  Prepared (*prepare)(const Codebook&, const float*, float*);
  void (*run)(const Codebook&, const float*, Found&);
};

Scan scan_of(Path path) {
  switch (path) {
#ifdef T2V_X86
    case Path::kBf16: return {12, prepare_avx512, scan_bf16};
    case Path::kAvx512: return {12, prepare_avx512, scan_avx512};
    case Path::kAvx2: return {3, prepare_avx2, scan_avx2};
#endif
    default: return {2, prepare_portable, scan_portable};
  }
}

// All codes, in double and where that does not decide in integers.
int64_t nearest_of_all(const Codebook& book, const float* x) {
  Nearest nearest(x, book.rows, book.dim);
  for (int64_t code = 0; code < book.codes; ++code) nearest.offer(code);
  return nearest.code();
}

// Decide from what the scan left; `ambiguous` is set if the scores alone did not.
int64_t decide(const Codebook& book, const float* x, const Found& found, int row, double error, bool& ambiguous) {
  float best = found.best[row][0];
  for (int lane = 1; lane < kLanes; ++lane) best = std::max(best, found.best[row][lane]);
  const double threshold = static_cast<double>(best) - 2 * error;
  int64_t only = -1;
  int near = 0;
  bool hidden = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (found.best[row][lane] >= threshold) only = static_cast<int64_t>(found.cell[row][lane]) * kLanes + lane, ++near;
    hidden |= found.second[row][lane] >= threshold;
  }
  if (near == 1 && !hidden) return only;
  ambiguous = true;
  Nearest nearest(x, book.rows, book.dim);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(found.best[row][lane] >= threshold)) continue;
    if (found.second[row][lane] >= threshold) {
      for (int64_t code = lane; code < book.codes; code += kLanes) nearest.offer(code);
    } else {
      nearest.offer(static_cast<int64_t>(found.cell[row][lane]) * kLanes + lane);
    }
  }
  return nearest.code();
}

// Codes of `count` latents; returns how many were ambiguous.
int64_t lookup_rows(const Codebook& book, Path path, const float* latents, int64_t count, int64_t* codes) {
  const Scan scan = scan_of(path);
  Aligned<float> packed(scan.rows * book.steps);
  Found found;
  Prepared prepared[kMaxRows];
  int64_t ambiguous = 0;
  for (int64_t start = 0; start < count; start += scan.rows) {
    const int rows = static_cast<int>(std::min<int64_t>(scan.rows, count - start));
    if (rows < scan.rows) std::memset(packed.data, 0, scan.rows * book.steps * sizeof(float));
    for (int row = 0; row < rows; ++row) prepared[row] = scan.prepare(book, latents + (start + row) * book.dim, packed.data + row * book.steps);
    for (int row = 0; row < scan.rows; ++row)
      for (int lane = 0; lane < kLanes; ++lane) {
        found.best[row][lane] = found.second[row][lane] = -std::numeric_limits<float>::infinity();
        found.cell[row][lane] = 0;
      }
    scan.run(book, packed.data, found);
    for (int row = 0; row < rows; ++row) {
      const float* x = latents + (start + row) * book.dim;
      bool unsure = false;
      if (!prepared[row].finite) codes[start + row] = -1;
      else if (!prepared[row].filtered) codes[start + row] = nearest_of_all(book, x);
      else codes[start + row] = decide(book, x, found, row, prepared[row].error, unsure);
      ambiguous += unsure;
    }
  }
  return ambiguous;
}

// The fastest path that this processor has; the environment's T2V_VQ_CPU=portable|avx2|avx512|bf16 asks for a lesser one.
Path best_path() {
  Path best = Path::kPortable;
#ifdef T2V_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Path::kAvx2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    best = Path::kAvx512;
  if (best == Path::kAvx512 && __builtin_cpu_supports("avx512bf16")) best = Path::kBf16;
#endif
  const char* wanted = std::getenv("T2V_VQ_CPU");
  const std::vector<std::string> names = {"portable", "avx2", "avx512", "bf16"};
  for (size_t i = 0; wanted != nullptr && i < names.size(); ++i)
    if (names[i] == wanted) best = std::min(best, static_cast<Path>(i));
  return best;
}

constexpr int64_t kSample = 240;     // latents on which the bf16 filter is tried
constexpr int64_t kBf16Dim = 32;     // below, bf16 leaves too much undecided
constexpr int64_t kRowsATask = 240;  // of one call of a thread

void lookup(const float* latents, int64_t count, const float* rows, int64_t size, int64_t dim, int64_t* codes) {
  if (count == 0) return;
  Path path = best_path();
  int64_t done = 0;
  std::unique_ptr<Codebook> book;
  if (path == Path::kBf16) {
    path = Path::kAvx512;
    if (dim >= kBf16Dim) {
      book = std::make_unique<Codebook>(rows, size, dim, true);
      done = std::min(count, kSample);
      // Where bf16 leaves more than a quarter of the latents undecided, fp32 is faster.
      if (lookup_rows(*book, Path::kBf16, latents, done, codes) * 4 <= done) path = Path::kBf16;
    }
  }
  if (path != Path::kBf16 && done < count) book = std::make_unique<Codebook>(rows, size, dim, false);
  torch::stable::parallel_for(done, count, kRowsATask, [&](int64_t begin, int64_t end) {
    lookup_rows(*book, path, latents + begin * dim, end - begin, codes + begin);
  });
}

// Statistics of codes: each code's rows in order of their numbers, so that the sums do not depend on the number of threads.
void statistics(const float* latents, int64_t count, const float* rows, int64_t size, int64_t dim, const int64_t* codes, float* quantized,
                float* counts, float* sums) {
  std::vector<int64_t> first(size + 1, 0), order(count);
  for (int64_t i = 0; i < count; ++i) ++first[codes[i] + 1];
  for (int64_t code = 0; code < size; ++code) first[code + 1] += first[code];
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t i = 0; i < count; ++i) order[next[codes[i]]++] = i;
  torch::stable::parallel_for(0, size, 16, [&](int64_t begin, int64_t end) {
    for (int64_t code = begin; code < end; ++code) {
      float* sum = sums + code * dim;
      std::memset(sum, 0, dim * sizeof(float));
      for (int64_t i = first[code]; i < first[code + 1]; ++i) {
        const float* x = latents + order[i] * dim;
        for (int64_t d = 0; d < dim; ++d) sum[d] += x[d];
        std::memcpy(quantized + order[i] * dim, rows + code * dim, dim * sizeof(float));
      }
      counts[code] = static_cast<float>(first[code + 1] - first[code]);
    }
  });
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Codes int64 [N]; -1 where a latent holds NaN or infinity. Contiguous fp32 [N, D] and [K, D], K and D at least 1: the Python face sees to it.
Tensor op_lookup(const Tensor& latents, const Tensor& codebook) {
  Tensor codes = torch::stable::empty({latents.size(0)}, ScalarType::Long);
  lookup(latents.const_data_ptr<float>(), latents.size(0), codebook.const_data_ptr<float>(), codebook.size(0), codebook.size(1),
         codes.mutable_data_ptr<int64_t>());
  return codes;
}

// Quantized rows fp32 [N, D], counts fp32 [K] and sums fp32 [K, D] of codes >= 0.
std::tuple<Tensor, Tensor, Tensor> op_statistics(const Tensor& latents, const Tensor& codebook, const Tensor& codes) {
  const int64_t count = latents.size(0), size = codebook.size(0), dim = codebook.size(1);
  Tensor quantized = torch::stable::empty({count, dim}, ScalarType::Float);
  Tensor counts = torch::stable::empty({size}, ScalarType::Float);
  Tensor sums = torch::stable::empty({size, dim}, ScalarType::Float);
  statistics(latents.const_data_ptr<float>(), count, codebook.const_data_ptr<float>(), size, dim, codes.const_data_ptr<int64_t>(),
             quantized.mutable_data_ptr<float>(), counts.mutable_data_ptr<float>(), sums.mutable_data_ptr<float>());
  return {quantized, counts, sums};
}

}  // namespace
}  // namespace t2v

STABLE_TORCH_LIBRARY(t2v_vq, m) {
  m.def("lookup(Tensor latents, Tensor codebook) -> Tensor");
  m.def("statistics(Tensor latents, Tensor codebook, Tensor codes) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(t2v_vq, CPU, m) {
  m.impl("lookup", TORCH_BOX(&t2v::op_lookup));
  m.impl("statistics", TORCH_BOX(&t2v::op_statistics));
}
