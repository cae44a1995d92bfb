"""Whole recipes take two steps through Triton's kernels, interpreted, and give what PyTorch's operators give."""

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from headway.tests.kernels.triton.finding import find_triton

pytestmark = pytest.mark.skipif(not find_triton(), reason="Triton is neither installed nor among the oracles")

SHORT = (
    "train.global_batch=2", "train.compile=false", "precision=fp32", "tracking.wandb=off", "schedule.warmup=1",
    "data.tokenizer={kind: bytes}", "data.heldout=0.2", "data.seq_len=24", "model.dropout=0.1",
)  # fmt: skip
ATTENTION = {"attention_forward_kernel", "attention_queries_kernel", "attention_keys_kernel"}
EVERY = {
    *(f"{name}_{way}_kernel" for name in ("norm", "dropout") for way in ("forward", "backward")),
    "cross_entropy_kernel",
}  # fmt: skip
LAMB = {"lamb_moments_kernel", "lamb_norms_kernel", "lamb_step_kernel"}
EXPERTS = {f"experts_{name}_kernel" for name in ("take", "combine", "spread")}
GATED = {"glu_forward_kernel", "glu_backward_kernel"}

# Recipe, settings of both runs, what PyTorch's run computes attention with, and the kernels that must be launched.
CASES: dict[str, tuple[str, list[str], str, set[str]]] = {
    "gpt": (
        "gpt/tiny",
        ["model.layers=2", "model.attention.dropout=0.1"],
        "blocks",
        ATTENTION | {"rotary_kernel"},
    ),
    "bert": ("bert/tiny", ["model.layers=2"], "blocks", ATTENTION | {"rotary_kernel"}),
}
LONG: dict[str, tuple[str, list[str], str, set[str]]] = {
    "lamb": ("bert/tiny", ["model.layers=1", "optimizer.name=lamb"], "blocks", ATTENTION | LAMB),
    "the whole gpt": ("gpt/tiny", ["model.attention.dropout=0.1"], "blocks", ATTENTION | {"rotary_kernel"}),
    "the whole bert": ("bert/tiny", ["model.attention.dropout=0.1"], "blocks", ATTENTION | {"rotary_kernel"}),
    "t5, whose bias learns": ("t5/tiny", ["model.layers=2"], "blocks", {*ATTENTION, "attention_bias_kernel"}),
    "experts": ("moe/tiny", ["model.layers=2", "model.experts.kernel=grouped"], "blocks",
                ATTENTION | EXPERTS | {"grouped_product_kernel"}),
    "gates": ("gpt/tiny", ["model.layers=2", "model.activation=swiglu"], "blocks", ATTENTION | GATED),
    "linear": ("gpt/tiny", ["model.layers=2", "model.attention.mechanism=linear"], "chunks",
               {"linear_attention_states_kernel", "linear_attention_outputs_kernel"}),
    "performer": ("gpt/tiny", ["model.layers=2", "model.attention.mechanism=performer"], "chunks",
                  {"linear_attention_states_kernel", "linear_attention_outputs_kernel"}),
    "gla": ("gpt/tiny", ["model.layers=2", "model.attention.mechanism=gla"], "chunks",
            {"gated_linear_states_kernel", "gated_linear_outputs_kernel"}),
    "delta": ("gpt/tiny", ["model.layers=2", "model.attention.mechanism=delta"], "chunks",
              {"delta_rule_states_kernel", "delta_rule_outputs_kernel"}),
    "entmax": ("gpt/tiny", ["model.layers=2", "model.attention.mechanism=entmax15"], "blocks",
               {"sparse_weights_forward_kernel"}),
    "bigbird": ("bert/tiny", ["model.layers=2", "model.attention.mechanism=bigbird", "data.seq_len=140"], "blocks",
                {"block_sparse_forward_kernel"}),
}  # fmt: skip


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
@pytest.mark.matrix
def test_two_steps_are_those_of_pytorch(name: str, corpus: Any, tmp_path: Any) -> None:
    recipe, sets, kernel, expected = (CASES | LONG)[name]
    given = [*SHORT, f"data.sources=['{corpus}']", f"run.dir={tmp_path}", *sets]
    ours = two_steps(
        recipe, tmp_path / "triton", *given, "train.kernels=triton", "model.attention.kernel=triton"
    )
    theirs = two_steps(
        recipe, tmp_path / "torch", *given, "train.kernels=torch", f"model.attention.kernel={kernel}"
    )
    assert theirs["kernels"] == []
    assert (EVERY | expected) - set(ours["kernels"]) == set()
    # fp32 in another order: losses are means of logarithms of order 1 to 10. What orthogonalising and the optimizer's
    # quotients make of the first step's 1e-7 is larger, as they divide by roots of small squares.
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=2e-6)
    np.testing.assert_allclose(ours["norms"], theirs["norms"], rtol=2e-5)
    for tensor, value in load_file(tmp_path / "torch").items():
        np.testing.assert_allclose(
            load_file(tmp_path / "triton")[tensor], value, rtol=0, atol=2e-4, err_msg=tensor
        )


def two_steps(recipe: str, file: Any, *sets: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "headway.tests.kernels.triton.two_steps", recipe, str(file), *sets]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
