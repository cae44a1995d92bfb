// Operands of products, and the products. A right operand of bf16 holds pairs of rows side by side (VNNI); the others are
// plain. Products of bf16 and fp32 are those of oneDNN's micro-kernels (AMX or AVX-512), as PyTorch exports them.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace {

using at::BFloat16;
namespace blas = at::native::cpublas;

constexpr int64_t LANES = 16;  // tiles are padded to a multiple of it, in both dims

template <typename T> struct Kind { using wide = T; static constexpr int64_t pair = 1; };
template <> struct Kind<BFloat16> { using wide = float; static constexpr int64_t pair = 2; };
template <typename T> using Wide = typename Kind<T>::wide;

// A row of wide numbers times a factor, in the type of operands.
template <typename T> inline void narrow(const Wide<T>* from, Wide<T> factor, T* to, int64_t count) {
  if constexpr (Kind<T>::pair == 2) {
    auto bits = reinterpret_cast<uint16_t*>(to);
    int64_t c = 0;
    for (; c + LANES <= count; c += LANES)
      store(bits + c, __builtin_convertvector(rounded(bits_of(load<Floats>(from + c) * factor)) >> 16, Halves));
    for (; c < count; ++c) to[c] = T(from[c] * factor);
  } else {
    for (int64_t c = 0; c < count; ++c) to[c] = from[c] * factor;
  }
}

// Sum of products of two rows.
template <typename T> inline Wide<T> dot(const T* a, const T* b, int64_t count) {
  if constexpr (Kind<T>::pair == 2) {
    auto wide = [](const T* x) {
      const Words bits = __builtin_convertvector(load<Halves>(x), Words) << 16;
      return reinterpret_cast<const Floats&>(bits);
    };
    Floats sums{};
    int64_t c = 0;
    for (; c + LANES <= count; c += LANES) sums += wide(a + c) * wide(b + c);
    float sum = 0;
    for (int64_t l = 0; l < LANES; ++l) sum += sums[l];
    for (; c < count; ++c) sum += float(a[c]) * float(b[c]);
    return sum;
  } else {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < count; ++c) sum += a[c] * b[c];
    return sum;
  }
}

// Right operand [rows (padded), columns] of a matrix [rows, columns]: pairs of rows side by side for bf16.
template <typename T> void pack(const T* from, int64_t row, T* to, int64_t rows, int64_t padded, int64_t columns) {
  if constexpr (Kind<T>::pair == 1) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * columns, from + r * row, columns * sizeof(T));
    std::memset(to + rows * columns, 0, (padded - rows) * columns * sizeof(T));
  } else {
    auto words = reinterpret_cast<uint32_t*>(to);
    auto bits = reinterpret_cast<const uint16_t*>(from);
    for (int64_t r = 0; r + 1 < rows; r += 2) {
      const uint16_t *first = bits + r * row, *second = first + row;
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) words[r / 2 * columns + c] = first[c] | uint32_t(second[c]) << 16;
    }
    if (rows % 2)
      for (int64_t c = 0; c < columns; ++c) words[rows / 2 * columns + c] = bits[(rows - 1) * row + c];
    const int64_t filled = (rows + 1) / 2;
    std::memset(words + filled * columns, 0, (padded / 2 - filled) * columns * 4);
  }
}

// Right operand [columns, rows (padded)] of the transpose of a matrix [rows, columns]; columns are even for bf16.
template <typename T> void pack_transposed(const T* from, int64_t row, T* to, int64_t rows, int64_t padded, int64_t columns) {
  if (rows < padded) std::memset(to, 0, padded * columns * sizeof(T));
  if constexpr (Kind<T>::pair == 1) {
    transpose(from, row, to, padded, rows, columns);
  } else if (row % 2 == 0) {
    transpose_words(reinterpret_cast<const uint32_t*>(from), row / 2, reinterpret_cast<uint32_t*>(to), padded, rows, columns / 2);
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) to[(c / 2 * padded + r) * 2 + c % 2] = from[r * row + c];
  }
}

// Left operand: the transpose [columns, rows (padded)] of a matrix [rows, columns]; rows are padded to an even number.
template <typename T>
void flip(const T* from, int64_t row, T* to, int64_t to_row, int64_t rows, int64_t padded, int64_t columns, std::vector<uint32_t>& pairs) {
  if constexpr (Kind<T>::pair == 1) {
    transpose(from, row, to, to_row, rows, columns);
    for (int64_t c = 0; c < columns; ++c) std::memset(to + c * to_row + rows, 0, (padded - rows) * sizeof(T));
  } else {
    pairs.resize(padded / 2 * columns);
    pack(from, row, reinterpret_cast<T*>(pairs.data()), rows, padded, columns);
    transpose_words(pairs.data(), columns, reinterpret_cast<uint32_t*>(to), to_row / 2, padded / 2, columns);
  }
}

// C [ROWS, columns] (+)= A [ROWS, K] B [K, N], in registers; columns: at most two vectors.
template <typename A, int ROWS>
inline void panel(int64_t columns, int64_t k, const A* a, int64_t a_row, const A* b, int64_t b_row, A* c, int64_t c_row, bool add) {
  using V = Vector<A>;
  const bool whole = columns == 2 * WIDTH<A>;
  V sums[ROWS][2] = {};
  A edge[2 * WIDTH<A>] = {};
  for (int64_t l = 0; l < k; ++l) {
    const A* row = b + l * b_row;
    if (!whole) std::memcpy(edge, row, columns * sizeof(A)), row = edge;
    const V left = load<V>(row), right = load<V>(row + WIDTH<A>);
    for (int r = 0; r < ROWS; ++r) {
      const V x = all<V>(a[r * a_row + l]);
      sums[r][0] += x * left;
      sums[r][1] += x * right;
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    A* to = c + r * c_row;
    if (whole) {
      store(to, add ? load<V>(to) + sums[r][0] : sums[r][0]);
      store(to + WIDTH<A>, add ? load<V>(to + WIDTH<A>) + sums[r][1] : sums[r][1]);
    } else {
      for (int64_t i = 0; i < columns; ++i) to[i] = (add ? to[i] : A(0)) + sums[r][i / WIDTH<A>][i % WIDTH<A>];
    }
  }
}

// Whether oneDNN's micro-kernel computes products of fp32 on this processor.
inline bool fp32_products() {
  static const bool found = [] {
    const float one = 1;
    float product = 0;
    try {
      blas::brgemm(1, 1, 1, 1, 1, 1, false, &one, &one, &product, false);
    } catch (const c10::Error&) {
      return false;
    }
    return product == 1;
  }();
  return found;
}

// C [M, N] (+)= A [M, K] B [K, N], B as `pack` leaves it, of N columns a row.
template <typename T>
inline void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, const T* b, Wide<T>* c, int64_t c_row, bool add) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    blas::brgemm(m, n, k, a_row, n, c_row, add, a, b, c, true);
  } else {
    if constexpr (std::is_same_v<T, float>)
      if (fp32_products()) return blas::brgemm(m, n, k, a_row, n, c_row, add, a, b, c, false);
    constexpr int64_t columns = 2 * WIDTH<T>;
    for (int64_t j = 0; j < n; j += columns) {
      const int64_t some = std::min(columns, n - j);
      int64_t i = 0;
      for (; i + 8 <= m; i += 8) panel<T, 8>(some, k, a + i * a_row, a_row, b + j, n, c + i * c_row + j, c_row, add);
      for (; i < m; ++i) panel<T, 1>(some, k, a + i * a_row, a_row, b + j, n, c + i * c_row + j, c_row, add);
    }
  }
}

// Writes two rows of weights (keys j and j + 1) as a right operand, and if `rows` is given as rows of a left one too.
template <typename T>
inline void write_pair(Vector<Wide<T>> first, Vector<Wide<T>> second, T* pairs, T* rows, int64_t j, int64_t i, int64_t M) {
  using V = Vector<Wide<T>>;
  if constexpr (Kind<T>::pair == 1) {
    if (pairs) store(pairs + j * M + i, first), store(pairs + (j + 1) * M + i, second);
    if (rows) store(rows + j * M + i, first), store(rows + (j + 1) * M + i, second);
  } else {
    const Words a = rounded(bits_of(first)) >> 16, b = rounded(bits_of(second)) & 0xffff0000u;
    if (pairs) store(reinterpret_cast<uint32_t*>(pairs) + j / 2 * M + i, a | b);
    if (rows) {
      store(reinterpret_cast<uint16_t*>(rows) + j * M + i, __builtin_convertvector(a, Halves));
      store(reinterpret_cast<uint16_t*>(rows) + (j + 1) * M + i, __builtin_convertvector(b >> 16, Halves));
    }
  }
}

inline int64_t even(int64_t n) { return n + n % 2; }

}  // namespace
