// The entry point that tests call: kernels/vq_cuda.cu ends with this file when it is compiled over the shim.
#pragma once

#include <cstdlib>

extern "C" {

struct HostCall {
  const void* latents;
  const float* codebook;
  int64_t rows, codes, dim;
  int64_t* out;
  float *quantized, *counts, *sums;  // null: a lookup
  int32_t type, deterministic, mark_bad;
  uint64_t seed;
  int32_t processors, shared_of_processor, shared_of_block;
  // What comes back.
  uint32_t undecided;  // rows that the filter left
  uint64_t bank_conflicts;
  char message[512];  // of an error; else empty
};

void t2v_vq_host(HostCall* call) {
  using namespace t2v;
  call->message[0] = 0;
  shim::settings = {call->seed, call->processors, call->shared_of_processor, call->shared_of_block};
  shim::reseed();
  shim::bank_conflicts = 0;
  constexpr int64_t kGuard = 4096;
  char* memory = nullptr;
  std::string error;
  try {
    const Outputs to = {call->out, call->quantized, call->counts, call->sums, call->deterministic != 0};
    const auto plan = [&](char* base) {
      return make_plan(call->latents, static_cast<Type>(call->type), call->rows, call->codebook, call->codes, call->dim, to, base);
    };
    const int64_t bytes = plan(nullptr).bytes;
    memory = static_cast<char*>(std::aligned_alloc(256, bytes + kGuard));
    std::memset(memory, 0xFF, bytes + kGuard);
    const Status status = run(plan(memory), to, nullptr);
    call->undecided = status.undecided;
    call->bank_conflicts = shim::bank_conflicts;
    error = complaint(status, call->mark_bad != 0);
    for (int64_t i = bytes; i < bytes + kGuard; ++i)
      if (memory[i] != static_cast<char>(0xFF)) error = "written behind the end of the workspace";
  } catch (const std::exception& caught) {
    error = caught.what();
  }
  std::free(memory);
  std::snprintf(call->message, sizeof call->message, "%s", error.c_str());
}

}  // extern "C"
