"""What is asked of Slurm, and the script that says it."""

import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headway.launch.cli import app
from headway.launch.slurm.request import find_cluster, read_request, seconds_of
from headway.launch.slurm.script import sweep_points, template_text
from headway.pretrain.errors import HeadwayError, JobError
from headway.pretrain.recipe import parse_yaml

CLUSTERS = [f"cluster/{path.stem}" for path in Path(str(find_cluster("cluster/cpu"))).parent.glob("*.yaml")]


def dry(recipe: object, *options: str) -> str:
    """The script that would be submitted; it is one that bash can read."""
    words = ["launch", "slurm", str(recipe), *options, "--dry-run"]
    result = CliRunner().invoke(app, words)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    subprocess.run(["bash", "-n"], input=result.output, text=True, check=True)
    return result.output


def lines(script: str, start: str) -> list[str]:
    return [line for line in script.splitlines() if line.startswith(start)]


def test_a_script_says_all_that_was_asked_for(small_job):
    script = dry(
        small_job,
        *("--nodes", "2", "--gpus-per-node", "4", "--partition", "batch", "--time", "1-00:00:00"),
        *("--account", "us", "--qos", "high", "--constraint", "a100", "--exclude", "node[3,7]", "--mem", "0"),
        *(
            "--cpus-per-task",
            "6",
            "--interface",
            "ib0",
            "--env",
            "NCCL_IB_HCA=mlx5 1",
            "--setup",
            "module load x",
        ),
        *("--set", "train.steps=7", "--set", "run.name=my run's".replace(" run's", "")),
    )
    wanted = (
        "job-name=my nodes=2 ntasks-per-node=4 gpus-per-node=4 partition=batch time=1-00:00:00 account=us qos=high "
        "constraint=a100 exclude=node[3,7] mem=0 cpus-per-task=6 requeue open-mode=append signal=USR1@300 "
        "output=runs/my/slurm/%j.log"
    )
    assert sorted(lines(script, "#SBATCH")) == sorted(f"#SBATCH --{word}" for word in wanted.split())
    assert "export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0" in script
    assert "export NCCL_IB_HCA='mlx5 1'" in script
    assert "export SRUN_CPUS_PER_TASK=6" in script
    assert "\nmodule load x\n" in script
    assert f"train {small_job} --set train.steps=7 --set run.name=my\ncode=$?" in script


def test_a_short_job_is_warned_a_tenth_of_its_time_before_the_end(small_job):
    assert "--signal=USR1@60\n" in dry(small_job, "--time", "10")
    assert "--signal=USR1@5\n" in dry(small_job, "--time", "10", "--signal-before", "5")


def test_torchrun_is_one_agent_a_node(small_job):
    script = dry(small_job, "--nodes", "2", "--tasks-per-node", "4", "--launcher", "torchrun", "--no-requeue")
    assert "#SBATCH --ntasks-per-node=1\n" in script
    assert "#SBATCH --signal=B:USR1@300\n" in script
    assert "#SBATCH --no-requeue\n" in script
    assert "torchrun --nnodes=2 --nproc-per-node=4 --no-python" in script
    assert "${asked:+--asked}" in script


def test_containers(small_job):
    pyxis = dry(small_job, "--container", "me/image:1", "--container-mount", "/data:/data")
    assert f"--container-image=me/image:1 --container-mounts={Path.cwd()}:{Path.cwd()},/data:/data" in pyxis
    assert "\n    headway train" in pyxis
    assert 'scontrol requeue "$SLURM_JOB_ID"' in pyxis
    apptainer = dry(
        small_job,
        *(
            "--container",
            "image.sif",
            "--container-runtime",
            "apptainer",
            "--gpus-per-node",
            "1",
            "--chain",
            "2",
        ),
    )
    assert "\n    apptainer exec --nv --bind" in apptainer
    assert "image.sif headway train" in apptainer
    assert "scontrol requeue" not in apptainer  # the next job of the chain goes on


def test_a_sweep_is_an_array_of_runs(small_job):
    script = dry(
        small_job,
        *("--sweep", "optimizer.lr=1e-3,3e-4", "--sweep", "train.seed=0,1"),
        *("--sweep-parallel", "2", "--set", "run.name=sweep", "--set", "tracking.wandb=offline"),
    )
    assert "#SBATCH --array=0-3%2\n" in script
    assert "#SBATCH --output=runs/sweep/slurm/%A_%a.log\n" in script
    third = "2) point=(--set optimizer.lr=3e-4 --set train.seed=0 --set run.name=sweep-2) run=runs/sweep-2 ;;"
    assert third in script
    assert '--set tracking.group=sweep "${point[@]}"' in script
    unseen = dry(small_job, "--sweep", "optimizer.lr=1e-3,3e-4")  # the small job tells W&B nothing
    assert "tracking.group" not in unseen


def test_points_of_a_sweep():
    (one, two) = sweep_points(["data.sources=[a,b],[c]"], "x", Path("runs"))
    assert one.sets == ("data.sources=[a,b]", "run.name=x-0")
    assert two.folder == Path("runs/x-1")
    for wrong in (["optimizer.lr"], ["=1"], ["a=1,"], ["a.b=1", "a.b=2"], ["run.name=a,b"]):
        with pytest.raises(JobError, match="--sweep"):
            sweep_points(wrong, "x", Path("runs"))


def test_a_template_of_ones_own(small_job, tmp_path):
    mine = tmp_path / "mine.j2"
    mine.write_text(template_text().replace("{{ srun }}", "# ours\n{{ srun }}"))
    assert "\n# ours\nsrun" in dry(small_job, "--template", str(mine))
    mine.write_text("{{ nothing_like_it }}")
    with pytest.raises(JobError, match=r"--template.*nothing_like_it"):
        dry(small_job, "--template", str(mine))
    with pytest.raises(JobError, match=r"--template.*No such file"):
        dry(small_job, "--template", str(tmp_path / "missing"))
    assert CliRunner().invoke(app, ["launch", "template"]).output == template_text()


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        (90, 5400),
        ("1:30", 90),
        ("1:00:00", 3600),
        ("2-0", 172800),
        ("1-2:03", 93780),
        ("1-0:0:1", 86401),
    ],
)
def test_times_as_sbatch_reads_them(time, seconds):
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--time", "soon"], "--time = 'soon': must be minutes"),
        (["--time", "1", "--signal-before", "60"], "--signal-before = 60: must be less than the 60 seconds"),
        (
            ["--gpus-per-node", "2", "--tasks-per-node", "4"],
            "--tasks-per-node = 4: each rank has a GPU of its own",
        ),
        (["--launcher", "mpirun"], "launcher = 'mpirun': input should be 'srun' or 'torchrun'"),
        (["--env", "NCCL"], "--env = 'NCCL': must have the form NAME=VALUE"),
        (["--cluster", "cluster/none"], r"--cluster = 'cluster/none': .*cluster/cpu"),
        (["--container-mount", "/data"], "container_mounts = .*no effect without --container"),
        (["--sweep-parallel", "2"], "--sweep-parallel = 2: has no effect without --sweep"),
        (["--sweep", "train.seed=0,1", "--chain", "2"], "--chain = 2"),
        (["--sweep", "train.seed=0,x"], "train.seed"),
        (["--nodes", "3"], "train.global_batch = 8: must be a multiple of the 3 ranks"),
        (["--set", "parallel.tensor=3"], "parallel"),
        (["--set", "precision=fp8"], "precision"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_submitted(small_job, options, message):
    with pytest.raises(HeadwayError, match=message):
        dry(small_job, *options)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_clusters_that_are_shipped(small_job, cluster):
    assert "#SBATCH --time=" in dry(small_job, "--cluster", cluster)
    assert read_request(cluster, {"nodes": 2, "env": {"A": "b"}}).env["A"] == "b"


def test_a_cluster_file_of_ones_own_yields_to_the_command_line(small_job, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("partition: big\ntime: 24:00:00\nenv: {A: 1}\n")
    script = dry(small_job, "--cluster", str(mine), "--partition", "small")
    assert "#SBATCH --partition=small\n" in script
    assert "#SBATCH --time=24:00:00\n" in script
    mine.write_text("partitions: big\n")
    with pytest.raises(JobError, match=r"partitions.*Nearest legal choice: partition"):
        dry(small_job, "--cluster", str(mine))


def test_times_and_leading_zeros_are_words_in_yaml():
    found = parse_yaml("[24:00:00, 010, 10, -3, 0x1f, 1_000, 0]", "here")
    assert found == ["24:00:00", "010", 10, -3, 31, 1000, 0]


def test_slurm_is_missing(small_job, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(JobError, match=r"Slurm's commands are not on this machine"):
        CliRunner().invoke(
            app, ["launch", "slurm", str(small_job), "--set", "run.dir=/tmp/x"], catch_exceptions=False
        )
