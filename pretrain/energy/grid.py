"""How much CO2 a kilowatt-hour stands for: a number that the job states, a country's, or the world's average."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from headway.pretrain.errors import JobError

SOURCE = "Ember and Energy Institute, by way of Our World in Data: generation of 2023, whole life cycle"
"""Of the table; its numbers are those that CodeCarbon 3.3 ships, rounded to grams."""

WORLD = 481.0
"""Grams of CO2 equivalent a kWh that the world generated in 2023 (Ember, July 2024, as Statista quotes it)."""

# ISO 3166 code: name, grams of CO2 equivalent a kWh that was generated there in 2023. What is imported, lost on the
# way or bought by certificate is not in it, and hours and regions of a country differ: state a number of your own
# where you know better.
COUNTRIES: dict[str, tuple[str, float]] = {
    "AR": ("Argentina", 354),
    "AT": ("Austria", 111),
    "AU": ("Australia", 549),
    "BE": ("Belgium", 138),
    "BR": ("Brazil", 98),
    "CA": ("Canada", 170),
    "CH": ("Switzerland", 35),
    "CL": ("Chile", 291),
    "CN": ("China", 582),
    "CO": ("Colombia", 260),
    "CZ": ("Czechia", 450),
    "DE": ("Germany", 381),
    "DK": ("Denmark", 152),
    "EG": ("Egypt", 570),
    "ES": ("Spain", 174),
    "FI": ("Finland", 79),
    "FR": ("France", 56),
    "GB": ("United Kingdom", 238),
    "GR": ("Greece", 337),
    "HU": ("Hungary", 204),
    "IE": ("Ireland", 291),
    "IN": ("India", 713),
    "IT": ("Italy", 331),
    "JP": ("Japan", 485),
    "KR": ("South Korea", 431),
    "MX": ("Mexico", 507),
    "NL": ("Netherlands", 268),
    "NO": ("Norway", 30),
    "NZ": ("New Zealand", 113),
    "PL": ("Poland", 662),
    "PT": ("Portugal", 166),
    "RO": ("Romania", 241),
    "SE": ("Sweden", 41),
    "SG": ("Singapore", 471),
    "TH": ("Thailand", 550),
    "TR": ("Turkey", 465),
    "TW": ("Taiwan", 642),
    "US": ("United States", 369),
    "VN": ("Vietnam", 475),
    "ZA": ("South Africa", 708),
}


@dataclass(frozen=True)
class Grid:
    """Carbon intensity of electricity.

    Attributes:
        kg_per_kwh: kilograms of CO2 equivalent.
        source: where the number comes from, with its year.
        place: name of the country; None where it is not known.
    """

    kg_per_kwh: float
    source: str
    place: str | None = None


def find_grid(setting: float | str | None) -> Grid:
    """What `tracking.energy.grid` means.

    Raises:
        JobError: a code that the table does not have.
    """
    if setting is None:
        return Grid(WORLD / 1000, "world average of 2023 (Ember, July 2024)")
    if not isinstance(setting, str):
        return Grid(float(setting), "stated in the job")
    if setting.upper() in COUNTRIES:
        name, grams = COUNTRIES[setting.upper()]
        return Grid(grams / 1000, f"{name}: {SOURCE}", name)
    rule = f"must be kg of CO2 equivalent a kWh, or one of {', '.join(COUNTRIES)}"
    raise JobError("tracking.energy.grid", setting, rule, _nearest(setting))


def _nearest(setting: str) -> str:
    """The code whose name or letters are nearest."""
    names = {name.lower(): code for code, (name, _) in COUNTRIES.items()}
    if found := difflib.get_close_matches(setting.lower(), names, n=1, cutoff=0.6):
        return names[found[0]]
    near = difflib.get_close_matches(setting.upper()[:2], COUNTRIES, n=1, cutoff=0.4)
    return near[0] if near else "a number, e.g. 0.4"
