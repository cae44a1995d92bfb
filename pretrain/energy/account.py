"""Energy and carbon of a whole run, from its own records.

metrics.jsonl   `joules` and `watts` of every step, each step once: what was used since the step before it ended, also
                by an evaluation or a checkpoint between them
events.jsonl    `meter`: what measures, at each start. `start` and `resume`: `lost_joules` of steps that a killed
                process had done beyond its last checkpoint and that were done again. `energy`: what the end used
                after the last step.

kWh = joules / 3.6e6,   kg CO2e = kWh x PUE x intensity of the grid (Lacoste et al. 2019; Henderson et al. 2020)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from headway.pretrain.energy.grid import find_grid

JOULES_PER_KWH = 3.6e6


def lost(rows: Sequence[Mapping[str, Any]], start_step: int) -> dict[str, Any]:
    """What is told when a run goes on at a step: steps beyond it that were done for nothing, and their energy."""
    gone = [row for row in rows if row["step"] > start_step]
    if not gone:
        return {}
    joules = [number for row in gone if (number := _number(row.get("joules"))) is not None]
    return {"lost_steps": len(gone), **({"lost_joules": sum(joules)} if joules else {})}


def account(
    rows: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Energy and carbon of a run; None if none of its steps was measured.

    Args:
        rows: of metrics.jsonl.
        events: of events.jsonl.
        settings: the job's, by dotted name.
    Returns:
        `joules` of everything, of which `step_joules` steps that count, `lost_joules` steps that were done twice and
        `end_joules` what came after the last one; `kwh`; `kg_co2e`; `watts`, mean over steps; `joules_per_token` of
        steps; `source`; `estimate`; `notes`; `pue`; `kg_per_kwh`; `grid`, where that comes from; `place`;
        `steps_measured`.
    """
    measured = [row for row in rows if _number(row.get("joules")) is not None]
    if not measured:
        return None
    steps = sum(row["joules"] for row in measured)
    seconds = sum(row["joules"] / row["watts"] for row in measured if _number(row.get("watts")))
    tokens = sum(_number(row.get("tokens")) or 0 for row in measured)
    gone = _total(events, "lost_joules")
    end = sum(_number(e.get("joules")) or 0.0 for e in events if e.get("kind") == "energy")
    total = steps + gone + end
    pue = float(settings.get("tracking.energy.pue", 1.0))
    grid = find_grid(settings.get("tracking.energy.grid"))
    meters = [event for event in events if event.get("kind") == "meter"]
    kwh = total / JOULES_PER_KWH
    return {
        "joules": total,
        "step_joules": steps,
        "lost_joules": gone,
        "end_joules": end,
        "kwh": kwh,
        "kg_co2e": kwh * pue * grid.kg_per_kwh,
        **({"watts": steps / seconds} if seconds else {}),
        **({"joules_per_token": steps / tokens} if tokens else {}),
        "source": "; then ".join(dict.fromkeys(str(m.get("source")) for m in meters)) or "not recorded",
        "estimate": any(bool(m.get("estimate")) for m in meters),
        "notes": list(dict.fromkeys(str(note) for m in meters for note in m.get("notes") or [])),
        "pue": pue,
        "kg_per_kwh": grid.kg_per_kwh,
        "grid": grid.source,
        "place": grid.place,
        "steps_measured": len(measured),
    }


def in_words(energy: Mapping[str, Any]) -> str:
    """One line: `0.012 kWh, 0.0058 kg CO2e (estimate: ...)`."""
    return f"{energy['kwh']:.3g} kWh, {energy['kg_co2e']:.3g} kg CO2e ({energy['source']})"


def _total(events: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(_number(event.get(key)) or 0.0 for event in events)


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None
