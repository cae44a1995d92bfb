"""What one rank of a model-parallel layout computes: its share of widths, of places, of the chain of blocks.

Tensor parallelism (Shoeybi et al. 2019) cuts heads, widths and words; with sequence parallelism (Korthikanti et al.
2022, section 4.2.2) what lies between products is cut along the sequence too. Context parallelism cuts sequences.
Pipelines cut the chain of blocks, and a stage holds several micro-batches at once.
"""

from __future__ import annotations

from headway.pretrain.config import Model


def of_rank(model: Model, ranks: int) -> Model:
    """The shape of what the first of so many tensor ranks computes: of all, it has most."""
    if ranks == 1:
        return model
    experts = model.experts
    if experts.count and experts.ffn is not None:
        experts = experts.model_copy(update={"ffn": -(-experts.ffn // ranks)})
    cut = {
        "heads": model.heads // ranks,
        "kv_heads": max(1, model.kv // ranks),
        "head_dim": model.head_width,
        "ffn": -(-model.ffn_width // ranks),
        "experts": experts,
    }
    return model.model_copy(update=cut)


def in_flight(schedule: str, ranks: int, place: int, micros: int) -> int:
    """Micro-batches whose activations a rank of a pipeline holds at once: all of them under GPipe (Huang et al. 2019),
    one for each rank from its own to the last under 1F1B (Narayanan et al. 2021, section 2.2.1).

    Of schedules with several stages a rank it is the most that any stage of it may hold: all of them.
    """
    return min(ranks - place, micros) if schedule == "1f1b" else micros
