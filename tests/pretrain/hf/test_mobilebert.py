"""What a MobileBERT cannot be on one of the two sides is refused, by name."""

import pytest

from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.hf import family_of_job
from headway.pretrain.hf.bert import BERT
from headway.pretrain.hf.mobilebert import MOBILEBERT
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.recipe import resolve

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 24,
         "max_position_embeddings": 16}  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"use_bottleneck": False}, r"use_bottleneck = False: .*no other.*True"),
        ({"trigram_input": False}, r"trigram_input = False: .*no other.*True"),
        ({"normalization_type": "rms"}, r"normalization_type = 'rms': Headway has no_norm, layer_norm"),
        ({"use_bottleneck_attention": True}, r"key_query_shared_bottleneck = True: .*nothing reads.*False"),
        ({"normalization_type": "layer_norm"}, r"layer_norm_eps = 1e-12: .*1e-05"),
    ],
)
def test_what_headway_does_not_have(keys, said):
    with pytest.raises(JobError, match=said):
        MOBILEBERT.to_model(SIZES | keys, frozenset())


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            {"bottleneck": {"hidden": None}},
            r"model\.bottleneck\.hidden = None: a MobileBERT has a bottleneck",
        ),
        ({"embedding_size": None}, r"model\.embedding_size = None: "),
        ({"norm": "rmsnorm"}, r"model\.norm = 'rmsnorm': .*affine"),
        ({"norm": "layernorm"}, r"model\.norm_eps = 1e-12: .*1e-05"),
        (
            {"bottleneck": {"hidden": 1024, "reads": "outside"}},
            r"model\.bottleneck\.reads = 'outside': .*shared",
        ),
        ({"embedding_trigram": False}, r"model\.embedding_trigram = False: .*cannot be exported"),
    ],
)
def test_what_transformers_does_not_have(model, said):
    tree = resolve(["bert/mobile"]).job.model_dump()
    tree["model"] |= model
    job = Job.model_validate(tree)
    assert family_of_job(job) is MOBILEBERT
    with pytest.raises(JobError, match=said):
        MOBILEBERT.to_hf(job, Inputs(100, 512))


def test_the_recipe_is_the_default_configuration_of_transformers():
    from transformers import MobileBertConfig

    ours = MOBILEBERT.to_hf(resolve(["bert/mobile"]).job, Inputs(30522, 512))
    theirs = MobileBertConfig().to_dict()
    assert ours.pop("architectures") == ["MobileBertForPreTraining"]
    assert {key: theirs[key] for key in ours} == ours


def test_other_families_have_no_bottleneck():
    with pytest.raises(JobError, match=r"model\.embedding_trigram = True: a bert model.* cannot be exported"):
        BERT.to_hf(resolve(["bert/mobile"]).job, Inputs(30522, 512))
