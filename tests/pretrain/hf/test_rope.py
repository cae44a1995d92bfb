"""Rotary positions of config.json, read and written: what transformers makes of them, and what is refused."""

import pytest
import torch

from headway.kernels.rotary import frequencies, magnitude
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.hf.rope import read_rope, write_rope
from headway.pretrain.models.positions import stretch_of

LENGTH = "original_max_position_embeddings"
ROPES = {
    "plain": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, LENGTH: 512},
    "yarn in full": {
        "rope_type": "yarn", "factor": 4.0, LENGTH: 512, "beta_fast": 16, "beta_slow": 2, "truncate": False,
        "attention_factor": 1.1,
    },
    "deepseek's yarn": {
        "rope_type": "yarn", "factor": 40, LENGTH: 512, "mscale": 0.7, "mscale_all_dim": 1.0,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, LENGTH: 512, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
}  # fmt: skip


def job_of(settings, **model):
    tree = {"family": "gpt", "positions": "rotary", "head_dim": 32, **model}
    for name, value in settings.items():
        section = tree
        *parents, last = name.split(".")[1:]
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return Job.model_validate({"model": tree})


def ours(job):
    stretch = stretch_of(job.model.rotary_scaling)
    found = frequencies(job.model.head_width, job.model.rotary_base, stretch)
    return found, 1.0 if stretch is None else magnitude(stretch)


def theirs(config):
    """Frequencies and attention factor of transformers' own rotary module."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    module = LlamaRotaryEmbedding(LlamaConfig(**config, head_dim=32, max_position_embeddings=2048))
    return module.inv_freq, module.attention_scaling


@pytest.mark.parametrize("name", ROPES)
def test_there_and_back(name):
    rope = {**ROPES[name], "rope_theta": 5000.0}
    job = job_of(read_rope({"rope_parameters": dict(rope), "max_position_embeddings": 2048}))
    expected, size = theirs({"rope_parameters": dict(rope)})
    for here in (job, job_of(read_rope({**write_rope(job), "max_position_embeddings": 2048}))):
        found, factor = ours(here)
        torch.testing.assert_close(found.float(), expected, rtol=3e-6, atol=0)  # fp32 on their side
        assert factor == pytest.approx(size, rel=1e-12)
    assert read_rope({**write_rope(job), "max_position_embeddings": 2048}) == read_rope(
        {"rope_parameters": dict(rope), "max_position_embeddings": 2048}
    )
    # and what is written for transformers is what they read
    again, size_again = theirs(write_rope(job))
    torch.testing.assert_close(again, expected, rtol=1e-6, atol=0)
    assert size_again == pytest.approx(size)


def test_transformers_4_is_read():
    old = {
        "rope_theta": 1e4,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "max_position_embeddings": 64,
    }
    found = read_rope(old)
    assert found["model.rotary_scaling.kind"] == "linear"
    assert found["model.rotary_base"] == 1e4


def test_a_length_or_a_factor_may_follow_from_the_longest_row():
    yarn = {"rope_type": "yarn", LENGTH: 512}
    found = read_rope({"rope_parameters": yarn, "max_position_embeddings": 2048})
    assert found["model.rotary_scaling.factor"] == 4.0
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    found = read_rope({"rope_parameters": llama3, "max_position_embeddings": 2048})
    assert found["model.rotary_scaling.original_length"] == 2048


def test_another_base_is_written_as_such():
    job = job_of({"model.rotary_scaling.kind": "ntk", "model.rotary_scaling.factor": 4.0})
    found, size = theirs(write_rope(job))
    torch.testing.assert_close(found, ours(job)[0].float(), rtol=3e-6, atol=0)
    assert size == 1.0


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "of the kinds default, linear, yarn, llama3"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "whole heads"),
        ({"rope_type": "linear"}, r"rope_parameters\.factor.*must say it"),
        ({"rope_type": "llama3", "factor": 2.0}, r"rope_parameters\.high_freq_factor"),
        ({"rope_type": "yarn", "factor": 2.0, "mystery": 1}, r"rope_parameters\.mystery"),
        ({"full_attention": {"rope_type": "default"}}, r"rope_parameters\.full_attention"),
    ],
)
def test_what_is_refused(rope, message):
    with pytest.raises(JobError, match=message):
        read_rope({"rope_parameters": rope, "max_position_embeddings": 64})
