"""What trackers kept of a run, as each one's own package reads it; programs, since some read their place at import.

A program gets the tracker's folder and prints `[[step, name, value], ...]`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

AIM = """
from aim import Repo
from aim.sdk.index_manager import RepoIndexManager
repo = Repo(folder)
for hash in repo.list_all_runs():
    RepoIndexManager.get_index_manager(repo).index(hash)
(run,) = Repo(folder).iter_runs()
assert (run.name, run.experiment, run["hparams"]["train.global_batch"]) == ("trial", "proof", 32)
for metric in run.metrics():
    steps, (values, *_) = metric.data.items_list()
    found += [[step, metric.name, value] for step, value in zip(steps, values)]
"""
CLEARML = """
import json, pathlib
(place,) = pathlib.Path(folder).glob("offline/*/")
task = json.loads((place / "task.json").read_text())
assert task["name"] == "trial"
for line in (place / "metrics.jsonl").read_text().splitlines():
    for each in json.loads(line):
        found.append([each["iter"], each["metric"], each["value"]])
"""
COMET = """
import json, pathlib, zipfile
keys = set()
for path in pathlib.Path(folder).glob("*.zip"):
    with zipfile.ZipFile(path) as archive:
        keys.add(json.loads(archive.read("experiment.json"))["offline_id"])
        lines = archive.read("messages.json").decode().splitlines()
    for message in map(json.loads, lines):
        if message["type"] == "metric_msg":
            metric = message["payload"]["metric"]
            if not metric["metricName"].startswith(("sys.", "process ")):  # of the machine
                found.append([metric["step"], metric["metricName"], float(metric["metricValue"])])
assert len(keys) == 1
"""
DVCLIVE = """
import pathlib
from types import SimpleNamespace
from dvclive.utils import parse_metrics
place = pathlib.Path(folder)
history, _ = parse_metrics(SimpleNamespace(plots_dir=place / "plots", metrics_file=place / "metrics.json"))
for path, rows in history.items():
    name = pathlib.Path(path).relative_to(place / "plots/metrics").as_posix().removesuffix(".tsv")
    found += [[int(row["step"]), name, float(row[pathlib.Path(name).name])] for row in rows]
"""
MLFLOW = """
from mlflow import MlflowClient
client = MlflowClient("file:" + folder)
(experiment,) = client.search_experiments(filter_string="name = 'proof'")
(run,) = client.search_runs([experiment.experiment_id])
assert run.data.params["run.name"] == "trial" and run.info.status == "FINISHED"
assert run.info.run_name == "trial"
for name in run.data.metrics:
    found += [[point.step, name, point.value] for point in client.get_metric_history(run.info.run_id, name)]
"""
SWANLAB = """
import pathlib
from swanlab.sdk.internal.core_python.store import DataStoreReader
from swanlab.sdk.internal.core_python.sync import Record
names = set()
for path in pathlib.Path(folder).glob("run-*/run-*.swanlab"):
    names.add(path.name)
    reader = DataStoreReader()
    reader.open(path)
    for line in reader:
        record = Record()
        record.ParseFromString(line)
        if record.HasField("scalar"):
            found.append([record.scalar.step, record.scalar.key, record.scalar.value.number])
assert len(names) == 1
"""
TRACKIO = """
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_run_records("proof")
assert run["name"] == "trial"
assert SQLiteStorage.get_run_config("proof", "trial")["train.global_batch"] == 32
for row in SQLiteStorage.get_logs("proof", "trial"):
    found += [[row["step"], k, v] for k, v in row.items() if k not in ("step", "timestamp")]
"""
READERS = {
    "aim": AIM,
    "clearml": CLEARML,
    "comet_ml": COMET,
    "dvclive": DVCLIVE,
    "mlflow": MLFLOW,
    "swanlab": SWANLAB,
    "trackio": TRACKIO,
}
ALLOWED = {"MLFLOW_ALLOW_FILE_STORE": "true"}


def read(name: str, folder: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of every point."""
    program = f"import json\nfolder, found = {str(folder)!r}, []\n{READERS[name]}\nprint('FOUND', json.dumps(found))"
    environment = {**os.environ, **ALLOWED, "TRACKIO_DIR": str(folder)}
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return [tuple(point) for point in json.loads(line.removeprefix("FOUND "))]
