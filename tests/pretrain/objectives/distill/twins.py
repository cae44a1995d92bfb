"""A student and a teacher of transformers, and the same student in Headway, which learns from the same teacher.

    twins = Twins(make("bert", layers=2), make("bert", layers=4), tmp_path, {"attention": {"weight": 1.0}})
    twins.check(batch, loss)

holds a step of Headway's engine, of two micro-batches, to a loss that a test composes of what transformers gives: the
loss, and its gradients by all parameters, in fp64. Losses sum a few hundred terms in another order, gradients go
through a few blocks: 1e-15 each, 1e-13 together. Bounds leave a factor of 100.

Shapes: B batch, S sequence, H heads, D their width, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.launch.teacher import hire, shape_of
from headway.launch.teacher_source import open_teacher
from headway.parallel import mesh
from headway.parallel.engines.native import NativeEngine
from headway.pretrain.engine import StepResult
from headway.pretrain.hf.folder import open_folder, tree_of
from headway.pretrain.hf.writing import inputs_of
from headway.pretrain.objectives import build_objective
from headway.pretrain.recipe import validate
from headway.tests.parallel.family_cases import merged

VOCAB, LENGTH, TARGET, ROWS, CLASSES = 53, 12, 9, 4, 7
BOUND = 1e-11
"""Relative to the largest of a tensor's values."""
EAGER = {"attn_implementation": "eager"}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def make(kind: str, seed: int = 0, **shape: Any) -> nn.Module:
    """A model of transformers in fp64; `shape`: layers, hidden, heads, and keys of its config. Weights of every kind
    are away from 0 and 1, where a swap would not show."""
    import transformers

    layers, hidden, heads = shape.pop("layers", 2), shape.pop("hidden", 24), shape.pop("heads", 3)
    usual = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 40,
    }
    words = {"vocab_size": VOCAB, "max_position_embeddings": LENGTH}
    if kind == "gpt2":
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
        sizes = {
            "n_layer": layers,
            "n_embd": hidden,
            "n_head": heads,
            "n_positions": LENGTH,
            "vocab_size": VOCAB,
        }
        config, model = transformers.GPT2Config, transformers.GPT2LMHeadModel
        keys = sizes | off
    elif kind == "t5":
        sizes = {"d_model": hidden, "d_kv": 6, "d_ff": 40, "num_layers": layers, "num_heads": heads}
        more = {"dropout_rate": 0.0, "pad_token_id": 0, "decoder_start_token_id": 0, "vocab_size": VOCAB}
        more |= {"relative_attention_num_buckets": 10, "relative_attention_max_distance": 9}
        config, model = transformers.T5Config, transformers.T5ForConditionalGeneration
        keys = sizes | more
    elif kind == "mobilebert":
        more = {"embedding_size": 10, "intra_bottleneck_size": 18, "num_feedforward_networks": 2}
        config, model = transformers.MobileBertConfig, transformers.MobileBertForMaskedLM
        keys = usual | words | NO_DROPOUT | more
    elif kind == "albert":
        more = {"embedding_size": 10, "classifier_dropout_prob": 0.0}
        config, model, keys = (
            transformers.AlbertConfig,
            transformers.AlbertForMaskedLM,
            usual | words | NO_DROPOUT | more,
        )
    elif kind == "bert_pairs":
        config, model, keys = (
            transformers.BertConfig,
            transformers.BertForPreTraining,
            usual | words | NO_DROPOUT,
        )
    elif kind in ("vit", "deit"):
        images = {"image_size": 12, "patch_size": 4, "num_labels": CLASSES}
        config = transformers.ViTConfig if kind == "vit" else transformers.DeiTConfig
        name = "ViTForImageClassification" if kind == "vit" else "DeiTForImageClassificationWithTeacher"
        model, keys = getattr(transformers, name), usual | images
    else:
        config, model = transformers.BertConfig, transformers.BertForMaskedLM
        keys = usual | words | NO_DROPOUT
    torch.manual_seed(seed)
    made = model(config(**{**keys, **EAGER, **shape})).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
    return made


class Twins:
    """The pair. The student's own parts (projections) have weights away from 0 too."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        place: Path,
        distill: dict[str, Any],
        more: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            student, teacher: of transformers.
            place: an empty folder.
            distill: `objective.distill`, without the teacher.
            more: further settings of the student's job.
        """
        self.student, self.teacher, self.place = student, teacher, place
        for name, model in (("student", student), ("teacher", teacher)):
            model.save_pretrained(place / name)
        self.folder = open_folder(place / "student")
        self.source = open_teacher(str(place / "teacher"))
        settings: dict[str, Any] = {
            "objective": {"distill": distill | {"teacher": str(place / "teacher")}},
            "data": {"seq_len": LENGTH},
            "optimizer": {"lr": 1e-2, "weight_decay": 0.1},
            "train": {"global_batch": ROWS, "steps": 20, "compile": False},
            "parallel": {"micro_batch": ROWS // 2},
            "precision": "fp64",
        }
        self.job = job = validate(merged(merged(tree_of(self.folder.settings), settings), more or {}))
        weights = dict(self.folder.tensors())
        inputs = inputs_of(job, {name: tuple(w.shape) for name, w in weights.items()})
        self.inputs = inputs = inputs._replace(
            length=job.row_tokens, target_length=TARGET if job.model.family == "t5" else 0
        )
        self.world = mesh.start(job, mesh.lay_out(job.parallel, 1), 0, 1, 0, torch.device("cpu"), "gloo")
        self.objective = build_objective(job, inputs, device="meta", teacher=shape_of(self.source))
        self.engine = NativeEngine(job, self.objective, self.world, precision="fp64", compiled=False)
        data: Any = SimpleNamespace(inputs=inputs, specials=None)
        self.engine.teacher = hire(self.source, job, self.engine, data, "fp64")
        self._fill(weights)
        self.leaves: dict[str, Tensor] = {}

    @torch.no_grad()
    def _fill(self, weights: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(5)
        for name, p in self.objective.named_parameters():
            if name in weights:
                p.copy_(weights.pop(name))
            elif p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
        assert not weights

    def leaf(self, name: str) -> Tensor:
        """A copy of a parameter that the student of transformers lacks, whose gradient is compared too."""
        copy = self.objective.get_parameter(name).detach().clone().requires_grad_()
        return self.leaves.setdefault(name, copy)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A linear layer of the student's own."""
        return F.linear(x, self.leaf(f"{name}.weight"), self.leaf(f"{name}.bias"))

    def step(self, batch: dict[str, Tensor], step: int = 0) -> tuple[StepResult, dict[str, Tensor]]:
        """What a step of the engine tells, and its gradients."""
        kept: dict[str, Tensor] = {}
        result = self.engine.train_step(
            batch, step, lambda found: kept.update({name: g.clone() for name, g in found.items()})
        )
        return result, kept

    def check(self, batch: dict[str, Tensor], loss: Tensor, step: int = 0) -> StepResult:
        """Hold a step to a loss of transformers' outputs, and its gradients to those of that loss."""
        result, found = self.step(batch, step)
        assert abs(result.loss - float(loss.detach())) <= BOUND * max(abs(result.loss), 1e-3)
        loss.backward()
        expected = self.gradients()
        floor = max(float(g.abs().max()) for g in expected.values()) / 1000
        for name, g in expected.items():
            ours = found.pop(name, torch.zeros_like(g))
            apart = float((ours - g).abs().max()) / max(float(g.abs().max()), floor)
            assert apart < BOUND, f"{name}: {apart}"
        assert not [name for name, g in found.items() if g.abs().max() > 0]
        return result

    @torch.no_grad()
    def gradients(self) -> dict[str, Tensor]:
        """Gradients of transformers' student under Headway's names, saved as if they were its weights, and those of the
        leaves."""
        values = {p: p.clone() for p in self.student.parameters()}
        for p in values:
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
        self.student.save_pretrained(self.place / "gradients")
        for p, value in values.items():
            p.copy_(value)
        own = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in self.leaves.items()}
        return dict(open_folder(self.place / "gradients").tensors()) | own


# -- what transformers shows -----------------------------------------------------------------------------------


class Seen(NamedTuple):
    """Of a forward: logits; hidden states, the embeddings first; attention weights of every layer [B, H, S, S] (of T5
    `decoder`'s and `cross` too); with hooks, queries, keys and values [B, H, S, D] of every layer."""

    out: Any
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]

    @property
    def logits(self) -> Tensor:
        found: Tensor = self.out.logits
        return found

    @property
    def maps(self) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.out.attentions
        return found

    @property
    def states(self) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.out.hidden_states
        return found

    def scores(self, layer: int) -> Tensor:
        """Before the softmax."""
        q, k = self.q[layer], self.k[layer]
        return q @ k.mT / q.shape[-1] ** 0.5


@contextmanager
def exact() -> Iterator[None]:
    """Where transformers computes in fp32 whatever it is given (softmax of ViT, norms of T5), let it be fp64."""
    with mock.patch.object(torch, "float32", torch.float64):
        yield


PRODUCTS = {"query": 0, "key": 1, "value": 2, "q_proj": 0, "k_proj": 1, "v_proj": 2}
"""What transformers calls the layers of queries, keys and values, in BERT and in ViT."""


def look(model: nn.Module, *args: Tensor, **inputs: Any) -> Seen:
    """A forward of a model of transformers, with queries, keys and values where it has layers of such names."""
    found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    heads = getattr(model.config, "num_attention_heads", 1)
    hooks = [
        module.register_forward_hook(
            lambda m, i, x, which=which: found[which].append(x.unflatten(-1, (heads, -1)).transpose(1, 2))
        )
        for name, module in model.named_modules()
        if (which := PRODUCTS.get(name.rpartition(".")[2])) is not None
    ]
    with exact():
        out = model(*args, output_attentions=True, output_hidden_states=True, **inputs)
    for hook in hooks:
        hook.remove()
    return Seen(out, *found)


def look_at_both(twins: Twins, *args: Tensor, **inputs: Any) -> tuple[Seen, Seen]:
    """Student and teacher; the teacher without a graph."""
    student = look(twins.student, *args, **inputs)
    with torch.no_grad():
        return student, look(twins.teacher, *args, **inputs)


# -- batches ---------------------------------------------------------------------------------------------------


def words(length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (ROWS, length), generator=torch.Generator().manual_seed(seed))


def real(length: int = LENGTH) -> Tensor:
    """Which places of rows are no padding, bool [B, S]."""
    return torch.arange(length) < torch.tensor([length, length - 4, length, 5])[:, None]


def numbered(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"slot": torch.arange(ROWS), "sample": torch.arange(ROWS)}


def masked_batch(padded: bool = True, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch of BERT: Headway's, and what transformers is called with. A third of the real places have a label."""
    tokens, labels, seen = (
        words(seed=seed),
        words(seed=seed + 1),
        real() if padded else torch.ones(ROWS, LENGTH, dtype=torch.bool),
    )
    labels = labels.masked_fill(~seen | (torch.arange(LENGTH) % 3 != 1), -100)
    segments = words(seed=seed + 2) % 2
    ours = {"tokens": tokens, "labels": labels, "segments": segments}
    if padded:
        ours["documents"] = seen.int() - 1
    return numbered(ours), {"input_ids": tokens, "attention_mask": seen.long(), "token_type_ids": segments}


# -- the usual losses ------------------------------------------------------------------------------------------


def over_rows(each: Tensor, seen: Tensor) -> Tensor:
    """Mean over heads and the places of rows that count: of [B, H, S]."""
    return each.mean(1)[seen].mean()


def kl_of_maps(teacher: Tensor, student: Tensor, seen: Tensor) -> Tensor:
    """KL(teacher || student) of attention weights [B, H, S, S], by torch; hidden keys have no weight in both."""
    return over_rows(kl(teacher, student), seen)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of rows of weights, by torch. Where both are 0 there is nothing, and no gradient."""
    there = (p > 0) | (q > 0)
    log_p, log_q = (torch.where(there, x, 1).log() for x in (p, q))
    return torch.where(there, F.kl_div(log_q, log_p, reduction="none", log_target=True), 0).sum(-1)
