"""The errors a user can cause, the exit code each one ends a job with, and their form as data."""

from __future__ import annotations

from collections.abc import Mapping

EXIT_OK = 0
EXIT_UNEXPECTED = 1
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_ARTIFACT = 4


class CraneError(Exception):
    """An error with a message for the person who runs the pipeline.

    Args:
        found: what is wrong, with file names and counts.
        remedy: what to do about it: the command to type, or the values that are allowed.
    """

    exit_code = EXIT_UNEXPECTED

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found, remedy)
        self.found = found
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.found} Remedy: {self.remedy}"

    @property
    def name(self) -> str:
        """The name of the class."""
        return type(self).__name__

    def as_dict(self) -> dict[str, str]:
        """Return `error`, the name of the class, `found` and `remedy`."""
        return {"error": self.name, "found": self.found, "remedy": self.remedy}


class ConfigError(CraneError):
    """The configuration or the command line is wrong."""

    exit_code = EXIT_CONFIG


class DataError(CraneError):
    """The raw data cannot be used."""

    exit_code = EXIT_DATA


class ArtifactError(CraneError):
    """An artifact of an earlier stage is missing, damaged or not the one expected."""

    exit_code = EXIT_ARTIFACT


class TrainingError(CraneError):
    """Training cannot go on: the loss is not finite, or it does not fit in memory."""


class TrainingStopped(TrainingError):
    """Somebody asked a training to stop; it left a checkpoint behind."""


class UnexpectedError(CraneError):
    """An exception of any other class, under the name of that class.

    Args:
        found: its text.
        remedy: where its traceback is.
        kind: the name of its class.
    """

    def __init__(self, found: str, remedy: str, kind: str = "Exception") -> None:
        super().__init__(found, remedy)
        self.kind = kind

    @property
    def name(self) -> str:
        return self.kind


MOST_CHARACTERS = 2000
"""Characters kept of an unexpected exception's text. Spark's text holds the stack of the JVM, as the traceback does."""

_KINDS = {each.__name__: each for each in (CraneError, ConfigError, DataError, ArtifactError, TrainingError)}
_KINDS[TrainingStopped.__name__] = TrainingStopped


def error_of(exception: Exception, remedy: str) -> CraneError:
    """Return a `CraneError` as it is, and any other exception as an `UnexpectedError`.

    Args:
        exception: what was raised.
        remedy: of an unexpected one: where its traceback is.
    """
    if isinstance(exception, CraneError):
        return exception
    text = str(exception).strip() or repr(exception)
    found = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ..."
    return UnexpectedError(found, remedy, type(exception).__name__)


def error_from(data: Mapping[str, object]) -> CraneError | None:
    """Return the error that `CraneError.as_dict` has described; None where the mapping describes none."""
    name, found, remedy = (data.get(key) for key in ("error", "found", "remedy"))
    if not (isinstance(name, str) and isinstance(found, str) and isinstance(remedy, str)):
        return None
    kind = _KINDS.get(name)
    return kind(found, remedy) if kind else UnexpectedError(found, remedy, name)
