"""From what Accelerate was told to what that means here: a row for every key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from headway.launch.accelerate.mapping import ALIASES, READ_BY, RULES, ZERO_STAGE
from headway.launch.accelerate.rules import Host, Settings, Share, plain
from headway.pretrain.errors import JobError
from headway.pretrain.recipe import InvalidJob, one_line

ORIGIN = "accelerate: "
"""Origin of a setting: this and the key that asked for it."""

STAGES = {"deepspeed.zero_stage", "deepspeed.config_file"}


@dataclass(frozen=True)
class Given:
    """A key as the user or Accelerate wrote it, its value, and its name in `mapping.RULES`."""

    key: str
    value: Any
    name: str
    launched: bool = False
    """Whether `accelerate launch` said it, which says its defaults too."""


@dataclass(frozen=True)
class Row:
    """What became of a key: settings, or why there are none."""

    key: str
    value: Any
    settings: Settings = field(default_factory=dict)
    note: str = ""
    asked: bool = True
    """False of a default of `accelerate launch`: it yields to what the job says."""
    stands: str = ""
    """What the job says instead, and goes on to say."""

    @property
    def became(self) -> str:
        """For people."""
        made = ", ".join(f"{name} = {_spell(value)}" for name, value in self.settings.items())
        return "; ".join(part for part in (made, self.note, self.stands) if part)


def _spell(value: Any) -> str:
    return str(value) if isinstance(value, Host | Share) else one_line(value)


def translate(given: Sequence[Given]) -> list[Row]:
    """A row for every key.

    Raises:
        JobError, InvalidJob: keys that are unknown, or ask for what Headway cannot do; all at once.
    """
    rows, errors = [], []
    for one in given:
        try:
            rows.append(_row(one, given))
        except JobError as error:
            errors.append(error)
    raise_all(errors)
    names = {one.name for one in given}
    if _value("distributed_type", given, "no") == "deepspeed" and not names & STAGES:
        rows.append(Row("zero_stage", "not said", ZERO_STAGE, "as Accelerate has it", asked=False))
    return rows


def raise_all(errors: Sequence[JobError]) -> None:
    """Raise what was found, one line for each."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise InvalidJob("\n".join(str(error) for error in errors))


def _row(one: Given, given: Sequence[Given]) -> Row:
    name = ALIASES.get(one.name, one.name)
    kind = _value("distributed_type", given, "no")
    reader = READ_BY.get(name.split(".")[0], kind)
    if reader != kind:
        return Row(one.key, one.value, note=_unread(one, reader), asked=False)
    version = f" of version {_value('fsdp.version', given, '1')}"
    rule = RULES.get(name + version) or RULES.get(name)
    if rule is None:
        near = difflib.get_close_matches(one.key.split(".")[-1].lower(), _keys(name), n=1, cutoff=0.5)
        raise JobError(
            one.key, one.value, "is no key of Accelerate that Headway knows", near[0] if near else None
        )
    meaning = rule.meaning(one.key, one.value)
    asked = not (one.launched and rule.unasked(one.value))
    if isinstance(meaning, str):
        return Row(one.key, one.value, note=meaning, asked=asked)
    return Row(one.key, one.value, meaning, asked=asked)


def _keys(name: str) -> list[str]:
    """Keys of the same section, as files spell them."""
    section = name.split(".")[0] if "." in name else ""
    return [
        f"{section}_{rest}" if section in READ_BY and section != "deepspeed" else rest
        for each in RULES
        for start, _, rest in [each.rpartition(".")]
        if start == section and " " not in rest
    ]


def _value(name: str, given: Sequence[Given], default: str) -> str:
    return next((plain(one.value) for one in given if ALIASES.get(one.name, one.name) == name), default)


def _unread(one: Given, reader: str) -> str:
    """Why a key is not read; in a file it is an error."""
    rule = f"is read with distributed_type {reader.upper()} only"
    if not one.launched:
        raise JobError(one.key, one.value, rule, f"distributed_type: {reader.upper()}, or leave it out")
    return rule
