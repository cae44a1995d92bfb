"""What Megatron-Core 0.16.1 gets wrong without a word, shown; and what keeps us out of it."""

import ast
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import headway.parallel.engines.megatron as engine
from headway.tests.parallel.engines.megatron_ranks import groups
from headway.tests.parallel.proof import Running, alone

pytestmark = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")

E, LR = 6, 1e-2


def settings(**more):
    from headway.parallel.engines.megatron.guards import exact

    return exact(num_layers=1, hidden_size=E, num_attention_heads=2, **more)


def raises(call, *arguments):
    """Name and text of what a call raises."""
    try:
        call(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


# -- schedules ---------------------------------------------------------------------------------------------------


def first_norm(rank, world, wrong, watched):
    """Gradient norm of the first step under the interleaved schedule, or what was raised.

    Args:
        wrong: messages of both directions are sent and received at once.
        watched: their headers are looked at.
    """
    with groups(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2):
        from headway.parallel.engines.megatron import guards, schedules, wire

        def together(**given):
            config = guards.exact(**given)
            config.overlap_p2p_comm, config.batch_p2p_comm = False, True
            return config

        running = Running("experts", rank, world, {"pipeline": 2, "schedule": "interleaved_1f1b"})
        one = running.engine
        one.pipeline = schedules.MegatronPipeline(
            one.pipeline.plan,
            one.objective,
            one.named,
            running.here,
            "interleaved_1f1b",
            one.rows,
            one._autocast,
        )
        with (
            patch.object(schedules, "exact", together if wrong else guards.exact),
            patch.object(wire.Ledger, "check", wire.Ledger.check if watched else lambda self: None),
        ):
            norms = []
            raised = raises(lambda: norms.append(running.step(0).grad_norm))
        return norms[0] if norms else raised


@pytest.mark.matrix
def test_interleaved_schedule_with_messages_of_both_directions_at_once(pool):
    """On two ranks with two stages each; every message says what it is, and a wrong order is seen."""
    (expected,) = alone("experts").norms[:1]
    wrong = pool(first_norm, ranks=2, wrong=True, watched=False)
    assert all(abs(norm / expected - 1) > 0.01 for norm in wrong), "Megatron-Core was repaired"
    for kind, text in pool(first_norm, ranks=2, wrong=True, watched=True):
        assert kind == "OrderError"
        assert "different orders" in text
    assert pool(first_norm, ranks=2, wrong=False, watched=True) == pytest.approx([expected] * 2, rel=1e-9)


class Line(nn.Module):
    """A linear in the protocol of Megatron's schedules; what it gave."""

    def __init__(self, config):
        super().__init__()
        from megatron.core.enums import ModelType

        self.config, self.model_type = config, ModelType.encoder_or_decoder
        self.linear, self.dtypes = nn.Linear(E, 1), []

    def set_input_tensor(self, tensors): ...

    def forward(self, x):
        y = self.linear(x)
        self.dtypes.append(str(y.dtype))
        return y.float().sum()


def scheduled(rank, world, guarded, autocast):
    """Reported losses of two micro-batches with a loss of E, and dtypes of what was computed."""
    with groups():
        from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining

        config = settings()
        if not guarded:
            config.calculate_per_token_loss, config.enable_autocast = False, autocast
            config.autocast_dtype = torch.bfloat16
        line = Line(config)
        nn.init.ones_(line.linear.weight)
        nn.init.zeros_(line.linear.bias)

        def loss_func(loss):
            tokens = (torch.zeros((), dtype=torch.int),) if guarded else ()
            return loss, *tokens, loss.detach()

        def step(micros, model):
            if not guarded:
                return model(next(micros)), loss_func
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return model(next(micros)), loss_func

        told = forward_backward_no_pipelining(
            forward_step_func=step, data_iterator=iter([torch.ones(1, E)] * 2), model=line, num_microbatches=2,
            seq_length=1, micro_batch_size=1,
        )  # fmt: skip
        return [float(t) for t in told], float(line.linear.bias.grad), line.dtypes


def test_losses_are_divided_in_place(pool):
    """What a loss function tells of the loss is the loss itself, which is then divided; so is the gradient."""
    ((told, gradient, _),) = pool(scheduled, ranks=1, guarded=False, autocast=False)
    assert (told, gradient) == ([E / 2] * 2, 1)
    ((told, gradient, _),) = pool(scheduled, ranks=1, guarded=True, autocast=False)
    assert (told, gradient) == ([E] * 2, 2)


def test_autocast_of_the_configuration_is_that_of_cuda(pool):
    ((_, _, dtypes),) = pool(scheduled, ranks=1, guarded=False, autocast=True)
    assert dtypes == ["torch.float32"] * 2
    ((_, _, dtypes),) = pool(scheduled, ranks=1, guarded=True, autocast=True)
    assert dtypes == ["torch.bfloat16"] * 2


# -- gradients ---------------------------------------------------------------------------------------------------


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(E))
        self.gain.tensor_share = True

    def forward(self, x):
        return (self.gain * x).sum()


def shares(rank, world, marked, summed):
    """Gradient of a gain, of which each rank has a share; what `check_shares` raises."""
    with groups(tensor_model_parallel_size=2):
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )

        from headway.parallel.engines.megatron.guards import check_shares

        config = settings(tensor_model_parallel_size=2, sequence_parallel=summed)
        module = Gain()
        if marked:
            module.gain.sequence_parallel = True
        data = DistributedDataParallel(config, DistributedDataParallelConfig(), module)
        data(torch.full((E,), 1.0 + rank)).backward()
        finalize_model_grads([data], None)
        return float(module.gain.main_grad[0]), raises(check_shares, dict(module.named_parameters()), config)


def test_shares_of_gradients_are_summed_where_they_are_marked_only(pool):
    """By the parameter, and by `sequence_parallel` of the configuration."""
    for marked, summed, text in ((False, True, "not marked"), (True, False, "is off")):
        for rank, (gradient, (kind, told)) in enumerate(pool(shares, ranks=2, marked=marked, summed=summed)):
            assert gradient == 1 + rank
            assert kind == "GuardError"
            assert text in told
    assert pool(shares, ranks=2, marked=True, summed=True) == [(3.0, ("nothing", ""))] * 2


# -- optimizers --------------------------------------------------------------------------------------------------


def optimized(module, config_overrides, **more):
    """A module in Megatron's DDP, and its distributed optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    data = DistributedDataParallel(
        settings(),
        DistributedDataParallelConfig(use_distributed_optimizer=True, bucket_size=50, **more),
        module,
    )
    config = OptimizerConfig(
        lr=LR, weight_decay=0.1, clip_grad=0.0, use_distributed_optimizer=True,
        overlap_param_gather=data.ddp_config.overlap_param_gather,
    )  # fmt: skip
    return data, get_megatron_optimizer(config, [data], config_overrides=config_overrides)


def step(data, optimizer, loss):
    from megatron.core.distributed import finalize_model_grads

    data.zero_grad_buffer()
    optimizer.zero_grad()
    loss().backward()
    finalize_model_grads([data], None)
    optimizer.step()


def decays(rank, world, overrides):
    """Weight decay of weight and bias after Megatron's scheduler has been there; what `check_groups` raises."""
    with groups():
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        from headway.parallel.engines.megatron.guards import check_groups

        _, optimizer = optimized(nn.Linear(E, E), overrides)
        told = raises(check_groups, optimizer.param_groups)
        OptimizerParamScheduler(optimizer, 0.0, LR, LR, 0, 10, "constant", 0.1, 0.1, 10, "constant").step(1)
        found = {p.numel(): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        return found, told


def test_decay_exempts_what_has_one_dim_by_default(pool):
    ((found, (kind, text)),) = pool(decays, ranks=1, overrides=None)
    assert found == {E * E: 0.1, E: 0.0}
    assert kind == "GuardError"
    assert "wd_mult" in text
    assert pool(decays, ranks=1, overrides={}) == [({E * E: 0.1, E: 0.1}, ("nothing", ""))]


def own_steps(optimizer):
    """Give every parameter a `step` of its own, of the same value."""
    for entries in optimizer.state.values():
        if isinstance(step := entries.get("step"), torch.Tensor):
            entries["step"] = step.detach().clone()


def loaded(rank, world, load, guarded):
    """Steps of the parameters and their values after two steps, a load of the state as it is, and a third."""
    with groups():
        torch.manual_seed(0)
        data, optimizer = optimized(nn.Sequential(nn.Linear(E, E), nn.Linear(E, E)), {})
        each = optimizer.chained_optimizers[0]
        for number in range(3):
            if number == 2 and load:
                each.load_state_dict(each.state_dict())
                if guarded:
                    own_steps(each.optimizer)
            step(data, optimizer, lambda number=number: data(torch.full((1, E), 1.0 + number)).square().sum())
        steps = [float(entries["step"]) for entries in each.optimizer.state.values()]
        return steps, np.concatenate([p.detach().numpy().ravel() for p in data.module.parameters()])


def test_parameters_share_a_step_after_a_load(pool):
    ((steps, right),) = pool(loaded, ranks=1, load=False, guarded=False)
    assert steps == [3] * 4
    ((steps, values),) = pool(loaded, ranks=1, load=True, guarded=False)
    assert steps == [2 + 4] * 4
    assert np.abs(values - right).max() > 1e-4
    ((steps, values),) = pool(loaded, ranks=1, load=True, guarded=True)
    assert steps == [3] * 4
    np.testing.assert_array_equal(values, right)


class Tied(nn.Module):
    """A table of which only the weight is read, as a head does on the last stage; and a linear, which is called."""

    def __init__(self):
        super().__init__()
        self.table, self.linear = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return F.linear(self.linear(x), self.table.weight)


def gathered(rank, world, overlap, guarded):
    """Both weights, as the last forward has used them, after two steps over two data ranks."""
    with groups():
        from headway.parallel.engines.megatron.guards import gather_whole

        torch.manual_seed(0)
        more = {"overlap_grad_reduce": overlap, "overlap_param_gather": overlap}
        data, optimizer = optimized(Tied(), {}, **more)
        start, wait = gather_whole(data) if guarded else (lambda: None, lambda: None)
        for number in range(2):
            wait()
            step(
                data,
                optimizer,
                lambda number=number: data(torch.full((1, 8), 1.0 + number + rank)).square().sum(),
            )
            start()
        wait()
        data(torch.ones(1, 8))
        return [p.detach().clone().numpy() for p in data.module.parameters()]


def test_parameters_that_are_read_from_outside_are_old_ones(pool):
    right = pool(gathered, ranks=2, overlap=False, guarded=False)
    wrong = pool(gathered, ranks=2, overlap=True, guarded=False)
    assert all(
        np.abs(found[0] - weights[0]).max() > LR / 2 for found, weights in zip(wrong, right, strict=True)
    )
    ours = pool(gathered, ranks=2, overlap=True, guarded=True)
    for found, weights in zip(chain(*ours), chain(*right), strict=True):
        np.testing.assert_array_equal(found, weights)


# -- checkpoints -------------------------------------------------------------------------------------------------


def saved(rank, world, folder):
    """What `dist_checkpointing.save` does first; here no process is started."""
    with groups():
        from multiprocessing.context import BaseContext

        from megatron.core import dist_checkpointing

        def manager(context):
            raise RuntimeError(f"{context.get_start_method()} starts a process")

        state = {"x": dist_checkpointing.ShardedTensor.from_rank_offsets("x", torch.ones(2))}
        with patch.object(BaseContext, "Manager", manager):
            return raises(dist_checkpointing.save, state, folder)


def test_checkpoints_of_megatron_start_a_process_and_are_not_used(pool, tmp_path):
    ((kind, text),) = pool(saved, ranks=1, folder=str(tmp_path))
    assert (kind, text) == ("RuntimeError", "spawn starts a process")
    for path in Path(engine.__file__).parent.glob("*.py"):
        tree = ast.walk(ast.parse(path.read_text()))
        names = {
            n for node in tree if isinstance(node, (ast.Import, ast.ImportFrom)) for n in _imported(node)
        }
        assert not [n for n in names if "dist_checkpointing" in n], path


def _imported(node):
    module = getattr(node, "module", None) or ""
    return [f"{module}.{alias.name}" for alias in node.names]
