"""A training step of BERT, T5 and ViT beside transformers and timm: same weights, shapes, precision and optimizer.

    python tests/benchmarks/bench_families.py [bert t5 vit bert_dropout] [--modes eager] [--precisions bf16]

A step is forward, backward, clipping to norm 1 and fused AdamW; theirs attend by SDPA where their code has it.
Prints the median time of each and their ratio; above 1, ours is faster. No dropout, but in `bert_dropout`: 0.1, ours
by coordinates (the same at every layout), theirs by torch's generator.
"""

from __future__ import annotations

import torch
from side_by_side import Pair, arguments, fill, from_transformers, race
from torch import Tensor, nn

from headway.pretrain import config
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import build_objective
from headway.tests import oracles

VOCAB, HIDDEN, HEADS, BATCH = 8192, 256, 4, 32
CLASSES, IMAGES = 100, 64


def bert(dropout: float = 0.0) -> Pair:
    """4 layers, 128 tokens of which 15% are predicted."""
    from transformers import BertConfig, BertForMaskedLM

    length = 128
    theirs = BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=4,
            num_attention_heads=HEADS,
            intermediate_size=4 * HIDDEN,
            max_position_embeddings=length,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (BATCH, length), generator=draw)
    labels = torch.where(torch.rand(BATCH, length, generator=draw) < 0.15, tokens, -100)
    inputs = torch.where(labels >= 0, 3, tokens)

    def their_loss(model: nn.Module) -> Tensor:
        loss: Tensor = model(input_ids=inputs, labels=labels).loss
        return loss

    ours = from_transformers(theirs, Inputs(VOCAB, length))
    return Pair(ours, {"tokens": inputs, "labels": labels}, theirs, their_loss, dropout=dropout > 0)


def bert_dropout() -> Pair:
    """The same with dropout of weights and of what sub-layers add."""
    return bert(0.1)


def t5() -> Pair:
    """Version 1.1, 3 + 3 layers, 128 tokens to 32."""
    from transformers import T5Config, T5ForConditionalGeneration

    theirs = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            d_kv=HIDDEN // HEADS,
            d_ff=704,
            num_layers=3,
            num_heads=HEADS,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
            pad_token_id=0,
            use_cache=False,
        )
    )
    theirs.lm_head.weight = nn.Parameter(
        0.02 * torch.randn(VOCAB, HIDDEN)
    )  # transformers 5 ties what it makes
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCAB, (BATCH, 128), generator=draw)
    labels = torch.randint(1, VOCAB, (BATCH, 32), generator=draw)
    targets = nn.functional.pad(labels[:, :-1], (1, 0))

    def their_loss(model: nn.Module) -> Tensor:
        loss: Tensor = model(input_ids=tokens, decoder_input_ids=targets, labels=labels).loss
        return loss

    batch = {"tokens": tokens, "targets": targets, "labels": labels}
    return Pair(from_transformers(theirs, Inputs(VOCAB, 128, 32)), batch, theirs, their_loss)


def vit() -> Pair:
    """6 layers of 192 features, 64 patches and a class token; beside timm."""
    oracles.timm()
    from timm.models.vision_transformer import VisionTransformer

    hidden, heads, layers, rows = 192, 3, 6, 64
    theirs = VisionTransformer(
        IMAGES, 8, num_classes=CLASSES, embed_dim=hidden, depth=layers, num_heads=heads
    )
    model = config.Model(
        family="vit",
        layers=layers,
        hidden=hidden,
        heads=heads,
        activation="gelu",
        norm_eps=1e-6,
        vision=config.Vision(patch=8),
    )
    job = config.Job(model=model, objective=config.Objective(name="classify"))
    ours = build_objective(job, Inputs(length=65, image=IMAGES, channels=3, classes=CLASSES))
    fill(ours, from_timm(theirs.state_dict()))
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(rows, 3, IMAGES, IMAGES, generator=draw)
    labels = torch.randint(0, CLASSES, (rows,), generator=draw)

    def their_loss(model: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(model(pixels).float(), labels)

    return Pair(ours, {"pixels": pixels, "labels": labels}, theirs, their_loss, rival="timm")


TIMM = {
    "norm1": "attention_norm",
    "attn.proj": "attention.o",
    "norm2": "mlp_norm",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}
TIMM_EDGES = {
    "cls_token": "model.embed.class_token",
    "pos_embed": "model.embed.positions.weight",
    "patch_embed.proj.weight": "model.embed.patches.weight",
    "patch_embed.proj.bias": "model.embed.patches.bias",
    "norm.weight": "model.norm.weight",
    "norm.bias": "model.norm.bias",
    "head.weight": "head.weight",
    "head.bias": "head.bias",
}


def from_timm(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's weights under our names: q, k and v apart, patches and tokens as matrices."""
    ours = {}
    for name, tensor in theirs.items():
        if name in TIMM_EDGES:
            ours[TIMM_EDGES[name]] = tensor
            if tensor.dim() > 2:  # class token and positions are batches of one, patches a convolution
                ours[TIMM_EDGES[name]] = tensor[0] if tensor.dim() == 3 else tensor.flatten(1)
            continue
        _, layer, rest = name.split(".", 2)
        place, kind = rest.rsplit(".", 1)
        block = f"model.blocks.{layer}."
        if place == "attn.qkv":
            ours |= {f"{block}attention.{p}.{kind}": t for p, t in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            ours[f"{block}{TIMM[place]}.{kind}"] = tensor
    return ours


FAMILIES = {f.__name__: f for f in (bert, t5, vit, bert_dropout)}


def main() -> None:
    parser = arguments(__doc__, rounds=15)
    parser.add_argument(
        "families", nargs="*", default=list(FAMILIES), metavar="family", help=", ".join(FAMILIES)
    )
    args = parser.parse_args()
    print(f"medians of {args.rounds} rounds")
    for name in args.families:
        for mode in args.modes:
            for precision in args.precisions:
                torch.manual_seed(0)
                line = race(FAMILIES[name](), mode, precision, args.rounds, args.clock)
                print(f"  {name:12} {line}", flush=True)


if __name__ == "__main__":
    main()
