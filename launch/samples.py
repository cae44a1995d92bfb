"""What a model does with samples: it continues a prompt, guesses masked tokens, attends, paints images."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from headway.kernels.cross_entropy import IGNORE
from headway.launch.assemble import Parts
from headway.launch.compare import compare
from headway.pretrain.engine import Batch
from headway.pretrain.evaluate import heldout_rows
from headway.pretrain.generate import generate
from headway.pretrain.objectives import Objective
from headway.pretrain.objectives.causal import CausalLM
from headway.pretrain.objectives.mae import MaskedAutoencoder
from headway.pretrain.objectives.masked import MaskedLM
from headway.pretrain.records.attention_maps import AttentionMaps, readable
from headway.pretrain.records.backends.base import Gallery, Picture, Table
from headway.pretrain.records.map_pairs import MapPairs
from headway.pretrain.records.pictures import draw_layers, draw_reconstructions, png_of
from headway.pretrain.records.records import Recorder

COMPLETION_TOKENS = 96
MAP_TOKENS = 48
"""Longest text whose attention maps are drawn: beyond it a cell is smaller than a pixel."""
PAINTED = 10
"""Held-out images whose reconstruction is drawn."""


@dataclass(frozen=True)
class Shown:
    """What a model does with a sample.

    Attributes:
        completion: of the prompt.
        maps: attention.
        painted: reconstructed images.
        pairs: attention beside the teacher's.
        guesses: of masked tokens.
    """

    completion: str | None = None
    maps: AttentionMaps | None = None
    painted: str | None = None
    pairs: MapPairs | None = None
    guesses: Table | None = None


def show(parts: Parts) -> Shown:
    """What people look at, each where the objective has it; collective."""
    objective = parts.engine.whole()
    if objective is None:
        if parts.world.main:
            print("  the report has no samples or maps: the stages' weights are too large for one rank")
        return Shown()
    shown = look_at(parts, objective)
    return replace(shown, pairs=compare(parts, objective, beginning(parts), shown.maps))


def look_at(parts: Parts, objective: Objective) -> Shown:
    """What needs no teacher; collective."""
    batch = beginning(parts)
    return Shown(
        completion=complete(parts, objective),
        maps=draw_maps(parts, objective, batch),
        painted=paint(parts, objective),
        guesses=guess(parts, objective, batch),
    )


def complete(parts: Parts, objective: Objective) -> str | None:
    """A sampled continuation of the prompt, of causal models; the same on every rank."""
    tokenizer, job = parts.dataset.tokenizer, parts.job
    if not isinstance(objective, CausalLM) or tokenizer is None:
        return None
    prompt = [tokenizer.separator, *tokenizer.encode(job.tracking.prompt)]
    tokens = torch.tensor([prompt], device=parts.world.device)
    new = generate(
        objective,
        tokens,
        COMPLETION_TOKENS,
        context=job.data.seq_len,
        temperature=0.7,
        top_k=50,
        seed=job.train.seed,
    )
    pieces = new[0, len(prompt) :].tolist()
    if tokenizer.separator in pieces:
        pieces = pieces[: pieces.index(tokenizer.separator)]
    return tokenizer.decode(pieces)


def example(parts: Parts, count: int) -> Batch:
    """The first samples, held-out ones if there are any, on the device."""
    if parts.dataset.heldout:
        samples = parts.dataset.heldout[0]
        rows = heldout_rows(samples, np.arange(min(count, len(samples))))
    else:
        rows = parts.loader.stream.rows(np.arange(count))
    batch = parts.engine.objective.collate(rows)
    return {name: tensor.to(parts.world.device) for name, tensor in batch.items()}


def beginning(parts: Parts) -> Batch:
    """The beginning of a text, or an image."""
    batch = example(parts, 1)
    for name in ("tokens", "targets", "documents", "segments"):
        if name in batch:
            batch[name] = batch[name][:, :MAP_TOKENS]
    return batch


def draw_maps(parts: Parts, objective: Objective, batch: Batch) -> AttentionMaps | None:
    """Attention of every head on one sample, if there is any; collective."""
    tokenizer = parts.dataset.tokenizer
    maps = objective.attention_maps(batch)[:, 0].float().cpu().numpy().astype(np.float32)
    if len(maps) == 0:
        return None
    if tokenizer is None:
        first = parts.job.model.vision.prefix_tokens
        names = ["<class>", "<distill>"][:first] + [f"patch {i} " for i in range(maps.shape[-1] - first)]
        return AttentionMaps(names, maps)
    return AttentionMaps([spell(parts, int(token)) for token in batch["tokens"][0]], maps)


def spell(parts: Parts, token: int) -> str:
    """A token as people read it."""
    tokenizer, specials = parts.dataset.tokenizer, parts.dataset.specials
    assert tokenizer is not None
    assert specials is not None
    if token == tokenizer.separator:
        return "<end>"
    if token in specials.sentinels:
        return f"<{specials.sentinels.index(token)}>"
    named = {i: name for name, i in specials.ids.items()}
    return f"<{named[token]}>" if token in named else tokenizer.decode([token])


def paint(parts: Parts, objective: Objective) -> str | None:
    """A picture of held-out images, masked, reconstructed and true, of masked autoencoders; collective."""
    if not isinstance(objective, MaskedAutoencoder):
        return None
    batch = example(parts, PAINTED)
    seen, whole = objective.reconstruct(batch)
    images = parts.job.data.images
    levels = [np.asarray(values, dtype=np.float32).reshape(-1, 1, 1) for values in (images.mean, images.std)]
    shown = [part.float().cpu().numpy() * levels[1] + levels[0] for part in (seen, whole, batch["pixels"])]
    return draw_reconstructions(*shown)


@torch.no_grad()
def guess(parts: Parts, objective: Objective, batch: Batch) -> Table | None:
    """What a masked model takes masked tokens for, beside what they were; collective."""
    if not isinstance(objective, MaskedLM) or parts.dataset.tokenizer is None:
        return None
    logits_BSV = objective.logits(batch["tokens"], batch.get("documents"), batch.get("segments"))
    guessed_S, true_S = logits_BSV[0].argmax(-1).tolist(), batch["labels"][0, :MAP_TOKENS].tolist()
    seen = [spell(parts, int(token)) for token in batch["tokens"][0]]
    text = readable("".join(seen))
    return Table(
        ("text", "place", "guess", "true"),
        [
            (text, place, spell(parts, guessed), spell(parts, true))
            for place, (guessed, true) in enumerate(zip(guessed_S, true_S, strict=True))
            if true != IGNORE
        ],
    )


def gallery(parts: Parts, shown: Shown, step: int) -> Gallery:
    """`shown` as those who are told about a run take it."""
    tables: dict[str, Table] = {}
    pictures: dict[str, list[Picture]] = {}
    if shown.completion is not None:
        row = (step, parts.job.tracking.prompt, shown.completion)
        tables["samples"] = Table(("step", "prompt", "completion"), [row])
    if shown.guesses is not None:
        columns, rows = shown.guesses.columns, shown.guesses.rows
        tables["masked_tokens"] = Table(("step", *columns), [(step, *row) for row in rows])
    if shown.maps is not None:
        for layer, png in draw_layers(shown.maps).items():
            pictures[f"attention/layer_{layer + 1:02d}"] = [png]
    if shown.painted is not None:
        pictures["reconstructions"] = [
            Picture(png_of(shown.painted), "as the encoder sees them, painted, true")
        ]
    return Gallery(tables, pictures)


def show_samples(parts: Parts, recorder: Recorder, step: int) -> None:
    """Tell what the model does with samples after a step; collective."""
    if (objective := parts.engine.whole()) is not None:
        recorder.show(gallery(parts, look_at(parts, objective), step))
