// Nearest codebook rows on a CPU: fused, exact, with no N x K buffer.
//
//   codebook [K, D] -> centred, scaled, rounded, packed for the processor          (once a call)
//   latents, a few at a time -> the same -> scores x.c - |c|^2/2 in registers or tiles
//              -> codes within twice the error bound of the best: one -> done; several -> vq.h decides without rounding
//
// vq_cpu_vector.h (portable, AVX2, AVX-512, AVX-512-bf16) and vq_cpu_amx.h hold the scores; this file chooses among them, collects statistics,
// and registers the operators. What is rounded where, and why no row can be decided wrongly: docs/kernel.md.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

#include "vq_cpu_vector.h"
#ifdef T2V_X86
#include "vq_cpu_amx.h"
#endif

namespace t2v {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kBlock = 192;   // latents that a thread takes through all steps before the next: they stay in its cache
constexpr int64_t kSample = 256;  // latents on which a precision is tried

enum class Path { kPortable, kAvx2, kAvx512, kBf16, kAmx };
constexpr std::string_view kPathNames[] = {"portable", "avx2", "avx512", "bf16", "amx"};

// The fastest path that this processor has; the environment's T2V_VQ_CPU=portable|avx2|avx512|bf16|amx asks for a lesser one.
Path best_path() {
  const char* wanted = std::getenv("T2V_VQ_CPU");
  if (wanted != nullptr && std::find(std::begin(kPathNames), std::end(kPathNames), wanted) == std::end(kPathNames))
    throw std::runtime_error(std::string("T2V_VQ_CPU is '") + wanted + "'; it can be portable, avx2, avx512, bf16 or amx");
#ifdef T2V_X86
  const auto least = [&](Path path) {
    for (int i = 0; wanted != nullptr && i < 5; ++i)
      if (kPathNames[i] == wanted) return std::min(path, static_cast<Path>(i));
    // Unless asked for: bf16 dot products are twice as fast as fp32 on AMD's processors, and half as fast on Intel's.
    return path == Path::kBf16 && !__builtin_cpu_is("amd") ? Path::kAvx512 : path;
  };
  static const bool has_amx = amx::available();
  if (has_amx) return least(Path::kAmx);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq"))
    return least(__builtin_cpu_supports("avx512bf16") ? Path::kBf16 : Path::kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return least(Path::kAvx2);
#endif
  return Path::kPortable;
}

// Latents of any type that converts to fp32 exactly.
struct Latents {
  const float* block(int64_t start, int64_t rows, std::vector<float>& converted) const {
    if (type == ScalarType::Float) return static_cast<const float*>(data) + start * dim;
    converted.resize(kBlock * dim);
    for (int64_t i = 0; i < rows * dim; ++i) {
      if (type == ScalarType::BFloat16) converted[i] = static_cast<const torch::headeronly::BFloat16*>(data)[start * dim + i];
      else converted[i] = static_cast<const torch::headeronly::Half*>(data)[start * dim + i];
    }
    return converted.data();
  }

  const void* data;
  ScalarType type;
  int64_t count, dim;
};

// Where results go; what is not wanted is null.
struct Results {
  int64_t* codes;
  float* quantized = nullptr;
  float* sums = nullptr;  // only where one thread does all
};

template <class Book, class Work>
struct Way {
  void (*pack)(Book&, int64_t, double&, double&);
  int64_t (*lookup)(const Book&, Work&, const float*, int64_t, int64_t*);
};

// Adds the first `width` numbers of each latent to its code's row of `table` [K, width].
#ifdef T2V_X86
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void add_rows(const float* x, int64_t stride, const int64_t* codes, int64_t rows, int64_t width, float* table) {
  for (int64_t row = 0; row < rows; ++row) {
    float* sum = table + codes[row] * width;
    for (int64_t d = 0; d < width; ++d) sum[d] += x[row * stride + d];
  }
}

// Codebook rows of codes; past the cache where they can be, so that they need not be read before they are written.
void gather(const Codebook& book, const int64_t* codes, int64_t count, float* quantized) {
  const int64_t dim = book.dim;
  for (int64_t i = 0; i < count; ++i, quantized += dim) {
    const float* row = book.rows + codes[i] * dim;
#ifdef T2V_X86
    if (dim % 4 == 0 && reinterpret_cast<uintptr_t>(quantized) % 16 == 0) {
      for (int64_t d = 0; d < dim; d += 4) _mm_stream_ps(quantized + d, _mm_loadu_ps(row + d));
      continue;
    }
#endif
    std::memcpy(quantized, row, dim * sizeof(float));
  }
#ifdef T2V_X86
  _mm_sfence();  // before another thread reads them
#endif
}

template <class Book, class Work>
int64_t lookup_range(const Book& book, const Way<Book, Work>& way, const Latents& latents, int64_t begin, int64_t end, const Results& results) {
  const KeepSubnormals keep;
  Work work(book);
  std::vector<float> converted;
  int64_t looked_at = 0;
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t rows = std::min(kBlock, end - start), dim = book.dim;
    const float* x = latents.block(start, rows, converted);
    int64_t* codes = results.codes + start;
    looked_at += way.lookup(book, work, x, rows, codes);
    if (results.quantized == nullptr || std::any_of(codes, codes + rows, [](int64_t code) { return code < 0; })) continue;
    gather(book, codes, rows, results.quantized + start * dim);
    if (results.sums != nullptr) add_rows(x, dim, codes, rows, dim, results.sums);
  }
  return looked_at;
}

// Look up latents [begin, N) with one precision; returns the end of what was done: all, or where it decides too little alone, only a sample.
template <class Book, class Work>
int64_t lookup_with(Precision precision, bool last, const Way<Book, Work>& way, const float* rows, int64_t size, const Latents& latents,
                    int64_t begin, const Results& results) {
  const KeepSubnormals keep;
  Book book(rows, size, latents.dim, precision);
  std::vector<double> norms(book.parts(), 0.0), errors(book.parts(), 0.0);
  parallel_for(0, book.parts(), 8, [&](int64_t from, int64_t to) {
    const KeepSubnormals keep;
    for (int64_t part = from; part < to; ++part) way.pack(book, part, norms[part], errors[part]);
  });
  book.largest_norm = *std::max_element(norms.begin(), norms.end());
  book.largest_error = *std::max_element(errors.begin(), errors.end());
  const int64_t sample = last ? begin : std::min(latents.count, begin + kSample);
  if (begin < sample) {
    const int64_t looked_at = lookup_range(book, way, latents, begin, sample, results);
    // A distance in double costs about as much as 32 scores of the fastest filter.
    if (looked_at * 32 > (sample - begin) * size) return sample;
  }
  parallel_for(sample, latents.count, kBlock, [&](int64_t from, int64_t to) { lookup_range(book, way, latents, from, to, results); });
  return latents.count;
}

void lookup(const Latents& latents, const float* rows, int64_t size, const Results& results) {
  using Vector = Way<vector::Book, vector::Work>;
  const Path path = best_path();
  Vector fp32{vector::portable::pack, vector::portable::lookup_rows};
  int64_t done = 0;
#ifdef T2V_X86
  if (path == Path::kAvx2) fp32 = {vector::avx2::pack, vector::avx2::lookup_rows};
  if (path >= Path::kAvx512) fp32 = {vector::avx512::pack, vector::avx512::lookup_rows};
  if (path == Path::kAmx) {
    const Way<amx::Book, amx::Work> way{amx::pack, amx::lookup_rows};
    if (latents.dim > amx::kSplitIsFree) done = lookup_with(Precision::kBf16, false, way, rows, size, latents, done, results);
    if (done < latents.count) done = lookup_with(Precision::kSplitBf16, false, way, rows, size, latents, done, results);
  }
  if (path == Path::kBf16 && latents.dim >= 32)  // below, bf16 leaves too much undecided
    done = lookup_with(Precision::kBf16, false, Vector{vector::bf16::pack, vector::bf16::lookup_rows}, rows, size, latents, done, results);
#endif
  if (done < latents.count) lookup_with(Precision::kFp32, true, fp32, rows, size, latents, done, results);
}

void count_codes(const int64_t* codes, int64_t count, int64_t size, float* counts) {
  std::vector<int64_t> numbers(size, 0);
  for (int64_t row = 0; row < count; ++row) ++numbers[codes[row]];
  for (int64_t code = 0; code < size; ++code) counts[code] = static_cast<float>(numbers[code]);
}

// Sums of the latents of each code. Each task adds up some columns, row after row: the sums do not depend on the number of threads.
void sum_latents(const Latents& latents, int64_t size, const int64_t* codes, float* sums) {
  const int64_t dim = latents.dim, threads = torch::stable::get_num_threads();
  const int64_t columns = ((dim + threads - 1) / threads + kLanes - 1) / kLanes * kLanes;  // of a task
  parallel_for(0, (dim + columns - 1) / columns, 1, [&](int64_t begin, int64_t end) {
    const KeepSubnormals keep;
    std::vector<float> converted;
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * columns, width = std::min(columns, dim - first);
      std::vector<float> table(size * width, 0.0f);  // in one piece, unlike columns of `sums`
      for (int64_t start = 0; start < latents.count; start += kBlock) {
        const int64_t rows = std::min(kBlock, latents.count - start);
        add_rows(latents.block(start, rows, converted) + first, dim, codes + start, rows, width, table.data());
      }
      for (int64_t code = 0; code < size; ++code) std::memcpy(sums + code * dim + first, table.data() + code * width, width * sizeof(float));
    }
  });
}

void refuse_bad_codebook(const float* rows, int64_t size, int64_t dim) {
  for (int64_t row = 0; row < size; ++row)
    if (!is_finite(rows + row * dim, dim)) throw std::runtime_error("codebook row " + std::to_string(row) + " holds NaN or infinity");
}

void refuse_bad_latents(const int64_t* codes, int64_t count) {
  for (int64_t row = 0; row < count; ++row)
    if (codes[row] < 0) throw std::runtime_error("latents row " + std::to_string(row) + " holds NaN or infinity");
}

Latents latents_of(const Tensor& latents) { return {latents.const_data_ptr(), latents.scalar_type(), latents.size(0), latents.size(1)}; }

// Codes int64 [N]. Contiguous fp32, bf16 or fp16 [N, D] and fp32 [K, D], K and D at least 1: the Python face sees to it.
Tensor op_lookup(const Tensor& latents, const Tensor& codebook, bool mark_bad) {
  const float* rows = codebook.const_data_ptr<float>();
  refuse_bad_codebook(rows, codebook.size(0), codebook.size(1));
  Tensor codes = torch::stable::empty({latents.size(0)}, ScalarType::Long);
  lookup(latents_of(latents), rows, codebook.size(0), {codes.mutable_data_ptr<int64_t>()});
  if (!mark_bad) refuse_bad_latents(codes.const_data_ptr<int64_t>(), latents.size(0));
  return codes;
}

// Codebook rows of the codes fp32 [N, D], codes int64 [N], and of each code the number of latents fp32 [K] and their sum fp32 [K, D].
// Sums are always deterministic: a CPU gains nothing from another order.
std::tuple<Tensor, Tensor, Tensor, Tensor> op_assign(const Tensor& latents, const Tensor& codebook, bool /*deterministic*/) {
  const int64_t count = latents.size(0), size = codebook.size(0), dim = codebook.size(1);
  const float* rows = codebook.const_data_ptr<float>();
  refuse_bad_codebook(rows, size, dim);
  Tensor codes = torch::stable::empty({count}, ScalarType::Long), quantized = torch::stable::empty({count, dim}, ScalarType::Float);
  Tensor counts = torch::stable::empty({size}, ScalarType::Float), sums = torch::stable::empty({size, dim}, ScalarType::Float);
  Results results{codes.mutable_data_ptr<int64_t>(), quantized.mutable_data_ptr<float>()};
  float* into = sums.mutable_data_ptr<float>();
  if (torch::stable::get_num_threads() == 1) {
    std::memset(into, 0, size * dim * sizeof(float));
    results.sums = into;
  }
  lookup(latents_of(latents), rows, size, results);
  refuse_bad_latents(results.codes, count);
  count_codes(results.codes, count, size, counts.mutable_data_ptr<float>());
  if (results.sums == nullptr) sum_latents(latents_of(latents), size, results.codes, into);
  return {quantized, codes, counts, sums};
}

}  // namespace
}  // namespace t2v

STABLE_TORCH_LIBRARY(t2v_vq, m) {
  m.def("lookup(Tensor latents, Tensor codebook, bool mark_bad) -> Tensor");
  m.def("assign(Tensor latents, Tensor codebook, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(t2v_vq, CPU, m) {
  m.impl("lookup", TORCH_BOX(&t2v::op_lookup));
  m.impl("assign", TORCH_BOX(&t2v::op_assign));
}
