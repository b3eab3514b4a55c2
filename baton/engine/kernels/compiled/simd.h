// Vectors of the machine's own width, and the few functions the kernels need of them.
//
// Everything here works element by element: a value never depends on its lane, nor on what
// lies in the lanes beside it. Bitwise reproducibility of a row among any neighbours rests
// on that (see linear.h and attention.cpp).
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace baton {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

inline vf splat(float x) { return x - vf{}; }

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  // A multiplication by 2^112 moves the exponent's bias, and normalises subnormals.
  const uint32_t shifted = rest << 13;
  float value;
  std::memcpy(&value, &shifted, 4);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (rest >= 0x7c00) bits |= 0x7f800000;
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

inline void from_float(float x, float* out) { *out = x; }

// Rounds to nearest, ties to even, as torch does. NaN stays NaN.
inline void from_float(float x, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) {
    out->bits = 0x7fc0;
  } else {
    out->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

inline void from_float(float x, f16* out) {
#if defined(__F16C__)
  out->bits = uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  uint16_t half;
  if (bits >= 0x47800000) {
    half = bits > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (bits < 0x38800000) {
    // Adding 0.5 lets the adder round a subnormal result into the low mantissa bits.
    float value;
    std::memcpy(&value, &bits, 4);
    value += 0.5f;
    uint32_t moved;
    std::memcpy(&moved, &value, 4);
    half = uint16_t(moved - 0x3f000000);
  } else {
    bits += 0xc8000fff + ((bits >> 13) & 1);
    half = uint16_t(bits >> 13);
  }
  out->bits = sign | half;
#endif
}

inline vf load(const bf16* p) {
  typedef uint16_t half_vector __attribute__((vector_size(VL * 2)));
  half_vector h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}

inline vf load(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf v;
  for (int i = 0; i < VL; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// What the compiler makes of a * b + c on vectors: one rounding where the machine has it.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Lanes are halved again and again, so the order of additions is one fixed tree.
inline float sum(vf v) {
  float lanes[VL];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = VL / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

inline vf max(vf a, vf b) { return a > b ? a : b; }

inline float max(vf v) {
  float lanes[VL];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = VL / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) {
      lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    }
  }
  return lanes[0];
}

// e^x, relative error below 2e-7. x is clamped to -87 .. 88, so e^-inf is about 1e-38.
inline vf exp(vf x) {
  x = x > splat(88.0f) ? splat(88.0f) : x;
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x * 1.44269504088896341f + magic;
  const vi exponent = (vi)shifted - (vi)magic;
  const vf n = shifted - magic;
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (vf)((vi)p + (exponent << 23));
}

inline vf tanh(vf x) {
  const vf e = exp(x + x);
  return 1.0f - 2.0f / (e + 1.0f);
}

inline vf silu(vf x) { return x / (1.0f + exp(-x)); }

inline vf gelu_tanh(vf x) {
  const vf inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return 0.5f * x * (1.0f + tanh(inner));
}

}  // namespace baton
