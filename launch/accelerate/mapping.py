"""What each key of Accelerate becomes, as data.

A key is named as `section.key`, of the section of a config file, without the prefix that repeats the section; keys
of the first level stand alone. The variables that `accelerate launch` gives to ranks have the same names here
(`environment.NAMES`). Checked against Accelerate 1.15.

What changes neither numbers nor what is held where (prefetching, how initial weights reach ranks, how Accelerate would
write its checkpoints) has a note in place of settings. All else that Headway does not do is refused.
"""

from __future__ import annotations

from headway.launch.accelerate.rules import LEFT, Host, Rule, Settings, Share, off, switch

REPLICAS: Settings = {"parallel.replicate": LEFT, "parallel.shard": 1}
"""DistributedDataParallel."""
MICRO_BATCH = "parallel.micro_batch"

TOP: dict[str, Rule] = {
    "distributed_type": Rule(
        {
            "no": "one process, or as many as are started",
            "multi_cpu": {"parallel.device": "cpu", **REPLICAS},
            "multi_gpu": {"parallel.device": "cuda", **REPLICAS},
            "fsdp": {"parallel.engine": "native"},
            "deepspeed": {"parallel.engine": "deepspeed"},
            "megatron_lm": {"parallel.engine": "megatron"},
        },
        refused="Headway computes on CPUs and on CUDA devices",
    ),
    "mixed_precision": Rule(
        {
            "no": {"precision": "fp32"},
            "fp16": {"precision": "fp16"},
            "bf16": {"precision": "bf16"},
            "fp8": {"precision": "fp8"},
        },
        default="no",
    ),
    "use_cpu": switch({"parallel.device": "cpu"}, default="false"),
    "torch_device": Rule({"cpu": {"parallel.device": "cpu"}, "cuda": {"parallel.device": "cuda"}}),
    "gradient_accumulation_steps": Rule(
        {"auto": "the job's parallel.micro_batch says"}, setting=MICRO_BATCH, kind=Share
    ),
    "compute_environment": Rule(
        {"local_machine": "this machine"}, refused="Headway starts ranks on this machine, by Slurm or by MPI"
    ),
    "main_training_function": Rule(note="only notebooks and TPUs call one"),
    "num_processes": Rule(note="ranks, counted when they are started"),
    "num_machines": Rule(note="hosts, counted when ranks are started"),
    "machine_rank": Rule(note="which host this is"),
    "main_process_ip": Rule(note="where ranks of several hosts meet"),
    "main_process_port": Rule(note="where ranks of several hosts meet; those of one find a free port"),
    "same_network": Rule(note="hosts meet at main_process_ip either way"),
    "gpu_ids": Rule(note="the GPUs that ranks are shown (CUDA_VISIBLE_DEVICES)"),
    "rdzv_backend": Rule(
        dict.fromkeys(("static", "c10d"), "how agents of several hosts meet"),
        refused="agents meet by static or c10d",
    ),
    "debug": Rule({"false": "is off"}, note="checks the collectives of Accelerate, none of which runs"),
    "enable_cpu_affinity": off("Headway binds no process to cores: let srun --cpu-bind or numactl do it"),
    "downcast_bf16": off("is of TPUs"),
    "tpu_use_cluster": off("Headway does not compute on TPUs"),
    "tpu_use_sudo": off("Headway does not compute on TPUs"),
    "tpu_name": off("Headway does not compute on TPUs", "none"),
    "tpu_zone": off("Headway does not compute on TPUs", "none"),
    "tpu_vm": off("Headway does not compute on TPUs", "none"),
    "tpu_env": off("Headway does not compute on TPUs", "none"),
    "in_tpu_pod": off("Headway does not compute on TPUs"),
    "use_sagemaker": off("Headway starts ranks on this machine, by Slurm or by MPI"),
    "commands": off("starts what TPU pods run first: Headway does not compute on TPUs", "none"),
    "command_file": off("starts what TPU pods run first: Headway does not compute on TPUs", "none"),
    "log_level": Rule(note="of Accelerate's own messages"),
    "enable_rich": Rule(note="of Accelerate's own messages"),
    "bypass_device_map": Rule(note="of models that Transformers has spread; ours are not"),
    "init_include_buffers": Rule(note="of models that Accelerate builds empty"),
    "allow_cp_standalone": Rule(note="context parallelism goes with any layout"),
    "config_ds_fields": Rule(note="which keys of deepspeed_config the file had", default=""),
}

DYNAMO: dict[str, Rule] = {
    "backend": Rule(
        {"no": "train.compile says", "inductor": {"train.compile": True}},
        refused="torch.compile compiles by inductor here",
        default="no",
    ),
    "mode": Rule(
        {"default": "the default"}, refused="blocks are compiled in the default mode", default="default"
    ),
    "use_fullgraph": off("blocks whose attention breaks the graph are compiled in parts", default="false"),
    "use_dynamic": off("blocks are compiled for the shapes that they see", default="false"),
    "use_regional_compilation": Rule(note="blocks are compiled one by one in any case", default="false"),
}

STRATEGIES: dict[str, Settings | str] = {
    "full_shard": {"parallel.shard": LEFT, "parallel.replicate": 1, "parallel.reshard": True},
    "shard_grad_op": {"parallel.shard": LEFT, "parallel.replicate": 1, "parallel.reshard": False},
    "no_shard": REPLICAS,
    "hybrid_shard": {"parallel.shard": Host(), "parallel.replicate": LEFT, "parallel.reshard": True},
    "hybrid_shard_zero2": {"parallel.shard": Host(), "parallel.replicate": LEFT, "parallel.reshard": False},
}
"""Of FSDP 1 (torch.distributed.fsdp.ShardingStrategy, numbered from 1)."""
STRATEGIES |= {str(i): settings for i, settings in enumerate(list(STRATEGIES.values()), 1)}

SAVED = (
    "checkpoints are shards with global shapes, which any layout reads; `headway export` writes whole weights"
)

FSDP: dict[str, Rule] = {
    "version": Rule({"1": "what both versions do, FSDP2 does here", "2": "FSDP2"}, default="1"),
    "sharding_strategy": Rule(STRATEGIES, refused="is no strategy of FSDP", default="full_shard"),
    "reshard_after_forward": Rule(
        {
            "true": {"parallel.reshard": True},
            "false": {"parallel.reshard": False},
        },
        refused="with fsdp_version 2 it is true or false",
        nearest="true",
        default="true",
    ),
    "reshard_after_forward of version 1": Rule(
        {"true": "read with fsdp_version 2", **STRATEGIES},
        refused="with fsdp_version 1 it is a strategy",
        nearest="SHARD_GRAD_OP",
        default="true",
    ),
    "sharding_strategy of version 2": Rule(
        {"full_shard": "read with fsdp_version 1"},
        refused="fsdp_version 2 reads fsdp_reshard_after_forward and parallelism_config",
        nearest="fsdp_reshard_after_forward: false for SHARD_GRAD_OP, parallelism_config for the others",
        default="full_shard",
    ),
    "offload_params": off(
        "the native engine keeps parameters on the device",
        "distributed_type: DEEPSPEED with zero_stage: 3 and offload_param_device: cpu, "
        "or fsdp_activation_checkpointing: true",
        default="false",
    ),
    "activation_checkpointing": switch({"parallel.recompute": "full"}, default="false"),
    "activation_checkpointing_offload": switch({"parallel.offload": True}, default="false"),
    "auto_wrap_policy": Rule(
        {"transformer_based_wrap": "each block is a unit of its own"},
        refused="each block is a unit of its own, in any case",
        nearest="TRANSFORMER_BASED_WRAP",
    ),
    "transformer_layer_cls_to_wrap": Rule(note="the blocks of Headway's models are wrapped"),
    "min_num_params": Rule(note="read with SIZE_BASED_WRAP only", default="100000000"),
    "backward_prefetch": Rule(note="FSDP2 fetches the next block in time by itself"),
    "forward_prefetch": Rule(note="FSDP2 fetches the next block in time by itself", default="false"),
    "state_dict_type": Rule(note=SAVED),
    "use_orig_params": Rule(note="FSDP2 keeps parameters as they are", default="true"),
    "sync_module_states": Rule(note="initial weights are the same on any layout", default="true"),
    "cpu_ram_efficient_loading": Rule(
        note="models are built without memory, each rank fills its part", default="true"
    ),
    "ignored_modules": off("all parameters are sharded", "none"),
}

DEVICES = ("none", "cpu", "nvme")
INCLUDED = "starts ranks over ssh: Headway leaves that to srun, mpirun, or one command on each host"

DEEPSPEED: dict[str, Rule] = {
    "zero_stage": Rule({str(i): {"parallel.deepspeed.zero": i} for i in range(4)}),
    "offload_optimizer_device": Rule(
        {"none": "stays on the device"}
        | {d: {"parallel.deepspeed.offload_optimizer": d} for d in DEVICES[1:]}
    ),
    "offload_param_device": Rule(
        {"none": "stays on the device"}
        | {d: {"parallel.deepspeed.offload_parameters": d} for d in DEVICES[1:]}
    ),
    "offload_optimizer_nvme_path": Rule({"none": "none"}, setting="parallel.deepspeed.nvme_path", kind=str),
    "offload_param_nvme_path": Rule({"none": "none"}, setting="parallel.deepspeed.nvme_path", kind=str),
    "gradient_clipping": Rule(
        {
            "auto": "the job's optimizer.clip says",
            "0": {"optimizer.clip": None},
            "0.0": {"optimizer.clip": None},
        },
        setting="optimizer.clip",
        kind=float,
    ),
    "config_file": Rule({"none": "none"}, setting="parallel.deepspeed.config", kind=str),
    "zero3_init_flag": Rule(note="models are built without memory, each rank fills its part"),
    "zero3_save_16bit_model": Rule(note=SAVED),
    "moe_layer_cls_names": Rule(note="Headway knows the experts of its models"),
    "multinode_launcher": Rule({"standard": "torchrun's agent on each host"}, refused=INCLUDED),
    "hostfile": off(INCLUDED, "none"),
    "inclusion_filter": off(INCLUDED, "none"),
    "exclusion_filter": off(INCLUDED, "none"),
}

KEPT = "Megatron-Core's engine keeps it on the device"

MEGATRON: dict[str, Rule] = {
    "tp_degree": Rule(setting="parallel.tensor", default="1"),
    "pp_degree": Rule(setting="parallel.pipeline", default="1"),
    "num_micro_batches": Rule(setting=MICRO_BATCH, kind=Share),
    "context_parallel_size": Rule(setting="parallel.context"),
    "expert_model_parallel_size": Rule(setting="parallel.expert"),
    "expert_tensor_parallel_size": Rule(
        {"1": "experts are whole on a rank"}, refused="experts are whole on a rank"
    ),
    "sequence_parallelism": Rule(
        {"true": {"parallel.sequence": True}, "false": {"parallel.sequence": False}},
        refused="must be true or false",
    ),
    "recompute_activations": switch({"parallel.recompute": "attention"}),
    "recompute_granularity": Rule(
        {"full": {"parallel.recompute": "full"}, "selective": {"parallel.recompute": "attention"}}
    ),
    "recompute_method": Rule(
        {"uniform": "every block"}, refused="parallel.recompute counts from every block"
    ),
    "recompute_num_layers": Rule({"1": "every block"}, refused="parallel.recompute counts from every block"),
    "use_distributed_optimizer": Rule(
        {
            "true": {"parallel.megatron.distributed_optimizer": True},
            "false": {"parallel.megatron.distributed_optimizer": False},
        },
        refused="must be true or false",
    ),
    "gradient_clipping": Rule(
        {"0": {"optimizer.clip": None}, "0.0": {"optimizer.clip": None}},
        setting="optimizer.clip",
        kind=float,
        default="1.0",
    ),
    "attention_dropout": Rule(setting="model.attention.dropout", kind=float),
    "hidden_dropout": Rule(setting="model.dropout", kind=float),
    "attention_softmax_in_fp32": Rule({"true": "reductions are fp32"}, refused="reductions are fp32"),
    "calculate_per_token_loss": Rule(
        {"true": "a loss is the mean over tokens"}, refused="a loss is the mean over tokens"
    ),
    "use_rotary_position_embeddings": Rule(
        {"true": {"model.positions": "rotary"}}, refused="model.positions says which, if not these"
    ),
    "attention_backend": Rule({"true": "model.attention.kernel says"}, refused="model.attention.kernel says"),
    "use_custom_fsdp": off(
        "parameters are whole on a rank of this engine", "false, or distributed_type: FSDP", "false"
    ),
    "no_load_optim": off(
        "a run goes on with its optimizer", "false, and train.start_from: weights only", "false"
    ),
    "no_save_optim": off("a checkpoint holds all that a run needs to go on", default="false"),
    "eod_mask_loss": off(
        "the objective says which tokens count", "false, or data.documents: isolate", "false"
    ),
    "optimizer_cpu_offload": off(
        KEPT, "false, or distributed_type: DEEPSPEED with offload_optimizer_device: cpu", "false"
    ),
    "overlap_cpu_optimizer_d2h_h2d": off(KEPT, default="false"),
    "use_precision_aware_optimizer": off("moments are fp32", default="false"),
    "decoder_last_pipeline_num_layers": off("stages are cut by what their layers cost", "none"),
}

PARALLELISM: dict[str, Rule] = {
    "dp_replicate_size": Rule(setting="parallel.replicate", default="1"),
    "dp_shard_size": Rule(setting="parallel.shard", default="1"),
    "tp_size": Rule(setting="parallel.tensor", default="1"),
    "cp_size": Rule({"1": "none"}, setting="parallel.context", default="1"),
    "cp_backend": Rule({"torch": "the ring of Headway"}, default="torch"),
    "cp_comm_strategy": Rule(
        {
            "allgather": {"parallel.context_method": "ring"},
            "alltoall": {"parallel.context_method": "ring"},
        },
        default="allgather",
    ),
    "sp_size": Rule({"1": "none"}, setting="parallel.context", default="1"),
    "sp_backend": Rule({"deepspeed": "Ulysses"}, default="deepspeed"),
    "sp_seq_length": Rule({"none": "data.seq_len says"}, setting="data.seq_len"),
    "sp_seq_length_is_variable": Rule(note="rows have data.seq_len tokens", default="true"),
    "sp_attn_implementation": Rule(
        {"sdpa": "model.attention.kernel says"}, refused="model.attention.kernel says", default="sdpa"
    ),
}

FP8: dict[str, Rule] = {
    "backend": Rule({"ao": "torchao", "none": "torchao"}, refused="fp8 is torchao's here", nearest="AO"),
    "enable_fsdp_float8_all_gather": Rule(
        note="rows are scaled apart, after they were gathered", default="true"
    ),
    "pad_inner_dim": Rule(note="widths are multiples of 16, or refused", default="true"),
    "use_autocast_during_eval": off("is of Transformer Engine", default="false"),
    "margin": Rule({"0": "is of Transformer Engine"}, refused="is of Transformer Engine", default="0"),
    "interval": Rule({"1": "is of Transformer Engine"}, refused="is of Transformer Engine", default="1"),
    "format": Rule(
        {"hybrid": "is of Transformer Engine"}, refused="is of Transformer Engine", default="hybrid"
    ),
    "amax_history_len": Rule(note="rows are scaled by what they hold now", default="1024"),
    "amax_compute_algo": Rule(note="rows are scaled by what they hold now", default="most_recent"),
    "override_linear_precision": Rule(
        {"(false, false, false)": "none", "[false, false, false]": "none"},
        refused="gradients of weights are bf16 products, all others fp8",
    ),
    "override_fprop": off("all products but gradients of weights are fp8", default="false"),
    "override_dgrad": off("all products but gradients of weights are fp8", default="false"),
    "override_wgrad": Rule(note="gradients of weights are bf16 products", default="false"),
    "opt_level": Rule({"o2": "is of MS-AMP"}, refused="is of MS-AMP", default="o2"),
}

MPIRUN: dict[str, Rule] = {
    "hostfile": off(
        "Headway does not start mpirun", "mpirun --hostfile FILE headway train ...: its ranks are recognised"
    ),
    "ccl": Rule(note="read by mpirun only"),
}

SECTIONS: dict[str, dict[str, Rule]] = {
    "dynamo": DYNAMO,
    "fsdp": FSDP,
    "deepspeed": DEEPSPEED,
    "megatron_lm": MEGATRON,
    "parallelism_config": PARALLELISM,
    "fp8": FP8,
    "mpirun": MPIRUN,
}

RULES: dict[str, Rule] = {
    **TOP,
    **{f"{section}.{key}": rule for section, rules in SECTIONS.items() for key, rule in rules.items()},
}
"""All keys."""

ALIASES = {
    "deepspeed.gradient_accumulation_steps": "gradient_accumulation_steps",
    "deepspeed.zero3_init": "deepspeed.zero3_init_flag",
    "fsdp.transformer_cls_to_wrap": "fsdp.transformer_layer_cls_to_wrap",
    "gradient_clipping": "deepspeed.gradient_clipping",
    "fp8.amax_history_length": "fp8.amax_history_len",
    "fp8.amax_compute_algorithm": "fp8.amax_compute_algo",
    "fp8.optimization_level": "fp8.opt_level",
    "debug_mode": "debug",
    "cpu_affinity": "enable_cpu_affinity",
}
"""Other spellings of the same, in files or in variables -> key."""

READ_BY = {"fsdp": "fsdp", "deepspeed": "deepspeed", "megatron_lm": "megatron_lm"}
"""Section -> the distributed_type that reads it."""

ZERO_STAGE: Settings = {"parallel.deepspeed.zero": 2}
"""Of Accelerate's DeepSpeedPlugin, where neither a stage nor a JSON file is named."""
