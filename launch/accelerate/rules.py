"""What a key of Accelerate can mean to Headway: the words in which the tables of `mapping` are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headway.pretrain.errors import JobError

Settings = Mapping[str, Any]
"""Dotted settings of a job -> values."""

LEFT = -1
"""Of an axis: the ranks that the other axes leave."""


@dataclass(frozen=True)
class Host:
    """As the size of an axis: the ranks of a host."""

    def __str__(self) -> str:
        return "the ranks of a host"


@dataclass(frozen=True)
class Share:
    """So many micro-batches a step on each rank; as `parallel.micro_batch` it becomes rows."""

    parts: int

    def __str__(self) -> str:
        return f"a rank's rows / {self.parts}"


@dataclass(frozen=True)
class Rule:
    """What the values of a key become; a value that nothing here takes is refused.

    Args:
        values: value as text in lower case -> settings, or why there are none to make.
        setting: takes the value as it is, as `kind`.
        note: why no value needs a setting; all are taken.
        refused: the rule that other values break.
        nearest: what to give instead.
        default: what `accelerate launch` tells ranks when nobody asked for it: such a value yields to the job's own.
    """

    values: Mapping[str, Settings | str] = field(default_factory=dict)
    setting: str = ""
    kind: type = int
    note: str = ""
    refused: str = "is none of Accelerate's values"
    nearest: object = None
    default: str | None = None

    def meaning(self, key: str, value: Any) -> Settings | str:
        """Settings that a value becomes, or why there are none; raises JobError if Headway cannot do it."""
        text = plain(value)
        if text in self.values:
            return self.values[text]
        if self.note:
            return self.note
        if not self.setting:
            nearest = self.nearest if self.nearest is not None else ", ".join(self.values) or None
            raise JobError(key, value, self.refused, nearest)
        return {self.setting: self._number(key, value)}

    def _number(self, key: str, value: Any) -> Any:
        """The value as the setting has it; raises JobError if it cannot be."""
        if self.kind is str:
            return str(value)
        try:
            number = float(value) if self.kind is float else int(str(value))
        except ValueError:
            rule = f"becomes {self.setting}: must be a {'number' if self.kind is float else 'whole number'}"
            raise JobError(key, value, rule, self.nearest) from None
        if self.kind is not float and number < 1:
            raise JobError(key, value, f"becomes {self.setting}: must be at least 1", 1)
        return Share(int(number)) if self.kind is Share else number

    def unasked(self, value: Any) -> bool:
        """Whether the value is what Accelerate tells ranks in any case."""
        return self.default is not None and plain(value) == self.default


def plain(value: Any) -> str:
    """A value of a file or a variable as the tables spell it."""
    return str(getattr(value, "value", value)).lower()


def off(refused: str, nearest: object = None, default: str | None = None) -> Rule:
    """A switch that must stay off."""
    words = dict.fromkeys(("false", "no", "none", "0", ""), "is off")
    return Rule(words, refused=refused, nearest="false" if nearest is None else nearest, default=default)


def switch(on: Settings | str, default: str | None = None) -> Rule:
    """A switch that does something when it is on; off it asks for nothing."""
    words: dict[str, Settings | str] = dict.fromkeys(("false", "no", "none", "0", ""), "is off")
    return Rule({"true": on, "yes": on, "1": on, **words}, refused="must be true or false", default=default)
