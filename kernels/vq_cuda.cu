// Nearest codebook rows on a GPU: fused, exact, with no N x K buffer.
//
//   codebook -> vq_cuda_codebook.cuh: centred, scaled, fp16, packed
//   latents  -> vq_cuda_filter.cuh: scores by tensor cores, codes of the rows that the error bound decides, quantized rows
//            -> vq_cuda_refine.cuh: the rows that it does not, in double and at last in integers (vq.h)
//   codes    -> vq_cuda_statistics.cuh: counts, sums in a fixed order
//
// Everything is queued on the current stream; the call waits once, for one small copy that says whether a row held NaN or infinity.
// What is rounded where, and why no row can be decided wrongly: docs/kernel_cuda.md.
#include "vq_cuda_codebook.cuh"
#include "vq_cuda_filter.cuh"
#include "vq_cuda_refine.cuh"
#include "vq_cuda_statistics.cuh"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>

namespace t2v {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("nearest codes on CUDA: ") + cudaGetErrorString(error));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kHistogramCells = int64_t{1} << 22;  // 16 MiB at most
constexpr int64_t kHeadNumbers = int64_t{1} << 22;
constexpr int64_t kLeastPiece = 64, kLeastSlab = 128, kMostSlabs = 1024;

// Where results go. `quantized`, `counts` and `sums` are null for a lookup.
struct Outputs {
  int64_t* codes;
  float *quantized, *counts, *sums;
  bool deterministic;
};

// One buffer, divided; with a null base only its size is worked out.
struct Workspace {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* at = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return at;
  }
};

struct Plan {
  Problem problem;
  Sorting sorting;
  int64_t bytes;  // of the workspace
};

Plan make_plan(const void* latents, Type type, int64_t rows, const float* codebook, int64_t codes, int64_t dim, const Outputs& to, char* base) {
  Plan plan = {};
  Problem& p = plan.problem;
  Sorting& s = plan.sorting;
  p.latents = latents, p.codebook = codebook, p.rows = rows, p.codes = static_cast<int>(codes), p.dim = static_cast<int>(dim), p.type = type;
  p.wide_latents = dim % 8 == 0 && reinterpret_cast<uintptr_t>(latents) % 16 == 0;
  p.wide_codebook = dim % 4 == 0 && reinterpret_cast<uintptr_t>(codebook) % 16 == 0 && reinterpret_cast<uintptr_t>(to.quantized) % 16 == 0;
  p.tiles = static_cast<int>(ceil_div(codes, kTile)), p.chunks = static_cast<int>(ceil_div(dim, kDepth));
  p.out = to.codes, p.quantized = to.quantized;
  const bool counted = to.counts != nullptr, sorted = counted && to.deterministic;
  if (counted && !sorted) p.atomic_sums = to.sums;
  Workspace space{base};
  p.status = space.take<Status>(1);
  p.mean = space.take<float>(p.chunks * kDepth);
  p.bias = space.take<float>(p.tiles * kTile);
  p.packed = space.take<uint16_t>(static_cast<int64_t>(p.tiles) * kTile * p.chunks * kDepth);
  p.list = space.take<uint32_t>(rows);
  p.slabs = sorted ? static_cast<int>(std::clamp(ceil_div(rows, kLeastSlab), int64_t{1}, std::min(kMostSlabs, kHistogramCells / codes))) : 1;
  p.slab_rows = std::max(ceil_div(ceil_div(rows, p.slabs), kWarp) * kWarp, int64_t{kWarp});
  if (counted) p.histogram = space.take<int32_t>(codes * p.slabs);
  if (sorted) {
    s.total = space.take<uint32_t>(codes);
    s.first = space.take<uint32_t>(codes + 1);
    s.order = p.list;  // no longer needed then
    s.counts = to.counts, s.sums = to.sums;
    s.piece = std::max(kLeastPiece, ceil_div(rows * dim, kHeadNumbers));
    s.pieces = ceil_div(rows, s.piece);
    s.heads = space.take<float>(s.pieces * dim);
    for (s.team = kWarp; s.team < dim && s.team < 256;) s.team *= 2;
  }
  plan.bytes = space.used;
  return plan;
}

struct Device {
  int processors, shared_of_processor, shared_of_block;
};

Device device_now() {
  int index;
  Device device;
  check(cudaGetDevice(&index));
  check(cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, index));
  check(cudaDeviceGetAttribute(&device.shared_of_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index));
  check(cudaDeviceGetAttribute(&device.shared_of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  return device;
}

template <class S>
bool fits(const Device& device, int chunks, int blocks) {  // the driver takes 1 KiB of each block
  const int bytes = filter_shared_bytes<S>(chunks);
  return bytes <= device.shared_of_block && blocks * (bytes + 1024) <= device.shared_of_processor;
}

// The largest block of which two fit on a multiprocessor, unless there are too few of them to keep all busy.
template <class S>
bool suits(const Device& device, const Problem& p) {
  return fits<S>(device, p.chunks, 2) && ceil_div(p.rows, S::kRows) >= device.processors;
}

template <class S>
void launch_with(Problem p, const Device& device, cudaStream_t stream) {
  const int shared = filter_shared_bytes<S>(p.chunks);
  p.warp_codes = S::kWarpCodes;
  check(cudaFuncSetAttribute(filter_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  check(cudaFuncSetAttribute(filter_kernel<S>, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  T2V_LAUNCH(filter_kernel<S>, static_cast<unsigned>(ceil_div(p.rows, S::kRows)), kThreads, shared, stream, p);
  const int64_t blocks = std::min<int64_t>(ceil_div(p.rows, kRefineThreads / kWarp), 4 * device.processors);
  T2V_LAUNCH(refine_kernel, static_cast<unsigned>(blocks), kRefineThreads, 0, stream, p);
}

void launch_filter_and_refine(const Problem& p, cudaStream_t stream) {
  const Device device = device_now();
  if (suits<Shape128>(device, p)) return launch_with<Shape128>(p, device, stream);
  if (suits<Shape64>(device, p)) return launch_with<Shape64>(p, device, stream);
  if (!fits<Shape32>(device, p.chunks, 1)) throw std::runtime_error("nearest codes on CUDA: this GPU has too little shared memory");
  launch_with<Shape32>(p, device, stream);
}

// Queues everything; what it found out about bad rows comes back when the stream has done it.
Status run(const Plan& plan, const Outputs& to, cudaStream_t stream) {
  const Problem& p = plan.problem;
  const Sorting& s = plan.sorting;
  const auto blocks = [](int64_t threads, int64_t of_block) { return static_cast<unsigned>(ceil_div(threads, of_block)); };
  check(cudaMemsetAsync(p.status, 0, sizeof(Status), stream));
  if (p.histogram != nullptr) check(cudaMemsetAsync(p.histogram, 0, static_cast<size_t>(p.codes) * p.slabs * 4, stream));
  if (p.atomic_sums != nullptr) check(cudaMemsetAsync(p.atomic_sums, 0, static_cast<size_t>(p.codes) * p.dim * 4, stream));
  T2V_LAUNCH(mean_kernel, p.chunks, kMeanRows * kWarp, kMeanRows * kWarp * 8, stream, p);
  T2V_LAUNCH(largest_kernel, std::min(blocks(int64_t{p.codes} * kWarp, 256), 512u), 256, 0, stream, p);
  T2V_LAUNCH(pack_kernel, blocks(int64_t{p.tiles} * kTile * kWarp, 256), 256, 0, stream, p);
  if (p.rows > 0) launch_filter_and_refine(p, stream);
  if (s.first != nullptr) {
    T2V_LAUNCH(scan_slabs_kernel, blocks(int64_t{p.codes} * kWarp, 256), 256, 0, stream, p, s);
    T2V_LAUNCH(scan_codes_kernel, 1, kScanThreads, kWarp * 4, stream, p, s);
    if (p.rows > 0) {
      T2V_LAUNCH(scatter_kernel, blocks(int64_t{p.slabs} * kWarp, 128), 128, 0, stream, p, s);
      T2V_LAUNCH(segments_kernel, blocks(s.pieces * s.team, 256), 256, 0, stream, p, s);
    }
    T2V_LAUNCH(join_kernel, static_cast<unsigned>(p.codes), s.team, 0, stream, p, s);
  } else if (to.counts != nullptr) {
    T2V_LAUNCH(counts_kernel, blocks(p.codes, 256), 256, 0, stream, p, to.counts);
  }
  check(cudaGetLastError());
  Status status;
  check(cudaMemcpyAsync(&status, p.status, sizeof status, cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));
  return status;
}

// The error that a call ends in, or nothing.
std::string complaint(const Status& status, bool mark_bad) {
  if (status.bad_code != 0) return "codebook row " + std::to_string(~status.bad_code) + " holds NaN or infinity";
  if (status.bad_latents != 0 && !mark_bad) return "latents row " + std::to_string(~status.bad_latents) + " holds NaN or infinity";
  return "";
}

}  // namespace
}  // namespace t2v

#ifdef T2V_CUDA_SHIM
#include "entry.h"
#else
#include "vq_cuda_ops.h"
#endif
