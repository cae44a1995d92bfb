"""What Accelerate's own launcher tells ranks."""

import os

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import launch as launchers

from headway.launch.environment import Ranks

ALONE, TWO, FOUR = Ranks(), Ranks(0, 2, 0, 2, "torchrun"), Ranks(0, 4, 0, 2, "torchrun")


def variables(options):
    """What `accelerate launch OPTIONS` gives to the processes that it starts, by its own code."""
    arguments = launch_command_parser().parse_args([*options.split(), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    arguments.main_process_port = 0
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""
        told = launchers.prepare_deepspeed_cmd_env(arguments)[1]
    elif arguments.multi_gpu or arguments.use_fsdp or arguments.use_megatron_lm:
        told = launchers.prepare_multi_gpu_env(arguments)
    else:
        told = launchers.prepare_simple_launcher_cmd_env(arguments)[1]
    return {k: v for k, v in told.items() if k not in os.environ}


def settings_of(rows):
    return {name: value for row in rows for name, value in row.settings.items()}
