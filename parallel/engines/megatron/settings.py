"""What Megatron-Core's parts are told of a job. Much of its configuration is for its own models and stays as it is."""

from __future__ import annotations

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from headway.parallel.engines.megatron.guards import exact
from headway.parallel.mesh import Layout
from headway.pretrain.config import Job


def layers(job: Job, layout: Layout) -> TransformerConfig:
    """For linears and tables: they hold nothing of their own, and sequences are gathered before them (`regions`)."""
    return _config(job, layout, sequence_parallel=False)


def gradients(job: Job, layout: Layout) -> TransformerConfig:
    """For data parallelism. Gradients are summed: what is differentiated is divided by global counts already. And those
    that are marked `sequence_parallel` are summed over the tensor axis, with or without sequence parallelism."""
    return _config(job, layout, sequence_parallel=layout.tensor > 1)


def dispatcher(job: Job, layout: Layout) -> TransformerConfig:
    """For dispatchers: each rank has whole experts, and other tokens than the ranks beside it. A capacity says that
    pairs may be dropped, so that Megatron counts them; which ones, our router has said."""
    return exact(
        num_layers=job.model.layers,
        hidden_size=job.model.hidden,
        num_attention_heads=job.model.heads,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        num_moe_experts=job.model.experts.count,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_expert_capacity_factor=1.0,
    )


def _config(job: Job, layout: Layout, *, sequence_parallel: bool) -> TransformerConfig:
    return exact(
        num_layers=job.model.layers,
        hidden_size=job.model.hidden,
        num_attention_heads=job.model.heads,
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )


def shards(job: Job, groups: ProcessGroupCollection) -> bool:
    """Whether optimizer state is sharded over data ranks."""
    copies = max(groups.dp_cp.size(), groups.expt_dp.size() if groups.ep.size() > 1 else 1)
    return (
        copies > 1
        and job.optimizer.name == "adamw"
        and job.parallel.megatron.distributed_optimizer is not False
    )


def data_parallel(job: Job, *, sharded: bool) -> DistributedDataParallelConfig:
    """How gradients are reduced: in fp32, whatever parameters are."""
    wanted = job.parallel.megatron
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=wanted.overlap_grad_reduce,
        overlap_param_gather=wanted.overlap_param_gather and sharded,
        use_distributed_optimizer=sharded,
    )


def optimizer(job: Job, *, narrow: bool, sharded: bool) -> OptimizerConfig:
    """What Megatron's optimizers are told: clipping, rates and a loss scale are ours, so nothing of them."""
    return OptimizerConfig(
        lr=job.optimizer.lr,
        clip_grad=0.0,
        bf16=narrow,
        use_distributed_optimizer=sharded,
        overlap_param_gather=job.parallel.megatron.overlap_param_gather and sharded,
    )
