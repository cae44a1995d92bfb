"""What stands beside exported weights: tokenizer, special tokens, how pixels are normalised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headway.pretrain import config
from headway.pretrain.config import Job
from headway.pretrain.data.build import train_tokenizer
from headway.pretrain.data.specials import Specials, assign
from headway.pretrain.data.tokenizer import Tokenizer, load_tokenizer
from headway.pretrain.errors import HeadwayError
from headway.pretrain.hf.tokenizers import write_tokenizer


def find_job_tokenizer(job: Job) -> tuple[Path | None, Tokenizer]:
    """The tokenizer of a job and its file, if it has one; found in the cache or trained, if none was named."""
    settings = job.data.tokenizer
    path = Path(settings.path).expanduser() if settings.path else None
    if settings.kind == "sentencepiece" and path is None:
        path = train_tokenizer(job.data, progress=False)
    return path, load_tokenizer(settings, path)


def find_specials(job: Job) -> tuple[Specials | None, Path | None, list[str]]:
    """Special tokens of a job of text, its tokenizer's file, and why there are none, if there should be some."""
    if job.model.family == "vit":
        return None, None, []
    try:
        path, tokenizer = find_job_tokenizer(job)
    except HeadwayError as fault:
        return None, None, [f"no tokenizer is written: {fault}"]
    return assign(tokenizer, job.objective), path, []


def write_companions(target: Path, job: Job, specials: Specials | None, path: Path | None) -> list[str]:
    """Write what stands beside the weights: the tokenizer, or how pixels are normalised; what could not be done."""
    if job.model.family == "vit":
        write_json(target / "preprocessor_config.json", preprocessor(job.data.images))
    if specials is None:
        return []
    frame = {"bert": "pair", "t5": "end"}.get(job.model.family, "")
    note = write_tokenizer(target, job.data.tokenizer.kind, path, specials, frame)
    if job.model.family in ("gpt", "t5"):
        write_json(target / "generation_config.json", special_ids(job, specials))
    return [note] if note else []


def special_ids(job: Job, specials: Specials) -> dict[str, Any]:
    """Keys of config.json that name special tokens."""
    if job.model.family == "gpt":
        return {"bos_token_id": specials.separator, "eos_token_id": specials.separator}
    ids = {"pad_token_id": specials.ids["pad"]}
    if job.model.family == "t5":
        ids |= {"eos_token_id": specials.separator, "decoder_start_token_id": specials.ids["bos"]}
    return ids


def preprocessor(images: config.Images) -> dict[str, Any]:
    """The preprocessor_config.json of transformers' ViTImageProcessor."""
    mean, std = (list(v) * (images.channels if len(v) == 1 else 1) for v in (images.mean, images.std))
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": images.size, "width": images.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
