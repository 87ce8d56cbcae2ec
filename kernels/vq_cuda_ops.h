// The CUDA implementations of torch.ops.t2v_vq, over torch's stable ABI; the end of vq_cuda.cu.
//
//   tensors -> checked -> one workspace from torch's allocator -> run(), on the tensors' device and its current stream -> tensors, or an error
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace t2v {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor empty_like_device(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::empty(shape, type, std::nullopt, like.device());
}

Type type_of(const Tensor& latents) {
  const ScalarType type = latents.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, "latents must be fp32, bf16 or fp16");
  return type == ScalarType::Float ? Type::kFp32 : (type == ScalarType::BFloat16 ? Type::kBf16 : Type::kFp16);
}

void solve(const Tensor& latents, const Tensor& codebook, const Outputs& to, bool mark_bad) {
  const Type type = type_of(latents);
  STD_TORCH_CHECK(latents.dim() == 2 && codebook.dim() == 2 && latents.size(1) == codebook.size(1), "expected latents [N, D] and a codebook [K, D]");
  STD_TORCH_CHECK(codebook.scalar_type() == ScalarType::Float, "the codebook must be fp32");
  STD_TORCH_CHECK(latents.is_contiguous() && codebook.is_contiguous(), "latents and codebook must be contiguous");
  STD_TORCH_CHECK(codebook.get_device_index() == latents.get_device_index() && codebook.is_cuda(), "expected one device");
  const int64_t rows = latents.size(0), codes = codebook.size(0), dim = codebook.size(1);
  STD_TORCH_CHECK(codes >= 1 && codes <= 65536, "expected 1 to 65536 codes; got ", codes);
  STD_TORCH_CHECK(dim >= 1 && dim <= 1024, "expected 1 to 1024 numbers a row; got ", dim);
  STD_TORCH_CHECK(rows <= (int64_t{1} << 31), "expected at most 2^31 latents; got ", rows);
  const auto plan = [&](char* base) {
    return make_plan(latents.const_data_ptr(), type, rows, codebook.const_data_ptr<float>(), codes, dim, to, base);
  };
  const Tensor workspace = empty_like_device(latents, {plan(nullptr).bytes}, ScalarType::Byte);
  const auto stream = torch::stable::accelerator::getCurrentStream(latents.get_device_index());
  const Status status = run(plan(static_cast<char*>(workspace.mutable_data_ptr())), to, static_cast<cudaStream_t>(stream.nativeHandle()));
  const std::string error = complaint(status, mark_bad);
  STD_TORCH_CHECK(error.empty(), error);
}

// Codes int64 [N]; with mark_bad -1 where a latent holds NaN or infinity, else that is an error.
Tensor op_lookup(const Tensor& latents, const Tensor& codebook, bool mark_bad) {
  const torch::stable::accelerator::DeviceGuard guard(latents.get_device_index());
  Tensor codes = empty_like_device(latents, {latents.size(0)}, ScalarType::Long);
  solve(latents, codebook, {codes.mutable_data_ptr<int64_t>(), nullptr, nullptr, nullptr, true}, mark_bad);
  return codes;
}

// Codebook rows of the codes fp32 [N, D], codes int64 [N], and of each code the number of latents fp32 [K] and their sum fp32 [K, D].
std::tuple<Tensor, Tensor, Tensor, Tensor> op_assign(const Tensor& latents, const Tensor& codebook, bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(latents.get_device_index());
  const int64_t rows = latents.size(0), codes = codebook.size(0), dim = codebook.size(1);
  Tensor found = empty_like_device(latents, {rows}, ScalarType::Long);
  Tensor quantized = empty_like_device(latents, {rows, dim}, ScalarType::Float);
  Tensor counts = empty_like_device(latents, {codes}, ScalarType::Float);
  Tensor sums = empty_like_device(latents, {codes, dim}, ScalarType::Float);
  solve(latents, codebook,
        {found.mutable_data_ptr<int64_t>(), quantized.mutable_data_ptr<float>(), counts.mutable_data_ptr<float>(), sums.mutable_data_ptr<float>(),
         deterministic},
        false);
  return {quantized, found, counts, sums};
}

}  // namespace
}  // namespace t2v

// The operators' schemas are in the library for CPUs, which is loaded first.
STABLE_TORCH_LIBRARY_IMPL(t2v_vq, CUDA, m) {
  m.impl("lookup", TORCH_BOX(&t2v::op_lookup));
  m.impl("assign", TORCH_BOX(&t2v::op_assign));
}
