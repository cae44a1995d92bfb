// Softmax attention on CPUs in tiles (Dao et al. 2022; Dao 2023): no map is held, and tiles in which nothing is seen are
// not computed. Products of bf16 are those of oneDNN's micro-kernels (AMX or AVX-512), as PyTorch exports them.
//
// All tiles are transposed, keys by queries: what belongs to a query (maximum, sum, log-sum-exp, its document, its random
// words) then runs along vectors, and neither pass needs a transposed copy of weights:
//   forward   S' = K Q', P' = exp(S' - m), O' += V' P'
//   backward  P' = exp(S' - lse), dV += P' dO, dP' = V dO', dS' = P' (dP' - delta), dK += dS' Q, dQ' += K' dS'
//
// Shapes: B batch, H query heads, K key/value heads, Q queries, S keys, D width of queries and keys, V width of values;
// in a tile: M queries (padded), N keys. `BlockMask` of cpp.py says which tiles are computed.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using at::BFloat16;
using at::Tensor;
using Maybe = std::optional<Tensor>;
namespace blas = at::native::cpublas;

constexpr int64_t LANES = 16;  // tiles are padded to a multiple of it, in both dims

// ---- Vectors: GCC's and Clang's, of 64 bytes, for whatever the processor has. ----

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));

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

// ---- Operands of products. A right operand of bf16 holds pairs of rows side by side (VNNI), the others are plain. ----

typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

inline Words rounded(Words bits) { return bits + 0x7fffu + ((bits >> 16) & 1u); }  // to nearest even, in the high half
inline Words bits_of(Floats x) { return reinterpret_cast<const Words&>(x); }

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

// C [M, N] (+)= A [M, K] B [K, N], B as `pack` leaves it, of N columns a row.
template <typename T>
inline void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, const T* b, Wide<T>* c, int64_t c_row, bool add) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    blas::brgemm(m, n, k, a_row, n, c_row, add, a, b, c, true);
  } else {
    if constexpr (std::is_same_v<T, float>) { blas::brgemm(m, n, k, a_row, n, c_row, add, a, b, c, false); return; }
    constexpr int64_t columns = 2 * WIDTH<T>;
    for (int64_t j = 0; j < n; j += columns) {
      const int64_t some = std::min(columns, n - j);
      int64_t i = 0;
      for (; i + 8 <= m; i += 8) panel<T, 8>(some, k, a + i * a_row, a_row, b + j, n, c + i * c_row + j, c_row, add);
      for (; i < m; ++i) panel<T, 1>(some, k, a + i * a_row, a_row, b + j, n, c + i * c_row + j, c_row, add);
    }
  }
}

// ---- What an attention is about. ----

struct Task {
  int64_t batch, heads, kv_heads, queries, keys, dim, width;  // width: of values
  int64_t query_block, key_block;                              // of a tile, multiples of LANES
  double scale, cap;                                           // cap: bound of scores; 0 has none
  const int32_t *starts, *columns, *kinds;                     // which tiles: see BlockMask
  const bool* patterns;                                        // [kinds, key_block, query_block]
  const int32_t *documents, *key_documents;                    // [B, Q], [B, S] or null
  const int64_t* prefix;                                       // [B] or null
  const void* bias;                                            // [H, Q, S] of the scores' type, or null
  const double* slopes;                                        // [H] or null, with the places below
  const int64_t *query_places, *key_places;                    // [Q], [S]
  int64_t least, random_key;                                   // dropout: see keep() of random.py; least 0 drops nothing
  const int64_t *slots, *positions;                            // [B], [Q]
  int64_t first_head, first_key;
  double kept_scale;

  int64_t query_blocks() const { return (queries + query_block - 1) / query_block; }
  int64_t key_blocks() const { return (keys + key_block - 1) / key_block; }
  bool plain() const { return cap == 0 && !slopes && !bias && scale > 0; }  // scores are scaled products
};

struct Tile {
  int64_t b, h, query, key, m, n;  // first query and key; m queries and n keys that are real
  int64_t kind;                    // pattern, or -1: all is seen as far as places say
  bool documents;                  // whether they may separate some
};

// Smallest and largest document of each block.
std::vector<std::pair<int32_t, int32_t>> extents(const int32_t* documents, int64_t length, int64_t block) {
  std::vector<std::pair<int32_t, int32_t>> found;
  for (int64_t start = 0; start < length; start += block) {
    auto [low, high] = std::minmax_element(documents + start, documents + std::min(length, start + block));
    found.emplace_back(*low, *high);
  }
  return found;
}

struct Documents {  // of one row of the batch, by blocks
  std::vector<std::pair<int32_t, int32_t>> queries, keys;
  Documents(const Task& t, int64_t b) {
    if (!t.documents) return;
    queries = extents(t.documents + b * t.queries, t.queries, t.query_block);
    keys = extents(t.key_documents + b * t.keys, t.keys, t.key_block);
  }
  bool apart(int64_t i, int64_t j) const {
    return !queries.empty() && (queries[i].first > keys[j].second || keys[j].first > queries[i].second);
  }
  bool mixed(int64_t i, int64_t j) const {
    return !queries.empty() && !(queries[i].first == queries[i].second && queries[i] == keys[j]);
  }
};

// Which lanes are not 0.
template <typename A> inline auto seen_of(const bool* seen) {
  if constexpr (sizeof(A) == 4) {
    return __builtin_convertvector(__builtin_convertvector(load<Bytes>(seen), Halves), Ints) != 0;
  } else {
    typedef uint8_t Few __attribute__((vector_size(8)));
    typedef int64_t Longs __attribute__((vector_size(64)));
    return __builtin_convertvector(load<Few>(seen), Longs) != 0;
  }
}

// Masks a tile's scores [N, M] with -inf, key by key.
template <typename A> void hide(const Task& t, const Tile& tile, A* scores) {
  constexpr A hidden = -std::numeric_limits<A>::infinity();
  const int64_t M = t.query_block;
  for (int64_t j = 0; j < tile.n; ++j) {
    A* row = scores + j * M;
    if (tile.kind >= 0) {
      const bool* seen = t.patterns + (tile.kind * t.key_block + j) * M;
      for (int64_t i = 0; i < M; i += WIDTH<A>) store(row + i, seen_of<A>(seen + i) ? load<Vector<A>>(row + i) : all<Vector<A>>(hidden));
    }
    if (tile.documents) {
      const int32_t mine = t.key_documents[tile.b * t.keys + tile.key + j];
      const int32_t* theirs = t.documents + tile.b * t.queries + tile.query;
#pragma omp simd
      for (int64_t i = 0; i < tile.m; ++i) row[i] = theirs[i] == mine ? row[i] : hidden;
    }
    if (t.prefix && tile.key + j >= t.prefix[tile.b]) {
      const int64_t first = std::min(M, tile.key + j - tile.query);  // of the queries at this key's place and after
      for (int64_t i = 0; i < first; ++i) row[i] = hidden;
    }
  }
}

// Makes scores of products, in place; `bent` gets the slope of the cap, `added` is room for a tile.
template <typename A> void bend(const Task& t, const Tile& tile, A* scores, A* bent, A* added) {
  using V = Vector<A>;
  const int64_t M = t.query_block;
  const A scale = t.scale, cap = t.cap, slope = t.slopes ? t.slopes[tile.h] : 0;
  if (t.bias) {
    const A* bias = static_cast<const A*>(t.bias) + (tile.h * t.queries + tile.query) * t.keys + tile.key;
    transpose<A>(bias, t.keys, added, M, tile.m, tile.n);
  }
  for (int64_t j = 0; j < tile.n; ++j) {
    A* row = scores + j * M;
    for (int64_t i = 0; i < M; i += WIDTH<A>) {
      V s = load<V>(row + i) * scale;
      if (cap != 0) {
        const V t = tanh_of(s / cap);
        s = t * cap;
        if (bent) store(bent + j * M + i, 1 - t * t);
      }
      store(row + i, s);
    }
    if (t.bias)
      for (int64_t i = 0; i < tile.m; ++i) row[i] += added[j * M + i];
    if (t.slopes) {
      const int64_t place = t.key_places[tile.key + j];
      const int64_t* places = t.query_places + tile.query;
      for (int64_t i = 0; i < tile.m; ++i) row[i] -= slope * A(std::abs(place - places[i]));
    }
  }
}

// Which weights dropout keeps: as keep() of random.py, eight keys a call of Philox4x32-10 (Salmon et al. 2011).
struct Dropout {
  std::vector<uint32_t> words;  // [4, M]
  std::vector<uint8_t> kept;    // [N, M]

  void draw(const Task& t, const Tile& tile) {
    const int64_t M = t.query_block;
    words.resize(4 * M);
    kept.resize(t.key_block * M);
    const int64_t first = t.first_key + tile.key;
    for (int64_t group = first / 8; group * 8 < first + tile.n; ++group) {
      philox(t, tile, group);
      for (int64_t lane = 0; lane < 8; ++lane) {
        const int64_t j = group * 8 + lane - first;
        if (j < 0 || j >= tile.n) continue;
        const uint32_t *word = words.data() + lane / 2 * M, shift = lane % 2 * 16, least = t.least;
        uint8_t* row = kept.data() + j * M;
#pragma omp simd
        for (int64_t i = 0; i < M; ++i) row[i] = ((word[i] >> shift) & 0xffff) >= least;
      }
    }
  }

  void philox(const Task& t, const Tile& tile, int64_t group) {
    const int64_t M = t.query_block;
    uint32_t *c0 = words.data(), *c1 = c0 + M, *c2 = c1 + M, *c3 = c2 + M;
    for (int64_t i = 0; i < M; ++i) {
      c0[i] = uint32_t(group);
      c1[i] = i < tile.m ? uint32_t(t.positions[tile.query + i]) : 0;
      c2[i] = uint32_t(tile.h + t.first_head);
      c3[i] = uint32_t(t.slots[tile.b]);
    }
    uint32_t k0 = uint32_t(t.random_key), k1 = uint32_t(uint64_t(t.random_key) >> 32);
    for (int round = 0; round < 10; ++round) {
#pragma omp simd
      for (int64_t i = 0; i < M; ++i) {
        const uint64_t p0 = uint64_t(c0[i]) * 0xD2511F53u, p1 = uint64_t(c2[i]) * 0xCD9E8D57u;
        const uint32_t a = uint32_t(p1 >> 32) ^ c1[i] ^ k0, b = uint32_t(p0 >> 32) ^ c3[i] ^ k1;
        c1[i] = uint32_t(p1);
        c3[i] = uint32_t(p0);
        c0[i] = a;
        c2[i] = b;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
};

template <typename A> inline Vector<A> kept_of(const uint8_t* kept) {
  Vector<A> v;
  if constexpr (sizeof(A) == 4) {
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(load<Bytes>(kept), Halves), Ints), Floats);
  } else {
    for (int64_t i = 0; i < WIDTH<A>; ++i) v[i] = A(kept[i]);
    return v;
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

// ---- Forward: of a block of queries. ----

template <typename T> struct Forward {
  using A = Wide<T>;
  using V = Vector<A>;
  const Task& t;
  const int64_t M, N;
  std::vector<A> scores, added, out, top, sum;
  std::vector<T> query, weights;
  Dropout dropout;

  explicit Forward(const Task& t)
      : t(t), M(t.query_block), N(t.key_block), scores(M * N), added(t.bias ? M * N : 0), out(t.width * M), top(M), sum(M), query(t.dim * M), weights(M * N) {}

  // q, k: this head's; values: V' of it [width, padded keys]. Writes out [m, width] and lse [m].
  void block(int64_t b, int64_t h, int64_t i, const T* q, int64_t q_row, const T* k, int64_t k_row, const T* values, int64_t padded,
             const Documents& documents, T* to, int64_t to_row, A* lse) {
    const int64_t m = std::min(M, t.queries - i * M);
    std::fill(top.begin(), top.end(), -std::numeric_limits<A>::infinity());
    std::fill(sum.begin(), sum.end(), A(0));
    pack_transposed(q + i * M * q_row, q_row, query.data(), m, M, t.dim);
    bool first = true;
    for (int32_t at = t.starts[i]; at < t.starts[i + 1]; ++at) {
      const int64_t j = t.columns[at];
      if (documents.apart(i, j)) continue;
      const Tile tile{b, h, i * M, j * N, m, std::min(N, t.keys - j * N), t.kinds[at], documents.mixed(i, j)};
      product<T>(tile.n, M, t.dim, k + tile.key * k_row, k_row, query.data(), scores.data(), M, false);
      weigh(tile, first);
      product<T>(t.width, M, even(tile.n), values + tile.key, padded, weights.data(), out.data(), M, !first);
      first = false;
    }
    if (first) std::fill(out.begin(), out.end(), A(0));
    finish(m, to, to_row, lse);
  }

  // Scores to weights, by the largest score so far; scales what was summed by an earlier one.
  void weigh(const Tile& tile, bool first) {
    const bool masked = tile.kind >= 0 || tile.documents || t.prefix, plain = t.plain();
    if (!plain) bend<A>(t, tile, scores.data(), nullptr, added.data());
    if (masked) hide<A>(t, tile, scores.data());
    if (t.least) dropout.draw(t, tile);
    if (tile.n % 2)
      std::fill_n(scores.begin() + tile.n * M, M, -std::numeric_limits<A>::infinity());
    const A scale = plain ? A(t.scale) : A(1);
    for (int64_t i = 0; i < M; i += WIDTH<A>) {
      const V before = load<V>(&top[i]);
      V high = all<V>(-std::numeric_limits<A>::infinity());
      for (int64_t j = 0; j < tile.n; ++j) high = larger(high, load<V>(&scores[j * M + i]));
      high = larger(before, high * scale);
      store(&top[i], high);
      const V finite = high == -std::numeric_limits<A>::infinity() ? V{} : high;
      V total{}, other{};
      for (int64_t j = 0; j < tile.n; j += 2) {
        V a = exp_of(load<V>(&scores[j * M + i]) * scale - finite), c = exp_of(load<V>(&scores[(j + 1) * M + i]) * scale - finite);
        total += a;
        other += c;
        if (t.least) {
          a *= kept_of<A>(&dropout.kept[j * M + i]);
          c *= j + 1 < tile.n ? kept_of<A>(&dropout.kept[(j + 1) * M + i]) : V{};
        }
        write_pair<T>(a, c, weights.data(), nullptr, j, i, M);
      }
      const V factor = exp_of(before - finite);
      store(&sum[i], load<V>(&sum[i]) * factor + total + other);
      if (first) continue;
      bool same = true;
      for (int64_t l = 0; l < WIDTH<A>; ++l) same = same && factor[l] == 1;
      if (!same)
        for (int64_t d = 0; d < t.width; ++d) store(&out[d * M + i], load<V>(&out[d * M + i]) * factor);
    }
  }

  void finish(int64_t m, T* to, int64_t to_row, A* lse) {
    std::vector<A>& factor = sum;
    for (int64_t i = 0; i < m; ++i) {
      lse[i] = top[i] + std::log(sum[i]);
      factor[i] = sum[i] > 0 ? A(t.kept_scale) / sum[i] : A(0);
    }
    for (int64_t d = 0; d < t.width; ++d)
#pragma omp simd
      for (int64_t i = 0; i < M; ++i) out[d * M + i] *= factor[i];
    std::vector<A>& rows = scores;  // of the queries
    rows.resize(std::max<int64_t>(M * N, M * t.width));
    transpose<A>(out.data(), M, rows.data(), t.width, t.width, M);
    for (int64_t i = 0; i < m; ++i) narrow<T>(&rows[i * t.width], 1, to + i * to_row, t.width);
  }
};

// ---- Backward: of a head. ----

template <typename T> struct Backward {
  using A = Wide<T>;
  using V = Vector<A>;
  const Task& t;
  const int64_t M, N, blocks;
  std::vector<A> scores, d_weights, added, bent, d_q, d_k, d_v, lse, delta;
  std::vector<T> q_turned, q_packed, d_turned, d_packed, k_flipped, weights, d_rows, d_pairs;
  std::vector<uint32_t> pairs;
  Dropout dropout;
  A* d_bias;  // [H, Q, S] or null; of a head only one thread adds to it

  explicit Backward(const Task& t, A* d_bias)
      : t(t), M(t.query_block), N(t.key_block), blocks(t.query_blocks()), scores(M * N), d_weights(M * N), added(t.bias ? M * N : 0), bent(t.cap != 0 ? M * N : 0),
        d_q(blocks * M * t.dim), d_k(N * t.dim), d_v(N * t.width), lse(blocks * M), delta(blocks * M), q_turned(blocks * M * t.dim),
        q_packed(blocks * M * t.dim), d_turned(blocks * M * t.width), d_packed(blocks * M * t.width), k_flipped(N * t.dim),
        weights(M * N), d_rows(M * N), d_pairs(M * N), d_bias(d_bias) {}

  void prepare(const T* q, int64_t q_row, const T* d_out, int64_t d_row, const T* out, int64_t out_row, const A* lses) {
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t m = std::min(M, t.queries - i * M), at = i * M;
      pack_transposed(q + at * q_row, q_row, &q_turned[at * t.dim], m, M, t.dim);
      pack(q + at * q_row, q_row, &q_packed[at * t.dim], m, M, t.dim);
      pack_transposed(d_out + at * d_row, d_row, &d_turned[at * t.width], m, M, t.width);
      pack(d_out + at * d_row, d_row, &d_packed[at * t.width], m, M, t.width);
    }
    std::fill(lse.begin(), lse.end(), std::numeric_limits<A>::infinity());  // weights of what pads, and sees nothing, are 0
    for (int64_t i = 0; i < t.queries; ++i)
      if (lses[i] != -std::numeric_limits<A>::infinity()) lse[i] = lses[i];
    std::fill(delta.begin(), delta.end(), A(0));
    for (int64_t i = 0; i < t.queries; ++i) delta[i] = dot(d_out + i * d_row, out + i * out_row, t.width);
    std::fill(d_q.begin(), d_q.end(), A(0));
  }

  // Gradients of a block of keys, and its part of the queries'. `asking`: which blocks of queries see it, and patterns.
  void block(int64_t b, int64_t h, int64_t j, const std::vector<std::pair<int32_t, int32_t>>& asking, const T* k, int64_t k_row,
             const T* v, int64_t v_row, const Documents& documents) {
    const int64_t n = std::min(N, t.keys - j * N), filled = even(n);
    k += j * N * k_row;
    v += j * N * v_row;
    flip(k, k_row, k_flipped.data(), N, n, N, t.dim, pairs);
    bool first = true;
    for (auto [i, kind] : asking) {
      if (documents.apart(i, j)) continue;
      const Tile tile{b, h, i * M, j * N, std::min(M, t.queries - i * M), n, kind, documents.mixed(i, j)};
      product<T>(n, M, t.dim, k, k_row, &q_turned[tile.query * t.dim], scores.data(), M, false);
      product<T>(n, M, t.width, v, v_row, &d_turned[tile.query * t.width], d_weights.data(), M, false);
      pull(tile);
      product<T>(n, t.width, M, weights.data(), M, &d_packed[tile.query * t.width], d_v.data(), t.width, !first);
      product<T>(n, t.dim, M, d_rows.data(), M, &q_packed[tile.query * t.dim], d_k.data(), t.dim, !first);
      product<T>(t.dim, M, filled, k_flipped.data(), N, d_pairs.data(), &d_q[tile.query * t.dim], M, true);
      first = false;
    }
    if (first) std::fill(d_k.begin(), d_k.end(), A(0)), std::fill(d_v.begin(), d_v.end(), A(0));
  }

  // Scores and gradients of weights to weights and gradients of scores, as operands.
  void pull(const Tile& tile) {
    const bool masked = tile.kind >= 0 || tile.documents || t.prefix, plain = t.plain(), drops = t.least != 0;
    if (!plain) bend<A>(t, tile, scores.data(), bent.empty() ? nullptr : bent.data(), added.data());
    if (masked) hide<A>(t, tile, scores.data());
    if (drops) dropout.draw(t, tile);
    const A scale = plain ? A(t.scale) : A(1), kept_scale = t.kept_scale;
    if (tile.n % 2) {
      std::fill_n(scores.begin() + tile.n * M, M, -std::numeric_limits<A>::infinity());
      std::fill_n(d_weights.begin() + tile.n * M, M, A(0));
      if (!bent.empty()) std::fill_n(bent.begin() + tile.n * M, M, A(0));
      if (drops) std::fill_n(dropout.kept.begin() + tile.n * M, M, 0);
    }
    for (int64_t i = 0; i < M; i += WIDTH<A>) {
      const V less = load<V>(&lse[tile.query + i]), shift = load<V>(&delta[tile.query + i]);
      for (int64_t j = 0; j < tile.n; j += 2) {
        V p[2], d[2];
        for (int64_t r = 0; r < 2; ++r) {
          const int64_t at = (j + r) * M + i;
          p[r] = exp_of(load<V>(&scores[at]) * scale - less);
          V slope = load<V>(&d_weights[at]);
          V used = p[r];
          if (drops) {
            const V kept = kept_of<A>(&dropout.kept[at]) * kept_scale;
            slope *= kept;
            used *= kept;
          }
          d[r] = p[r] * (slope - shift);
          if (d_bias) store(&d_weights[at], d[r]);
          if (!bent.empty()) d[r] *= load<V>(&bent[at]);
          p[r] = used;
        }
        write_pair<T>(p[0], p[1], nullptr, weights.data(), j, i, M);
        write_pair<T>(d[0], d[1], d_pairs.data(), d_rows.data(), j, i, M);
      }
    }
    if (d_bias) {
      transpose<A>(d_weights.data(), M, added.data(), N, tile.n, tile.m);
      A* to = d_bias + (tile.h * t.queries + tile.query) * t.keys + tile.key;
      for (int64_t i = 0; i < tile.m; ++i)
#pragma omp simd
        for (int64_t j = 0; j < tile.n; ++j) to[i * t.keys + j] += added[i * N + j];
    }
  }
};

// ---- Operators. ----

template <typename T> const T* head(const Tensor& x, int64_t b, int64_t h) {
  return x.const_data_ptr<T>() + b * x.stride(0) + h * x.stride(1);
}
template <typename T> T* head_of(Tensor& x, int64_t b, int64_t h) { return x.data_ptr<T>() + b * x.stride(0) + h * x.stride(1); }

const int32_t* ints(const Maybe& x) { return x ? x->const_data_ptr<int32_t>() : nullptr; }
const int64_t* longs(const Maybe& x) { return x ? x->const_data_ptr<int64_t>() : nullptr; }

Task described(const Tensor& q, const Tensor& k, const Tensor& v, double scale, double cap, at::TensorList plan, at::IntArrayRef tile,
               const Maybe& documents, const Maybe& key_documents, const Maybe& prefix, const Maybe& bias, const Maybe& slopes,
               const Maybe& query_places, const Maybe& key_places, int64_t least, const Maybe& random_key, const Maybe& slots, const Maybe& positions,
               int64_t first_head, int64_t first_key) {
  Task t{};
  t.batch = q.size(0), t.heads = q.size(1), t.kv_heads = k.size(1), t.queries = q.size(2), t.keys = k.size(2);
  t.dim = q.size(3), t.width = v.size(3), t.query_block = tile[0], t.key_block = tile[1];
  t.scale = scale, t.cap = cap;
  t.starts = plan[0].const_data_ptr<int32_t>(), t.columns = plan[1].const_data_ptr<int32_t>();
  t.kinds = plan[2].const_data_ptr<int32_t>(), t.patterns = plan[3].const_data_ptr<bool>();
  t.documents = ints(documents), t.key_documents = ints(key_documents);
  t.prefix = longs(prefix);
  t.bias = bias ? bias->const_data_ptr() : nullptr;
  t.slopes = slopes ? slopes->const_data_ptr<double>() : nullptr;
  t.query_places = longs(query_places), t.key_places = longs(key_places);
  t.least = least, t.random_key = random_key ? *random_key->const_data_ptr<int64_t>() : 0;
  t.slots = longs(slots), t.positions = longs(positions), t.first_head = first_head, t.first_key = first_key;
  t.kept_scale = 1 / (1 - double(least) / 65536);
  return t;
}

template <typename T> void forward_of(const Task& t, const Tensor& q, const Tensor& k, const Tensor& v, Tensor& out, Tensor& lse) {
  using A = Wide<T>;
  const int64_t padded = t.key_blocks() * t.key_block, group = t.heads / t.kv_heads;
  // Heads are shared out among threads; where there are few, parts of them.
  const int64_t parts = std::min(t.query_blocks(), (2 * at::get_num_threads() - 1) / (t.batch * t.heads) + 1);
  at::parallel_for(0, t.batch * t.heads * parts, 1, [&](int64_t begin, int64_t end) {
    Forward<T> work(t);
    std::vector<T> values(t.width * padded);
    std::vector<uint32_t> pairs;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / parts / t.heads, h = task / parts % t.heads;
      const Documents documents(t, b);
      flip(head<T>(v, b, h / group), v.stride(2), values.data(), padded, t.keys, padded, t.width, pairs);
      for (int64_t i = task % parts; i < t.query_blocks(); i += parts)
        work.block(b, h, i, head<T>(q, b, h), q.stride(2), head<T>(k, b, h / group), k.stride(2), values.data(), padded, documents,
                   head_of<T>(out, b, h) + i * t.query_block * out.stride(2), out.stride(2),
                   lse.data_ptr<A>() + (b * t.heads + h) * t.queries + i * t.query_block);
    }
    if (std::is_same_v<T, BFloat16>) blas::brgemm_release();
  });
}

template <typename T>
void backward_of(const Task& t, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& d_out, const Tensor& out,
                 const Tensor& lse, Tensor& d_q, Tensor& d_k, Tensor& d_v, Tensor& d_bias) {
  using A = Wide<T>;
  const int64_t group = t.heads / t.kv_heads, M = t.query_block, N = t.key_block;
  std::vector<std::vector<std::pair<int32_t, int32_t>>> asking(t.key_blocks());
  for (int64_t i = 0; i < t.query_blocks(); ++i)
    for (int32_t at = t.starts[i]; at < t.starts[i + 1]; ++at) asking[t.columns[at]].emplace_back(i, t.kinds[at]);
  // A bias is the same for all rows of the batch: one thread adds up what they give for a head.
  const bool biased = d_bias.numel() > 0;
  const int64_t rows = biased ? t.batch : 1;
  at::parallel_for(0, t.batch * t.heads / rows, 1, [&](int64_t begin, int64_t end) {
    Backward<T> work(t, biased ? d_bias.data_ptr<A>() : nullptr);
    for (int64_t unit = begin * rows; unit < end * rows; ++unit) {
      const int64_t b = biased ? unit % rows : unit / t.heads, h = biased ? unit / rows : unit % t.heads;
      const int64_t task = b * t.heads + h;
      const Documents documents(t, b);
      work.prepare(head<T>(q, b, h), q.stride(2), head<T>(d_out, b, h), d_out.stride(2), head<T>(out, b, h), out.stride(2),
                   lse.const_data_ptr<A>() + task * t.queries);
      for (int64_t j = 0; j < t.key_blocks(); ++j) {
        work.block(b, h, j, asking[j], head<T>(k, b, h / group), k.stride(2), head<T>(v, b, h / group), v.stride(2), documents);
        T *to_k = head_of<T>(d_k, b, h) + j * N * d_k.stride(2), *to_v = head_of<T>(d_v, b, h) + j * N * d_v.stride(2);
        for (int64_t r = 0; r < std::min(N, t.keys - j * N); ++r) {
          narrow<T>(&work.d_k[r * t.dim], t.scale, to_k + r * d_k.stride(2), t.dim);
          narrow<T>(&work.d_v[r * t.width], 1, to_v + r * d_v.stride(2), t.width);
        }
      }
      std::vector<A> rows(M * t.dim);
      for (int64_t i = 0; i < t.query_blocks(); ++i) {
        transpose<A>(&work.d_q[i * M * t.dim], M, rows.data(), t.dim, t.dim, M);
        T* to = head_of<T>(d_q, b, h) + i * M * d_q.stride(2);
        for (int64_t r = 0; r < std::min(M, t.queries - i * M); ++r) narrow<T>(&rows[r * t.dim], t.scale, to + r * d_q.stride(2), t.dim);
      }
    }
    if (std::is_same_v<T, BFloat16>) blas::brgemm_release();
  });
}

// [B, H, S, C] with the memory of [B, S, H, C], as projections want it.
Tensor empty_heads(const Tensor& like, int64_t heads, int64_t length, int64_t width) {
  return at::empty({like.size(0), length, heads, width}, like.options()).transpose(1, 2);
}

#define DESCRIPTION                                                                                                            \
  double scale, double cap, at::TensorList plan, at::IntArrayRef tile, const Maybe &documents, const Maybe &key_documents,     \
      const Maybe &prefix, const Maybe &bias, const Maybe &slopes, const Maybe &query_places, const Maybe &key_places,          \
      int64_t least,                                                                                                           \
      const Maybe &random_key, const Maybe &slots, const Maybe &positions, int64_t first_head, int64_t first_key
#define DESCRIBED                                                                                                              \
  described(q, k, v, scale, cap, plan, tile, documents, key_documents, prefix, bias, slopes, query_places, key_places, least,  \
            random_key, slots, positions, first_head, first_key)

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, DESCRIPTION) {
  const Task t = DESCRIBED;
  Tensor out = empty_heads(q, t.heads, t.queries, t.width);
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor lse = at::empty({t.batch, t.heads, t.queries}, q.options().dtype(wide));
  if (q.scalar_type() == at::kBFloat16) forward_of<BFloat16>(t, q, k, v, out, lse);
  else if (q.scalar_type() == at::kFloat) forward_of<float>(t, q, k, v, out, lse);
  else forward_of<double>(t, q, k, v, out, lse);
  return {out, lse};
}

// Gradients of keys and values are of every query head; that of the bias is [0] if it is not wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                                            const Tensor& lse, bool wants_bias, DESCRIPTION) {
  const Task t = DESCRIBED;
  Tensor d_bias = at::zeros(wants_bias ? bias->sizes() : at::IntArrayRef{0}, lse.options());
  Tensor d_q = empty_heads(q, t.heads, t.queries, t.dim), d_k = empty_heads(q, t.heads, t.keys, t.dim),
         d_v = empty_heads(q, t.heads, t.keys, t.width);
  if (q.scalar_type() == at::kBFloat16) backward_of<BFloat16>(t, q, k, v, d_out, out, lse, d_q, d_k, d_v, d_bias);
  else if (q.scalar_type() == at::kFloat) backward_of<float>(t, q, k, v, d_out, out, lse, d_q, d_k, d_v, d_bias);
  else backward_of<double>(t, q, k, v, d_out, out, lse, d_q, d_k, d_v, d_bias);
  return {d_q, d_k, d_v, d_bias};
}

bool bf16_products() { return blas::could_pack(at::kBFloat16); }

}  // namespace

#define SCHEMA                                                                                                                 \
  "float scale, float cap, Tensor[] plan, int[] tile, Tensor? documents, Tensor? key_documents, Tensor? prefix, "              \
  "Tensor? bias, Tensor? slopes, Tensor? query_places, Tensor? key_places, int least, Tensor? random_key, Tensor? slots, "                   \
  "Tensor? positions, int first_head, int first_key"

TORCH_LIBRARY(headway_cpp, library) {
  library.def("attention(Tensor q, Tensor k, Tensor v, " SCHEMA ") -> (Tensor, Tensor)", &forward);
  library.def("attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool wants_bias, " SCHEMA
              ") -> (Tensor, Tensor, Tensor, Tensor)",
              &backward);
  library.def("bf16_products() -> bool", &bf16_products);
}
