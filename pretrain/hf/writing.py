"""Writing folders that `from_pretrained` of transformers loads: config.json and weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import chain, islice
from pathlib import Path

from torch import Tensor

from headway.pretrain.config import Job
from headway.pretrain.hf import family_of_job
from headway.pretrain.hf.folder import WEIGHTS
from headway.pretrain.hf.links import Lazy, to_theirs
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.tensor_files import Slot, bytes_of, header, write_shard

SHARD = 5 * 10**9
"""Bytes of a weight file at most, as transformers cuts them."""


def inputs_of(job: Job, shapes: Mapping[str, tuple[int, ...]]) -> Inputs:
    """The sizes that a model was built for, from the shapes of its tensors."""
    images, vision = job.data.images, job.model.family == "vit"
    classes = shapes["head.weight"][0] if vision and "head.weight" in shapes else 0
    vocab = 0 if vision else shapes["model.embed.tokens.weight"][0]
    image = (images.size, images.channels) if vision else (0, 0)
    length = shapes.get("model.embed.positions.weight", (job.data.seq_len,))[0]
    return Inputs(vocab, length, job.data.target_len or 0, *image, classes)


def write_folder(place: Path, job: Job, source: Lazy, outline: Lazy, more: dict) -> None:
    """Write config.json and weights, one tensor at a time.

    Args:
        place: an empty or new folder.
        job: of the weights.
        source: tensors under canonical names.
        outline: the same without values (on meta), from which files are laid out before a value is read.
        more: further keys of config.json.

    Raises:
        JobError: Hugging Face has no such model; names the setting.
        CheckpointError: a tensor has no place there.
    """
    family = family_of_job(job)
    shapes = {name: tuple(outline.read(name).shape) for name in source.names}
    hf_config = family.to_hf(job, inputs_of(job, shapes)) | more
    if source.names:
        dtype = outline.read(min(source.names)).dtype
        hf_config |= dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    links, constants = family.links(job), family.constants(job)
    laid_out = chain(to_theirs(links, outline), constants.items())
    place.mkdir(parents=True, exist_ok=True)
    write_weights(place, chain(to_theirs(links, source), constants.items()), laid_out)
    text = json.dumps(hf_config, indent=2, sort_keys=True) + "\n"
    (place / "config.json").write_text(text, encoding="utf-8")


def write_weights(
    place: Path,
    tensors: Iterable[tuple[str, Tensor]],
    outline: Iterable[tuple[str, Tensor]],
    limit: int = SHARD,
) -> None:
    """Write `model.safetensors`, or several files of at most `limit` bytes and their index.

    Args:
        outline: the same tensors in the same order, with or without values.
    """
    files, total = _split(outline, limit), 0
    where: dict[str, str] = {}
    values = iter(tensors)
    for i, slots in enumerate(files):
        file = WEIGHTS[0] if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        data = (bytes_of(tensor) for _, tensor in islice(values, len(slots)))
        write_shard(place / file, header(slots, {"format": "pt"}), data)
        where |= dict.fromkeys((slot.key for slot in slots), file)
        total += slots[-1].stop if slots else 0
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (place / WEIGHTS[1]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(outline: Iterable[tuple[str, Tensor]], limit: int) -> list[list[Slot]]:
    """Tensors' places in files, in the order in which they come."""
    files: list[list[Slot]] = [[]]
    for name, tensor in outline:
        start = files[-1][-1].stop if files[-1] else 0
        if files[-1] and start + tensor.nbytes > limit:
            files.append([])
            start = 0
        dtype = str(tensor.dtype).removeprefix("torch.")
        files[-1].append(Slot(name, dtype, tuple(tensor.shape), start, start + tensor.nbytes))
    return files
