"""What is known of an engine and a feature."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Cell(NamedTuple):
    """Whether an engine has a feature.

    Attributes:
        status: tested here; supported, but on devices that no test has seen; refused.
        why: of what is not tested, the reason.
    """

    status: Literal["tested", "supported", "refused"]
    why: str = ""


TESTED = Cell("tested")


def supported(why: str) -> Cell:
    """It should work; `why` says what it was not tried on."""
    return Cell("supported", why)


def refused(why: str) -> Cell:
    """A job that asks for it is refused, with this reason."""
    return Cell("refused", why)
