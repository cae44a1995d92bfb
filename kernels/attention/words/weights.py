"""Words for weightings: from scores to weights."""

from __future__ import annotations

from headway.kernels.attention import weights
from headway.kernels.attention.compose import Form
from headway.kernels.attention.registry import Own
from headway.kernels.attention.words.composed import EVERYTHING, per_head, word

ROWS = (
    word(
        "sparsemax", "weights", Form(weighting=weights.Sparsemax()), "sparsemax(Q K^T / sqrt(D)) V",
        "Martins and Astudillo 2016",
    ),
    word(
        "entmax15", "weights", Form(weighting=weights.Entmax15()), "1.5-entmax(Q K^T / sqrt(D)) V",
        "Peters et al. 2019, section 3",
    ),
    word(
        "sigmoid", "weights", Form(weighting=weights.Sigmoid()), "sigmoid(Q K^T / sqrt(D) - log n) V",
        "Ramapuram et al. 2024, section 3",
    ),
    word(
        "sink", "weights", Form(weighting=weights.Sink(), own="sink"), "exp(s) / (sum exp(s) + exp(sink_h)) V",
        "OpenAI 2025 (gpt-oss); Miller 2023", own={"sink": Own(per_head, ("constant", 0.0))},
    ),
    word(
        "hard", "weights", Form(weighting=weights.Hard()), "v_j, j drawn from softmax(Q K^T / sqrt(D))",
        "Jang et al. 2017, section 2.2 (straight-through Gumbel)", settings={"temperature": 1.0}, draws=True,
        estimated=True, supports=EVERYTHING - {"cross"},
    ),
    word(
        "reinforce", "weights", Form(weighting=weights.Reinforced()),
        "v_j, j drawn from softmax(Q K^T / sqrt(D)); scores learn by (loss - baseline) grad log p_j",
        "Williams 1992; Mnih et al. 2014, equation 2; Xu et al. 2015, section 4.1", draws=True, estimated=True,
        supports=EVERYTHING - {"cross", "dropout", "tensor", "context_ulysses"},
    ),
)  # fmt: skip
