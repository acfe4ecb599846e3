"""Parse every Terraform file of a folder, and resolve what they refer to: `python terraform_syntax.py FOLDER`.

A full `terraform validate` needs the provider's schema, which comes from a registry; this needs nothing.
"""

import re
import sys
from pathlib import Path

import hcl2

REFERENCE = re.compile(r"(?<![\w.\"/-])(var|local|data\.\w+|aws_\w+)\.(\w+)")


def main(folder: Path) -> int:
    problems: list[str] = []
    declared: set[str] = set()
    texts: dict[Path, str] = {}
    for path in sorted(folder.glob("*.tf")):
        texts[path] = path.read_text()
        try:
            tree = hcl2.loads(texts[path])
        except Exception as error:  # hcl2 lets its parser's exceptions through.
            problems.append(f"{path}: {str(error).splitlines()[0]}")
            continue
        declared |= {f"var.{_name(name)}" for block in tree.get("variable", []) for name in _keys(block)}
        declared |= {f"local.{_name(name)}" for block in tree.get("locals", []) for name in _keys(block)}
        for kind, prefix in (("resource", ""), ("data", "data.")):
            for block in tree.get(kind, []):
                for type_, named in block.items():
                    declared |= {f"{prefix}{_name(type_)}.{_name(name)}" for name in _keys(named)}
    for path, text in texts.items():
        code = re.sub(r"(?m)#.*$", "", text)
        for match in REFERENCE.finditer(code):
            if match.group() not in declared:
                problems.append(f"{path}: {match.group()} is not declared")
    for problem in problems:
        print(problem, file=sys.stderr)
    if not texts:
        print(f"{folder}: no Terraform file", file=sys.stderr)
    return 1 if problems or not texts else 0


def _keys(block: dict) -> list[str]:
    return [key for key in block if not key.startswith("__")]


def _name(key: str) -> str:
    return key.strip('"')


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
