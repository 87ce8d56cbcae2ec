// Exact comparison of distances between fp32 rows, shared by the implementations of vq_lookup.
//
// An implementation filters with fast, bounded arithmetic, and works out distances of the candidates in double, each within a relative
// (D + 4) 2^-53; those that double cannot tell apart come here: integers, no rounding at all.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define T2V_HOST_DEVICE __host__ __device__
#else
#define T2V_HOST_DEVICE
#endif

namespace t2v {

// The sum of products of fp32 numbers as an integer multiple of 2^-352. A product is a double without rounding (48 bits, between 2^-298
// and 2^256); its last bit as a double lies at 2^-350 or above. 20 digits of 32 bits reach 2^288: room for 2^31 products. A digit is kept in
// 64 bits and carries are only moved at the end.
class ExactSum {
 public:
  static constexpr int kDigits = 22;

  T2V_HOST_DEVICE void add(double product, bool subtract) {
    if (product == 0) return;
    uint64_t bits;
    memcpy(&bits, &product, sizeof bits);
    const int exponent = static_cast<int>((bits >> 52) & 0x7FF);  // never 0: a product is far above the subnormal doubles
    const uint64_t mantissa = (bits & ((uint64_t{1} << 52) - 1)) | (uint64_t{1} << 52);
    const int position = exponent - 1075 + 352;  // of the mantissa's last bit
    const int digit = position >> 5, shift = position & 31;
    const unsigned __int128 wide = static_cast<unsigned __int128>(mantissa) << shift;  // 84 bits: three digits
    const int64_t sign = ((bits >> 63) != 0) != subtract ? -1 : 1;
    for (int i = 0; i < 3; ++i) digits_[digit + i] += sign * static_cast<int64_t>(static_cast<uint32_t>(wide >> (32 * i)));
  }

  // The terms of |x - a|^2 - |x - b|^2 that one coordinate gives: a^2 - b^2 - 2xa + 2xb.
  T2V_HOST_DEVICE void add_difference(double x, double a, double b) {
    add(a * a, false);
    add(b * b, true);
    add(2 * (x * a), true);
    add(2 * (x * b), false);
  }

  // Sums that several threads hold are added digit by digit.
  T2V_HOST_DEVICE int64_t& digit(int i) { return digits_[i]; }

  T2V_HOST_DEVICE int sign() const {
    int64_t carry = 0;
    bool any = false;
    for (int i = 0; i < kDigits; ++i) {
      const int64_t value = digits_[i] + carry;
      any |= (value & 0xFFFFFFFF) != 0;
      carry = value >> 32;  // rounds down, so the digit that stays is not negative
    }
    return carry < 0 ? -1 : (any || carry > 0 ? 1 : 0);
  }

 private:
  int64_t digits_[kDigits] = {};
};

// Sign of |x - a|^2 - |x - b|^2 in exact arithmetic: of the sum of a^2 - b^2 - 2xa + 2xb.
inline int compare_distances(const float* x, const float* a, const float* b, int64_t dim) {
  ExactSum sum;
  for (int64_t d = 0; d < dim; ++d) {
    if (a[d] == b[d]) continue;
    sum.add_difference(x[d], a[d], b[d]);
  }
  return sum.sign();
}

}  // namespace t2v
