"""Writing folders that `from_pretrained` of transformers loads: config.json and weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from headway.pretrain.config import Job
from headway.pretrain.hf import family_of_job
from headway.pretrain.hf.folder import WEIGHTS
from headway.pretrain.hf.links import Lazy, to_theirs
from headway.pretrain.models.inputs import Inputs

SHARD = 5 * 10**9
"""Bytes of a weight file at most, as transformers cuts them."""


def inputs_of(job: Job, shapes: Mapping[str, tuple[int, ...]]) -> Inputs:
    """The sizes that a model was built for, from the shapes of its tensors."""
    images, vision = job.data.images, job.model.family == "vit"
    classes = shapes["head.weight"][0] if vision and "head.weight" in shapes else 0
    vocab = 0 if vision else shapes["model.embed.tokens.weight"][0]
    image = (images.size, images.channels) if vision else (0, 0)
    return Inputs(vocab, job.data.seq_len, job.data.target_len or 0, *image, classes)


def write_folder(
    place: Path, job: Job, source: Lazy, shapes: Mapping[str, tuple[int, ...]], more: dict
) -> None:
    """Write config.json and weights.

    Args:
        place: an empty or new folder.
        job: of the weights.
        source: tensors under canonical names.
        shapes: of these tensors.
        more: further keys of config.json.

    Raises:
        JobError: Hugging Face has no such model; names the setting.
        CheckpointError: a tensor has no place there.
    """
    family = family_of_job(job)
    hf_config = family.to_hf(job, inputs_of(job, shapes)) | more
    if source.names:
        dtype = source.read(min(source.names)).dtype
        hf_config |= dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    tensors = to_theirs(family.links(job), source)
    place.mkdir(parents=True, exist_ok=True)
    write_weights(place, _with(tensors, family.constants(job)))
    text = json.dumps(hf_config, indent=2, sort_keys=True) + "\n"
    (place / "config.json").write_text(text, encoding="utf-8")


def _with(
    tensors: Iterable[tuple[str, Tensor]], constants: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    yield from tensors
    yield from constants.items()


def write_weights(place: Path, tensors: Iterable[tuple[str, Tensor]], limit: int = SHARD) -> None:
    """Write `model.safetensors`, or several files of at most `limit` bytes and their index."""
    parts: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(held, place / f"part-{len(parts)}", metadata={"format": "pt"})
        parts.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > limit:
            flush()
            size = 0
        held[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(parts) == 1:
        (place / "part-0").rename(place / WEIGHTS[0])
        return
    where: dict[str, str] = {}
    for i, names in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        (place / f"part-{i}").rename(place / file)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (place / WEIGHTS[1]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
