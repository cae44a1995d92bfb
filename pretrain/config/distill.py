"""What a student learns from a teacher, beside or in place of the objective's own loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from headway.pretrain.config.base import AboveZero, Count, NotNegative, Positive, Section

Layers = Literal["uniform", "top", "bottom", "last"] | list[Count | None]
"""Which layer of the teacher each layer of the student learns from: evenly spaced ones, up to the last; the last
ones; the first ones; the last from the last alone; or a list, from 0, with null where a layer learns from none."""
Divergence = Literal["kl", "reverse_kl", "js", "mse", "scores"]


class Term(Section):
    """A part of the loss."""

    weight: NotNegative = 0.0
    """Weight in the loss; 0 leaves the part out."""
    begin: Count = 0
    """The first step that has it."""
    end: Positive | None = None
    """The first step that has it no more; none if not given."""

    def at(self, step: int | None) -> bool:
        """Whether a step has it; None asks whether any has."""
        return self.weight > 0 and (
            step is None or (self.begin <= step and (self.end is None or step < self.end))
        )


class Logits(Term):
    """Soft targets (Hinton et al. 2015): T^2 D(teacher || student) of predictions at temperature T."""

    temperature: AboveZero = 1.0
    divergence: Literal["forward", "reverse", "js"] = "forward"
    """KL(teacher || student), KL(student || teacher), or Jensen-Shannon."""
    top_k: Positive | None = None
    """Compare the teacher's likeliest words, and the rest as one; all words if not given."""
    hard: bool = False
    """Learn the teacher's likeliest class as a label (DeiT); of classifiers."""


class Maps(Term):
    """Attention maps, head by head."""

    loss: Divergence = "kl"
    """KL(teacher || student), KL(student || teacher), Jensen-Shannon; squared error of weights, or of scores before
    the softmax (TinyBERT). Of rows of weights over the keys that the student sees; a mean over rows that count and
    heads."""
    layers: Layers | None = None
    """As `objective.distill.layers` if not given."""
    heads: Literal["average"] | list[Count] = "average"
    """Of a teacher with a multiple of the student's heads, each student's head learns the mean of its share of maps,
    in order; or a list: the teacher's head of every student's head."""
    across: bool = True
    """Cross-attention too, of encoder-decoders."""
    progressive: Count = 0
    """Steps for which each layer in turn is matched alone, the first first (MobileBERT, section 3.3); 0 matches
    all."""


class Relations(Term):
    """How places relate: softmax(A A^T / sqrt(d)) of queries, keys or values A (MiniLM, Wang et al. 2020, 2021)."""

    of: Annotated[list[Literal["queries", "keys", "values"]], Field(min_length=1)] = ["values"]
    heads: Positive | None = None
    """Relation heads: both models' features are cut into so many; the student's heads if not given."""
    loss: Divergence = "kl"
    layers: Layers | None = "last"
    """As `objective.distill.layers` if None."""


class States(Term):
    """Hidden states after blocks, through a learned projection where the widths differ."""

    loss: Literal["mse", "normalised", "cosine"] = "mse"
    """Mean squared error; of layer-normalised features (MobileBERT, equation 2); 1 - cosine."""
    layers: Layers | None = None
    """As `objective.distill.layers` if not given."""
    embeddings: bool = False
    """What goes into the first block too (TinyBERT, equation 9)."""
    projection: Literal["auto", "always"] = "auto"
    """`auto` has one where the widths differ, `always` also where they do not (TinyBERT)."""
    progressive: Count = 0
    """As `attention.progressive`."""


class Final(Term):
    """1 - cosine of the last hidden states (DistilBERT), through a learned projection where the widths differ."""


class Contrast(Term):
    """A sample's representation, told from those of others: the mean of its last hidden states, projected."""

    kind: Literal["codir", "crd"] = "codir"
    """`codir`: which of the teacher's is the sample's, by softmax (Sun et al. 2020). `crd`: whether each is, one by
    one (Tian et al. 2020, equation 19)."""
    width: Positive = 128
    """Of the projections."""
    temperature: AboveZero = 0.07
    queue: Count = 0
    """Samples of steps before whose representations by the teacher are told from too; the rest of the batch always
    is."""


class Rows(Term):
    """Rows of attention maps, each told from other rows of its head by which keys they look at."""

    layers: Layers | None = "last"
    count: Annotated[int, Field(ge=2)] = 32
    """Rows of a map that are taken, evenly spaced."""
    temperature: AboveZero = 0.1


class Distill(Section):
    """A teacher, and what is learned from it."""

    enabled: bool = True
    """False leaves the teacher out, and all that is learned from it: for the same run without."""
    teacher: str | None = None
    """A run, a checkpoint, or a folder of Hugging Face."""
    cache: str | None = None
    """A folder that `headway distill cache` wrote, read in the teacher's stead."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """Dtype of the teacher's weights and products; `auto` is that of the student's products."""
    init: Layers | None = None
    """Begin with the weights of these layers of the teacher, and with its other weights (DistilBERT: every second
    layer); both models then have the same widths."""
    layers: Layers = "uniform"
    """Which layers learn from which, where a part of the loss does not say."""
    task: NotNegative = 1.0
    """Weight of the objective's own loss."""
    logits: Logits = Logits()
    attention: Maps = Maps()
    relations: Relations = Relations()
    states: States = States()
    final: Final = Final()
    contrast: Contrast = Contrast()
    rows: Rows = Rows()

    @property
    def on(self) -> bool:
        """Whether something is learned from a teacher."""
        return self.enabled and (self.teacher is not None or self.cache is not None)

    @property
    def terms(self) -> dict[str, Term]:
        """The parts of the loss that have a weight."""
        found = {name: getattr(self, name) for name in TERMS}
        return {name: term for name, term in found.items() if term.weight}


TERMS = ("logits", "attention", "relations", "states", "final", "contrast", "rows")
