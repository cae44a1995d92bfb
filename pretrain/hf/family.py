"""A kind of model in both houses, as data: what its settings are called, what it fixes, where its tensors are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.hf.links import Link
from headway.pretrain.models.inputs import Inputs

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
}
"""Ours -> Hugging Face's."""
SPELLINGS = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "swish": "silu",
}
"""Hugging Face's -> ours."""
DERIVED = {
    "model.ffn": "ffn_width",
    "model.kv_heads": "kv",
    "model.head_dim": "head_width",
    "model.decoder_layers": "decoder_depth",
}
"""Settings that are derived where they are not given, and the property that says how."""
NOWHERE = {
    "model.spectral": False,
    "model.layer_scale": None,
    "model.embedding_scale": False,
    "model.embedding_trigram": False,
    "model.bottleneck.hidden": None,
    "model.attention.mechanism": "dense",
    "model.attention.pattern": (),
}
"""What models of Hugging Face that we write have not otherwise, unless they have a key for it."""

Settings = dict[str, Any]
"""Dotted setting -> value."""


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face.

    Attributes:
        model_type: of its config.json.
        values: setting -> key, where both hold the same value.
        fixed: settings that this kind of model always has: set by import, demanded by export.
        theirs: keys of which we have one value only: demanded by import (where given), written by export.
        defaults: what a config.json means that leaves a key out.
        activation: the key that names the activation, if a table says what it means.
        read: (config.json, names of the tensors) -> settings that need more than a table.
        write: (job, sizes) -> keys that need more than a table.
        links: job -> where its tensors are.
        spellings: rules that give tensors of older files and of bare models their full names.
        constants: job -> tensors that files hold and that are no weights here.
        copies: a tensor that is stored a second time where it is tied -> the first.
        varied: settings of `NOWHERE` that `write` looks after.
    """

    model_type: str
    values: Mapping[str, str]
    fixed: Mapping[str, Any]
    theirs: Mapping[str, Any]
    defaults: Mapping[str, Any]
    activation: str | None
    read: Callable[[dict, frozenset[str]], Settings]
    write: Callable[[Job, Inputs], dict]
    links: Callable[[Job], list[Link]]
    spellings: tuple[tuple[str, str], ...] = ()
    constants: Callable[[Job], dict[str, Tensor]] = lambda job: {}
    copies: Mapping[str, str] = field(default_factory=dict)
    varied: frozenset[str] = frozenset()

    def to_model(self, hf_config: Mapping[str, Any], names: frozenset[str]) -> Settings:
        """Settings of a model that config.json and the names of its tensors describe.

        Raises:
            JobError: it is of a kind that Headway does not have; names the key.
        """
        known = {**self.defaults, **hf_config}
        for key, value in self.theirs.items():
            if known.get(key, value) != value:
                rule = f"Headway's models of this kind ({self.model_type}) have no other"
                raise JobError(f"config.json: {key}", known[key], rule, value)
        settings: Settings = dict(self.fixed)
        for setting, key in self.values.items():
            if key not in known:
                raise JobError(f"config.json: {key}", None, f"a {self.model_type} must say it")
            settings[setting] = known[key]
        if self.activation:
            spelled = known[self.activation]
            if spelled not in SPELLINGS:
                raise JobError(
                    f"config.json: {self.activation}", spelled, f"Headway has {', '.join(SPELLINGS)}"
                )
            settings["model.activation"] = SPELLINGS[spelled]
        settings |= self.read(known, names)
        return settings

    def to_hf(self, job: Job, inputs: Inputs) -> dict:
        """The config.json of a job's model.

        Raises:
            JobError: the model has something that this kind of model lacks; names the setting.
        """
        for setting, value in {**NOWHERE, **self.fixed}.items():
            if setting not in self.values and setting not in self.varied:
                demand(job, setting, value, self.model_type)
        usual = {
            "model.kv_heads": job.model.heads,
            "model.head_dim": job.model.inner_width // job.model.heads,
        }
        for setting in usual.keys() - self.values.keys():
            demand(job, setting, usual[setting], self.model_type)
        config = {"model_type": self.model_type, **self.theirs}
        config |= {key: value_of(job, setting) for setting, key in self.values.items()}
        if self.activation and "model.activation" not in self.fixed:
            if job.model.activation not in ACTIVATIONS:
                rule = f"a {self.model_type} model of Hugging Face has {', '.join(ACTIVATIONS)}"
                raise JobError("model.activation", job.model.activation, rule, "gelu_tanh")
            config[self.activation] = ACTIVATIONS[job.model.activation]
        return config | self.write(job, inputs)


def value_of(job: Job, setting: str) -> Any:
    """Value of a dotted setting, derived where it was not given."""
    if setting in DERIVED:
        return getattr(job.model, DERIVED[setting])
    value: Any = job
    for part in setting.split("."):
        value = getattr(value, part)
    return value


def demand(job: Job, setting: str, value: Any, model_type: str) -> None:
    """Raise JobError unless a setting has the value that a kind of model always has."""
    if (found := value_of(job, setting)) != value:
        rule = f"a {model_type} model of Hugging Face has no other value, so this one cannot be exported"
        raise JobError(setting, found, rule, value)


def is_tied(hf_config: Mapping[str, Any], names: frozenset[str], head: str) -> bool:
    """Whether the head shares the token table: the configuration says so, and no head of its own is stored."""
    return bool(hf_config["tie_word_embeddings"]) and head not in names
