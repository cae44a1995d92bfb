// Vectors of 64 bytes, GCC's and Clang's, for whatever the processor has; exponentials, roundings, transposes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));  // as many as Floats, as are
typedef uint8_t Bytes __attribute__((vector_size(16)));

template <typename A> struct VectorOf;
template <> struct VectorOf<float> { using type = Floats; };
template <> struct VectorOf<double> { using type = Doubles; };
template <typename A> using Vector = typename VectorOf<A>::type;
template <typename A> constexpr int64_t WIDTH = 64 / sizeof(A);

template <typename V, typename A> inline V load(const A* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <typename V, typename A> inline void store(A* to, V v) { std::memcpy(to, &v, sizeof v); }
template <typename V, typename A> inline V all(A x) { return x - V{}; }
template <typename V> inline V larger(V a, V b) { return a > b ? a : b; }

// exp of fp32 within 2 ulp (Cephes' expf: Cody and Waite's reduction, a polynomial of degree 6); 0 below the normal range.
inline Floats exp_of(Floats x) {
  const Floats rounder = all<Floats>(12582912.0f);
  const Floats bounded = larger(x, all<Floats>(-87.0f));
  const Floats n = (bounded * 1.44269504088896341f + rounder) - rounder;
  const Floats r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  y *= reinterpret_cast<const Floats&>(power);
  return x < -87.0f ? Floats{} : y;
}
inline Doubles exp_of(Doubles x) {
  for (int64_t i = 0; i < WIDTH<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}
inline Floats tanh_of(Floats x) {
  const Floats bounded = larger(-larger(-x, all<Floats>(-20.0f)), all<Floats>(-20.0f));
  return 1.0f - 2.0f / (exp_of(bounded + bounded) + 1.0f);
}
inline Doubles tanh_of(Doubles x) {
  for (int64_t i = 0; i < WIDTH<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

inline Words bits_of(Floats x) { return reinterpret_cast<const Words&>(x); }
inline Words rounded(Words bits) { return bits + 0x7fffu + ((bits >> 16) & 1u); }  // bf16 in the high half, ties to even

// to[c * to_row + r] = from[r * row + c], R x C, 32 bits each; both sides may be tails.
inline void transpose_words(const uint32_t* from, int64_t row, uint32_t* to, int64_t to_row, int64_t rows, int64_t columns) {
  int64_t r = 0;
#if defined(__AVX512F__)
  for (; r + 16 <= rows; r += 16) {
    int64_t c = 0;
    for (; c + 16 <= columns; c += 16) {
      __m512i a[16], b[16];
      for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + (r + i) * row + c);
      for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
      }
      for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
      }
      for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
      }
      for (int i = 0; i < 4; ++i) {
        _mm512_storeu_si512(to + (c + i) * to_row + r, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(to + (c + i + 8) * to_row + r, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_si512(to + (c + i + 4) * to_row + r, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_si512(to + (c + i + 12) * to_row + r, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
      }
    }
    for (int i = 0; i < 16; ++i)
      for (int64_t k = c; k < columns; ++k) to[k * to_row + r + i] = from[(r + i) * row + k];
  }
#endif
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[c * to_row + r] = from[r * row + c];
}

template <typename A> inline void transpose(const A* from, int64_t row, A* to, int64_t to_row, int64_t rows, int64_t columns) {
  if constexpr (sizeof(A) == 4) {
    transpose_words(reinterpret_cast<const uint32_t*>(from), row, reinterpret_cast<uint32_t*>(to), to_row, rows, columns);
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) to[c * to_row + r] = from[r * row + c];
  }
}

}  // namespace
