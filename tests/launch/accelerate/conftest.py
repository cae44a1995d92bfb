"""Jobs under Accelerate's variables, and files as Accelerate writes them."""

import pytest
from accelerate.commands.config.config_args import ClusterConfig

from headway.launch.accelerate.job import resolve_asked
from headway.tests.launch.accelerate.told import TWO, variables


@pytest.fixture(autouse=True)
def no_default_file(monkeypatch):
    """Accelerate reads the user's own default file where none is named."""
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", "/nowhere")


@pytest.fixture
def resolved(small_job, monkeypatch, tmp_path):
    """Resolve the small job under the variables of `accelerate launch OPTIONS`, or with a file of Accelerate."""

    def resolve_small(options="", file=None, ranks=TWO, sets=(), recipe=""):
        for name, value in (variables(options) if options else {}).items():
            monkeypatch.setenv(name, value)
        (tmp_path / "more.yaml").write_text(recipe or "{}")
        return resolve_asked([str(small_job), str(tmp_path / "more.yaml")], sets, file, ranks)

    return resolve_small


@pytest.fixture
def written(tmp_path):
    """A file as Accelerate writes it."""

    def write(kind="MULTI_GPU", name="accelerate.yaml", **more):
        given = {"mixed_precision": "no", "use_cpu": False, "debug": False, "num_processes": 2, **more}
        path = tmp_path / name
        ClusterConfig(compute_environment="LOCAL_MACHINE", distributed_type=kind, **given).to_yaml_file(
            str(path)
        )
        return str(path)

    return write
