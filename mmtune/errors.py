"""The errors that a person can act on, each with its next step and exit code."""

from __future__ import annotations

EXIT_FOLDER = "MMTUNE_LAUNCHED_EXIT"
"""Environment variable with the folder in which every launched process leaves its error for the command that launched
them: a launcher ends with 1 whatever its processes ended with."""


class MmtuneError(Exception):
    """A failure the user can mend: what went wrong, what to do next, and the exit code.

    Attributes:
        message: What, where, and what was expected, in one sentence.
        hint: The next step, often a command to run.
        code: A short name for scripts, such as ``unknown_key``.
        exit_code: The process exit code of the command line contract.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or self.default_code

    default_code = "error"

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        # An error of a worker process arrives whole.
        return type(self), (self.message, self.hint, self.code)


class RecipeError(MmtuneError):
    """The recipe or the command line is wrong (exit 2)."""

    exit_code = 2
    default_code = "recipe"


class DataError(MmtuneError):
    """The input data cannot be used (exit 3)."""

    exit_code = 3
    default_code = "data"


class CapabilityError(MmtuneError):
    """Something is not installed or not on this machine (exit 4)."""

    exit_code = 4
    default_code = "capability"


class ResourceError(MmtuneError):
    """Out of disk, memory or file handles (exit 5)."""

    exit_code = 5
    default_code = "resource"


class DivergedError(MmtuneError):
    """Training produced a non-finite loss or gradient (exit 6)."""

    exit_code = 6
    default_code = "diverged"


class IntegrityError(MmtuneError):
    """A finished folder is damaged, or does not belong to this recipe (exit 7)."""

    exit_code = 7
    default_code = "integrity"


class LockedError(MmtuneError):
    """Another run holds the output folder (exit 8)."""

    exit_code = 8
    default_code = "locked"


class GateError(MmtuneError):
    """A score stayed under the bar that was asked for (exit 9)."""

    exit_code = 9
    default_code = "gate"


class Interrupted(MmtuneError):
    """Stopped by a signal with a resumable state on disk (exit 75)."""

    exit_code = 75
    default_code = "interrupted"
