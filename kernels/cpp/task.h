// What an attention is about: which tiles are computed, and what becomes of a tile's scores.
#pragma once

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "vectors.h"

namespace {

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
  bool empty() const { return batch * heads * queries * keys * dim * width == 0; }
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

}  // namespace
