"""Attention against PyTorch's kernels and others' implementations: forward + backward in turns, medians, ratios.

    python tests/benchmarks/bench_attention.py [dense dropout sparse packages slopes]

8 heads of 64, causal where the rival can be. A ratio above 1 says that ours is faster.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention.choose import choose
from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.registry import mechanism
from headway.launch.timing import layer_of
from headway.pretrain.config import Attention

HEADS, DIM = 8, 64
Compute = Callable[..., Tensor]


def heads(rows: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(rows, HEADS, length, DIM, dtype=dtype) for _ in range(3)]


def once(compute: Compute, inputs: list[Tensor]) -> float:
    """Seconds of a forward and a backward."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    start = time.perf_counter()
    out = compute(*leaves)
    out.backward(torch.ones_like(out))
    return time.perf_counter() - start


def race(ours: Compute, theirs: Compute, inputs: list[Tensor], rounds: int) -> tuple[float, float, float]:
    """Median seconds of both, and theirs over ours; the first round warms up."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            spent = once((ours, theirs)[which], inputs)
            if number:
                times[which].append(spent)
    a, b = map(statistics.median, times)
    return a, b, b / a


def told(name: str, found: tuple[float, float, float], wanted: float | None = None) -> str:
    ours, theirs, ratio = found
    goal = f", wanted {wanted:.1f}x" if wanted else ""
    return f"{name:52} ours {ours * 1e3:9.1f} ms, theirs {theirs * 1e3:9.1f} ms, ratio {ratio:.2f}x{goal}"


def compute_of(word: str, compiled: bool = False, **facts: object) -> Compute:
    """The kernel that a run would take, at the word's own settings."""
    row = mechanism(word)
    settings = Attention().settings(0, row.settings) | facts
    dropout = settings.pop("dropout", None)

    def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kernel = choose(row, dropout=dropout is not None, dtype=q.dtype, compiled=compiled, keys=k.shape[2])
        return kernel.compute(q, k, v, Mask(), dropout, **settings)

    return torch.compile(compute) if compiled else compute


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def dense(rounds: int) -> Iterator[str]:
    """What a compiled block computes against PyTorch's kernel."""
    wanted = {("bf16", 512): 2.5, ("bf16", 2048): 1.2, ("bf16", 8192): 1.2}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for rows, length in ((8, 512), (1, 2048), (1, 8192)):
            torch.compiler.reset()
            found = race(compute_of("dense", True), sdpa, heads(rows, length, dtype), rounds)
            yield told(f"dense {name} {rows} x {length}", found, wanted.get((name, length), 1.0))


def dropout(rounds: int) -> Iterator[str]:
    """Dropout of weights against PyTorch's."""
    drop = WeightDropout(0.1, torch.tensor(random.key(0, "x")), torch.arange(1), torch.arange(2048))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        theirs = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)  # noqa: E731
        found = race(compute_of("dense", dropout=drop), theirs, heads(1, 2048, dtype), rounds)
        yield told(f"dropout 0.1 {name} 2048", found, 2.0)


def sparse(rounds: int) -> Iterator[str]:
    """Scopes at 8,192 tokens against dense attention by PyTorch's kernel, and against transformers' layers."""
    inputs = heads(1, 8192, torch.float32)
    for word, wanted in (("window", 6.0), ("longformer", 3.0), ("bigbird", 3.0), ("dilated", None), ("local", None),
                         ("strided", None), ("fixed", None), ("streaming", None)):  # fmt: skip
        yield told(f"{word} against dense, fp32 8192", race(compute_of(word), sdpa, inputs, rounds), wanted)
    for word, theirs in (("longformer", longformer()), ("bigbird", bigbird())):
        ours = layer_of(word, 8192, torch.float32, torch.device("cpu"))
        x = torch.randn(1, 8192, HEADS * DIM)
        found = race(lambda x, ours=ours: ours(x, Mask(False))[0], theirs, [x], max(1, rounds // 2))
        yield told(f"{word} layer against transformers', fp32 8192", found, 1.0)


def longformer() -> Compute:
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    facts = {"hidden_size": HEADS * DIM, "num_attention_heads": HEADS, "attention_window": [510]}
    module = LongformerSelfAttention(LongformerConfig(**facts, attention_probs_dropout_prob=0.0), 0)
    padded = 510 * -(-8192 // 510)  # a multiple of its window
    mask = torch.zeros(1, padded)
    mask[:, :16] = 10000

    def compute(x: Tensor) -> Tensor:
        out: Tensor = module(F.pad(x, (0, 0, 0, padded - 8192)), mask, mask < 0, mask > 0, True)[0]
        return out

    return compute


def bigbird() -> Compute:
    from transformers import BigBirdConfig, BigBirdModel

    config = BigBirdConfig(
        hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_hidden_layers=1, intermediate_size=8, vocab_size=8,
        block_size=64, num_random_blocks=3, max_position_embeddings=8192, attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
    )  # fmt: skip
    module = BigBirdModel(config, add_pooling_layer=False)
    return lambda x: module(inputs_embeds=x).last_hidden_state  # type: ignore[no-any-return]


def packages(rounds: int) -> Iterator[str]:
    """Sparse weights against the entmax package inside the same attention."""
    sys.path.append(str(Path(sys.prefix) / "oracles"))
    import entmax

    for word, theirs in (("sparsemax", entmax.sparsemax), ("entmax15", entmax.entmax15)):
        for length in (512, 2048):
            hidden = torch.full((length, length), -torch.inf).triu(1)

            def compute(q: Tensor, k: Tensor, v: Tensor, theirs=theirs, hidden=hidden) -> Tensor:
                weights: Tensor = theirs(q @ k.mT / math.sqrt(DIM) + hidden, dim=-1)
                return weights @ v

            found = race(compute_of(word), compute, heads(1, length, torch.float32), rounds)
            yield told(f"{word} against entmax, fp32 {length}", found, 1.5)


def slopes(rounds: int) -> Iterator[str]:
    """Growth of time with the length on a log-log plot, fitted over 2,048 to 32,768."""
    lengths = [2048, 4096, 8192, 16384, 32768]
    for word in ("linear", "performer", "rfa", "gla", "delta", "window", "logtime"):
        times = []
        for length in lengths:
            layer = layer_of(word, length, torch.float32, torch.device("cpu"))
            x = torch.randn(1, length, HEADS * DIM)
            spent = [
                once(lambda x, layer=layer: layer(x, Mask())[0], [x]) for _ in range(max(2, rounds // 2) + 1)
            ]
            times.append(statistics.median(spent[1:]))
        x, y = ([math.log(value) for value in values] for values in (lengths, times))
        mean_x, mean_y = statistics.mean(x), statistics.mean(y)
        slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
            (a - mean_x) ** 2 for a in x
        )
        yield f"{word:20} slope {slope:.2f}, wanted at most 1.10; seconds {', '.join(f'{t:.2f}' for t in times)}"


PARTS = {"dense": dense, "dropout": dropout, "sparse": sparse, "packages": packages, "slopes": slopes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=[*PARTS, []])
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, medians of {asked.rounds} rounds in turns, forward + backward")
    for part in asked.parts:
        for line in PARTS[part](asked.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
