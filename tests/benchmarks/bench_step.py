"""A training step beside Hugging Face GPT-2: same weights, shapes, precision and optimizer, interleaved.

    python tests/benchmarks/bench_step.py [--rounds 5] [--modes compiled eager] [--precisions fp32 bf16]

A step is forward, backward, clipping to norm 1 and fused AdamW. Prints the median time of each and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from headway.pretrain import config
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import CausalLM, build_objective

LAYERS, HIDDEN, HEADS, VOCAB, BATCH, LENGTH = 6, 512, 8, 16384, 8, 512


def build_ours() -> CausalLM:
    model = config.Model(layers=LAYERS, hidden=HIDDEN, heads=HEADS)
    return build_objective(config.Job(model=model, data=config.Data(seq_len=LENGTH)), Inputs(VOCAB, LENGTH))


def build_theirs(ours: CausalLM) -> nn.Module:
    """transformers' GPT-2 with the weights of `ours`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_layer": LAYERS, "n_embd": HIDDEN, "n_head": HEADS, "n_positions": LENGTH, "vocab_size": VOCAB}
    theirs = GPT2LMHeadModel(
        GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    )
    theirs.load_state_dict(gpt2_state(ours), strict=False)
    return theirs


def gpt2_state(ours: CausalLM) -> dict[str, Tensor]:
    """Our weights under GPT-2's names: its products store weights transposed, and q, k, v as one."""
    w = dict(ours.model.state_dict())
    state = {
        "transformer.wte.weight": w["embed.tokens.weight"],
        "transformer.wpe.weight": w["embed.positions.weight"],
        "lm_head.weight": w["embed.tokens.weight"],
    }
    for kind in ("weight", "bias"):
        state[f"transformer.ln_f.{kind}"] = w[f"norm.{kind}"]
        for i in range(len(ours.model.blocks)):
            a, b = f"blocks.{i}.", f"transformer.h.{i}."
            qkv = torch.cat([w[f"{a}attention.{p}.{kind}"] for p in "qkv"])
            state |= {
                f"{b}ln_1.{kind}": w[f"{a}attention_norm.{kind}"],
                f"{b}ln_2.{kind}": w[f"{a}mlp_norm.{kind}"],
                f"{b}attn.c_attn.{kind}": qkv.mT if qkv.dim() > 1 else qkv,
                f"{b}attn.c_proj.{kind}": w[f"{a}attention.o.{kind}"].T,
                f"{b}mlp.c_fc.{kind}": w[f"{a}mlp.up.{kind}"].T,
                f"{b}mlp.c_proj.{kind}": w[f"{a}mlp.down.{kind}"].T,
            }
    return state


def stepper(module: nn.Module, loss_of: Callable[[], Tensor], precision: str) -> Callable[[], float]:
    """A function that takes one step and returns the loss."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-4, fused=True)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def pair(mode: str, precision: str) -> tuple[Callable[[], float], Callable[[], float]]:
    """Steps of ours and theirs on the same batch."""
    ours = build_ours()
    theirs = build_theirs(ours)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    batch = ours.collate({"tokens": tokens.numpy()})
    if mode == "compiled":
        for block in ours.model.blocks:
            block.compile()
        ours.loss.compile()
        theirs.compile()

    def our_loss() -> Tensor:
        out = ours(batch)
        return out.terms["tokens"] / out.tokens

    def their_loss() -> Tensor:
        # transformers shifts labels itself: given the whole row it would drop one target, so shift them here.
        loss: Tensor = theirs(
            input_ids=batch["tokens"], shift_labels=batch["labels"], labels=batch["labels"]
        ).loss
        return loss

    return stepper(ours, our_loss, precision), stepper(theirs, their_loss, precision)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each")
    parser.add_argument("--modes", nargs="+", default=["compiled", "eager"], choices=["compiled", "eager"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    args = parser.parse_args()
    for mode in args.modes:
        for precision in args.precisions:
            torch.compiler.reset()
            steps = pair(mode, precision)
            first = [step() for step in steps]  # compiles, warms up, and shows that both compute the same
            times: list[list[float]] = [[], []]
            for _ in range(args.rounds):
                for step, taken in zip(steps, times, strict=True):
                    start = time.perf_counter()
                    step()
                    taken.append(time.perf_counter() - start)
            ours, theirs = map(statistics.median, times)
            print(
                f"step {mode:8} {precision}: ours {ours:.2f} s ({BATCH * LENGTH / ours:.0f} tokens/s), "
                f"transformers {theirs:.2f} s, ratio {theirs / ours:.2f}x; "
                f"first losses {first[0]:.5f} {first[1]:.5f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
