"""Whether a kernel of keys' gradients sums both at once."""

BOTH = 128
"""Width of heads up to which two sums [N, D] of fp32, N keys of a program, leave registers for the rest."""


def gradients_of(width: int) -> list[dict[str, bool]]:
    """Constants of the launches that give both gradients: of one, or of one for each, which multiplies 5 times instead
    of 4, and reads queries and gradients of outputs twice."""
    if width <= BOTH:
        return [{"OF_KEYS": True, "OF_VALUES": True}]
    return [{"OF_KEYS": True, "OF_VALUES": False}, {"OF_KEYS": False, "OF_VALUES": True}]
