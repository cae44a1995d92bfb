"""A training step beside Hugging Face GPT-2: same weights, shapes, precision and optimizer, interleaved.

    python tests/benchmarks/bench_step.py [--rounds 5] [--modes compiled eager] [--precisions fp32 bf16]

A step is forward, backward, clipping to norm 1 and fused AdamW. Prints the median time of each and their ratio.
"""

from __future__ import annotations

import torch
from side_by_side import Pair, arguments, from_transformers, race
from torch import Tensor, nn

from headway.pretrain.models.inputs import Inputs

LAYERS, HIDDEN, HEADS, VOCAB, BATCH, LENGTH = 6, 512, 8, 16384, 8, 512


def gpt2() -> Pair:
    """GPT-2 of transformers, without dropout, and ours with its weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_layer": LAYERS, "n_embd": HIDDEN, "n_head": HEADS, "n_positions": LENGTH, "vocab_size": VOCAB}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    theirs = GPT2LMHeadModel(GPT2Config(**shape, **off, use_cache=False))
    rows = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    ours = from_transformers(theirs, Inputs(VOCAB, LENGTH))
    batch = ours.collate({"tokens": rows.numpy()})

    def their_loss(model: nn.Module) -> Tensor:
        # transformers shifts labels itself: given the whole row it would drop one target, so shift them here.
        loss: Tensor = model(
            input_ids=batch["tokens"], shift_labels=batch["labels"], labels=batch["labels"]
        ).loss
        return loss

    return Pair(ours, batch, theirs, their_loss)


def main() -> None:
    args = arguments(__doc__, rounds=5).parse_args()
    print(f"a step of {BATCH * LENGTH} tokens, medians of {args.rounds} rounds")
    for mode in args.modes:
        for precision in args.precisions:
            torch.manual_seed(0)
            print(" ", race(gpt2(), mode, precision, args.rounds, args.clock), flush=True)


if __name__ == "__main__":
    main()
