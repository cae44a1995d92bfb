"""Sizes from the config against built models, transformers' counts, and counted operations."""

import pytest
import torch
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from headway.pretrain import config
from headway.pretrain.models import sizes
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import build_objective

REFERENCE = config.Attention(kernel="reference")
EXPERTS = config.Experts(count=5, top_k=2, shared=1, ffn=20, kernel="reference", bias_rate=0.001)


def gpt(**settings):
    model = config.Model(**{"layers": 2, "hidden": 32, "heads": 4, "attention": REFERENCE, **settings})
    return config.Job(model=model, data=config.Data(seq_len=24)), Inputs(vocab=211, length=24)


def bert_job(pairs="none", **settings):
    shape = {
        "family": "bert", "layers": 2, "hidden": 32, "heads": 4, "norm_position": "post", "embedding_norm": True,
        "segments": 2, "activation": "gelu", "attention": REFERENCE,
    }  # fmt: skip
    objective = config.Objective(name="masked", masking=config.Masking(rate=0.25, pairs=pairs))
    job = config.Job(
        model=config.Model(**shape | settings), objective=objective, data=config.Data(seq_len=24)
    )
    return job, Inputs(vocab=211, length=24)


def t5(**settings):
    shape = {
        "family": "t5", "layers": 2, "decoder_layers": 3, "hidden": 36, "heads": 3, "head_dim": 10, "ffn": 50,
        "norm": "rmsnorm", "positions": "relative", "bias": False, "attention": REFERENCE,
    }  # fmt: skip
    job = config.Job(model=config.Model(**shape | settings), objective=config.Objective(name="spans"))
    return job, Inputs(vocab=211, length=24, target_length=13)


def vit(objective=None, **settings):
    tokens = {name: settings.pop(name) for name in ("class_token", "distill_token") if name in settings}
    shape = {
        "family": "vit", "layers": 2, "hidden": 32, "heads": 4, "activation": "gelu", "attention": REFERENCE,
        "vision": config.Vision(patch=4, **tokens),
    }  # fmt: skip
    job = config.Job(
        model=config.Model(**shape | settings),
        objective=objective or config.Objective(name="classify", pool="mean"),
        data=config.Data(images=config.Images(size=16, channels=3)),
    )
    return job, Inputs(length=job.row_tokens, image=16, channels=3, classes=10)


MAE = config.Objective(name="mae", mae=config.Reconstruct(layers=3, hidden=24, heads=2))

MOBILE = {
    "ffn": 50, "embedding_size": 12, "embedding_trigram": True,
    "bottleneck": config.Bottleneck(hidden=20, ffns=3),
}  # fmt: skip
CASES = {
    "gpt2": gpt(),
    "llama": gpt(
        layers=3, hidden=96, heads=6, kv_heads=2, activation="swiglu", norm="rmsnorm", positions="rotary",
        tied=False, bias=False, attention=config.Attention(qk_norm=True, kernel="reference"),
    ),
    "mqa": gpt(layers=1, hidden=60, heads=5, kv_heads=1, head_dim=14, ffn=77, activation="geglu"),
    "post": gpt(norm_position="post", positions="none", bias=False),
    "table": gpt(max_positions=300, norm="rmsnorm", activation="relu2"),
    "no norms": gpt(norm="none", layer_scale=1e-4),
    "experts": gpt(layers=3, experts=EXPERTS.model_copy(update={"pattern": "DE"})),
    "gated experts": gpt(activation="swiglu", bias=False, experts=EXPERTS),
    "bert": bert_job("next", pooler=True),
    "albert": bert_job("order", pooler=True, layers=4, unique_layers=2, embedding_size=12),
    "mobile": bert_job("next", pooler=True, activation="relu", norm="affine", **MOBILE),
    "inverted": bert_job(
        tied=False, bias=False, norm="rmsnorm", layer_scale=0.1, experts=EXPERTS,
        bottleneck=config.Bottleneck(hidden=48, reads="outside"),
    ),
    "inside": gpt(
        norm_position="post", kv_heads=1, bottleneck=config.Bottleneck(hidden=20, reads="inside", ffns=2),
    ),
    "roberta": bert_job(norm_position="pre", tied=False, bias=False, segments=0, embedding_norm=False),
    "t5": t5(),
    "t5 1.1": t5(activation="geglu_tanh", tied=False),
    "transformer": t5(positions="learned", norm="layernorm", norm_position="post", bias=True),
    "switch": t5(experts=config.Experts(count=4, top_k=1, normalise=False, pattern="DE", kernel="reference")),
    "vit": vit(),
    "deit": vit(distill_token=True),
    "plain": vit(layer_scale=1e-4, stochastic_depth=0.1, class_token=False, positions="sinusoidal"),
    "mae": vit(MAE, ffn=50),
    "mae of experts": vit(MAE, class_token=False, experts=EXPERTS),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parameters_are_the_built_models(case):
    job, inputs = case
    built = build_objective(job, inputs, device="meta")
    assert sizes.parameters(job, inputs).total == sum(p.numel() for p in built.parameters())


def theirs():
    """Small models of transformers, and the case that has their shape."""
    import transformers as hf

    text = {"vocab_size": 211, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = {**text, "intermediate_size": 128, "max_position_embeddings": 24}
    t5 = {"vocab_size": 211, "d_model": 36, "d_kv": 10, "d_ff": 50, "num_heads": 3}
    llama = {**text, "num_key_value_heads": 2, "intermediate_size": 70, "tie_word_embeddings": False}
    ours = {"kv_heads": 2, "ffn": 70, "activation": "swiglu", "norm": "rmsnorm", "positions": "rotary"}
    ours |= {"tied": False, "bias": False}
    albert = {**bert, "num_hidden_layers": 4, "num_hidden_groups": 1, "embedding_size": 12}
    mobile = {**bert, "intermediate_size": 50, "embedding_size": 12, "intra_bottleneck_size": 20}
    patches = {**text, "intermediate_size": 128, "image_size": 16, "patch_size": 4, "num_labels": 10}
    return [
        (hf.BertForPreTraining(hf.BertConfig(**bert)), CASES["bert"]),
        (
            hf.AlbertForPreTraining(hf.AlbertConfig(**albert)),
            bert_job("order", pooler=True, layers=4, unique_layers=1, embedding_size=12),
        ),
        (
            hf.MobileBertForPreTraining(hf.MobileBertConfig(**mobile, num_feedforward_networks=3)),
            CASES["mobile"],
        ),
        (hf.LlamaForCausalLM(hf.LlamaConfig(**llama)), gpt(**ours)),
        (
            hf.MixtralForCausalLM(hf.MixtralConfig(**llama, num_local_experts=5)),
            gpt(**ours, experts=config.Experts(count=5)),
        ),
        (
            hf.T5ForConditionalGeneration(hf.T5Config(**t5, num_layers=2, num_decoder_layers=3)),
            CASES["t5"],
        ),
        (hf.ViTForImageClassification(hf.ViTConfig(**patches)), CASES["vit"]),
        (hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**patches)), CASES["deit"]),
    ]


def test_parameters_are_those_of_transformers():
    with torch.device("meta"):
        pairs = theirs()
    for model, case in pairs:
        count = sum(p.numel() for p in model.parameters())
        assert sizes.parameters(*case).total == count, type(model).__name__


def test_spectral_layers_have_gains():
    job, inputs = gpt(spectral=True)
    built = build_objective(job, inputs, device="meta")
    assert sizes.parameters(job, inputs).total == sum(p.numel() for p in built.parameters())
    assert sizes.parameters(job, inputs).total == sizes.parameters(*CASES["gpt2"]).total + 6 * 2
    mobile, inputs = bert_job(spectral=True, **MOBILE)
    built = build_objective(mobile, inputs, device="meta")
    assert sizes.parameters(mobile, inputs).total == sum(p.numel() for p in built.parameters())


def compute(objective, job, inputs):
    """A forward of one row, heads applied where the objective applies them."""
    tokens, targets = (
        torch.zeros(1, n, dtype=torch.int64) for n in (inputs.length, inputs.target_length or 1)
    )
    pixels, name = torch.zeros(1, inputs.channels, inputs.image, inputs.image), job.objective.name
    if name == "masked":
        hidden = objective.model(tokens)
        linear(objective.head(hidden.final[0, :6]), objective.head_weight)  # a quarter of 24
        if objective.pair is not None:
            objective.pair(hidden.pooled)
    elif name == "classify":
        objective.logits(pixels)
    elif name == "mae":
        visible = torch.arange(4)[None]  # a quarter of 16
        objective.decoder(objective.model(pixels, visible).final, visible)
    else:
        objective.logits(tokens, *([targets] if name == "spans" else []))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_flops_are_those_of_the_products(case):
    job, inputs = case
    m, objective = job.model, build_objective(*case)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        compute(objective, job, inputs)
    # The reference computes the whole square of scores; the config counts what causal attention needs.
    n = {"gpt": inputs.length, "t5": inputs.target_length}.get(m.family, 0)
    layers = m.decoder_depth if m.family == "t5" else m.layers
    square = 4 * m.heads * m.head_width * (n * n - n * (n + 1) // 2) * layers
    assert sizes.forward_flops(job, inputs) == counter.get_total_flops() - square
    assert sizes.training_flops(job, inputs) == 3 * sizes.forward_flops(job, inputs)
    assert sizes.backward_flops(job, inputs) == 2 * sizes.forward_flops(job, inputs)


def test_active_parameters_leave_out_the_experts_of_others():
    job, inputs = CASES["gated experts"]
    count = sizes.parameters(job, inputs)
    assert count.total - count.active == 2 * (5 - 2) * 3 * 32 * 20
    dense = sizes.parameters(*CASES["llama"])
    assert dense.total == dense.active


def test_bytes():
    job, count = config.Job(), 124_439_808  # transformers' GPT-2
    inputs = Inputs(vocab=50257, length=1024)
    assert sizes.parameters(job, inputs).total == count
    assert sizes.weight_bytes(job, inputs, 2) == 2 * count
    assert sizes.training_bytes(job, inputs) == 16 * count
