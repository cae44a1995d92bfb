"""Tokenizers between the houses: files that are copied, and `tokenizer.json` made of what is trained here.

The `tokenizers` library merges pairs in the order of a list, SentencePiece's BPE by the score of the merged piece. A
list of all pairs that make a piece, by score, is the same rule (but for ties of overlapping pairs of one letter).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from headway.pretrain.data.specials import NAMES, Specials
from headway.pretrain.data.tokenizer import SEPARATOR, BytesTokenizer

MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    *MODELS,
)
"""Files that may make up a tokenizer of Hugging Face."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Types of pieces in a SentencePiece model."""


class Found(NamedTuple):
    """A tokenizer in a folder: `data.tokenizer.kind` and the file to read."""

    kind: str
    file: str


def find_tokenizer(folder: Path) -> Found | None:
    """What of a folder's tokenizer Headway reads; None if there is none, or only an older form."""
    if (folder / "tokenizer.json").is_file():
        return Found("huggingface", "tokenizer.json")
    model = next((name for name in MODELS if (folder / name).is_file()), None)
    return Found("sentencepiece", model) if model else None


def copy_tokenizer(folder: Path, to: Path) -> None:
    """Copy all files of a tokenizer."""
    to.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, to / name)


def write_tokenizer(
    to: Path, kind: str, path: Path | None, specials: Specials, frame: str = ""
) -> str | None:
    """Write a job's tokenizer such that `AutoTokenizer` loads it, with the special tokens of the job's objective.

    Args:
        to: the folder of the model.
        kind: `data.tokenizer.kind`.
        path: its file; None for bytes.
        specials: ids of the special tokens.
        frame: what a text stands between: "pair" ([CLS] A [SEP] B [SEP]), "end" (A and the separator), or nothing.

    Returns:
        What could not be done, if anything.
    """
    from tokenizers import Tokenizer

    came = path is not None and path.with_name("tokenizer_config.json").is_file()
    if path is not None and came:
        copy_tokenizer(path.parent, to)
    elif path is not None and kind == "sentencepiece":
        shutil.copyfile(path, to / "tokenizer.model")
    content = _json_of(kind, path)
    if content is None:
        return "tokenizer.json was not made of a SentencePiece model that normalises text, or is no BPE"
    library = Tokenizer.from_str(content)
    new = added(specials)
    library.add_special_tokens([new[i] for i in sorted(new)])
    if wrong := [name for i, name in new.items() if library.token_to_id(name) != i]:
        return f"tokenizer.json has other ids than the model for {', '.join(wrong)}"
    if came and not new:
        return None  # as it came
    names = {role: str(library.id_to_token(i)) for role, i in specials.ids.items()}
    ends = str(library.id_to_token(specials.separator))
    if frame and not came:
        library.post_processor = _framed(frame, library, names, ends)
    (to / "tokenizer.json").write_text(library.to_str(), encoding="utf-8")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    settings |= {"eos_token": ends, "bos_token": ends}
    settings |= {f"{role}_token": names[role] for role in ("cls", "sep", "mask", "pad") if role in names}
    if frame == "pair":
        settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    if not came:
        (to / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return None


def added(specials: Specials) -> dict[int, str]:
    """Id -> name of the special tokens that the tokenizer itself does not have."""
    names = {i: NAMES[role][0] for role, i in specials.ids.items() if role in NAMES}
    names |= {i: f"<extra_id_{k}>" for k, i in enumerate(specials.sentinels)}
    return {i: name for i, name in names.items() if i >= specials.text}


def _framed(frame: str, library: Any, names: dict[str, str], ends: str) -> Any:
    from tokenizers.processors import TemplateProcessing

    if frame == "end":
        return TemplateProcessing(f"$A {ends}", None, [(ends, library.token_to_id(ends))])
    cls, sep = names["cls"], names["sep"]
    tokens = [(name, library.token_to_id(name)) for name in (cls, sep)]
    return TemplateProcessing(f"{cls} $A {sep}", f"{cls} $A {sep} $B:1 {sep}:1", tokens)


def _json_of(kind: str, path: Path | None) -> str | None:
    """The tokenizer as a tokenizer.json; None if it cannot be one."""
    if path is None:
        return bytes_json()
    return (
        path.read_text(encoding="utf-8") if kind == "huggingface" else sentencepiece_json(path.read_bytes())
    )


def bytes_json() -> str:
    """`BytesTokenizer` as a tokenizer.json: no character is in the vocabulary, so each becomes its bytes."""
    unused = [f"<|unused_{i}|>" for i in range(BytesTokenizer.separator + 1, BytesTokenizer.vocab)]
    names = [f"<0x{i:02X}>" for i in range(256)] + [SEPARATOR, *unused]
    return _bpe_json(
        {name: i for i, name in enumerate(names)}, [], special=[SEPARATOR, *unused], spaced=False
    )


def sentencepiece_json(model: bytes) -> str | None:
    """A BPE model of SentencePiece as a tokenizer.json.

    Returns:
        None if the model is no BPE, or changes text before it cuts it (beyond a space for U+2581).
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    proto = ModelProto.FromString(model)
    rules = proto.normalizer_spec
    if proto.trainer_spec.model_type != 2 or rules.precompiled_charsmap or rules.remove_extra_whitespaces:
        return None
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scored = sorted((-p.score, i, p.piece) for i, p in enumerate(proto.pieces) if p.type == NORMAL)
    mergeable = {piece for _, _, piece in scored}
    merges = [
        (piece[:cut], piece[cut:])
        for _, _, piece in scored
        for cut in range(1, len(piece))
        if piece[:cut] in mergeable and piece[cut:] in mergeable
    ]
    special = [p.piece for p in proto.pieces if p.type == CONTROL]
    literal = [p.piece for p in proto.pieces if p.type == USER_DEFINED]
    unknown = next((p.piece for p in proto.pieces if p.type == UNKNOWN), None)
    spaced = bool(rules.escape_whitespaces)
    prefix = spaced and rules.add_dummy_prefix
    return _bpe_json(vocab, merges, special, literal, unknown, spaced=spaced, prefix=prefix)


def _bpe_json(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    special: list[str],
    literal: list[str] | tuple[()] = (),
    unknown: str | None = None,
    *,
    spaced: bool,
    prefix: bool = False,
) -> str:
    """A tokenizer.json of merges with bytes to fall back on; `spaced` writes a space as U+2581."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
    if spaced:
        rules = [normalizers.Prepend("\u2581")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*rules, normalizers.Replace(" ", "\u2581")])
        steps = [decoders.Replace("\u2581", " "), *steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in literal])
    return tokenizer.to_str(pretty=False)
