"""Routing attention (Roy et al. 2021, "Efficient Content-Based Sparse Attention with Routing Transformers", section 4).

Queries and keys are normalised (LayerNorm without gain) and clustered by learned centroids; attention stays within a
cluster. Where the paper lets every cluster take its n / clusters nearest tokens, a token here joins the one cluster
whose centroid is nearest, and attends to the last `window` tokens of its cluster up to itself (both ways: that many
before and after). The paper's choice ranks the whole row, so that whether an early token is a member depends on later
ones and on other documents; this one looks at the token alone, is causal, and sizes are bounded all the same.

- A token's cluster is that of the mean of its normalised query and key (the paper shares the two where it is causal).
- Centroids are learned by gradient, not by a moving average: a key's score gets the logarithm of its affinity, the
  softmax over centroids of their products with the token, at its own cluster. A token between two clusters counts
  less, and both centroids learn where it belongs.

Sorted by cluster, a cluster is a document and its last tokens are a sliding window: the fast path is that.

Shapes: B batch, H query heads, K key/value heads, S tokens, D head dimension, C clusters.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.attention.content import strips
from headway.kernels.attention.content.pieces import average, documents_of, seen_softmax, wide_scores
from headway.kernels.attention.content.strips import within
from headway.kernels.attention.dense import WeightDropout, per_query_head, score_scale
from headway.kernels.attention.masks import Mask


def reference(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    clusters: int,
    window: int,
    centroids: Tensor,
) -> Tensor:
    """Dense attention masked to the last tokens of the cluster; [B, H, S, D]. Arguments: `dense.reference`.

    Args:
        clusters: number of centroids; `centroids` are as many.
        window: tokens of its cluster that a token sees, itself among them; both ways: that many each way.
        centroids: [H, C, D].
    """
    assert dropout is None
    weights = attention_weights(
        q_BHSD, k_BKSD, mask, scale, bias_HQK, clusters=clusters, window=window, centroids=centroids
    )
    return average(weights, v_BKSD, q_BHSD)


def attention_weights(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    mask: Mask,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    clusters: int,
    window: int,
    centroids: Tensor,
) -> Tensor:
    """Weights [B, H, S, S]."""
    assert bias_HQK is None
    documents = documents_of(mask, q_BHSD.shape[2], q_BHSD.device)
    q_BHSD, k_BHSD, cluster_BHS, affinity_BHS = _clustered(q_BHSD, k_BKSD, centroids)
    seen = cluster_BHS[..., :, None] == cluster_BHS[..., None, :]
    seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    rank_BHS = seen.tril(-1).sum(-1)  # tokens of the cluster, of the document, that come before
    seen = seen & ((rank_BHS[..., :, None] - rank_BHS[..., None, :]).abs() < window)
    seen = seen.tril() if mask.causal else seen
    scores = wide_scores(q_BHSD, k_BHSD, scale)
    return seen_softmax(scores + affinity_BHS[..., None, :].to(scores.dtype), seen)


def attention(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    clusters: int,
    window: int,
    centroids: Tensor,
) -> Tensor:
    """The same as a sliding window over tokens sorted by cluster: O(S (C + window) D + S log S)."""
    assert dropout is None
    assert bias_HQK is None
    batch, heads, length, _ = q_BHSD.shape
    q_BHSD, k_BHSD, cluster_BHS, affinity_BHS = _clustered(q_BHSD, k_BKSD, centroids)
    factor = score_scale(scale, q_BHSD)
    # The affinity as one more product: q gets a 1, k the logarithm over what products are multiplied by.
    q = torch.cat([q_BHSD, torch.ones_like(q_BHSD[..., :1])], -1)
    k = torch.cat([k_BHSD, (affinity_BHS / factor).to(k_BHSD.dtype)[..., None]], -1)
    v = per_query_head(v_BKSD, q_BHSD)

    order = cluster_BHS.argsort(dim=-1, stable=True)
    documents = documents_of(mask, length, q.device)[:, None].long() * clusters + cluster_BHS
    sorted_mask = Mask(mask.causal, documents.gather(-1, order).flatten(0, 1))
    q, k, v = (_permuted(x, order).flatten(0, 1)[:, None] for x in (q, k, v))
    strip = within(window, mask.causal)
    near = partial(_near, window=window)
    out = strips.attention(q, k, v, sorted_mask, strip, near, factor)[:, 0].unflatten(0, (batch, heads))
    return _permuted(out, order.argsort(-1))


def _clustered(q, k, centroids_HCD):
    """Normalised q and k [B, H, S, D], each token's cluster, and the logarithm of its affinity, [B, H, S]."""
    shape = q.shape[-1:]
    q, k = (F.layer_norm(x, shape) for x in (q, per_query_head(k, q)))
    token = ((q + k) / 2).to(torch.promote_types(q.dtype, torch.float32))
    # Normalised tokens have length sqrt(D): scaled as attention's own scores are, logits are of order 1.
    logits = token @ centroids_HCD.to(token.dtype).mT / shape[0] ** 0.5
    cluster = logits.argmax(-1)
    return q, k, cluster, logits.log_softmax(-1).gather(-1, cluster[..., None])[..., 0]


def _near(query: Tensor, key: Tensor, window: int) -> Tensor:
    return (query - key).abs() < window


def _permuted(x_BHSD, order_BHS):
    return x_BHSD.gather(2, order_BHS[..., None].expand(-1, -1, -1, x_BHSD.shape[-1]))
