"""What Accelerate's trackers do not say of themselves, as data: how a run is named, kept here, and gone on with.

In texts `{run}` is the run's name, `{project}` tracking.project, `{folder}` a folder of the tracker's own in the run's
folder, `{id}` what `identity` found when the run was begun.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Manner:
    """One tracker.

    Attributes:
        first: what Accelerate calls `run_name`, the first argument; most hand it on as the project.
        begin: further arguments of every start.
        identity: attributes (methods are called) that lead from the tracker's own object to what names the run.
        resume: further arguments of a start that goes on with a run.
        told_where: variables of the environment, or files, of which one says that the user's own place or account is
            meant.
        alone: variables that keep the run in its folder where nothing says so; settings of the tracker.
        always: variables that are set where the user has not set them.
        finite: whether it takes finite numbers only.
    """

    first: str = "{project}"
    begin: Mapping[str, Any] = field(default_factory=dict)
    identity: str | None = None
    resume: Mapping[str, Any] = field(default_factory=dict)
    told_where: tuple[str, ...] = ()
    alone: Mapping[str, str] = field(default_factory=dict)
    always: Mapping[str, str] = field(default_factory=dict)
    finite: bool = False


MANNERS: dict[str, Manner] = {
    "aim": Manner(
        first="{run}",  # here the name of the run
        begin={"experiment": "{project}", "system_tracking_interval": None, "capture_terminal_logs": False},
        identity="hash",
        resume={"run_hash": "{id}"},
    ),
    "clearml": Manner(
        begin={
            "task_name": "{run}",
            "reuse_last_task_id": False,
            "auto_connect_arg_parser": False,
            "auto_connect_frameworks": False,
            "auto_connect_streams": False,
            "auto_resource_monitoring": False,
        },
        identity="id",
        resume={"reuse_last_task_id": "{id}", "continue_last_task": 0},  # 0: steps are counted by us
        told_where=(
            "CLEARML_API_ACCESS_KEY",
            "CLEARML_CONFIG_FILE",
            "CLEARML_OFFLINE_MODE",
            "~/clearml.conf",
        ),
        alone={"CLEARML_OFFLINE_MODE": "1"},
        always={"CLEARML_CACHE_DIR": "{folder}"},
        finite=True,  # it would show 0 for what is not a number
    ),
    "comet_ml": Manner(
        identity="get_key",
        resume={"experiment_key": "{id}", "mode": "get_or_create"},
        told_where=("COMET_API_KEY", "COMET_CONFIG", "COMET_START_ONLINE", "~/.comet.config"),
        alone={"COMET_START_ONLINE": "0"},
        always={
            "COMET_OFFLINE_DIRECTORY": "{folder}",
            "COMET_START_EXPERIMENT_NAME": "{run}",
            "COMET_AUTO_LOG_CODE": "0",  # it would be that of the tracker's process
        },
    ),
    "dvclive": Manner(
        first="",
        begin={"dir": "{folder}", "resume": True, "save_dvc_exp": False, "dvcyaml": None},
    ),
    "mlflow": Manner(
        begin={"run_name": "{run}"},
        identity="info.run_id",
        resume={"run_id": "{id}"},
        told_where=("MLFLOW_TRACKING_URI",),
        # mlflow's store of files needs no database, which mlflow-skinny lacks; since mlflow 3.7 it must be allowed
        alone={"MLFLOW_TRACKING_URI": "file:{folder}", "MLFLOW_ALLOW_FILE_STORE": "true"},
    ),
    "swanlab": Manner(
        begin={"experiment_name": "{run}", "logdir": "{folder}"},
        identity="id",
        resume={"id": "{id}", "resume": "allow"},
        told_where=("SWANLAB_API_KEY", "SWANLAB_MODE", "~/.swanlab/.netrc"),
        alone={"SWANLAB_MODE": "offline"},
    ),
    "trackio": Manner(
        begin={"name": "{run}"},
        identity="name",
        resume={"name": "{id}", "resume": "allow"},
        always={"TRACKIO_DIR": "{folder}"},
    ),
}
"""A tracker that is not named here begins a run at every start, with what Accelerate asks for alone."""


def filled(text: Any, words: Mapping[str, str]) -> Any:
    """A text with its words put in; other values as they are."""
    return text.format_map(words) if isinstance(text, str) else text
