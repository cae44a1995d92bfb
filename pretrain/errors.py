"""Errors that a person can act on: every one becomes a single clear message and an exit code.

Exit codes: 2 the job or the command line is wrong; 70 a fault that the log names; 75 saved, start me again.
"""


class HeadwayError(Exception):
    """A fault that the message names in full; the command line prints it without a traceback."""

    exit_code = 70


class JobError(HeadwayError):
    """A job or a command line that cannot be carried out.

    Args:
        field: dotted name of the setting or argument, as the user wrote it.
        value: what was given.
        rule: what must hold.
        nearest: the nearest legal choice, if there is one.
    """

    exit_code = 2

    def __init__(self, field: str, value: object, rule: str, nearest: object = None) -> None:
        self.field, self.value, self.rule, self.nearest = field, value, rule, nearest
        hint = "" if nearest is None else f" Nearest legal choice: {nearest}."
        super().__init__(f"{field} = {value!r}: {rule.rstrip('.')}.{hint}")


class DataError(HeadwayError):
    """Input that is missing, empty, malformed or does not belong together; names the file and the line."""

    exit_code = 2


class CheckpointError(HeadwayError):
    """A checkpoint that cannot be read or written; names the file and what was found in it."""


class FencedError(CheckpointError):
    """Another start of this run has taken over its folder; names that start."""


class NonFiniteError(HeadwayError):
    """The loss or the gradient is not finite; names the step and the samples of the batch."""


class LedgerError(HeadwayError):
    """A run's records do not show that every sample was used exactly once; names the first step and its samples."""


class DivergenceError(HeadwayError):
    """Ranks that should hold equal bits do not; names ranks, tensors and the step."""


class StartError(HeadwayError):
    """The ranks of a run did not find each other; names the ranks that are missing, or the master."""


class LostRanksError(HeadwayError):
    """A collective failed; names the step, this rank and the ranks and hosts that do not answer."""


class Interrupted(HeadwayError):
    """The run was asked to stop (signal, preemption), has saved its state and can be started again."""

    exit_code = 75
