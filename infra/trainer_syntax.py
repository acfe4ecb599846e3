"""Hold the TrainingRuntimes among manifests against the API of Kubeflow Trainer: `python trainer_syntax.py FILE...`.

The schemas of Kubernetes know no operator's kinds. What the API's own models drop or refuse, the cluster would too.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime


def main(files: list[Path]) -> int:
    problems: list[str] = []
    for file in files:
        runtimes = [each for each in yaml.safe_load_all(file.read_text()) if each["kind"] == "TrainingRuntime"]
        if not runtimes:
            problems.append(f"{file}: no TrainingRuntime")
        for runtime in runtimes:
            try:
                understood = TrainerV1alpha1TrainingRuntime.from_dict(runtime).to_dict()
            except ValueError as error:
                problems.append(f"{file}: {error}")
            else:
                problems += [f"{file}: TrainingRuntime has no field {name}" for name in _lost(runtime, understood)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def _lost(given: Any, understood: Any, path: str = "") -> Iterator[str]:
    """Paths of what was given and is no longer there."""
    if isinstance(given, dict):
        for key, value in given.items():
            if isinstance(understood, dict) and key in understood:
                yield from _lost(value, understood[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(given, list):
        for index, value in enumerate(given):
            within = isinstance(understood, list) and index < len(understood)
            yield from _lost(value, understood[index] if within else None, f"{path}[{index}]")
    elif given != understood:
        yield path


if __name__ == "__main__":
    raise SystemExit(main([Path(name) for name in sys.argv[1:]]))
