// Pieces of files -> one buffer, each with its CRC-32 checked. Plain C++17 behind a C interface; needs no library.
//
//   piece (descriptor, offset, bytes, CRC-32) -> pread until whole -> CRC -> its head is the one expected -> the rest of it is in its place
//
// pread and not mmap: a mapped file that is cut afterwards kills the process, and a file system over a network may give less than was
// asked for. The checksum is zlib's CRC-32, so that Python checks the same files without this code. It is computed right after the
// read, while the bytes are in the cache, by carry-less multiplication (Gopal et al. 2009, "Fast CRC Computation for Generic
// Polynomials Using PCLMULQDQ"): a block is folded onto the one D bits further with x^(D+32) and x^(D-32) mod P.

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include <sys/uio.h>
#include <unistd.h>

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

// What is left in 128 bits has the same remainder as all that was folded into it.
T2V_CLMUL uint32_t finish(__m128i rest, const uint8_t* data, size_t size) {
  const __m128i by16 = _mm_set_epi64x(int64_t(power(128 - 32)), int64_t(power(128 + 32)));
  for (; size >= 16; data += 16, size -= 16) rest = fold(rest, by16, load(data));
  uint8_t bytes[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), rest);
  return crc_tables(crc_tables(0, bytes, 16), data, size);
}

// At least 64 bytes.
T2V_CLMUL uint32_t crc_clmul(uint32_t crc, const uint8_t* data, size_t size) {
  const __m128i by64 = _mm_set_epi64x(int64_t(power(512 - 32)), int64_t(power(512 + 32)));
  const __m128i by16 = _mm_set_epi64x(int64_t(power(128 - 32)), int64_t(power(128 + 32)));
  __m128i a = _mm_xor_si128(load(data), _mm_cvtsi32_si128(int32_t(crc)));
  __m128i b = load(data + 16), c = load(data + 32), d = load(data + 48);
  for (data += 64, size -= 64; size >= 64; data += 64, size -= 64) {
    a = fold(a, by64, load(data));
    b = fold(b, by64, load(data + 16));
    c = fold(c, by64, load(data + 32));
    d = fold(d, by64, load(data + 48));
  }
  return finish(fold(fold(fold(a, by16, b), by16, c), by16, d), data, size);
}

T2V_WIDE inline __m512i fold_wide(__m512i value, __m512i powers, __m512i onto) {
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(value, powers, 0x00), _mm512_clmulepi64_epi128(value, powers, 0x11), onto, 0x96);
}

T2V_WIDE inline __m512i wide(uint64_t low, uint64_t high) {
  return _mm512_set_epi64(int64_t(high), int64_t(low), int64_t(high), int64_t(low), int64_t(high), int64_t(low), int64_t(high), int64_t(low));
}

// At least 256 bytes.
T2V_WIDE uint32_t crc_wide(uint32_t crc, const uint8_t* data, size_t size) {
  const __m512i by256 = wide(power(2048 + 32), power(2048 - 32)), by64 = wide(power(512 + 32), power(512 - 32));
  __m512i a = _mm512_xor_si512(_mm512_loadu_si512(data), _mm512_zextsi128_si512(_mm_cvtsi32_si128(int32_t(crc))));
  __m512i b = _mm512_loadu_si512(data + 64), c = _mm512_loadu_si512(data + 128), d = _mm512_loadu_si512(data + 192);
  for (data += 256, size -= 256; size >= 256; data += 256, size -= 256) {
    a = fold_wide(a, by256, _mm512_loadu_si512(data));
    b = fold_wide(b, by256, _mm512_loadu_si512(data + 64));
    c = fold_wide(c, by256, _mm512_loadu_si512(data + 128));
    d = fold_wide(d, by256, _mm512_loadu_si512(data + 192));
  }
  a = fold_wide(fold_wide(fold_wide(a, by64, b), by64, c), by64, d);
  for (; size >= 64; data += 64, size -= 64) a = fold_wide(a, by64, _mm512_loadu_si512(data));
  const __m128i by16 = _mm_set_epi64x(int64_t(power(128 - 32)), int64_t(power(128 + 32)));
  __m128i rest = _mm512_castsi512_si128(a);
  rest = fold(rest, by16, _mm512_extracti64x2_epi64(a, 1));
  rest = fold(rest, by16, _mm512_extracti64x2_epi64(a, 2));
  rest = fold(rest, by16, _mm512_extracti64x2_epi64(a, 3));
  return finish(rest, data, size);
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

// Of a register that stands complemented between calls, as zlib's crc32 sees it.
uint32_t crc32(uint32_t crc, const uint8_t* data, size_t size, int highest) {
  crc = ~crc;
#if defined(__x86_64__)
  if (highest >= 2 && size >= 256) return ~crc_wide(crc, data, size);
  if (highest >= 1 && size >= 64) return ~crc_clmul(crc, data, size);
#endif
  (void)highest;
  return ~crc_tables(crc, data, size);
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

// Reads the pieces numbers[0 .. count) of a table (file, offset, bytes and CRC-32 of each; descriptors of the files) to `out`, one after
// another, without the first `skip` bytes of each, which must be those of the table's row head_of[i] of `heads`. Returns 0, or of the first
// that fails its place in `numbers` times 2^16 plus: an error number, or kFileEnds, kDamaged, kOtherHead, kDoesNotFit, kNotThere.
int64_t t2v_read_pieces(const int32_t* descriptors, const int32_t* files, const int64_t* offsets, const int64_t* sizes, const uint32_t* crcs,
                        const int32_t* head_of, const uint8_t* heads, int64_t skip, int64_t pieces, const int64_t* numbers, int64_t count,
                        uint8_t* out, int64_t room) {
  uint8_t head[kLongestHead];
  for (int64_t n = 0; n < count; ++n) {
    const int64_t i = numbers[n];
    int status = 0;
    if (i < 0 || i >= pieces) status = kNotThere;
    else if (skip > kLongestHead || sizes[i] < skip || sizes[i] - skip > room) status = kDoesNotFit;
    if (status) return n << 16 | status;
    const size_t size = size_t(sizes[i] - skip);
    status = read_fully(descriptors[files[i]], offsets[i], head, size_t(skip), out, size);
    if (!status && crc32(crc32(0, head, size_t(skip), level()), out, size, level()) != crcs[i]) status = kDamaged;
    if (!status && skip && std::memcmp(head, heads + head_of[i] * skip, size_t(skip))) status = kOtherHead;
    if (status) return n << 16 | status;
    out += size;
    room -= int64_t(size);
  }
  return 0;
}
}
