"""The errors a user can cause, and the exit code each one ends a job with."""

EXIT_OK = 0
EXIT_UNEXPECTED = 1
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_ARTIFACT = 4


class CraneError(Exception):
    """An error with a message for the person who runs the pipeline.

    Args:
        found: what is wrong, with file names and counts.
        remedy: what to do about it.
    """

    exit_code = EXIT_UNEXPECTED

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(f"{found} Remedy: {remedy}")
        self.found = found
        self.remedy = remedy


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
