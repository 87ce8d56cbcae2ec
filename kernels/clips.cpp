// Pieces of files -> one buffer, each with its CRC-32 checked. Plain C++17 behind a C interface; needs no library.
//
//   piece (file, offset, bytes, CRC-32) -> copied out of a mapping, or pread until whole -> CRC -> its head is the one expected
//                                       -> the rest of it is in its place
//
// Copying out of a mapping is faster than pread. Files on disks of this machine are mapped; over a network a mapping is read page by page,
// and pread it is, which may give less than was asked for. The checksum is zlib's CRC-32, so that Python checks the same files without this
// code. It is computed in the same pass, or right after the read, by carry-less multiplication (Gopal et al. 2009, "Fast CRC Computation for
// Generic Polynomials Using PCLMULQDQ"): a block is folded onto the one D bits further with x^(D+32) and x^(D-32) mod P.

#include <cerrno>
#include <csetjmp>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>

#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/vfs.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

enum { kFileEnds = 10001, kDamaged, kOtherHead, kDoesNotFit, kNotThere };
constexpr int64_t kLongestHead = 4096;
constexpr uint32_t kPolynomial = 0xEDB88320u;  // bits reversed: the lowest bit is the highest power

// x^n mod P as the multiplication of reversed numbers needs it.
constexpr uint64_t power(int n) {
  uint32_t value = 0x80000000u;
  for (int i = 0; i < n; ++i) value = value >> 1 ^ (value & 1 ? kPolynomial : 0);
  return uint64_t(value) << 1;
}

struct Tables {
  uint32_t at[8][256];
  constexpr Tables() : at() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? kPolynomial : 0);
      at[0][i] = value;
    }
    for (int t = 1; t < 8; ++t)
      for (uint32_t i = 0; i < 256; ++i) at[t][i] = at[t - 1][i] >> 8 ^ at[0][at[t - 1][i] & 255];
  }
};
constexpr Tables kTables;

// Eight bytes at a time by tables (Kounavis and Berry 2005).
uint32_t crc_tables(uint32_t crc, const uint8_t* data, size_t size) {
  const auto& at = kTables.at;
  for (; size >= 8; data += 8, size -= 8) {
    uint32_t low = crc ^ (data[0] | data[1] << 8 | data[2] << 16 | uint32_t(data[3]) << 24);
    crc = at[7][low & 255] ^ at[6][low >> 8 & 255] ^ at[5][low >> 16 & 255] ^ at[4][low >> 24] ^ at[3][data[4]] ^ at[2][data[5]] ^
          at[1][data[6]] ^ at[0][data[7]];
  }
  for (; size; ++data, --size) crc = crc >> 8 ^ at[0][(crc ^ *data) & 255];
  return crc;
}

#if defined(__x86_64__)
#define T2V_CLMUL __attribute__((target("sse4.1,pclmul")))
#define T2V_WIDE __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,vpclmulqdq,pclmul")))

T2V_CLMUL inline __m128i fold(__m128i value, __m128i powers, __m128i onto) {
  return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(value, powers, 0x00), _mm_clmulepi64_si128(value, powers, 0x11)), onto);
}

T2V_CLMUL inline __m128i load(const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }

template <bool kCopy>
T2V_CLMUL inline __m128i pass(const uint8_t* from, uint8_t* to) {
  const __m128i value = load(from);
  if (kCopy) _mm_storeu_si128(reinterpret_cast<__m128i*>(to), value);
  return value;
}

// What is left in 128 bits has the same remainder as all that was folded into it.
T2V_CLMUL uint32_t finish(__m128i rest, const uint8_t* data, size_t size) {
  const __m128i by16 = _mm_set_epi64x(int64_t(power(128 - 32)), int64_t(power(128 + 32)));
  for (; size >= 16; data += 16, size -= 16) rest = fold(rest, by16, load(data));
  uint8_t bytes[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), rest);
  return crc_tables(crc_tables(0, bytes, 16), data, size);
}

// At least 64 bytes; with kCopy they are copied to `out` as they pass.
template <bool kCopy>
T2V_CLMUL uint32_t crc_clmul(uint32_t crc, const uint8_t* data, size_t size, uint8_t* out) {
  const __m128i by64 = _mm_set_epi64x(int64_t(power(512 - 32)), int64_t(power(512 + 32)));
  const __m128i by16 = _mm_set_epi64x(int64_t(power(128 - 32)), int64_t(power(128 + 32)));
  __m128i a = pass<kCopy>(data, out), b = pass<kCopy>(data + 16, out + 16), c = pass<kCopy>(data + 32, out + 32),
          d = pass<kCopy>(data + 48, out + 48);
  a = _mm_xor_si128(a, _mm_cvtsi32_si128(int32_t(crc)));
  for (data += 64, out += 64, size -= 64; size >= 64; data += 64, out += 64, size -= 64) {
    a = fold(a, by64, pass<kCopy>(data, out));
    b = fold(b, by64, pass<kCopy>(data + 16, out + 16));
    c = fold(c, by64, pass<kCopy>(data + 32, out + 32));
    d = fold(d, by64, pass<kCopy>(data + 48, out + 48));
  }
  if (kCopy) std::memcpy(out, data, size);
  return finish(fold(fold(fold(a, by16, b), by16, c), by16, d), kCopy ? out : data, size);
}

T2V_WIDE inline __m512i fold_wide(__m512i value, __m512i powers, __m512i onto) {
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(value, powers, 0x00), _mm512_clmulepi64_epi128(value, powers, 0x11), onto, 0x96);
}

T2V_WIDE inline __m512i wide(uint64_t low, uint64_t high) {
  return _mm512_set_epi64(int64_t(high), int64_t(low), int64_t(high), int64_t(low), int64_t(high), int64_t(low), int64_t(high), int64_t(low));
}

template <bool kCopy>
T2V_WIDE inline __m512i pass_wide(const uint8_t* from, uint8_t* to) {
  const __m512i value = _mm512_loadu_si512(from);
  if (kCopy) _mm512_storeu_si512(to, value);
  return value;
}

// At least 256 bytes; with kCopy they are copied to `out` as they pass.
template <bool kCopy>
T2V_WIDE uint32_t crc_wide(uint32_t crc, const uint8_t* data, size_t size, uint8_t* out) {
  const __m512i by256 = wide(power(2048 + 32), power(2048 - 32)), by64 = wide(power(512 + 32), power(512 - 32));
  __m512i a = pass_wide<kCopy>(data, out), b = pass_wide<kCopy>(data + 64, out + 64), c = pass_wide<kCopy>(data + 128, out + 128),
          d = pass_wide<kCopy>(data + 192, out + 192);
  a = _mm512_xor_si512(a, _mm512_zextsi128_si512(_mm_cvtsi32_si128(int32_t(crc))));
  for (data += 256, out += 256, size -= 256; size >= 256; data += 256, out += 256, size -= 256) {
    a = fold_wide(a, by256, pass_wide<kCopy>(data, out));
    b = fold_wide(b, by256, pass_wide<kCopy>(data + 64, out + 64));
    c = fold_wide(c, by256, pass_wide<kCopy>(data + 128, out + 128));
    d = fold_wide(d, by256, pass_wide<kCopy>(data + 192, out + 192));
  }
  a = fold_wide(fold_wide(fold_wide(a, by64, b), by64, c), by64, d);
  for (; size >= 64; data += 64, out += 64, size -= 64) a = fold_wide(a, by64, pass_wide<kCopy>(data, out));
  if (kCopy) std::memcpy(out, data, size);
  const __m128i by16 = _mm_set_epi64x(int64_t(power(128 - 32)), int64_t(power(128 + 32)));
  __m128i rest = _mm512_castsi512_si128(a);
  rest = fold(rest, by16, _mm512_extracti64x2_epi64(a, 1));
  rest = fold(rest, by16, _mm512_extracti64x2_epi64(a, 2));
  rest = fold(rest, by16, _mm512_extracti64x2_epi64(a, 3));
  return finish(rest, kCopy ? out : data, size);
}

int level() {
  static const int found = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("vpclmulqdq") ? 2
                           : __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")   ? 1
                                                                                                      : 0;
  return found;
}
#else
int level() { return 0; }
#endif

// Of a register that stands complemented between calls, as zlib's crc32 sees it. With kCopy the bytes are copied to `out`; each is read
// once, so that what was checked is what was copied, even where somebody writes to them meanwhile.
template <bool kCopy>
uint32_t crc32(uint32_t crc, const uint8_t* data, size_t size, uint8_t* out, int highest) {
  crc = ~crc;
#if defined(__x86_64__)
  if (highest >= 2 && size >= 256) return ~crc_wide<kCopy>(crc, data, size, out);
  if (highest >= 1 && size >= 64) return ~crc_clmul<kCopy>(crc, data, size, out);
#endif
  (void)highest;
  if (kCopy) std::memcpy(out, data, size);
  return ~crc_tables(crc, kCopy ? out : data, size);
}

uint32_t crc32(uint32_t crc, const uint8_t* data, size_t size, int highest) {
  return crc32<false>(crc, data, size, const_cast<uint8_t*>(data), highest);
}

// --- mapped files -----------------------------------------------------------------------------------------------------

// A mapped file that is cut, or a disk that fails, is told by SIGBUS where a page is touched. While a thread copies out of a mapping, the
// signal leads back here, and is an error like any other; all else goes to whoever handled it before.
struct Guard {
  sigjmp_buf back;
  const uint8_t *from = nullptr, *to = nullptr;
};
__attribute__((tls_model("initial-exec"))) thread_local Guard* guard = nullptr;
struct sigaction others;

void on_bus_error(int number, siginfo_t* info, void* context) {
  const auto* at = static_cast<const uint8_t*>(info->si_addr);
  if (guard && at >= guard->from && at < guard->to) siglongjmp(guard->back, 1);
  // The instruction is tried again when this returns. The other handler is asked once: it may put this one back in its place.
  static volatile sig_atomic_t asked = 0;
  if (asked || (!(others.sa_flags & SA_SIGINFO) && (others.sa_handler == SIG_DFL || others.sa_handler == SIG_IGN))) {
    signal(number, SIG_DFL);
    return;
  }
  asked = 1;
  if (others.sa_flags & SA_SIGINFO) {
    others.sa_sigaction(number, info, context);
  } else {
    others.sa_handler(number);
  }
}

// Python's faulthandler and others may have taken the signal since.
void hold_bus_errors() {
  static std::mutex mutex;
  struct sigaction now;
  if (sigaction(SIGBUS, nullptr, &now) == 0 && (now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_bus_error) return;
  const std::lock_guard<std::mutex> lock(mutex);
  sigaction(SIGBUS, nullptr, &now);
  if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_bus_error) return;
  others = now;
  struct sigaction mine = {};
  mine.sa_sigaction = on_bus_error;
  mine.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigemptyset(&mine.sa_mask);
  sigaction(SIGBUS, &mine, nullptr);
}

struct File {
  int descriptor;
  const uint8_t* mapped;  // null: read by pread
  int64_t bytes;          // mapped
};

bool ends_before(const File& file, int64_t end) {
  struct stat about;
  return fstat(file.descriptor, &about) == 0 && about.st_size < end;
}

// As read_fully, with the checksum: out of a mapping, in which all of it lies.
int copy_mapped(const File& file, int64_t offset, uint8_t* head, size_t skip, uint8_t* body, size_t size, uint32_t* crc) {
  const int64_t end = offset + int64_t(skip + size);
  Guard here;
  here.from = file.mapped + offset;
  here.to = file.mapped + end;
  if (sigsetjmp(here.back, 0)) {
    guard = nullptr;
    return ends_before(file, end) ? kFileEnds : EIO;
  }
  guard = &here;
  *crc = crc32<true>(crc32<true>(0, here.from, skip, head, level()), here.from + skip, size, body, level());
  guard = nullptr;
  return 0;
}

// Reads until head and body are full; 0, an error number, or kFileEnds.
int read_fully(int descriptor, int64_t offset, uint8_t* head, size_t skip, uint8_t* body, size_t size) {
  size_t done = 0;
  while (done < skip + size) {
    iovec parts[2];
    int count = 0;
    if (done < skip) parts[count++] = {head + done, skip - done};
    const size_t into = done > skip ? done - skip : 0;
    parts[count++] = {body + into, size - into};
    const ssize_t got = preadv(descriptor, parts, count, offset + int64_t(done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno;
    if (got == 0) return kFileEnds;
    done += size_t(got);
  }
  return 0;
}

}  // namespace

extern "C" {

// zlib's crc32; `highest` keeps instruction sets out (0: tables, 1: 128 bits, 2: 512 bits), as far as the processor has them.
uint32_t t2v_crc32(uint32_t crc, const uint8_t* data, size_t size, int highest) {
  return crc32(crc, data, size, highest < level() ? highest : level());
}

// The address of a file in memory, or null where it is on no disk of this machine or cannot be mapped.
const uint8_t* t2v_map(int descriptor, int64_t bytes) {
#if defined(__linux__)
  struct statfs about;
  if (bytes <= 0 || fstatfs(descriptor, &about)) return nullptr;
  for (uint32_t local : {0xEF53u, 0x58465342u, 0x9123683Eu, 0x01021994u, 0x794C7630u, 0xF2F52010u, 0x2FC12FC1u}) {
    if (uint32_t(about.f_type) != local) continue;  // not one of ext4, XFS, Btrfs, tmpfs, overlayfs, F2FS, ZFS
    void* mapped = mmap(nullptr, size_t(bytes), PROT_READ, MAP_SHARED, descriptor, 0);
    return mapped == MAP_FAILED ? nullptr : static_cast<const uint8_t*>(mapped);
  }
#endif
  (void)descriptor, (void)bytes;
  return nullptr;
}

void t2v_unmap(const uint8_t* mapped, int64_t bytes) { munmap(const_cast<uint8_t*>(mapped), size_t(bytes)); }

// Reads the pieces numbers[0 .. count) of a table (file, offset, bytes and CRC-32 of each; descriptors of the files, and where they are
// mapped, if they are) to `out`, one after another, without the first `skip` bytes of each, which must be those of the table's row head_of[i] of `heads`. Returns 0, or of the first
// that fails its place in `numbers` times 2^16 plus: an error number, or kFileEnds, kDamaged, kOtherHead, kDoesNotFit, kNotThere.
int64_t t2v_read_pieces(const int32_t* descriptors, const uint8_t* const* mapped, const int64_t* mapped_bytes, const int32_t* files,
                        const int64_t* offsets, const int64_t* sizes, const uint32_t* crcs, const int32_t* head_of,
                        const uint8_t* heads, int64_t skip, int64_t pieces, const int64_t* numbers, int64_t count, uint8_t* out,
                        int64_t room) {
  uint8_t head[kLongestHead];
  hold_bus_errors();
  for (int64_t n = 0; n < count; ++n) {
    const int64_t i = numbers[n];
    int status = 0;
    if (i < 0 || i >= pieces) status = kNotThere;
    else if (skip > kLongestHead || sizes[i] < skip || sizes[i] - skip > room) status = kDoesNotFit;
    if (status) return n << 16 | status;
    const size_t size = size_t(sizes[i] - skip);
    const int32_t f = files[i];
    const File file{descriptors[f], mapped[f], mapped_bytes[f]};
    uint32_t crc = 0;
    // What does not lie in the mapping is left to pread, which says why, or finds it in a file that has grown since.
    if (file.mapped && offsets[i] >= 0 && sizes[i] <= file.bytes && offsets[i] <= file.bytes - sizes[i]) {
      status = copy_mapped(file, offsets[i], head, size_t(skip), out, size, &crc);
    } else {
      status = read_fully(file.descriptor, offsets[i], head, size_t(skip), out, size);
      if (!status) crc = crc32(crc32(0, head, size_t(skip), level()), out, size, level());
    }
    // A page that holds the end of a file that was cut is zeros behind it.
    if (!status && crc != crcs[i]) status = ends_before(file, offsets[i] + sizes[i]) ? kFileEnds : kDamaged;
    if (!status && skip && std::memcmp(head, heads + head_of[i] * skip, size_t(skip))) status = kOtherHead;
    if (status) return n << 16 | status;
    out += size;
    room -= int64_t(size);
  }
  return 0;
}
}
