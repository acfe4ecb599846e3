"""Hold a compose file against the Compose specification, and resolve what it names: `python compose_syntax.py FILE`.

`docker compose config` needs Docker; this needs nothing. Beyond the specification: services that others wait for exist,
mounted volumes and files too, and the variables are those of `compose.env.example`.
"""

import re
import sys
from pathlib import Path

import yaml
from compose_spec import PyCompose

VARIABLE = re.compile(r"\$\{(\w+)")


def main(file: Path) -> int:
    text = file.read_text()
    problems: list[str] = []
    # YAML's own merge keys and anchors are resolved by YAML, as Compose does.
    tree = yaml.safe_load(text)
    try:
        PyCompose.from_yaml(yaml.safe_dump(tree)).validate()
    except ValueError as error:
        problems.append(str(error))
    services = tree.get("services", {})
    for name, service in services.items():
        for other in service.get("depends_on", {}):
            if other not in services:
                problems.append(f"{name} waits for {other}, which is no service")
        for volume in service.get("volumes", []):
            source = str(volume).partition(":")[0]
            if source.startswith(".") and not (file.parent / source).exists():
                problems.append(f"{name} mounts {source}, which is not there")
            if not source.startswith((".", "/")) and source not in tree.get("volumes", {}):
                problems.append(f"{name} mounts {source}, which is no volume")
    used = set(VARIABLE.findall(text))
    example = (file.parent / "compose.env.example").read_text()
    offered = set(re.findall(r"(?m)^(\w+)=", example))
    problems += [f"{name} is not in compose.env.example" for name in sorted(used - offered)]
    problems += [f"{name} of compose.env.example is not used" for name in sorted(offered - used)]
    for problem in problems:
        print(f"{file}: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
