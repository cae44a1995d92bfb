"""Parameters as plain parts: initial weights and gradients are those of one process, cut."""

import numpy as np
import pytest

from headway.parallel.apply import materialise, spread
from headway.parallel.parts import part_of
from headway.parallel.tensor.collectives import total
from headway.pretrain.data.stream import SampleStream
from headway.pretrain.models.layers import Noise
from headway.tests.parallel.family_cases import build, job_of
from headway.tests.parallel.proof import join

EVEN = {"model": {"heads": 4}}
TENSOR, NO_SEQUENCE, EXPERT = {"tensor": 2}, {"tensor": 2, "sequence": False}, {"tensor": 2, "expert": 2}


def parts(rank, world, name, parallel):
    """Name -> gradient, weight and what part of the whole they are, of every parameter here."""
    job = job_of(name, parallel, 4, 12, EVEN, "fp64")
    here = join(job, rank, world)
    objective, samples = build(job)
    spread(objective, job, here, precision="fp64", plain=True)
    materialise(objective, job, here)
    rows = SampleStream([("memory", samples, 1.0)], seed=0).batch(0, 12, 0, 1)
    batch = objective.collate(rows)
    out = objective(batch, Noise.at(0, 0, batch["slot"]))
    sum(out.terms.values()).backward()
    found = {}
    for key, parameter in objective.named_parameters():
        gradient = parameter.grad
        if gradient is not None and getattr(parameter, "tensor_share", False):
            gradient = total(gradient, here.group("tensor").group_name)
        values = None if gradient is None else gradient.numpy()
        found[key] = values, parameter.detach().numpy().copy(), tuple(part_of(parameter))
    return found


@pytest.mark.parametrize(
    ("parallel", "names"),
    [
        (TENSOR, ["gpt", "bert", "t5", "vit", "experts", "content"]),
        (NO_SEQUENCE, ["albert", "roberta", "linear"]),
        (EXPERT, ["experts", "roberta"]),
    ],
)
def test_parts_are_those_of_one_process(pool, parallel, names):
    for name in names:
        whole = parts(0, 1, name, {})
        for rank in pool(parts, ranks=2, name=name, parallel=parallel):
            assert rank.keys() == whole.keys()
            for key, (gradient, weight, (shape, offset)) in rank.items():
                their_gradient, theirs, _ = whole[key]
                here = tuple(slice(o, o + n) for o, n in zip(offset, weight.shape, strict=True))
                assert shape == theirs.shape
                np.testing.assert_array_equal(weight, theirs[here], err_msg=f"{name} {key}")
                if their_gradient is None:
                    assert gradient is None
                    continue
                np.testing.assert_allclose(
                    gradient, their_gradient[here], rtol=1e-9, atol=1e-12, err_msg=f"{name} {key}"
                )
