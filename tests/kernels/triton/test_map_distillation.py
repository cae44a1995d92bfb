"""What Triton's kernels of map distillation refuse, and that they fit with every mask and bias at once; their numbers
are among the proofs."""

from __future__ import annotations

import pytest
import torch

from headway.kernels.attention.choose import KernelUnavailable
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scopes import Window
from headway.kernels.attention.slopes import Slopes
from headway.kernels.maps.operands import Scores, Seen
from headway.kernels.triton.targets import TARGETS
from headway.tests.kernels.triton.finding import find_triton
from headway.tests.kernels.triton.launches import Launch, compiled, recorded, resources

pytestmark = pytest.mark.skipif(not find_triton(), reason="Triton is neither installed nor among the oracles")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("teacher", "student", "rule"),
    [
        (torch.float64, torch.float32, "takes fp32, bf16 and fp16, and q_teacher is torch.float64"),
        (torch.float32, torch.float64, "takes fp32, bf16 and fp16, and q_student is torch.float64"),
    ],
)
def test_kernels_refuse_what_is_not_for_them(teacher: torch.dtype, student: torch.dtype, rule: str) -> None:
    from headway.kernels.triton.map_distillation import sums

    models = (Scores(*2 * [empty(1, 1, 4, 16, dtype=dtype)], 1.0) for dtype in (teacher, student))
    with pytest.raises(KernelUnavailable, match=rule):
        sums(*models, "kl", Seen(Mask(False)), None)


def everything(loss: str, group: int, target: str) -> dict[str, Launch]:
    """Launches with all conditions of a mask, both kinds of biases, and fewer heads of keys."""
    from headway.kernels.triton.map_distillation import sums
    from headway.kernels.triton.tuning import forced

    q_t, q, k = (empty(2, heads, 256, 64) for heads in (4 * group, 4, 2))
    documents, places = empty(2, 256, dtype=torch.int64), empty(256, dtype=torch.int64)
    mask = Mask(True, documents, documents, documents[:, 0], scope=Window(100))
    pairs = empty(1, 1, 1, 256, dtype=torch.bool).expand(1, 1, 256, 256)
    slopes = Slopes(empty(4 * group, dtype=torch.float32), places, places)
    student = [x.requires_grad_() for x in (q, k, empty(4, 256, 256, dtype=torch.float32))]
    with forced(target), recorded() as launches:
        found = sums(
            Scores(q_t, k.detach(), 0.1, slopes),
            Scores(*student[:2], 0.1, student[2]),
            loss,
            Seen(mask, pairs),
            empty(2, 256, dtype=torch.bool),
        )
        torch.autograd.grad(found, student, torch.empty_like(found))
    return {launch.name: launch for launch in launches}


@pytest.mark.long
@pytest.mark.parametrize("target", ["sm_90a", "gfx942"])
@pytest.mark.parametrize(("loss", "group"), [("js", 2), ("kl", 1)])
def test_every_kind_of_mask_and_bias_fits_at_once(loss: str, group: int, target: str) -> None:
    launches = everything(loss, group, target)
    assert len(launches) == (5 if loss == "js" else 4)
    for name, launch in launches.items():
        found = resources(compiled(launch, TARGETS[target]), TARGETS[target])
        assert found.spilled == 0, name
        assert found.tensor > 0, name
        assert found.shared <= TARGETS[target].shared, name
