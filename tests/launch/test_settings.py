"""`headway config`."""

import json
from pathlib import Path

from headway.launch.settings import schema, show


def test_the_shipped_schema_is_the_jobs(capsys):
    shipped = Path(__file__).parents[2] / "configs/schema.json"
    assert json.loads(shipped.read_text()) == schema(), "headway config schema > configs/schema.json"


def test_show_names_origins_and_settings_without_effect(capsys):
    show(["gpt/tiny"], ["schedule.name=constant", "schedule.decay=0.3"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "command line" in lines["schedule.decay"]
    assert "no effect: only wsd" in lines["schedule.decay"]
    assert "gpt/tiny" in lines["model.layers"]
    assert "default" in lines["optimizer.eps"]
