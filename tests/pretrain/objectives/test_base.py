"""What all objectives share: side losses and their weights, statistics by layer, what follows an update."""

import pytest
import torch

from headway.kernels.cross_entropy import linear_cross_entropy
from headway.kernels.soft_targets import FullTeacher, Soft
from headway.pretrain import config
from headway.pretrain.models.moe import MoE
from headway.pretrain.objectives.base import ChunkedLoss
from headway.tests.parallel.family_cases import build, job_of, rows_of


def made(name, device="cpu"):
    """Objective and batch of a case, fp64."""
    objective, samples = build(job_of(name, {}, 4, 12), device)
    return objective, objective.collate(rows_of(samples, 6))


def test_side_losses_are_means_over_rows_and_layers():
    objective, batch = made("spectral")
    objective.weights = {"balance": 0.5, "router_z": 0.25, "attention_entropy": 2.0}
    out = objective(batch)
    hidden = objective.model(batch["tokens"])
    sides = hidden.sides
    assert len(sides) == 2
    balance, z = (sides[0][name].sum() for name in ("balance", "router_z"))  # one layer has experts
    entropy = (sides[0]["attention_entropy"] + sides[1]["attention_entropy"]).sum() / 2
    expected = 0.5 * balance + 0.25 * z + 2.0 * entropy
    torch.testing.assert_close(out.terms["rows"], expected, rtol=1e-12, atol=0)
    assert objective.counts(batch)["rows"] == 6
    for name, total in (("balance", balance), ("router_z", z), ("attention_entropy", entropy)):
        torch.testing.assert_close(out.metrics[name].sum, total.detach(), rtol=1e-12, atol=0)
        assert out.metrics[name].over == 6
    loads = [name for name in out.metrics if name.startswith("load/")]
    assert loads == ["load/0"]
    assert out.metrics["load/0"].sum.shape == (3,)
    assert {"dropped/0", "router_entropy/0"} < out.metrics.keys()
    out.terms["rows"].backward()
    assert objective.model.blocks[0].mlp.router.weight.grad.any()


def test_a_weight_of_zero_is_reported_and_not_learned():
    objective, batch = made("spectral")
    objective.weights = dict.fromkeys(objective.weights, 0.0)
    out = objective(batch)
    assert "rows" not in out.terms
    assert {"balance", "router_z", "attention_entropy"} < out.metrics.keys()


def test_weights_are_those_of_the_job():
    job = job_of("spectral", {}, 4, 6)
    assert build(job, "cpu")[0].weights == {
        "balance": job.model.experts.balance,
        "router_z": job.model.experts.z_loss,
        "attention_entropy": job.model.attention.entropy_penalty,
        "attention_span": job.model.attention.span_penalty,
    }


@pytest.mark.parametrize("name", ["experts", "spectral", "transformer"])
def test_experts_are_balanced_by_the_load_of_all_their_uses(name):
    """Blocks that are used twice in a row (experts) see two loads; dense blocks (spectral, transformer) none."""
    objective, batch = made(name)
    experts = [m for m in objective.modules() if isinstance(m, MoE)]
    uses = 2 if name == "experts" else 1
    count, rate = experts[0].experts.count, experts[0].experts.bias_rate
    draw = torch.rand(uses * len(experts), count, generator=torch.Generator().manual_seed(0))
    places = [k for k in objective(batch).metrics if k.startswith("load/")]
    assert len(places) == len(draw)
    objective.after_update({"balance": torch.zeros(()), **dict(zip(places, draw.double(), strict=True))})
    for moe, load in zip(experts, draw.double().unflatten(0, (len(experts), uses)).sum(1), strict=True):
        torch.testing.assert_close(moe.balance_bias, rate * torch.sign(load.mean() - load))


@pytest.mark.parametrize("name", ["bert", "t5", "ul2", "transformer", "vit", "mae", "experts", "dropless"])
def test_sums_add_up_over_micro_batches(name):
    objective, batch = made(name)
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 1), slice(1, 6))]
    whole, outs = objective(batch), [objective(part) for part in parts]
    for key, value in whole.terms.items():
        torch.testing.assert_close(sum(out.terms[key] for out in outs), value, rtol=1e-12, atol=0)
    for key, mean in whole.metrics.items():
        torch.testing.assert_close(sum(out.metrics[key].sum for out in outs), mean.sum, rtol=1e-12, atol=0)
        assert sum(out.metrics[key].over for out in outs) == mean.over
    counts = [objective.counts(part) for part in parts]
    assert {k: sum(c[k] for c in counts) for k in counts[0]} == objective.counts(batch)
    assert whole.terms.keys() <= objective.counts(batch).keys()
    assert objective.scored in whole.terms


def test_a_chunked_loss_learns_from_a_teacher_where_rows_come_with_one():
    draw = torch.Generator().manual_seed(0)
    hidden_BSE, weight_VE, theirs, head = (
        torch.randn(size, generator=draw) for size in ((2, 5, 3), (11, 3), (10, 4), (11, 4))
    )
    labels_BS = torch.randint(0, 11, (2, 5), generator=draw)
    loss, teacher = ChunkedLoss(config.Objective(chunk=4)), FullTeacher(theirs, head)
    loss.soft = Soft(2.0, "reverse", 0.5)
    rows = hidden_BSE.view(10, 3), weight_VE, labels_BS.view(10)
    plain = linear_cross_entropy(*rows)
    expected = linear_cross_entropy(*rows, soft=loss.soft, teacher=teacher)
    torch.testing.assert_close(loss(hidden_BSE, weight_VE, labels_BS), plain)
    torch.testing.assert_close(loss(hidden_BSE, weight_VE, labels_BS, teacher=teacher), expected)
    loss.compile(backend="eager")
    torch.testing.assert_close(loss(hidden_BSE, weight_VE, labels_BS, None, teacher), expected)
