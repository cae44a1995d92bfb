"""A step of attention distillation against the usual way with transformers: seconds and peak memory.

    python tests/benchmarks/bench_distill.py [--lengths 512 2048]

One row; teacher BERT 4 x 768 with 12 heads, student 2 x 768 with 12 heads, both with random weights, fp32, 2 threads:
the student's masked-LM loss plus the mean KL of its maps from the teacher's evenly spaced layers, backward, clipping
and AdamW. The usual way asks both models for their maps (`output_attentions`, eager attention). Seconds are medians
of rounds in turns; memory is the growth of a process of its own in a step. Wanted: 1.5 times as fast.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from headway.launch.timing import begin, peak_since
from headway.parallel.distill.hire import hire
from headway.parallel.engines.native import NativeEngine
from headway.parallel.mesh import Layout, World
from headway.pretrain.config import Job
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import build_objective
from headway.pretrain.objectives.distill.attach import TeacherShape

VOCAB, LAYERS = 8192, (4, 2)
CPU = torch.device("cpu")


def batch_of(length: int) -> dict[str, torch.Tensor]:
    draw = np.random.default_rng(0)
    tokens = torch.from_numpy(draw.integers(0, VOCAB, (1, length)))
    labels = torch.where(torch.from_numpy(draw.random((1, length)) < 0.15), tokens, -100)
    return {
        "tokens": tokens,
        "labels": labels,
        "sample": torch.zeros(1).long(),
        "slot": torch.zeros(1).long(),
    }


def job_of(layers: int, length: int, objective: dict) -> Job:
    shape = {"family": "bert", "layers": layers, "hidden": 768, "heads": 12, "activation": "gelu",
             "norm_position": "post", "embedding_norm": True, "init": {"scheme": "bert"}}  # fmt: skip
    return Job.model_validate(
        {
            "model": shape,
            "data": {"seq_len": length, "tokenizer": {"kind": "bytes"}},
            "objective": {"name": "masked"} | objective,
            "train": {"steps": 100, "global_batch": 1, "compile": False},
            "precision": "fp32",
        }
    )


def ours(length: int) -> Callable[[], None]:
    maps = {"teacher": "memory", "attention": {"weight": 1.0}}
    job, theirs = job_of(LAYERS[1], length, {"distill": maps}), job_of(LAYERS[0], length, {})
    inputs, world = Inputs(VOCAB, length), World(0, 1, 0, CPU, "gloo", Layout(), None)
    shape = TeacherShape(theirs.model, VOCAB, 768, True)
    student = build_objective(job, inputs, device="meta", teacher=shape)
    engine = NativeEngine(job, student, world, precision="fp32", compiled=False)
    engine.teacher = hire(
        engine, theirs, build_objective(theirs, inputs, device="meta"), lambda weights: None
    )
    batch, steps = batch_of(length), iter(range(100))

    def step() -> None:
        engine.train_step(batch, next(steps))

    return step


def usual(length: int) -> Callable[[], None]:
    from transformers import BertConfig, BertForMaskedLM

    models = []
    for layers in LAYERS:
        config = BertConfig(
            vocab_size=VOCAB, hidden_size=768, num_hidden_layers=layers, num_attention_heads=12,
            intermediate_size=3072, max_position_embeddings=length, attn_implementation="eager",
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        models.append(BertForMaskedLM(config))
    teacher, student = models[0].eval(), models[1].train()
    optimizer, batch = torch.optim.AdamW(student.parameters(), fused=True), batch_of(length)

    def step() -> None:
        with torch.no_grad():
            theirs = teacher.bert(batch["tokens"], output_attentions=True).attentions
        out = student(batch["tokens"], labels=batch["labels"], output_attentions=True)
        loss = out.loss
        for layer, maps in enumerate(out.attentions):
            p = theirs[(layer + 1) * len(theirs) // len(out.attentions) - 1]
            rows = maps.shape[:3].numel()
            loss = loss + F.kl_div(maps.clamp(min=1e-30).log(), p, reduction="sum") / rows / len(
                out.attentions
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


WAYS = {"ours": ours, "usual": usual}


def seconds(length: int, rounds: int) -> dict[str, float]:
    steps = {way: make(length) for way, make in WAYS.items()}
    times: dict[str, list[float]] = {way: [] for way in steps}
    for number in range(rounds + 1):
        for way in list(steps)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            steps[way]()
            if number:
                times[way].append(time.perf_counter() - start)
    return {way: statistics.median(x) for way, x in times.items()}


def memory(length: int, way: str) -> int:
    command = [sys.executable, __file__, "--peak", way, "--lengths", str(length)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(found.stdout.split()[-1])


def peak_of_step(length: int, way: str) -> int:
    step = WAYS[way](length)
    WAYS[way](64)()  # loads libraries
    before = begin(CPU)
    step()
    return peak_since(CPU) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", choices=WAYS, help="print the peak memory of this way's step, and no more")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.peak:
        print(peak_of_step(asked.lengths[0], asked.peak))
        return
    for length in asked.lengths:
        took = seconds(length, asked.rounds)
        peaks = {way: memory(length, way) / 2**20 for way in WAYS}
        print(
            f"{length:5}   seconds ours {took['ours']:6.2f}, usual {took['usual']:6.2f},"
            f" {took['usual'] / took['ours']:4.1f}x   memory ours {peaks['ours']:7.0f} MiB,"
            f" usual {peaks['usual']:7.0f}, {peaks['usual'] / peaks['ours']:4.1f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
