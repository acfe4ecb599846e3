"""Start the parts that are asked for: see `tests/bench/gpu.sh`."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

TOTAL = 480
"""Seconds of a whole run."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, on the CPU and in Triton's interpreter")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts only")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for everything together")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="of the random inputs")
    args = parser.parse_args()
    # Triton reads it when its kernels are first imported.
    os.environ.pop("TRITON_INTERPRET", None)
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    from tests.bench.gpu.driver import Settings, run_all
    from tests.bench.gpu.parts import PARTS
    from tests.bench.gpu.report import write

    unknown = set(args.only or ()) - {part.name for part in PARTS}
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}: choose among {', '.join(part.name for part in PARTS)}")
    parts = [part for part in PARTS if not args.only or part.name in args.only]
    args.out.mkdir(parents=True, exist_ok=True)
    facts = circumstances(args.rehearse) | {"seed": args.seed}

    def done(results: list[dict[str, Any]]) -> None:
        write(facts | {"parts": results}, args.out)

    with tempfile.TemporaryDirectory() as work:
        settings = Settings("cpu" if args.rehearse else "cuda", args.seed, Path(work))
        results = run_all(parts, settings, args.seconds, done)
    print((args.out / "gpu.md").read_text())
    # A start that failed has been tried again in another way.
    return int(any(result["status"] != "ok" for result in results[1:]) or results[-1]["status"] != "ok")


def circumstances(rehearsal: bool) -> dict[str, Any]:
    """Return the card, its driver, the versions, the date and the command; JSON values. It does not touch CUDA."""
    found = {
        "card": f"none, a rehearsal on {platform.machine()}",
        "driver": "none",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "tests/bench/gpu.sh " + " ".join(sys.argv[1:]),
        "versions": {"python": platform.python_version()}
        | {name: known(name) for name in ("torch", "triton", "numpy")},
    }
    if not rehearsal:
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader", "--id=0"]
        try:
            ended = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
            name, memory, driver = (field.strip() for field in ended.stdout.split(","))
            found |= {"card": f"{name}, {memory}", "driver": driver}
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            found |= {"card": f"unknown: {type(error).__name__}", "driver": "unknown"}
    return found


def known(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    raise SystemExit(main())
