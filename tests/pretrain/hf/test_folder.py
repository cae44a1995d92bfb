"""Files of a folder: several weight files, other dtypes, older names, second copies, what is left over."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from headway.pretrain.errors import CheckpointError
from headway.pretrain.hf.folder import open_folder
from headway.pretrain.hf.writing import write_weights

GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 6, "n_head": 3, "n_positions": 5, "vocab_size": 7}
SHAPES = {
    "wte.weight": (7, 6), "wpe.weight": (5, 6), "ln_f.weight": (6,), "ln_f.bias": (6,),
    "h.0.ln_1.weight": (6,), "h.0.ln_1.bias": (6,), "h.0.ln_2.weight": (6,), "h.0.ln_2.bias": (6,),
    "h.0.attn.c_attn.weight": (6, 18), "h.0.attn.c_attn.bias": (18,),
    "h.0.attn.c_proj.weight": (6, 6), "h.0.attn.c_proj.bias": (6,),
    "h.0.mlp.c_fc.weight": (6, 24), "h.0.mlp.c_fc.bias": (24,),
    "h.0.mlp.c_proj.weight": (24, 6), "h.0.mlp.c_proj.bias": (6,),
}  # fmt: skip


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def folder(place, tensors, **more):
    (place / "config.json").write_text(json.dumps(GPT2 | more))
    save_file(tensors, place / "model.safetensors")
    return open_folder(place)


def test_a_bare_model_with_buffers_and_a_copied_head(tmp_path, tensors):
    extra = {
        "h.0.attn.bias": torch.ones(1, 1, 5, 5),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "lm_head.weight": tensors["wte.weight"].clone(),
    }
    found = folder(tmp_path, tensors | extra)
    assert found.left_over() == []
    assert found.settings["model.tied"] is True
    ours = dict(found.tensors())
    assert torch.equal(
        ours["model.blocks.0.attention.k.weight"], tensors["h.0.attn.c_attn.weight"][:, 6:12].T
    )
    assert "head.weight" not in ours


def test_a_head_that_differs_is_a_head_of_its_own(tmp_path, tensors):
    found = folder(tmp_path, tensors | {"lm_head.weight": tensors["wte.weight"] + 1})
    assert found.settings["model.tied"] is False
    assert torch.equal(dict(found.tensors())["head.weight"], tensors["wte.weight"] + 1)
    equal = folder(
        tmp_path, tensors | {"lm_head.weight": tensors["wte.weight"].clone()}, tie_word_embeddings=False
    )
    assert equal.settings["model.tied"] is False
    assert "head.weight" in dict(equal.tensors())


def test_narrow_weights_become_fp32_and_fp64_stays(tmp_path, tensors):
    narrow = {name: t.bfloat16() for name, t in tensors.items()}
    ours = dict(folder(tmp_path, narrow).tensors())
    assert torch.equal(ours["model.embed.tokens.weight"], narrow["wte.weight"].float())
    wide = {name: t.double() for name, t in tensors.items()}
    assert {t.dtype for _, t in folder(tmp_path, wide).tensors()} == {torch.float64}


def test_what_is_left_over_or_lost_is_named(tmp_path, tensors):
    assert folder(tmp_path, tensors | {"h.1.ln_1.weight": torch.ones(6)}).left_over() == [
        "transformer.h.1.ln_1.weight"
    ]
    del tensors["wpe.weight"]
    assert "model.embed.positions.weight" not in dict(folder(tmp_path, tensors).tensors())
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        open_folder(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        open_folder(tmp_path)


def test_large_models_are_cut_into_files_with_an_index(tmp_path, tensors):
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel

    named = {f"transformer.{name}": t for name, t in tensors.items()}
    write_weights(tmp_path, named.items(), named.items(), limit=800)
    files = sorted(p.name for p in tmp_path.glob("*"))
    assert files[0].startswith("model-00001-of-0000")
    assert files[-1] == "model.safetensors.index.json"
    sizes = [sum(t.nbytes for t in load_file(p).values()) for p in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) <= 800
    (tmp_path / "config.json").write_text(json.dumps(GPT2 | {"bos_token_id": 0, "eos_token_id": 0}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    back = open_folder(tmp_path)
    assert all(
        torch.equal(loaded[name], t) and torch.equal(back.source.read(name), t) for name, t in named.items()
    )
    with init_empty_weights():
        empty = GPT2LMHeadModel(AutoConfig.from_pretrained(tmp_path))
    empty.tie_weights()
    accelerated = load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"}).state_dict()
    assert all(torch.equal(accelerated[name], t) for name, t in named.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in named.values())


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save_are_read_tensor_by_tensor(tmp_path, tensors, zipped):
    """The present format is mapped; the one before torch 1.6 cannot be, and is read as a whole."""
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    found = open_folder(tmp_path)
    assert found.source.names == {f"transformer.{name}" for name in tensors}
    assert all(torch.equal(found.source.read(f"transformer.{name}"), t) for name, t in tensors.items())
    (tmp_path / "pytorch_model.bin").write_bytes((tmp_path / "pytorch_model.bin").read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin (cannot be read|is refused)"):
        open_folder(tmp_path)
