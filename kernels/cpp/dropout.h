// Dropout of weights by their coordinates, with the bits of keep() in random.py.
#pragma once

#include <vector>

#include "task.h"

namespace {

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

}  // namespace
