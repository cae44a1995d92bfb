"""Names of `tracking.backends`: Headway's own, and the trackers that Accelerate keeps."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

OWN = ("tensorboard", "prometheus")
KEPT_BY_ACCELERATE = ("aim", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab", "trackio")
"""Trackers of accelerate 1.15 (`accelerate.tracking`), less W&B and TensorBoard, which Headway tells by itself."""


def known(name: str) -> str:
    """The name, if there is such a backend; an Accelerate that has more trackers is asked for the rest."""
    if name in OWN or name in KEPT_BY_ACCELERATE:
        return name
    if name == "wandb":
        rule = "Headway tells W&B by itself, not through Accelerate: tracking.wandb says how"
        raise PydanticCustomError("elsewhere", rule)
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if name not in LOGGER_TYPE_TO_CLASS:
        names = dict.fromkeys((*OWN, *KEPT_BY_ACCELERATE, *sorted(LOGGER_TYPE_TO_CLASS.keys() - {"wandb"})))
        expected = ", ".join(f"'{each}'" for each in names)
        # of the type that literals have, so that the nearest name is found as for them
        raise PydanticCustomError(
            "literal_error", "Input should be one of {expected}", {"expected": expected}
        )
    return name


BackendName = Annotated[
    str,
    AfterValidator(known),
    WithJsonSchema({"anyOf": [{"enum": [*OWN, *KEPT_BY_ACCELERATE]}, {"type": "string"}]}),
]
