"""Turn what a job prints into the return value of its task, or an exception.

The last line that a job prints on stdout is a JSON object. It holds `stage` and the result, or after an error `stage`,
`error`, `found` and `remedy`. A job that was killed prints none.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from typing import Any

from airflow.sdk.exceptions import AirflowException

FINAL_EXIT_CODES = {2: "configuration", 3: "data", 4: "artifact"}
ERROR_KEYS = ("stage", "error", "found", "remedy")


class FinalJobError(AirflowException):
    """A job ended with a configuration, data or artifact error, with which every further try would end too."""


def last_object(lines: Sequence[str], *keys: str) -> dict[str, Any] | None:
    """Return the last JSON object among log lines that has all the keys, None where there is none."""
    for line in reversed(lines):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if all(key in found for key in keys):
                return found
    return None


def returned(result: dict[str, Any], name: str | None) -> Any:
    """Return the value of that name from a job's result, or all plain values where no name is given.

    Tables of figures belong in the store, not in Airflow's database.
    """
    if name:
        return result[name]
    return {key: value for key, value in result.items() if not isinstance(value, (dict, list))}


def failure(job: str, code: int, lines: Sequence[str]) -> AirflowException:
    """Return the exception for a job that failed, with the error that it printed or else its last line.

    Args:
        job: `<group>.<stage>`.
        code: the exit code; -n stands for signal n.
        lines: what the job has written, in order.

    Returns:
        A `FinalJobError` where the same try would fail again: exit code 2, 3 or 4.
    """
    error = last_object(lines, *ERROR_KEYS)
    if error:
        reason = f"{error['error']}: {error['found']} Remedy: {error['remedy']}"
    else:
        written = [line.strip() for line in lines if line.strip()]
        reason = f"the last line is {written[-1]!r}" if written else "it wrote nothing"
    if code in FINAL_EXIT_CODES:
        return FinalJobError(f"jobs.{job} ended with a {FINAL_EXIT_CODES[code]} error: {reason}")
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return AirflowException(f"jobs.{job} {ended}: {reason}")
