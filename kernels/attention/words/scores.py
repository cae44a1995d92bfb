"""Words for scores: how much a query and a key have to do with each other."""

from __future__ import annotations

from headway.kernels.attention import scores
from headway.kernels.attention.compose import Form
from headway.kernels.attention.registry import Own
from headway.kernels.attention.words.composed import EVERYTHING, per_head, word

ROWS = (
    word(
        "temperature", "score", Form(score=scores.Temperature()), "softmax(exp(t_h) Q K^T / sqrt(D)) V",
        "Vaswani et al. 2017, with a learned temperature of a head",
        own={"log_temperature": Own(per_head, ("constant", 0.0))},
    ),
    word(
        "cosine", "score", Form(score=scores.Cosine()), "softmax(exp(t_h) cos(Q, K)) V",
        "Henry et al. 2020; Liu et al. 2022 (Swin v2), equation 2",
        own={"log_temperature": Own(per_head, ("constant", 2.302585093))},  # 10, as Swin v2
    ),
    word(
        "general", "score", Form(score=scores.General()), "softmax(Q W_h K^T) V", "Luong et al. 2015, section 3.1",
        own={"score": Own(lambda s: (s.heads, s.dim, s.dim), ("identity", 0.125))},
    ),
    word(
        "dot", "score", Form(score=scores.Dot()), "softmax(Q K^T) V", "Luong et al. 2015, section 3.1",
    ),
    word(
        "additive", "score", Form(score=scores.Additive()), "softmax(u_h . tanh(Q + K)) V",
        "Bahdanau et al. 2015, appendix A.1.2",
        own={"direction": Own(lambda s: (s.heads, s.dim), ("normal", 0.2))},
    ),
    word(
        "softcap", "score", Form(score=scores.SoftCap()), "softmax(c tanh(Q K^T / (c sqrt(D)))) V",
        "Gemma Team 2024 (Gemma 2), section 2", settings={"softcap": 50.0},
    ),
    word(
        "talking", "score", Form(score=scores.TalkingHeads()), "P_w softmax(P_l Q K^T / sqrt(D)) V",
        "Shazeer et al. 2020",
        own={n: Own(lambda s: (s.heads, s.heads), ("identity", 1.0)) for n in ("before", "after")},
        supports=EVERYTHING - {"tensor", "context_ulysses"},
    ),
    word(
        "differential", "score", Form(score=scores.Differential()), "(softmax(Q1 K1^T) - l softmax(Q2 K2^T)) V",
        "Ye et al. 2024, section 2.1",
        own={
            f"lambda_{n}": Own(lambda s: (s.heads, s.dim // 2), ("normal", 0.1)) for n in ("q1", "k1", "q2", "k2")
        },
        settings={"first_lambda": lambda layer: 0.8 - 0.6 * 2.718281828459045 ** (-0.3 * layer)},
        supports=EVERYTHING - {"dropout", "bias"},
    ),
)  # fmt: skip
