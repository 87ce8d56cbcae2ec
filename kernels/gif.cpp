// GIF -> frames as a browser shows them on a white page, resized. Plain C++17 behind a C interface; needs no library.
//
//   bytes -> scan: blocks, sizes, number of frames            (nothing is decoded or allocated for pixels yet)
//         -> a frame: sub-blocks joined -> LZW -> indices -> drawn on the canvas (RGBX) -> changed rows resized -> RGB
//
// What is whole and usual is decoded here. For everything else a nonzero status is returned and nothing is promised about the
// output: the caller then takes the slow way, which finds the reason. Every index into a buffer is checked against its size
// where it is made, so that no input can lead outside.
//
// LZW: the string of a code is always found in the indices already written (a new code is the string before plus the first index
// of the one after it, and these stand side by side there), so that a code is a position and a length, and decoding is copying.
//
// Resizing is Pillow's (bilinear with antialiasing, 8 bits between the passes, 22 bits of precision), to the bit. The vector code
// splits a coefficient in two of 11 bits, whose products with a byte fit the 16-bit multiply-add, and is as exact.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define T2V_SSE41 __attribute__((target("sse4.1")))
#define T2V_AVX2 __attribute__((target("avx2")))
#endif

namespace {

constexpr int kMaxCodes = 4096;
constexpr int kPrecision = 22;  // bits of a resizing coefficient
constexpr int kHalf = 11;
constexpr size_t kSlack = 64;  // bytes behind a buffer that whole-vector loads and stores may touch
constexpr uint32_t kWhite = 0xFFFFFFFFu;

struct Image {
  uint32_t left, top, width, height;
  size_t palette;  // offset in the file
  int colours;
  bool interlaced;
  size_t data;  // offset of the LZW code size
  int delay_ms, disposal, transparent;
};

struct Gif {
  uint32_t width = 0, height = 0;
  std::vector<Image> images;
};

class Reader {
 public:
  Reader(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  bool has(size_t count) const { return count <= size_ - at_; }
  uint8_t byte() { return data_[at_++]; }
  uint32_t word() {
    uint32_t value = data_[at_] | data_[at_ + 1] << 8;
    at_ += 2;
    return value;
  }
  size_t at() const { return at_; }
  void skip(size_t count) { at_ += count; }
  // Passes over a chain of sub-blocks with its terminator.
  bool sub_blocks() {
    for (;;) {
      if (!has(1)) return false;
      size_t count = byte();
      if (count == 0) return true;
      if (!has(count)) return false;
      skip(count);
    }
  }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

struct Control {
  int delay_ms = 0, disposal = 0, transparent = -1;
};

bool scan_image(Reader& reader, const Control& control, size_t global, int global_colours, int64_t max_pixels, Gif& gif) {
  if (!reader.has(9)) return false;
  Image image{};
  image.left = reader.word();
  image.top = reader.word();
  image.width = reader.word();
  image.height = reader.word();
  int flags = reader.byte();
  image.palette = global;
  image.colours = global_colours;
  if (flags & 0x80) {
    image.colours = 2 << (flags & 7);
    image.palette = reader.at();
    if (!reader.has(3 * size_t(image.colours))) return false;
    reader.skip(3 * size_t(image.colours));
  }
  if (int64_t(image.width) * image.height > max_pixels) return false;
  image.interlaced = flags & 0x40;
  image.data = reader.at();
  if (!reader.has(1)) return false;
  reader.skip(1);
  if (!reader.sub_blocks()) return false;
  image.delay_ms = control.delay_ms >= 20 ? control.delay_ms : 100;
  image.disposal = control.disposal == 4 ? 3 : control.disposal;
  image.transparent = control.transparent;
  if (gif.images.empty()) {  // browsers grow the screen to hold the first image
    gif.width = std::max(gif.width, image.left + image.width);
    gif.height = std::max(gif.height, image.top + image.height);
    if (int64_t(gif.width) * gif.height > max_pixels) return false;
  }
  gif.images.push_back(image);
  return true;
}

bool scan(const uint8_t* data, size_t size, int64_t max_pixels, bool require_trailer, Gif& gif) {
  if (size < 13 || (std::memcmp(data, "GIF87a", 6) && std::memcmp(data, "GIF89a", 6))) return false;
  Reader reader(data, size);
  reader.skip(6);
  gif.width = reader.word();
  gif.height = reader.word();
  int flags = reader.byte();
  reader.skip(2);
  if (int64_t(gif.width) * gif.height > max_pixels) return false;
  size_t global = reader.at();
  int global_colours = 0;
  if (flags & 0x80) {
    global_colours = 2 << (flags & 7);
    if (!reader.has(3 * size_t(global_colours))) return false;
    reader.skip(3 * size_t(global_colours));
  }
  Control control;
  for (;;) {
    if (!reader.has(1)) return !require_trailer;
    int kind = reader.byte();
    if (kind == 0x3B) return true;
    if (kind == 0x21) {
      if (!reader.has(2)) return false;
      int label = reader.byte();
      size_t first = reader.at();
      if (!reader.sub_blocks()) return false;
      if (label == 0xF9 && data[first] >= 4) {
        const uint8_t* block = data + first + 1;
        control.disposal = block[0] >> 2 & 7;
        control.delay_ms = 10 * (block[1] | block[2] << 8);
        control.transparent = block[0] & 1 ? block[3] : -1;
      }
    } else if (kind == 0x2C) {
      if (!scan_image(reader, control, global, global_colours, max_pixels, gif)) return false;
      control = Control();
    } else if (kind != 0) {  // zero bytes between blocks are padding
      return false;
    }
  }
}

// --- LZW --------------------------------------------------------------------------------------------------------------

// Joins the sub-blocks at `from`, which `scan` has found whole; returns the number of bytes, with kSlack zeros behind them.
size_t join(const uint8_t* from, std::vector<uint8_t>& joined) {
  size_t total = 0;
  for (const uint8_t* block = from; *block; block += *block + 1) total += *block;
  if (joined.size() < total + kSlack) joined.resize(total + kSlack);
  uint8_t* to = joined.data();
  for (const uint8_t* block = from; *block; block += *block + 1) {
    std::memcpy(to, block + 1, *block);
    to += *block;
  }
  std::memset(to, 0, kSlack);
  return total;
}

uint64_t load64(const uint8_t* from) {
  uint64_t value;
  std::memcpy(&value, from, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  value = __builtin_bswap64(value);
#endif
  return value;
}

inline void copy16(uint8_t* to, const uint8_t* from) {  // may overlap
  uint8_t bytes[16];
  std::memcpy(bytes, from, 16);
  std::memcpy(to, bytes, 16);
}

// Copies `length` bytes that lie wholly before `to`; up to 15 more are overwritten.
inline void copy_string(uint8_t* to, const uint8_t* from, uint32_t length) {
  copy16(to, from);
  for (uint32_t done = 16; done < length; done += 16) copy16(to + done, from + done);
}

class Lzw {
 public:
  // Decodes `count` indices from `size` bytes into `out`, which has room for count + 4096 + kSlack.
  bool decode(const uint8_t* data, size_t size, int literal_bits, uint8_t* out, size_t count) {
    if (literal_bits < 1 || literal_bits > 8) return false;
    const uint32_t clear = 1u << literal_bits, end = clear + 1;
    const size_t bits = size * 8;
    size_t at = 0, written = 0;
    uint32_t width = literal_bits + 1, next = end + 1, limit = 2u << literal_bits;
    uint32_t previous_at = 0, previous_length = 0;  // of the string before; length 0: none since the last clear
    while (written < count) {
      if (at + width > bits) return false;
      uint32_t code = uint32_t(load64(data + (at >> 3)) >> (at & 7)) & (limit - 1);
      at += width;
      if (code == clear) {
        width = literal_bits + 1;
        next = end + 1;
        limit = 2u << literal_bits;
        previous_length = 0;
        continue;
      }
      if (code == end) return false;  // too few pixels
      const uint32_t start = uint32_t(written);
      uint32_t length;
      if (code < clear) {
        out[written] = uint8_t(code);
        length = 1;
      } else if (code < next) {
        length = length_[code];
        copy_string(out + written, out + start_[code], length);
      } else {  // the string that is only now being made: the one before and its own first index
        if (code != next || !previous_length || next >= kMaxCodes) return false;
        length = previous_length + 1;
        copy_string(out + written, out + previous_at, previous_length);
        out[written + previous_length] = out[previous_at];
      }
      written += length;
      if (previous_length && next < kMaxCodes) {
        start_[next] = previous_at;
        length_[next++] = previous_length + 1;
      }
      if (next == limit && width < 12) {  // also where no string was made: with literals of one bit the first is code 4
        ++width;
        limit <<= 1;
      }
      previous_at = start;
      previous_length = length;
    }
    return true;
  }

 private:
  uint32_t start_[kMaxCodes], length_[kMaxCodes];
};

// --- resizing ---------------------------------------------------------------------------------------------------------

// For each output: the first input and `taps` coefficients from there on, an even number, zeros at the end.
struct Filter {
  uint32_t taps = 0;
  std::vector<uint32_t> first, used;
  std::vector<int32_t> coefficients;
  std::vector<int16_t> high, low;  // coefficient = high * 2^11 + low

  Filter(uint32_t in, uint32_t out) : first(out), used(out) {
    const double scale = double(in) / out, filter_scale = scale < 1 ? 1 : scale, support = filter_scale;
    taps = (uint32_t(std::ceil(support)) * 2 + 2) & ~1u;
    coefficients.assign(size_t(taps) * out, 0);
    high.assign(coefficients.size(), 0);
    low.assign(coefficients.size(), 0);
    std::vector<double> weights(taps);
    for (uint32_t o = 0; o < out; ++o) {
      const double centre = (o + 0.5) * scale;
      int begin = int(centre - support + 0.5), stop = int(centre + support + 0.5);
      if (begin < 0) begin = 0;
      if (stop > int(in)) stop = int(in);
      double sum = 0;
      for (int i = begin; i < stop; ++i) {
        double distance = std::fabs((i - centre + 0.5) * (1.0 / filter_scale));
        weights[i - begin] = distance < 1 ? 1 - distance : 0;
        sum += weights[i - begin];
      }
      first[o] = begin;
      used[o] = stop - begin;
      const double share = sum != 0 ? 1.0 / sum : 1.0;
      for (int i = 0; i < stop - begin; ++i) {
        int32_t coefficient = int32_t(0.5 + weights[i] * share * (1 << kPrecision));
        size_t place = size_t(o) * taps + i;
        coefficients[place] = coefficient;
        high[place] = int16_t(coefficient >> kHalf);
        low[place] = int16_t(coefficient & ((1 << kHalf) - 1));
      }
    }
  }
};

inline uint8_t rounded(int32_t sum) {
  sum >>= kPrecision;
  return uint8_t(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

// One row of RGBX pixels, resized to out_from .. out_to.
void resize_row(const uint8_t* row, const Filter& filter, uint32_t out_from, uint32_t out_to, uint8_t* out) {
  for (uint32_t o = out_from; o < out_to; ++o) {
    const int32_t* coefficients = &filter.coefficients[size_t(o) * filter.taps];
    int32_t sums[4] = {1 << (kPrecision - 1), 1 << (kPrecision - 1), 1 << (kPrecision - 1), 0};
    for (uint32_t i = 0; i < filter.used[o]; ++i)
      for (int c = 0; c < 3; ++c) sums[c] += row[4 * size_t(filter.first[o] + i) + c] * coefficients[i];
    for (int c = 0; c < 3; ++c) out[4 * size_t(o) + c] = rounded(sums[c]);
    out[4 * size_t(o) + 3] = 255;
  }
}

// One output row from the rows of `in` (RGBX, `stride` bytes apart), bytes from .. to of it.
void mix_rows(const uint8_t* in, size_t stride, const Filter& filter, uint32_t o, uint32_t from, uint32_t to, uint8_t* out) {
  const int32_t* coefficients = &filter.coefficients[size_t(o) * filter.taps];
  for (uint32_t b = from; b < to; ++b) {
    int32_t sum = 1 << (kPrecision - 1);
    for (uint32_t i = 0; i < filter.used[o]; ++i) sum += in[(filter.first[o] + i) * stride + b] * coefficients[i];
    out[b] = rounded(sum);
  }
}

#if defined(__x86_64__)
inline int32_t load32(const void* from) {
  int32_t value;
  std::memcpy(&value, from, 4);
  return value;
}

// As resize_row; reads up to two pixels behind the row (kSlack) and multiplies them by zero.
T2V_SSE41 void resize_row_sse(const uint8_t* row, const Filter& filter, uint32_t out_from, uint32_t out_to, uint8_t* out) {
  const __m128i pair = _mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1);
  const __m128i pair2 = _mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1);
  const __m128i half = _mm_set1_epi32(1 << (kPrecision - 1));
  for (uint32_t o = out_from; o < out_to; ++o) {
    const int16_t* high = &filter.high[size_t(o) * filter.taps];
    const int16_t* low = &filter.low[size_t(o) * filter.taps];
    const uint8_t* pixel = row + 4 * size_t(filter.first[o]);
    __m128i sum_high = _mm_setzero_si128(), sum_low = half;
    const uint32_t used = filter.used[o];
    uint32_t i = 0;
    for (; i + 2 < used; i += 4) {  // four pixels; taps is even, so the last pair may lie behind the coefficients
      __m128i pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pixel + 4 * size_t(i)));
      __m128i a = _mm_shuffle_epi8(pixels, pair), b = _mm_shuffle_epi8(pixels, pair2);
      sum_high = _mm_add_epi32(sum_high, _mm_madd_epi16(a, _mm_set1_epi32(load32(high + i))));
      sum_low = _mm_add_epi32(sum_low, _mm_madd_epi16(a, _mm_set1_epi32(load32(low + i))));
      sum_high = _mm_add_epi32(sum_high, _mm_madd_epi16(b, _mm_set1_epi32(load32(high + i + 2))));
      sum_low = _mm_add_epi32(sum_low, _mm_madd_epi16(b, _mm_set1_epi32(load32(low + i + 2))));
    }
    if (i < used) {
      __m128i pixels = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(pixel + 4 * size_t(i)));
      __m128i a = _mm_shuffle_epi8(pixels, pair);
      sum_high = _mm_add_epi32(sum_high, _mm_madd_epi16(a, _mm_set1_epi32(load32(high + i))));
      sum_low = _mm_add_epi32(sum_low, _mm_madd_epi16(a, _mm_set1_epi32(load32(low + i))));
    }
    __m128i sum = _mm_srai_epi32(_mm_add_epi32(_mm_slli_epi32(sum_high, kHalf), sum_low), kPrecision);
    __m128i words = _mm_packus_epi32(sum, sum);
    int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
    std::memcpy(out + 4 * size_t(o), &bytes, 4);
  }
}

// As mix_rows; `from` and `to` are multiples of 4, and whole vectors of 16 bytes are read and written from `from` on (kSlack).
T2V_AVX2 void mix_rows_avx(const uint8_t* in, size_t stride, const Filter& filter, uint32_t o, uint32_t from, uint32_t to, uint8_t* out) {
  const int16_t* high = &filter.high[size_t(o) * filter.taps];
  const int16_t* low = &filter.low[size_t(o) * filter.taps];
  const uint8_t* first = in + filter.first[o] * stride;
  const uint32_t used = filter.used[o];
  const __m256i half = _mm256_set1_epi32(1 << (kPrecision - 1));
  for (uint32_t b = from; b < to; b += 16) {
    __m256i high0 = _mm256_setzero_si256(), high1 = high0, low0 = half, low1 = half;
    for (uint32_t i = 0; i < used; i += 2) {
      const uint8_t* row = first + i * stride + b;
      __m128i one = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
      __m128i two = i + 1 < used ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + stride)) : one;  // else times zero
      __m256i a = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(one, two)), c = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(one, two));
      __m256i h = _mm256_set1_epi32(load32(high + i)), l = _mm256_set1_epi32(load32(low + i));
      high0 = _mm256_add_epi32(high0, _mm256_madd_epi16(a, h));
      low0 = _mm256_add_epi32(low0, _mm256_madd_epi16(a, l));
      high1 = _mm256_add_epi32(high1, _mm256_madd_epi16(c, h));
      low1 = _mm256_add_epi32(low1, _mm256_madd_epi16(c, l));
    }
    __m256i sum0 = _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high0, kHalf), low0), kPrecision);
    __m256i sum1 = _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high1, kHalf), low1), kPrecision);
    __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(sum0, sum1), 0xD8);
    __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + b), bytes);
  }
}
#endif

// --- canvas -----------------------------------------------------------------------------------------------------------

struct Box {
  uint32_t left, top, right, bottom;
  bool empty() const { return left >= right || top >= bottom; }
};

class Canvas {
 public:
  Canvas(uint32_t width, uint32_t height) : width_(width), height_(height), pixels_(size_t(width) * height + kSlack, kWhite), changed_(height, 1) {}

  Box clip(const Image& image) const {
    uint32_t right = image.left + image.width, bottom = image.top + image.height;
    return {image.left, image.top, right < width_ ? right : width_, bottom < height_ ? bottom : height_};
  }

  const uint8_t* row(uint32_t y) const { return reinterpret_cast<const uint8_t*>(pixels_.data() + size_t(y) * width_); }

  // Draws a row of indices, of which the first falls on the box's left edge.
  void draw_row(const Box& box, uint32_t y, const uint8_t* indices, const uint32_t* colours, int transparent) {
    uint32_t* to = pixels_.data() + size_t(y) * width_ + box.left;
    const uint32_t count = box.right - box.left;
    uint32_t difference = 0;
    if (transparent < 0) {
      for (uint32_t x = 0; x < count; ++x) {
        uint32_t colour = colours[indices[x]];
        difference |= colour ^ to[x];
        to[x] = colour;
      }
    } else {
      for (uint32_t x = 0; x < count; ++x) {
        uint32_t colour = indices[x] == transparent ? to[x] : colours[indices[x]];
        difference |= colour ^ to[x];
        to[x] = colour;
      }
    }
    if (difference) mark(y, box);
  }

  void fill_white(const Box& box) {
    for (uint32_t y = box.top; y < box.bottom; ++y) {
      uint32_t* to = pixels_.data() + size_t(y) * width_;
      for (uint32_t x = box.left; x < box.right; ++x) to[x] = kWhite;
      mark(y, box);
    }
  }

  void save(const Box& box, std::vector<uint32_t>& saved) const {
    saved.clear();
    for (uint32_t y = box.top; y < box.bottom; ++y) {
      const uint32_t* from = pixels_.data() + size_t(y) * width_;
      saved.insert(saved.end(), from + box.left, from + box.right);
    }
  }

  void restore(const Box& box, const std::vector<uint32_t>& saved) {
    const uint32_t count = box.right - box.left;
    for (uint32_t y = box.top; y < box.bottom; ++y) {
      std::memcpy(pixels_.data() + size_t(y) * width_ + box.left, saved.data() + size_t(y - box.top) * count, 4 * size_t(count));
      mark(y, box);
    }
  }

  bool changed(uint32_t y) const { return changed_[y]; }
  uint32_t changed_left() const { return left_; }
  uint32_t changed_right() const { return right_; }
  uint32_t width() const { return width_; }
  uint32_t height() const { return height_; }
  void forget_changes() {
    std::memset(changed_.data(), 0, changed_.size());
    left_ = width_;
    right_ = 0;
  }

 private:
  void mark(uint32_t y, const Box& box) {
    changed_[y] = 1;
    if (box.left < left_) left_ = box.left;
    if (box.right > right_) right_ = box.right;
  }

  uint32_t width_, height_;
  std::vector<uint32_t> pixels_;  // bytes R, G, B, 255
  std::vector<uint8_t> changed_;  // rows, since the last frame was taken
  uint32_t left_ = 0, right_ = UINT32_MAX;  // columns; all at first
};

// Keeps the last frame resized, and renews what depends on rows and columns that have changed.
class Resizer {
 public:
  Resizer(uint32_t width, uint32_t height, uint32_t size, bool vector)
      : size_(size), across_(width, size), down_(height, size), vector_(vector), rows_first_(height > width),
        between_(4 * size_t(size) * (rows_first_ ? width : height) + kSlack), frame_(4 * size_t(size) * size + kSlack) {}

  void take(Canvas& canvas, uint8_t* out) {
    uint32_t from = 0, to = size_;  // the output's columns that have to be renewed
    while (from < to && across_.first[from] + across_.used[from] <= canvas.changed_left()) ++from;
    while (to > from && across_.first[to - 1] >= canvas.changed_right()) --to;
    if (from < to) rows_first_ ? renew_rows_first(canvas, from, to) : renew(canvas, from, to);
    canvas.forget_changes();
    for (size_t i = 0; i < size_t(size_) * size_; ++i) std::memcpy(out + 3 * i, frame_.data() + 4 * i, 3);
  }

 private:
  void renew(const Canvas& canvas, uint32_t from, uint32_t to) {
    const size_t stride = 4 * size_t(size_);
    for (uint32_t y = 0; y < canvas.height(); ++y)
      if (canvas.changed(y)) narrow(canvas.row(y), from, to, between_.data() + y * stride);
    for (uint32_t o = 0; o < size_; ++o)
      if (is_stale(canvas, o)) mix(between_.data(), stride, o, 4 * from, 4 * to, frame_.data() + o * stride);
  }
  // Pillow's way where a picture is higher than wide.
  void renew_rows_first(const Canvas& canvas, uint32_t from, uint32_t to) {
    const size_t stride = 4 * size_t(canvas.width());
    const uint32_t first = across_.first[from], stop = across_.first[to - 1] + across_.used[to - 1];
    for (uint32_t o = 0; o < size_; ++o) {
      if (!is_stale(canvas, o)) continue;
      mix(canvas.row(0), stride, o, 4 * first, 4 * stop, between_.data() + o * stride);
      narrow(between_.data() + o * stride, from, to, frame_.data() + 4 * size_t(o) * size_);
    }
  }
  bool is_stale(const Canvas& canvas, uint32_t o) const {
    for (uint32_t i = 0; i < down_.used[o]; ++i)
      if (canvas.changed(down_.first[o] + i)) return true;
    return false;
  }
  void narrow(const uint8_t* row, uint32_t from, uint32_t to, uint8_t* out) const {
#if defined(__x86_64__)
    if (vector_) return resize_row_sse(row, across_, from, to, out);
#endif
    resize_row(row, across_, from, to, out);
  }
  void mix(const uint8_t* in, size_t stride, uint32_t o, uint32_t from, uint32_t to, uint8_t* out) const {
#if defined(__x86_64__)
    if (vector_) {
      uint8_t behind[16];  // whole vectors are written: what they overwrite is put back
      const size_t rest = (to - from + 15) / 16 * 16 - (to - from);
      std::memcpy(behind, out + to, rest);
      mix_rows_avx(in, stride, down_, o, from, to, out);
      std::memcpy(out + to, behind, rest);
      return;
    }
#endif
    mix_rows(in, stride, down_, o, from, to, out);
  }

  uint32_t size_;
  Filter across_, down_;
  bool vector_, rows_first_;
  std::vector<uint8_t> between_;  // RGBX: [H, size], or rows first [size, W]
  std::vector<uint8_t> frame_;    // RGBX: [size, size]
};

// Row of the picture that the n-th row of the data is.
uint32_t interlaced_row(uint32_t n, uint32_t height) {
  const uint32_t starts[4] = {0, 4, 2, 1}, steps[4] = {8, 8, 4, 2};
  for (int pass = 0; pass < 4; ++pass) {
    uint32_t rows = height > starts[pass] ? (height - starts[pass] + steps[pass] - 1) / steps[pass] : 0;
    if (n < rows) return starts[pass] + n * steps[pass];
    n -= rows;
  }
  return 0;
}

class Decoder {
 public:
  Decoder(const uint8_t* data, const Gif& gif) : data_(data), gif_(gif), canvas_(gif.width, gif.height) {}

  bool decode(uint32_t size, bool vector, uint8_t* out, int32_t* delays) {
    std::unique_ptr<Resizer> resizer;
    if (size) resizer = std::make_unique<Resizer>(gif_.width, gif_.height, size, vector);
    const size_t frame = size ? 3 * size_t(size) * size : 3 * size_t(gif_.width) * gif_.height;
    for (const Image& image : gif_.images) {
      const Box box = canvas_.clip(image);
      const bool visible = !box.empty();
      if (image.disposal == 3 && visible) canvas_.save(box, saved_);
      if (!draw(image, box)) return false;
      if (resizer) resizer->take(canvas_, out);
      else take(out);
      out += frame;
      *delays++ = image.delay_ms;
      if (image.disposal == 2 && visible) canvas_.fill_white(box);
      if (image.disposal == 3 && visible) canvas_.restore(box, saved_);
    }
    return true;
  }

 private:
  bool draw(const Image& image, const Box& box) {
    const size_t count = size_t(image.width) * image.height;
    if (count == 0) return true;  // shown as a frame that changes nothing, whatever its data
    if (count > UINT32_MAX - 2 * kMaxCodes) return false;
    const size_t size = join(data_ + image.data + 1, joined_);
    if (indices_.size() < count + kMaxCodes + kSlack) indices_.resize(count + kMaxCodes + kSlack);
    if (!lzw_.decode(joined_.data(), size, data_[image.data], indices_.data(), count)) return false;
    uint32_t colours[256];
    for (int i = 0; i < 256; ++i) {
      uint8_t bytes[4] = {0, 0, 0, 255};  // beyond the palette
      if (i < image.colours) std::memcpy(bytes, data_ + image.palette + 3 * size_t(i), 3);
      std::memcpy(&colours[i], bytes, 4);
    }
    if (box.empty()) return true;
    for (uint32_t n = 0; n < image.height; ++n) {
      const uint32_t y = image.top + (image.interlaced ? interlaced_row(n, image.height) : n);
      if (y < box.bottom) canvas_.draw_row(box, y, indices_.data() + size_t(n) * image.width, colours, image.transparent);
    }
    return true;
  }

  void take(uint8_t* out) {
    for (uint32_t y = 0; y < gif_.height; ++y)
      for (uint32_t x = 0; x < gif_.width; ++x, out += 3) std::memcpy(out, canvas_.row(y) + 4 * size_t(x), 3);
  }

  const uint8_t* data_;
  const Gif& gif_;
  Canvas canvas_;
  Lzw lzw_;
  std::vector<uint8_t> joined_, indices_;
  std::vector<uint32_t> saved_;
};

bool has_vectors() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

}  // namespace

extern "C" {

// Width, height and number of frames of a GIF that is whole; nonzero if it is not, or declares more than max_pixels.
int t2v_gif_scan(const uint8_t* data, size_t size, int64_t max_pixels, int require_trailer, uint32_t* shape) {
  try {
    Gif gif;
    if (!scan(data, size, max_pixels, require_trailer, gif)) return 1;
    shape[0] = gif.width;
    shape[1] = gif.height;
    shape[2] = uint32_t(gif.images.size());
    return 0;
  } catch (const std::bad_alloc&) {
    return 2;
  }
}

// Frames [frames, size, size, 3], or with size 0 at the canvas's size, and delays [frames] in ms, of a GIF as scanned. Nonzero if its pixels
// are damaged or unusual: what was written is then of no use. `plain` keeps vector instructions out.
int t2v_gif_decode(const uint8_t* data, size_t bytes, int64_t max_pixels, int require_trailer, uint32_t frames, uint32_t size, int plain,
                   uint8_t* out, int32_t* delays) {
  try {
    Gif gif;
    if (!scan(data, bytes, max_pixels, require_trailer, gif)) return 1;
    if (gif.images.size() != frames || !gif.width || !gif.height) return 1;
    auto decoder = std::make_unique<Decoder>(data, gif);
    return decoder->decode(size, !plain && has_vectors(), out, delays) ? 0 : 3;
  } catch (const std::bad_alloc&) {
    return 2;
  }
}
}
