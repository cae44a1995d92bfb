"""Rules that bind several settings: each names field, value, rule and the nearest legal choice."""

import pytest

from headway.pretrain.config import Job
from headway.pretrain.errors import JobError

VIT = {"family": "vit"}
TEACHER = {"teacher": "runs/large"}


def distilling(**settings):
    return {"objective": {"distill": settings}}


CASES = [
    ({"objective": {"name": "masked"}}, r"objective\.name = 'masked': trains bert.*causal"),
    (
        {"model": {"family": "t5", "positions": "relative"}},
        r"objective\.name = 'causal': .*t5 takes prefix, spans, ul2, pairs",
    ),
    ({"model": {"positions": "relative"}}, r"model\.positions = 'relative': the family gpt has learned"),
    (
        {"model": {"family": "vit", "positions": "alibi"}, "objective": {"name": "classify"}},
        r"model\.positions = 'alibi': the family vit has learned",
    ),
    (
        {"model": {"positions": "alibi", "attention": {"mechanism": "differential"}}},
        r"model\.attention\.mechanism = 'differential': .*adds a bias",
    ),
    (
        {
            "model": {"positions": "rotary", "rotary_scaling": {"kind": "yarn", "factor": 4}},
            "data": {"seq_len": 512},
        },
        r"model\.rotary_scaling\.original_length = None: yarn must know.*128",
    ),
    (
        {"model": {"positions": "rotary", "rotary_scaling": {"kind": "linear", "factor": 0.5}}},
        r"model\.rotary_scaling\.factor = 0\.5: .*at least 1",
    ),
    (
        {
            "model": {
                "positions": "rotary",
                "rotary_scaling": {"kind": "llama3", "original_length": 64, "slow": 5.0},
            }
        },
        r"model\.rotary_scaling\.fast = 4\.0: must exceed.*20",
    ),
    (
        {"model": {"positions": "rotary", "head_dim": 2, "rotary_scaling": {"kind": "ntk"}}},
        r"model\.head_dim = 2: ntk.*4",
    ),
    ({"model": {"layers": 12, "unique_layers": 5}}, r"model\.unique_layers = 5: must divide.*4"),
    (
        {"model": {"family": "bert"}, "objective": {"name": "masked", "masking": {"pairs": "next"}}},
        r"model\.segments = 0: two segments.*2",
    ),
    (
        {"model": {"hidden": 96, "heads": 6, "norm_position": "post", "bottleneck": {"hidden": 20}}},
        r"model\.heads = 6: must divide model\.bottleneck\.hidden = 20.*5",
    ),
    (
        {"model": {"bottleneck": {"hidden": 24}}},
        r"model\.norm_position = 'pre': with model\.bottleneck\.hidden.*post",
    ),
    (
        {
            "model": {
                "family": "t5",
                "positions": "relative",
                "norm_position": "post",
                "bottleneck": {"hidden": 24},
            },
            "objective": {"name": "spans"},
        },
        r"model\.bottleneck\.hidden = 24: .*decoder behind them",
    ),
    (
        {
            "model": {
                "norm_position": "post",
                "bottleneck": {"hidden": 24},
                "attention": {"mechanism": "hyena"},
            }
        },
        r"model\.bottleneck\.reads = 'shared': .*'hyena'.*inside",
    ),
    ({"model": {"embedding_trigram": True}}, r"model\.embedding_trigram = True: .*encoders of text.*False"),
    (
        {
            "model": {"family": "bert", "embedding_trigram": True},
            "objective": {"name": "masked"},
            "data": {"documents": "isolate"},
        },
        r"data\.documents = 'isolate': with model\.embedding_trigram.*attend",
    ),
    ({"model": {"hidden": 100, "heads": 7}}, r"model\.heads = 7: must divide model\.hidden = 100.*5"),
    ({"model": {"experts": {"count": 4, "top_k": 5}}}, r"model\.experts\.top_k = 5: must not exceed.*4"),
    (
        {"model": {"experts": {"count": 4, "top_k": 1}}},
        r"model\.experts\.normalise = True: .*learn nothing.*False",
    ),
    (
        {"model": {"experts": {"count": 4, "routing": "experts"}}},
        r"model\.experts\.routing.*look ahead.*tokens",
    ),
    (
        {"objective": {"masking": {"mask": 0.8, "random": 0.3}}},
        r"objective\.masking\.random = 0\.3: .*must not exceed 1",
    ),
    (
        {"model": VIT, "objective": {"name": "classify"}, "data": {"images": {"size": 30}}},
        r"model\.vision\.patch = 16: must divide data\.images\.size = 30.*15",
    ),
    (
        {"model": VIT | {"vision": {"class_token": False}}, "objective": {"name": "classify"}},
        r"objective\.pool = 'first': the model has no class token.*mean",
    ),
    (
        {
            "model": VIT | {"vision": {"class_token": False, "distill_token": True}},
            "objective": {"name": "classify", "pool": "mean"},
        },
        r"model\.vision\.distill_token = True: stands after the class token.*lacks.*False",
    ),
    (
        {"model": VIT | {"vision": {"distill_token": True}}, "objective": {"name": "mae"}},
        r"model\.vision\.distill_token = True: its head tells classes, of which objective mae has none.*False",
    ),
    (
        {"model": VIT, "objective": {"name": "mae", "mae": {"hidden": 100, "heads": 16}}},
        r"objective\.mae\.heads = 16: must divide objective\.mae\.hidden = 100.*20",
    ),
    (
        {"train": {"ramp": {"start": 64}}},
        r"train\.ramp\.start = 64: must not exceed train\.global_batch = 32",
    ),
    ({"train": {"ramp": {"start": 8, "increment": 5, "samples": 100}}}, r"train\.ramp\.increment = 5: .*4"),
    ({"train": {"ramp": {"start": 8, "increment": 8}}}, r"train\.ramp\.samples = None: must be given"),
    (
        distilling(logits={"weight": 1.0}, rows={"weight": 0.1}),
        r"distill\.teacher = None: .*for objective\.distill\.logits\.weight, objective\.distill\.rows\.weight.*a run",
    ),
    (distilling(init="uniform"), r"objective\.distill\.teacher = None: .*for objective\.distill\.init"),
    (distilling(**TEACHER), r"objective\.distill\.logits\.weight = 0\.0: .*something is learned.*1\.0"),
    (
        distilling(**TEACHER, init="top", task=0.0),
        r"objective\.distill\.task = 0\.0: .*loss would be 0.*1\.0",
    ),
    (
        distilling(cache="kept", init="top", logits={"weight": 1.0}),
        r"objective\.distill\.init = 'top': .*a cache has none",
    ),
    (
        distilling(**TEACHER, init="top") | {"train": {"start_from": "runs/small"}},
        r"train\.start_from = 'runs/small': .*objective\.distill\.init.*not with both",
    ),
    (
        distilling(**TEACHER, states={"weight": 1.0, "begin": 7, "end": 7}),
        r"objective\.distill\.states\.end = 7: no step.*begin = 7.*8",
    ),
    (
        distilling(**TEACHER, logits={"weight": 1.0, "hard": True}),
        r"objective\.distill\.logits\.hard = True: .*classifiers, not of objective causal.*False",
    ),
    (
        {"model": VIT, "objective": {"name": "mae", "distill": TEACHER | {"final": {"weight": 1.0}}}},
        r"objective\.name = 'mae': learns from no teacher.*classify",
    ),
]


@pytest.mark.parametrize(("tree", "said"), CASES)
def test_a_broken_rule_names_the_nearest_legal_choice(tree, said):
    with pytest.raises(JobError, match=said):
        Job.model_validate(tree)
