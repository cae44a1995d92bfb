// Softmax attention on CPUs in tiles (Dao et al. 2022; Dao 2023): no map is held, and tiles in which nothing is seen are
// not computed.
//
// All tiles are transposed, keys by queries: what belongs to a query (maximum, sum, log-sum-exp, its document, its random
// words) then runs along vectors, and neither pass needs a transposed copy of weights:
//   forward   S' = K Q', P' = exp(S' - m), O' += V' P'
//   backward  P' = exp(S' - lse), dV += P' dO, dP' = V dO', dS' = P' (dP' - delta), dK += dS' Q, dQ' += K' dS'
//
// Shapes: B batch, H query heads, K key/value heads, Q queries, S keys, D width of queries and keys, V width of values;
// in a tile: M queries (padded), N keys. `BlockMask` of kernels/attention/tiles.py says which tiles are computed.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "dropout.h"
#include "operands.h"
#include "task.h"

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

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
  if (t.empty()) return {out.zero_(), lse.fill_(-std::numeric_limits<double>::infinity())};
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
  if (t.empty()) return {d_q.zero_(), d_k.zero_(), d_v.zero_(), d_bias};
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
