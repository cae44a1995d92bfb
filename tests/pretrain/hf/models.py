"""Small models of transformers with odd shapes and arbitrary weights, and the same inputs for both houses.

Heads are not a power of two, vocabularies not a multiple of 8, rows are padded where the family pads.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

VOCAB, LENGTH, ROWS = 101, 23, 3
EAGER = {"attn_implementation": "eager"}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ROTARY = {
    "hidden_size": 42, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10, "vocab_size": VOCAB, "max_position_embeddings": LENGTH,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
ENCODER = {
    "hidden_size": 42, "intermediate_size": 50, "num_hidden_layers": 4, "num_attention_heads": 6,
    "vocab_size": VOCAB, "max_position_embeddings": LENGTH,
}  # fmt: skip
T5 = {
    "d_model": 30, "d_kv": 7, "d_ff": 44, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 6, "vocab_size": VOCAB,
    "dropout_rate": 0.0, "relative_attention_num_buckets": 10, "relative_attention_max_distance": 13,
    "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
IMAGES = {
    "hidden_size": 24, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 12, "patch_size": 4,
}  # fmt: skip


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {
        "n_layer": 3,
        "n_embd": 42,
        "n_head": 6,
        "n_inner": 50,
        "n_positions": LENGTH,
        "vocab_size": VOCAB,
    }
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**shape, **off, **EAGER))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**ROTARY, **EAGER, rms_norm_eps=1e-5))


def llama_tied():
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": 5e5}
    more = {"attention_bias": True, "mlp_bias": True, "rope_parameters": rope, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**ROTARY, **EAGER, **more))


def llama_longer():
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {
        "rope_type": "llama3", "rope_theta": 1e3, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
        "original_max_position_embeddings": 8,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**ROTARY, **EAGER, rope_parameters=rope))


def qwen3_yarn():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    rope = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 3.0, "original_max_position_embeddings": 8,
            "beta_fast": 3.0, "beta_slow": 0.2}  # fmt: skip
    return Qwen3ForCausalLM(Qwen3Config(**ROTARY, **EAGER, rope_parameters=rope))


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**ROTARY, **EAGER, tie_word_embeddings=True))


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {"num_local_experts": 5, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    return MixtralForCausalLM(MixtralConfig(**ROTARY, **EAGER, **experts))


def mixtral_window():
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {"num_local_experts": 4, "experts_implementation": "eager"}
    return MixtralForCausalLM(MixtralConfig(**ROTARY, **EAGER, **experts, sliding_window=5))


def bert():
    from transformers import BertConfig, BertForPreTraining

    return BertForPreTraining(BertConfig(**ENCODER, **NO_DROPOUT, **EAGER, type_vocab_size=3))


def bert_untied():
    from transformers import BertConfig, BertForMaskedLM

    more = {"hidden_act": "gelu_new", "tie_word_embeddings": False}
    return BertForMaskedLM(BertConfig(**ENCODER, **NO_DROPOUT, **EAGER, **more))


def albert():
    from transformers import AlbertConfig, AlbertForPreTraining

    more = {"embedding_size": 10, "num_hidden_groups": 2, "classifier_dropout_prob": 0.0}
    return AlbertForPreTraining(AlbertConfig(**ENCODER, **NO_DROPOUT, **EAGER, **more))


MOBILE = {**ENCODER, **NO_DROPOUT, **EAGER, "embedding_size": 10, "intra_bottleneck_size": 24}


def mobilebert():
    from transformers import MobileBertConfig, MobileBertForPreTraining

    return MobileBertForPreTraining(MobileBertConfig(**MOBILE, num_feedforward_networks=3))


def mobilebert_inverted():
    """As wide as IB-BERT's inside, with LayerNorm, GELU and one feed-forward layer."""
    from transformers import MobileBertConfig, MobileBertForPreTraining

    more = {"intra_bottleneck_size": 60, "normalization_type": "layer_norm", "layer_norm_eps": 1e-5}
    more |= {"num_feedforward_networks": 1, "hidden_act": "gelu", "classifier_activation": False}
    return MobileBertForPreTraining(MobileBertConfig(**MOBILE | more))


def mobilebert_untied():
    """As MobileBERT-tiny: attention reads the bottleneck."""
    from transformers import MobileBertConfig, MobileBertForMaskedLM

    more = {
        "use_bottleneck_attention": True,
        "key_query_shared_bottleneck": False,
        "num_feedforward_networks": 2,
    }
    return MobileBertForMaskedLM(MobileBertConfig(**MOBILE | more, tie_word_embeddings=False))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(**T5, **EAGER))


def t5_v1_1():
    """With a head of its own: transformers 5 always ties what it makes, and never what it finds untied."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(**T5, **EAGER, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, 30))
    return model


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**IMAGES, **EAGER, num_labels=7))


def deit():
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    return DeiTForImageClassificationWithTeacher(DeiTConfig(**IMAGES, **EAGER, num_labels=7))


def mae():
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    decoder = {
        "decoder_hidden_size": 20, "decoder_num_attention_heads": 5, "decoder_num_hidden_layers": 2,
        "decoder_intermediate_size": 80, "mask_ratio": 0.5, "norm_pix_loss": True, "num_channels": 1,
    }  # fmt: skip
    model = ViTMAEForPreTraining(ViTMAEConfig(**IMAGES, **EAGER, **decoder))
    for place in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        # transformers 5.23 leaves them zero; its own code says which half is which
        table = build_2d_sinusoidal_position_embedding(3, 3, place.shape[-1], cls_token=True)
        place.data.copy_(table.roll(place.shape[-1] // 2, -1)[None])
    return model


CAUSAL = {
    f.__name__: f for f in (gpt2, llama, llama_tied, llama_longer, qwen3, qwen3_yarn, mixtral, mixtral_window)
}
MASKED = {
    f.__name__: f for f in (bert, bert_untied, albert, mobilebert, mobilebert_inverted, mobilebert_untied)
}
SEQ2SEQ = {f.__name__: f for f in (t5, t5_v1_1)}
VISION = {f.__name__: f for f in (vit, deit, mae)}
ALL = CAUSAL | MASKED | SEQ2SEQ | VISION


def make(name: str) -> nn.Module:
    """A model with weights of every kind away from 0 and 1, where a swap would not show."""
    torch.manual_seed(0)
    model, generator = ALL[name](), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if name != "mae" or "pos" not in key:  # MAE's positions are fixed
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        if name.endswith(
            "bert_untied"
        ):  # of an untied head's two biases, transformers adds that of `decoder`
            model.cls.predictions.bias.copy_(model.cls.predictions.decoder.bias)
    return model.eval()


class Outputs(NamedTuple):
    """What a model computes from `inputs`, by name, of real places only."""

    ours: dict[str, Tensor]
    theirs: dict[str, Tensor]


def tokens(seed: int = 0, length: int = LENGTH) -> Tensor:
    return torch.randint(1, VOCAB, (ROWS, length), generator=torch.Generator().manual_seed(seed))


def real(length: int = LENGTH) -> Tensor:
    """Which places of rows are no padding: bool."""
    return torch.arange(length) < torch.tensor([length, length - 6, 5])[:, None]


def run_causal(ours: nn.Module, theirs: nn.Module) -> Outputs:
    x = tokens()
    return Outputs({"logits": ours.logits(x)}, {"logits": theirs(x).logits})


def run_masked(ours: nn.Module, theirs: nn.Module) -> Outputs:
    x, seen, segments = tokens(), real(), tokens(1) % 2
    out = theirs(x, attention_mask=seen.long(), token_type_ids=segments)
    a = {"logits": ours.logits(x, seen.int() - 1, segments)[seen]}
    b = {"logits": (out.prediction_logits if "prediction_logits" in out else out.logits)[seen]}
    if ours.pair is not None:
        hidden = ours.model(x, seen.int() - 1, segments)
        a["pair"] = ours.pair(hidden.final[:, 0] if hidden.pooled is None else hidden.pooled)
        b["pair"] = out.seq_relationship_logits if "seq_relationship_logits" in out else out.sop_logits
    return Outputs(a, b)


def run_seq2seq(ours: nn.Module, theirs: nn.Module) -> Outputs:
    x, y, seen = tokens(), tokens(1, 17), real()
    out = theirs(x, attention_mask=seen.long(), decoder_input_ids=y)
    return Outputs({"logits": ours.logits(x, y, seen.int() - 1)}, {"logits": out.logits})


def run_vision(ours: nn.Module, theirs: nn.Module) -> Outputs:
    channels = theirs.config.num_channels
    x = torch.randn(ROWS, channels, 12, 12, generator=torch.Generator().manual_seed(0))
    if theirs.config.model_type in ("vit", "deit"):
        return Outputs({"logits": ours.logits(x)}, {"logits": theirs(x).logits})
    noise = torch.rand(ROWS, 9, generator=torch.Generator().manual_seed(1))
    visible = noise.argsort(1)[:, :4].sort(1).values  # transformers keeps the patches of least noise
    out = theirs(x, noise=noise)
    painted = ours.decoder(ours.model(x, visible).final, visible)
    pixels = (
        out.logits.unflatten(-1, (-1, channels)).transpose(-1, -2).flatten(-2)
    )  # to (channel, row, column)
    batch = {"pixels": x, "visible": visible, "scored": out.mask.bool()}
    loss = ours(batch).terms["patches"] / out.mask.sum()
    return Outputs({"pixels": painted, "loss": loss}, {"pixels": pixels, "loss": out.loss})


def run(name: str, ours: nn.Module, theirs: nn.Module) -> Outputs:
    for names, function in ((CAUSAL, run_causal), (MASKED, run_masked), (SEQ2SEQ, run_seq2seq)):
        if name in names:
            return function(ours, theirs)
    return run_vision(ours, theirs)
