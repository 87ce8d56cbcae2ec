// The filter on Intel's tile unit (AMX): 16 codes x 16 latents x 32 numbers of bf16 an instruction.
//
//   64 latents -> centred, scaled, rounded, transposed to pairs [steps, 16, 16 latents]
//   for each 16 codes: 4 tiles of scores [16 codes, 16 latents] -> a tile with a score near its latent's best is set aside
//   tiles set aside -> scores still near the best -> candidates -> codes
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vq_cpu_common.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,amx-tile,amx-bf16")

namespace t2v {
namespace amx {

constexpr int kTiles = 4;                 // of latents, scored together
constexpr int kRows = kTiles * kLanes;    // latents
constexpr int kTile = kLanes * kLanes;    // numbers of 32 bits in a tile
constexpr int64_t kSplitIsFree = 8;      // numbers of a latent, up to which all products of split bf16 fit an instruction
constexpr float kNever = -3e38f;          // score of a code that is not there

inline bool available() {
  __builtin_cpu_init();
  unsigned a = 7, b, c = 0, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  constexpr unsigned kBf16 = 1u << 22, kTileUnit = 1u << 24;
  if ((d & (kBf16 | kTileUnit)) != (kBf16 | kTileUnit) || !__builtin_cpu_supports("avx512bf16")) return false;
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

struct Book : Codebook {
  Book(const float* rows, int64_t codes, int64_t dim, Precision precision)
      : Codebook(rows, codes, dim, precision, 0),
        products(precision == Precision::kSplitBf16 ? 3 : 1), pairs((dim + 1) / 2), inner(products * pairs), bias_inside(inner % kLanes != 0 && inner % kLanes <= kLanes - 2),
        steps((inner + (bias_inside ? 2 : 0) + kLanes - 1) / kLanes), tiles((codes + kLanes - 1) / kLanes), packed(tiles * steps * kTile),
        bias(bias_inside ? 1 : tiles * kTile) {
    depth = static_cast<int>(kLanes + 2 + steps);  // 16 additions in each of two chains, their sum, and once a step to the score
    std::memset(packed.data, 0, tiles * steps * kTile * sizeof(uint32_t));
  }

  int64_t parts() const { return tiles; }  // that `pack` takes, in any order

  uint32_t* at(int64_t code, int64_t pair) { return packed.data + ((code / kLanes * steps + pair / kLanes) * kLanes + code % kLanes) * kLanes + pair % kLanes; }

  // Fill the tile of codes, and raise `norm` and `error` to bounds of its norms.
  T2V_INLINE void pack(int64_t tile, double& norm, double& error) {
    for (int64_t code = tile * kLanes; code < (tile + 1) * kLanes; ++code) {
      double squares = 0, errors = 0;
      if (code < codes) {
        for (int64_t d = 0; d < dim; d += 2) {
          const Seen a = see(code, d), b = d + 1 < dim ? see(code, d + 1) : Seen{0, 0, 0};
          squares += a.exact * a.exact + b.exact * b.exact;
          const double lost_a = a.exact - a.high - a.low, lost_b = b.exact - b.high - b.low;
          errors += lost_a * lost_a + lost_b * lost_b;
          *at(code, d / 2) = bf16_pair(a.high, b.high);
          if (products == 3) *at(code, pairs + d / 2) = *at(code, d / 2), *at(code, 2 * pairs + d / 2) = bf16_pair(a.low, b.low);
        }
        norm = std::max(norm, std::sqrt(squares) * (1 + 1e-6));
        error = std::max(error, std::sqrt(errors) * (1 + 1e-6));
      }
      set_bias(code, code < codes ? -0.5 * squares : kNever);
    }
  }

  void set_bias(int64_t code, double value) {
    if (!bias_inside) {
      for (int lane = 0; lane < kLanes; ++lane) bias.data[code * kLanes + lane] = static_cast<float>(value);
      return;
    }
    // The sum of three bf16, each times 1.
    const float high = round_to_bf16(static_cast<float>(value));
    const float middle = round_to_bf16(static_cast<float>(value - high));
    const float low = round_to_bf16(static_cast<float>(value - high - middle));
    *at(code, inner) = bf16_pair(high, middle);
    *at(code, inner + 1) = bf16_pair(low, 0);
  }

  int64_t products;             // high x high, high x low, low x high
  int64_t pairs, inner;         // pairs of numbers of a code: as given, and as the tiles hold them
  bool bias_inside;             // among the numbers, where there is room; else scores start at it
  int64_t steps, tiles;
  Aligned<uint32_t> packed;  // [tiles, steps, 16 codes, 16 pairs]
  Aligned<float> bias;       // [tiles, 16 codes, 16 times the same]
};

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
  TileConfig() {
    for (int i = 0; i < 8; ++i) bytes[i] = 64, rows[i] = 16;
  }
};

T2V_INLINE void transpose(__m512 (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]), c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xDD);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xDD);
    r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xDD);
  }
}

T2V_INLINE __m512i pair_of(__m512 low, __m512 high) {  // as bf16, side by side
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
T2V_INLINE __m512 low_of(__m512i pair) { return _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)); }
T2V_INLINE __m512 high_of(__m512i pair) { return _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)))); }

// What a thread needs for 64 latents.
struct Work {
  static constexpr int kAside = 32;
  struct Column {  // of 16 latents
    alignas(64) float best[kLanes], threshold[kLanes], two_error[kLanes], square[kLanes], residual[kLanes];
    int aside = 0;
    int32_t tile[kAside];
    alignas(64) float largest[kAside][kLanes];
    alignas(64) float scores[kAside][kTile];
    bool filtered[kLanes];
    Candidates candidates[kLanes];
  };
  explicit Work(const Book& book) : latents(kTiles * book.steps * kTile), columns(kTiles) {
    // Pairs past the latents' own: 1 where the bias lies, else 0.
    std::memset(latents.data, 0, kTiles * book.steps * kTile * sizeof(uint32_t));
    if (!book.bias_inside) return;
    for (int t = 0; t < kTiles; ++t)
      for (int i = 0; i < 2 * kLanes; ++i) latents.data[(t * book.steps * kLanes + book.inner) * kLanes + i] = bf16_pair(1, i < kLanes ? 1 : 0);
  }
  Aligned<uint32_t> latents;  // [4, steps, 16 pairs, 16 latents]
  Aligned<Column> columns;
  alignas(64) float scores[2][kTiles][kTile];  // [4, 16 codes, 16 latents], of this tile of codes and of the one before
};

// Prepare up to 16 latents [rows, dim].
template <bool kSplit>
inline void prepare(const Book& book, const float* x, int rows, uint32_t* out, Work::Column& column) {
  const int64_t dim = book.dim;
  const __m512 scale = _mm512_set1_ps(book.scale);
  __m512 squares = _mm512_setzero_ps(), errors = _mm512_setzero_ps();
  for (int64_t start = 0; start < dim; start += kLanes) {
    const __mmask16 mask = dim - start >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << (dim - start)) - 1);
    __m512 r[kLanes];
    const __m512 centre = _mm512_maskz_loadu_ps(mask, book.mean.data() + start);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      r[i] = i < rows ? _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i * dim + start), centre), scale) : _mm512_setzero_ps();
    transpose(r);
#pragma GCC unroll 8
    for (int j = 0; j < kLanes; j += 2) {
      if (start + j >= dim) break;
      const int64_t at = (start + j) / 2;
      const __m512i pair = pair_of(r[j], r[j + 1]);
      squares = _mm512_fmadd_ps(r[j], r[j], _mm512_fmadd_ps(r[j + 1], r[j + 1], squares));
      __m512 lost_low = _mm512_sub_ps(r[j], low_of(pair)), lost_high = _mm512_sub_ps(r[j + 1], high_of(pair));
      _mm512_store_si512(out + at * kLanes, pair);
      if (kSplit) {
        const __m512i rest = pair_of(lost_low, lost_high);
        lost_low = _mm512_sub_ps(lost_low, low_of(rest)), lost_high = _mm512_sub_ps(lost_high, high_of(rest));
        _mm512_store_si512(out + (book.pairs + at) * kLanes, rest);
        _mm512_store_si512(out + (2 * book.pairs + at) * kLanes, pair);
      }
      errors = _mm512_fmadd_ps(lost_low, lost_low, _mm512_fmadd_ps(lost_high, lost_high, errors));
    }
  }
  _mm512_store_ps(column.square, squares);
  _mm512_store_ps(column.residual, errors);
}

inline void reset(const Book& book, Work::Column& column) {
  column.aside = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    column.filtered[lane] = book.bound(column.square[lane], column.residual[lane], column.two_error[lane]);
    column.best[lane] = column.threshold[lane] = kNever;
    column.candidates[lane].start();
  }
}

// Scores still near the best become candidates.
inline void sift(Work::Column& column) {
  const __m512i rows = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(kLanes));
  const __m512 threshold = _mm512_load_ps(column.threshold);
  for (int i = 0; i < column.aside; ++i) {
    unsigned lanes = _mm512_cmp_ps_mask(_mm512_load_ps(column.largest[i]), threshold, _CMP_GE_OQ);
    for (; lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      alignas(64) float found[kLanes];
      _mm512_store_ps(found, _mm512_i32gather_ps(rows, column.scores[i] + lane, 4));
      column.candidates[lane].offer(found, column.tile[i] * kLanes, kLanes, column.threshold[lane]);
    }
  }
  column.aside = 0;
}

T2V_INLINE void look(const float* scores, int32_t tile, Work::Column& column) {
  __m512 m[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) m[i] = _mm512_max_ps(_mm512_load_ps(scores + 2 * i * kLanes), _mm512_load_ps(scores + (2 * i + 1) * kLanes));
  for (int i = 0; i < 4; ++i) m[i] = _mm512_max_ps(m[i], m[i + 4]);
  const __m512 largest = _mm512_max_ps(_mm512_max_ps(m[0], m[2]), _mm512_max_ps(m[1], m[3]));
  const __m512 best = _mm512_max_ps(_mm512_load_ps(column.best), largest);
  const __m512 threshold = _mm512_sub_ps(best, _mm512_load_ps(column.two_error));
  _mm512_store_ps(column.best, best);
  if (__builtin_expect(_mm512_cmp_ps_mask(largest, threshold, _CMP_GE_OQ) != 0, 0)) {
    _mm512_store_ps(column.threshold, threshold);
    if (column.aside == Work::kAside) sift(column);
    const int place = column.aside++;
    column.tile[place] = tile;
    _mm512_store_ps(column.largest[place], largest);
    for (int i = 0; i < kLanes; ++i) _mm512_store_ps(column.scores[place] + i * kLanes, _mm512_load_ps(scores + i * kLanes));
  }
}

// Scores of all codes. The processor's front end waits for the tile unit, so that the scores of the tile before are looked at in between.
inline void scan(const Book& book, Work& work) {
  const int64_t next = book.steps * kTile;  // from one tile of latents to the next
  __asm__ volatile("" ::: "memory");        // the compiler does not know that the tile loads read memory
  for (int64_t tile = 0; tile < book.tiles; ++tile) {
    const uint32_t* codes = book.packed.data + tile * next;
    const float* bias = book.bias.data + tile * kTile;
    if (book.bias_inside) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, bias, 64);
      _tile_loadd(1, bias, 64);
      _tile_loadd(2, bias, 64);
      _tile_loadd(3, bias, 64);
    }
    int64_t products = 0, column = tile > 0 ? 0 : kTiles;  // a column of the tile before after each quarter of the products
    const auto meanwhile = [&]() __attribute__((always_inline)) {
      if (++products < book.steps || column == kTiles) return;
      look(work.scores[(tile - 1) & 1][column], static_cast<int32_t>(tile - 1), work.columns.data[column]);
      ++column, products = 0;
    };
    for (int64_t step = 0; step < book.steps; ++step) {
      const uint32_t* latents = work.latents.data + step * kTile;
      _tile_loadd(4, codes + step * kTile, 64);
      _tile_loadd(5, latents, 64);
      _tile_dpbf16ps(0, 4, 5);
      meanwhile();
      _tile_loadd(6, latents + next, 64);
      _tile_dpbf16ps(1, 4, 6);
      meanwhile();
      _tile_loadd(7, latents + 2 * next, 64);
      _tile_dpbf16ps(2, 4, 7);
      meanwhile();
      _tile_loadd(5, latents + 3 * next, 64);
      _tile_dpbf16ps(3, 4, 5);
      meanwhile();
    }
    _tile_stored(0, work.scores[tile & 1][0], 64);
    _tile_stored(1, work.scores[tile & 1][1], 64);
    _tile_stored(2, work.scores[tile & 1][2], 64);
    _tile_stored(3, work.scores[tile & 1][3], 64);
  }
  const int64_t last = book.tiles - 1;
  for (int t = 0; t < kTiles; ++t) look(work.scores[last & 1][t], static_cast<int32_t>(last), work.columns.data[t]);
}

inline void pack(Book& book, int64_t part, double& norm, double& error) { book.pack(part, norm, error); }

// Codes of latents [count, dim]; returns how many distances were worked out in double.
inline int64_t lookup_rows(const Book& book, Work& work, const float* latents, int64_t count, int64_t* codes) {
  const TileConfig config;
  _tile_loadconfig(&config);
  int64_t looked_at = 0;
  for (int64_t start = 0; start < count; start += kRows) {
    for (int t = 0; t < kTiles; ++t) {
      const int64_t first = start + t * kLanes;
      const int rows = static_cast<int>(std::clamp<int64_t>(count - first, 0, kLanes));
      uint32_t* out = work.latents.data + t * book.steps * kTile;
      if (book.products == 3) prepare<true>(book, latents + first * book.dim, rows, out, work.columns.data[t]);
      else prepare<false>(book, latents + first * book.dim, rows, out, work.columns.data[t]);
      reset(book, work.columns.data[t]);
    }
    scan(book, work);
    for (int t = 0; t < kTiles; ++t) {
      Work::Column& column = work.columns.data[t];
      _mm512_store_ps(column.threshold, _mm512_sub_ps(_mm512_load_ps(column.best), _mm512_load_ps(column.two_error)));
      sift(column);
      for (int lane = 0; lane < kLanes && start + t * kLanes + lane < count; ++lane) {
        const int64_t row = start + t * kLanes + lane;
        const float* x = latents + row * book.dim;
        codes[row] = column.candidates[lane].decide(book, x, column.filtered[lane], column.threshold[lane], looked_at);
      }
    }
  }
  _tile_release();
  return looked_at;
}

}  // namespace amx
}  // namespace t2v

#pragma GCC pop_options
