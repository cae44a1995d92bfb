"""The front matter of a model card, as Hugging Face's hub reads it (hub-docs, modelcard.md).

What only a person can choose or know (license, language, identifiers of data sets on the hub) is left out, and a
comment says so.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from headway.pretrain.records.card.public import public_name
from headway.pretrain.records.card.story import Story
from headway.pretrain.records.metrics import plain

TASKS = {
    "causal": ("text-generation", "Causal language modelling"),
    "prefix": ("text-generation", "Prefix language modelling"),
    "masked": ("fill-mask", "Masked language modelling"),
    "spans": ("text2text-generation", "Span corruption"),
    "ul2": ("text2text-generation", "Mixture of denoisers"),
    "pairs": ("text2text-generation", "Sequence to sequence"),
    "classify": ("image-classification", "Image classification"),
    "mae": ("image-feature-extraction", "Masked autoencoding"),
}
"""Task identifiers of the hub, by objective, and words for people."""

FOR_PEOPLE = """\
# What no record of the run tells, and only you can: add
#   license: ...      language: ...      datasets: [identifiers on the hub]
"""


def front_matter(story: Story, library: str) -> str:
    """The block between `---` and `---`, with both.

    Args:
        library: `headway`, or `transformers` for an exported folder.
    """
    task, _ = TASKS[story.setting("objective.name")]
    data: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": task,
        "tags": tags(story),
        "model-index": [{"name": story.name, "results": results(story)}] if results(story) else None,
        "metrics": sorted({result["metrics"][0]["type"] for result in results(story)}) or None,
        "co2_eq_emissions": emissions(story),
    }
    data = {name: value for name, value in data.items() if value is not None}
    text = yaml.safe_dump(plain(data), sort_keys=False, allow_unicode=True, width=10**6)
    return f"---\n{text}{FOR_PEOPLE}---\n"


def tags(story: Story) -> list[str]:
    """What the model is, in words that people look for."""
    found = ["headway", story.setting("model.family"), story.setting("objective.name")]
    if (mechanism := story.setting("model.attention.mechanism")) and mechanism != "dense":
        found.append(f"{mechanism}-attention")
    if story.setting("model.experts.count"):
        found.append("mixture-of-experts")
    if distils(story):
        found.append("distillation")
    return list(dict.fromkeys(str(tag) for tag in found if tag))


def distils(story: Story) -> bool:
    """Whether something is learned from a teacher."""
    has = story.setting("objective.distill.teacher") or story.setting("objective.distill.cache")
    return bool(has) and story.setting("objective.distill.enabled") is not False


def measures(story: Story) -> list[tuple[str, float]]:
    """Held-out measurements of these very weights: (key, value)."""
    if not story.whole or not (story.weights is None or story.weights.measured):
        return []
    found = {}
    row = story.rows[-1] if story.rows else {}
    for key, value in {**row, **story.known}.items():
        if not (key.startswith("heldout_") or key == "bits_per_byte"):
            continue
        if isinstance(value, int | float) and math.isfinite(value):
            found[key] = float(value)
    return sorted(found.items())


def results(story: Story) -> list[dict[str, Any]]:
    """Entries of the model index, one for each measurement."""
    task, words = TASKS[story.setting("objective.name")]
    names = [public_name(source) for source in sources(story)]
    name = ", ".join(names) + " (held out)"
    kind = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(names)).strip("-.") or "unknown"
    return [
        {
            "task": {"type": task, "name": words},
            "dataset": {"name": name, "type": kind, "split": "heldout"},
            "metrics": [
                {
                    "type": key.removeprefix("heldout_"),
                    "value": value,
                    "name": key.replace("heldout_", "held-out ").replace("_", " "),
                }
            ],
        }
        for key, value in measures(story)
    ]


def sources(story: Story) -> list[str]:
    """Paths of the sources as the job names them."""
    return [
        source["path"] if isinstance(source, dict) else str(source)
        for source in story.setting("data.sources")
    ]


def emissions(story: Story) -> dict[str, Any] | None:
    """CO2 in grams, as the hub has it; None where no energy was counted."""
    energy = story.known.get("energy")
    if not energy:
        return None
    machine = story.machine or {}
    begun = story.setting("train.start_from") or story.imported
    hardware = f"{machine['world']} x {machine['device']}" if machine.get("device") else "unknown"
    return {
        "emissions": float(f"{1000 * energy['kg_co2e']:.4g}"),
        "source": f"Headway; {energy['source']}; grid: {energy['grid']}; PUE {energy['pue']:g}",
        "training_type": "continued pre-training" if begun else "pre-training",
        "geographical_location": energy["place"] or "unknown",
        "hardware_used": hardware,
    }
