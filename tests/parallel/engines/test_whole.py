"""What people ask of a trained model: it is brought together from parts, and answers as in one process."""

import numpy as np
import pytest
import torch

from headway.tests.parallel.engines.beside import PLAIN
from headway.tests.parallel.proof import Running, ranks_of

LAYOUTS = {
    "ZeRO 3": {"engine": "deepspeed", "shard": 2},
    "ZeRO 1, tensor": {"engine": "deepspeed", "tensor": 2, "deepspeed": {"zero": 1}},
    "Megatron's layers": {"engine": "megatron", "tensor": 2},
    "Megatron's pipeline": {"engine": "megatron", "pipeline": 2, "micro_batch": 6},
}


def answers(rank, world, parallel):
    """Logits of two rows after two steps."""
    running = Running("gpt", rank, world, {"shard": 1} | parallel, PLAIN, 4, precision="fp32")
    for step in range(2):
        running.step(step)
    objective = running.engine.whole()
    rows = torch.arange(32).view(2, 16)
    objective.eval()
    with torch.no_grad():
        return objective.logits(rows).numpy()


@pytest.mark.parametrize(
    "layout", [pytest.param(k, marks=[pytest.mark.matrix] * (k != "ZeRO 3")) for k in LAYOUTS]
)
def test_the_whole_model_answers_as_in_one_process(pool, layout):
    expected = answers(0, 1, {})
    for found in pool(answers, ranks=ranks_of(LAYOUTS[layout]), timeout=300, parallel=LAYOUTS[layout]):
        np.testing.assert_allclose(found, expected, atol=1e-4)
