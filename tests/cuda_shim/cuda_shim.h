// Runs CUDA kernels on a host, to find what is wrong with them: included by kernels/vq_cuda_device.cuh in place of CUDA's headers.
//
//   launch -> blocks in random order -> shared memory filled with NaN -> a fiber a thread, the next one chosen at RANDOM wherever one waits
//     barriers, warp collectives, atomics: wait for, or give way to, others;  nobody can go on -> an error, with who waits where
//     cp.async: the bytes arrive when they are waited for, or by chance at once
//     mma.sync: fragments as in the PTX manual; sums cut off, not rounded, as tensor cores do
//
// One block at a time: kernels that wait for other blocks are out of reach.
#pragma once

#include <sys/mman.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __launch_bounds__(...)
#define T2V_LAUNCH(kernel, blocks, threads, shared, stream, ...) shim::launch(blocks, threads, shared, [=] { kernel(__VA_ARGS__); })
#define T2V_SHARED(name) unsigned char* name = shim::shared_memory.data()

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;
using std::min;

#ifdef __x86_64__
// Saves what a call must keep on this stack, and goes on where another stack did the same.
extern "C" void t2v_shim_switch(void** from, void* to);
asm(R"(
.text
.local t2v_shim_switch
t2v_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

namespace shim {

constexpr int kWarp = 32, kMostThreads = 1024, kStack = 1 << 16, kWords = 10, kGuard = 256;

struct Copy {
  uint32_t to;
  const void* from;
  int group;
};

struct Fiber {
#ifdef __x86_64__
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  bool done;
  const char* waits;  // for what
  std::vector<Copy> copies;
  int groups;  // of copies, committed
};

struct Warp {
  uint32_t words[2][kWarp][kWords];  // what lanes bring to a collective, of this one and of the one before
  const char* kind;
  int arrived, generation;
};

struct Settings {
  uint64_t seed = 0;
  int processors = 1, shared_of_processor = 233472, shared_of_block = 232448;
};

static Settings settings;
static std::mt19937_64 randomness;
static double newest_first;  // how often the fiber that became ready last goes on
static bool starve;          // whether one warp of each block, at random, only goes on when no other can
static std::vector<unsigned char> shared_memory;
static std::vector<Fiber> fibers(kMostThreads);
static std::vector<Warp> warps(kMostThreads / kWarp);
static std::vector<int> ready, at_barrier;
static int current, alive, block_threads;
static unsigned shared_bytes;
static std::function<void()> body;
static std::string failure;
static uint64_t bank_conflicts;
static char* stacks;
#ifdef __x86_64__
static void* scheduler_stack;
#else
static ucontext_t scheduler_context;
#endif

inline bool chance(double probability) { return static_cast<double>(randomness() >> 11) * 0x1p-53 < probability; }

inline void leave() {  // to the scheduler
#ifdef __x86_64__
  t2v_shim_switch(&fibers[current].stack_pointer, scheduler_stack);
#else
  swapcontext(&fibers[current].context, &scheduler_context);
#endif
}

[[noreturn]] inline void fail(const std::string& what) {
  failure = what + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(current) + ")";
  while (true) leave();
}

inline void give_way() {
  if (chance(0.5)) return;
  ready.push_back(current);
  leave();
}

inline void open_barrier() {
  ready.insert(ready.end(), at_barrier.begin(), at_barrier.end());
  at_barrier.clear();
}

inline void run_fiber() {
  body();
  Fiber& fiber = fibers[current];
  if (!fiber.copies.empty()) fail("a thread ends while copies are on their way");
  fiber.done = true;
  --alive;
  if (alive > 0 && static_cast<int>(at_barrier.size()) == alive) open_barrier();  // threads that ended are not waited for
  while (true) leave();
}

inline void start_fiber(int index) {
  Fiber& fiber = fibers[index];
  char* stack = stacks + static_cast<size_t>(index) * kStack;
#ifdef __x86_64__
  void** top = reinterpret_cast<void**>(stack + kStack - 16);  // aligned as after a call
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&run_fiber);
  fiber.stack_pointer = top - 6;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
#endif
  fiber.done = false;
  fiber.waits = "";
  fiber.copies.clear();
  fiber.groups = 0;
}

inline std::string who_waits() {
  std::string text = "no thread can go on:";
  for (int i = 0, shown = 0; i < block_threads && shown < 8; ++i)
    if (!fibers[i].done) text += " " + std::to_string(i) + " at " + fibers[i].waits, ++shown;
  return text;
}

inline void run_block() {
  std::fill(shared_memory.begin(), shared_memory.end(), 0xFF);
  ready.clear();
  at_barrier.clear();
  alive = block_threads;
  for (Warp& warp : warps) warp.arrived = warp.generation = 0;
  for (int i = 0; i < block_threads; ++i) start_fiber(i), ready.push_back(i);
  const int starved = starve ? static_cast<int>(randomness() % (block_threads / kWarp)) : -1;
  while (alive > 0) {
    if (ready.empty()) throw std::runtime_error(who_waits());
    size_t which = chance(newest_first) ? ready.size() - 1 : randomness() % ready.size();
    for (size_t tried = 1; tried < ready.size() && ready[which] / kWarp == starved; ++tried) which = (which + 1) % ready.size();
    current = ready[which];
    ready[which] = ready.back();
    ready.pop_back();
    threadIdx.x = static_cast<unsigned>(current);
#ifdef __x86_64__
    t2v_shim_switch(&scheduler_stack, fibers[current].stack_pointer);
#else
    swapcontext(&scheduler_context, &fibers[current].context);
#endif
    if (!failure.empty()) throw std::runtime_error(failure);
  }
  for (size_t i = shared_bytes; i < shared_memory.size(); ++i)
    if (shared_memory[i] != 0xFF) throw std::runtime_error("written behind the end of shared memory");
}

inline void launch(unsigned blocks, unsigned threads, unsigned shared, std::function<void()> kernel) {
  if (stacks == nullptr) {
    void* memory = mmap(nullptr, size_t{kMostThreads} * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stacks = static_cast<char*>(memory);
  }
  if (blocks == 0 || threads == 0 || threads > kMostThreads || threads % kWarp != 0) throw std::runtime_error("a launch of a wrong size");
  failure.clear();
  body = std::move(kernel);
  block_threads = static_cast<int>(threads);
  blockDim.x = threads, gridDim.x = blocks;
  shared_bytes = shared;
  shared_memory.assign(shared + kGuard, 0xFF);
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), randomness);
  for (const unsigned block : order) {
    blockIdx.x = block;
    run_block();
  }
}

inline void reseed() {
  randomness.seed(settings.seed);
  newest_first = settings.seed % 3 == 1 ? 0.9 : 0;
  starve = settings.seed % 3 == 2;
}

// Each lane of the warp brings some words; when all have, each goes on and sees the words of all.
inline const uint32_t (*exchange(const char* kind, unsigned mask, const uint32_t* mine, int count))[kWords] {
  Warp& warp = warps[current / kWarp];
  const int generation = warp.generation, lane = current % kWarp;
  if (mask != 0xFFFFFFFFu) fail(std::string(kind) + " of a part of a warp");
  if (warp.arrived > 0 && std::strcmp(warp.kind, kind) != 0) fail("lanes of a warp are at " + std::string(kind) + " and at " + warp.kind);
  warp.kind = kind;
  std::copy(mine, mine + count, warp.words[generation & 1][lane]);
  fibers[current].waits = kind;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.generation;
    for (int i = 0; i < kWarp; ++i) ready.push_back(current / kWarp * kWarp + i);
  }
  leave();
  return warp.words[generation & 1];
}

template <class T>
T shuffle(const char* kind, unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= 8);
  uint32_t words[2] = {};
  std::memcpy(words, &value, sizeof(T));
  const auto all = exchange(kind, mask, words, 2);
  if (from >= 0 && from < kWarp) std::memcpy(&value, all[from], sizeof(T));
  return value;
}

inline uint16_t to_fp16(float value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}

inline float from_fp16(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> made(1 << 16);
    for (uint32_t i = 0; i < made.size(); ++i) {
      const uint16_t half = static_cast<uint16_t>(i);
      _Float16 value;
      std::memcpy(&value, &half, 2);
      made[i] = static_cast<float>(value);
    }
    return made;
  }();
  return table[bits];
}

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - shared_memory.data());
}

inline void check_shared(uint32_t address, uint32_t bytes) {
  if (address % bytes != 0 || address + bytes > shared_bytes) fail("shared memory at " + std::to_string(address));
}

inline void copy_async_16(uint32_t to, const void* from) {
  check_shared(to, 16);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("cp.async from an address that is not a multiple of 16");
  if (chance(0.25)) std::memcpy(shared_memory.data() + to, from, 16);
  else fibers[current].copies.push_back({to, from, fibers[current].groups});
}

inline void copy_async_commit() { ++fibers[current].groups; }

template <int kNewest>
void copy_async_wait() {
  std::vector<Copy>& copies = fibers[current].copies;
  const int wanted = fibers[current].groups - kNewest;
  for (const Copy& copy : copies)
    if (copy.group < wanted) std::memcpy(shared_memory.data() + copy.to, copy.from, 16);
  copies.erase(std::remove_if(copies.begin(), copies.end(), [&](const Copy& copy) { return copy.group < wanted; }), copies.end());
}

inline void ldmatrix_x4(uint32_t (&out)[4], uint32_t address) {
  check_shared(address, 16);
  const auto addresses = exchange("ldmatrix", 0xFFFFFFFFu, &address, 1);
  const int lane = current % kWarp;
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned banks = 0;
    for (int row = 0; row < 8; ++row) banks |= 1u << (addresses[matrix * 8 + row][0] / 16 % 8);
    if (banks != 0xFF) ++bank_conflicts;
    std::memcpy(&out[matrix], shared_memory.data() + addresses[matrix * 8 + lane / 4][0] + lane % 4 * 4, 4);
  }
}

// The sum of exact products, each cut off at the last bit of the largest, and the result cut off to fp32.
inline float truncating_sum(const double* terms, int count) {
  double largest = 0;
  bool finite = true;
  for (int i = 0; i < count; ++i) finite &= std::isfinite(terms[i]), largest = std::max(largest, std::fabs(terms[i]));
  if (!finite || largest == 0) {
    double sum = 0;
    for (int i = 0; i < count; ++i) sum += terms[i];
    return static_cast<float>(sum);
  }
  const int exponent = std::ilogb(largest);
  const double unit = std::ldexp(1.0, exponent - 23), inverse = std::ldexp(1.0, 23 - exponent);
  int64_t sum = 0;
  for (int i = 0; i < count; ++i) sum += static_cast<int64_t>(terms[i] * inverse);
  const double exact = static_cast<double>(sum) * unit;
  float result = static_cast<float>(exact);
  if (std::fabs(static_cast<double>(result)) > std::fabs(exact)) result = std::nextafterf(result, 0.0f);
  return std::fabs(result) < 0x1p-126f ? 0.0f : result;  // flushed
}

inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto all = exchange("mma", 0xFFFFFFFFu, mine, 6);
  const int group = current % kWarp / 4, inside = current % 4;
  const auto half = [](uint32_t word, int odd) { return from_fp16(static_cast<uint16_t>(word >> (16 * odd))); };
  for (int i = 0; i < 4; ++i) {
    const int column = inside * 2 + i % 2, lower = i / 2;  // of c; its row is group + 8 lower
    double terms[17];
    for (int k = 0; k < 16; ++k) {
      const float left = half(all[group * 4 + k % 8 / 2][lower + k / 8 * 2], k % 2);
      const float right = half(all[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
      terms[k] = static_cast<double>(left) * right;
    }
    terms[16] = c[i];
    c[i] = truncating_sum(terms, 17);
  }
}

}  // namespace shim

inline void __syncthreads() {
  using namespace shim;
  fibers[current].waits = "__syncthreads";
  at_barrier.push_back(current);
  if (static_cast<int>(at_barrier.size()) == alive) open_barrier();
  leave();
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { shim::exchange("__syncwarp", mask, nullptr, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return shim::shuffle("__shfl_sync", mask, value, from);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by) {
  return shim::shuffle("__shfl_xor_sync", mask, value, shim::current % 32 ^ by);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  return shim::shuffle("__shfl_up_sync", mask, value, shim::current % 32 - by);
}

inline unsigned __match_any_sync(unsigned mask, int value) {
  const uint32_t mine = static_cast<uint32_t>(value);
  const auto all = shim::exchange("__match_any_sync", mask, &mine, 1);
  unsigned same = 0;
  for (int i = 0; i < 32; ++i) same |= static_cast<unsigned>(all[i][0] == mine) << i;
  return same;
}

inline unsigned __ballot_sync(unsigned mask, bool value) {
  const uint32_t mine = value;
  const auto all = shim::exchange("__ballot_sync", mask, &mine, 1);
  unsigned set = 0;
  for (int i = 0; i < 32; ++i) set |= all[i][0] << i;
  return set;
}

inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }

template <class T, class U>
T atomicAdd(T* to, U by) {
  shim::give_way();
  const T before = *to;
  *to = before + static_cast<T>(by);
  shim::give_way();
  return before;
}

inline uint32_t atomicMax(uint32_t* to, uint32_t by) {
  shim::give_way();
  const uint32_t before = *to;
  *to = std::max(before, by);
  return before;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
enum cudaDeviceAttribute { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerMultiprocessor, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFunctionAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum { cudaSharedmemCarveoutMaxShared = 100 };

inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttribute attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? shim::settings.processors
           : attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? shim::settings.shared_of_processor
                                                                      : shim::settings.shared_of_block;
  return cudaSuccess;
}
template <class T>
cudaError_t cudaFuncSetAttribute(T*, cudaFunctionAttribute, int bytes) {
  if (bytes > shim::settings.shared_of_block) throw std::runtime_error("more shared memory than a block may have");
  return cudaSuccess;
}
