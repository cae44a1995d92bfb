"""Completion of text by sampling.

The context is run again for every token: no cache of keys and values, which serves the short samples of a report.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels import random
from headway.pretrain.errors import JobError
from headway.pretrain.objectives.causal import CausalLM

_BUCKET = 64  # lengths are padded to multiples of this, so that compiled blocks see few shapes


@torch.no_grad()
def generate(
    objective: CausalLM,
    prompt_BS: Tensor,
    new_tokens: int,
    context: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Continue a prompt, token by token.

    A token is drawn by the Gumbel-max trick with noise that depends on (seed, row, place) alone, so a row's
    continuation does not depend on the rows beside it.

    Args:
        objective: the trained model and its head.
        prompt_BS: int64 [B, S], at least one token.
        new_tokens: how many to add.
        context: tokens that the model may see; beyond it, the window slides.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from so many likeliest tokens only.
        seed: of the draws.

    Returns:
        int64 [B, S + new_tokens].
    """
    if prompt_BS.shape[1] == 0:
        raise JobError("prompt", "", "must hold at least one token: there is nothing to continue")
    tokens_BS = prompt_BS
    for _ in range(new_tokens):
        logits_BV = _last_logits(objective, tokens_BS[:, -context:], context)
        chosen_B = _draw(logits_BV, temperature, top_k, random.key(seed, "generate"), tokens_BS.shape[1])
        tokens_BS = torch.cat((tokens_BS, chosen_B[:, None]), 1)
    return tokens_BS


def _last_logits(objective: CausalLM, seen_BS: Tensor, context: int) -> Tensor:
    """Logits after the last token, fp32 or fp64 [B, V]. Padding on the right is invisible to causal attention."""
    length = seen_BS.shape[1]
    padding = min(-(-length // _BUCKET) * _BUCKET, context) - length
    logits_BV = objective.logits(torch.nn.functional.pad(seen_BS, (0, padding)), at=length - 1)
    return logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))


def _draw(logits_BV: Tensor, temperature: float, top_k: int | None, key: int, place: int) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1)
    if top_k is not None:
        least = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, float("-inf"))
    rows, words = (torch.arange(n, device=logits_BV.device) for n in logits_BV.shape)
    gumbel = -torch.log(-torch.log(random.uniform(key, words[None, :], rows[:, None], place)))
    return (logits_BV / temperature + gumbel).argmax(-1)
