"""Run backfills through their command lines: the plan, its execution, and the files that neither may touch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from crane_core.config_file import load_config
from crane_core.errors import EXIT_ARTIFACT, EXIT_CONFIG, EXIT_OK
from crane_core.stages import STAGES
from jobs.backfill import check, content, etl, plan, train
from jobs.etl import interactions
from jobs.stores import open_store
from tests.worlds.raw_data import write_items, write_log, write_vectors

DAYS = ("2026-01-20", "2026-01-21")
SETTINGS = {
    "etl.validation_days": "2",
    "etl.test_days": "2",
    "refine.num_steps": "2",
    "refine.embedding_dim": "4",
    "knn.k": "2",
    "knn.num_shards": "2",
    "runtime.num_threads": "1",
}


class Backfill:
    """One backfill over two days, and its jobs."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self._capsys = capsys
        raw = root / "raw"
        events = [
            (f"u{user}", f"i{(user * 3 + step) % 12}", f"2026-01-{9 + step:02d} 10:00")
            for user in range(12)
            for step in range(13)
        ]
        write_log(raw, events)
        write_items(raw, [(f"i{n}", f"Item {n}") for n in range(16)])
        write_vectors(raw, "text", [(f"i{n}", [float(n % 4), 1.0, float(n)]) for n in range(16)])
        self.settings = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]

    def flags(self, *stages: str) -> list[str]:
        windows = [f"{day}T00:00:00+00:00/2026-01-{int(day[-2:]) + 1}T00:00:00+00:00" for day in DAYS]
        return ["--store", str(self.root), *self.settings, "--windows", *windows, "--stages", *stages]

    def job(self, module, argv: list[str], code: int = EXIT_OK) -> dict:
        self._capsys.readouterr()
        assert module.main(argv) == code
        captured = self._capsys.readouterr()
        lines = captured.out.splitlines()
        self.planned = [
            dict(word.split("=", 1) for word in line.partition(" plan ")[2].split())
            for line in captured.err.splitlines()
            if " plan day=" in line
        ]
        return json.loads(lines[-1]) if lines else {}

    def content(self) -> dict[str, bytes]:
        """Every file of the store but its scratch."""
        return {
            str(path.relative_to(self.root)): path.read_bytes()
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and ".scratch" not in path.parts
        }


@pytest.fixture
def backfill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Backfill:
    return Backfill(tmp_path, capsys)


@pytest.mark.spark
def test_what_a_dry_run_says_is_what_a_run_makes(spark: SparkSession, backfill: Backfill) -> None:
    # A scheduled run has been over the first day already: its artifact is found, whatever the run is called.
    window = ["--set", "window.start=2026-01-20", "--set", "window.end=2026-01-21"]
    scheduled = ["--store", str(backfill.root), "--run", "scheduled", *backfill.settings, *window]
    assert interactions.main(scheduled) == EXIT_OK
    before = backfill.content()
    argv = backfill.flags("ml.graph")
    dry = backfill.job(plan, [*argv, "--dry-run"])
    assert (dry["found"], dry["make"], dry["days"]) == (1, 13, [])
    assert backfill.content() == before
    planned = backfill.planned
    stages = ["etl.interactions", "etl.features", "etl.profiles", "ml.refine", "ml.knn", "ml.knn", "ml.graph"]
    assert [(step["day"], step["stage"]) for step in planned] == [(day, stage) for day in DAYS for stage in stages]
    assert [step["part"] for step in planned if step["stage"] == "ml.knn"] == ["0", "1"] * 2
    assert [step["state"] for step in planned] == ["found"] + ["make"] * 13
    # A step has its fingerprint if all its inputs are made.
    assert [step["fingerprint"] != "None" for step in planned] == [True, True, *[False] * 5, True, *[False] * 6]

    backfill.job(check, argv, code=EXIT_ARTIFACT)
    assert backfill.job(plan, argv)["days"] == list(DAYS)
    made = {}
    for day in DAYS:
        for module in (etl, content):
            done = backfill.job(module, [*argv, "--part", day])
            made[day] = made.get(day, 0) + done["done"]
    assert made == {DAYS[0]: 6, DAYS[1]: 7}
    assert backfill.job(check, argv)["found"] == 14
    store = open_store(str(backfill.root))
    for step in planned:
        entry = store.entry(step["run"], STAGES[step["stage"]].label(step["part"]))
        assert entry is not None and entry["status"] == {"found": "found", "make": "done"}[step["state"]], step
        if step["fingerprint"] != "None":
            assert entry["fingerprint"] == step["fingerprint"]
    assert sorted({step["run"] for step in planned} | {"scheduled"}) == store.run_ids()

    # Nothing is left to make, and a second run makes nothing.
    assert backfill.job(plan, argv)["days"] == []
    assert backfill.job(etl, [*argv, "--part", DAYS[0]])["done"] == 0


def test_a_stage_brings_along_what_it_reads(backfill: Backfill) -> None:
    backfill.job(plan, [*backfill.flags("etl.profiles"), "--dry-run", "--train"])
    refitted = [step["stage"] for step in backfill.planned if step["run"].endswith(".refit")]
    stages = [(step["day"], step["stage"]) for step in backfill.planned if not step["run"].endswith(".refit")]
    daily = ["etl.interactions", "etl.features", "etl.profiles"]
    assert [stage for day, stage in stages if day == DAYS[0]] == daily
    # Training is for the last day alone.
    assert [stage for day, stage in stages if day == DAYS[1]] == [
        *daily,
        *("ml.refine", "ml.knn", "ml.knn", "ml.graph", "ml.behaviour", "ml.train", "ml.evaluate", "ml.register"),
    ]
    assert refitted == [*daily, "ml.refine", "ml.knn", "ml.knn", "ml.graph", "ml.behaviour", "ml.train"]
    backfill.job(plan, [*backfill.flags("etl.profiles"), "--dry-run", "--train", "--set", "etl.refit=false"])
    assert not [step for step in backfill.planned if step["run"].endswith(".refit")]


@pytest.mark.slow
@pytest.mark.spark
def test_a_trained_day_is_shipped_too(spark: SparkSession, backfill: Backfill) -> None:
    fast = ("train.num_epochs=2", "lightgcn.embedding_dim=4", "evaluate.num_bootstrap=100", "runtime.backfill=true")
    argv = [*backfill.flags(), "--train", *(word for setting in fast for word in ("--set", setting))]
    assert backfill.job(plan, argv)["days"] == [DAYS[1]]
    planned = backfill.planned
    for module in (etl, content, train):
        backfill.job(module, [*argv, "--part", DAYS[1]])
    backfill.job(check, argv)
    store = open_store(str(backfill.root))
    (run,) = {step["run"] for step in planned if step["stage"] == "ml.register"}
    registered = store.entry(run, "ml.register")
    assert registered is not None and registered["alias"] is None and registered["shipped_run"] == f"{run}.refit"
    config = load_config(None, [], store.recorded_config(f"{run}.refit"))
    assert config.choices is not None and config.etl.split == "none"
    # Nothing is made again, and the choices stay.
    for module in (etl, content, train):
        assert backfill.job(module, [*argv, "--part", DAYS[1]])["done"] == 0
    assert load_config(None, [], store.recorded_config(f"{run}.refit")) == config
    assert backfill.job(plan, argv)["make"] == 0


def test_wrong_flags(backfill: Backfill) -> None:
    argv = backfill.flags("etl.features")
    backfill.job(etl, [*argv, "--part", "2026-01-25"], code=EXIT_CONFIG)
    backfill.job(plan, [word.replace("/", "-") if "T00" in word else word for word in argv], code=EXIT_CONFIG)
    backfill.job(plan, [*argv, "--set", "etl.k_core=no"], code=EXIT_CONFIG)
    backfill.job(plan, [*argv, "--set", "etl.base_run=previous"], code=EXIT_CONFIG)
