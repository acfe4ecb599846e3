"""The live score as its job leaves it: which lists are judged, on what, and what the thresholds do."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from crane_core.config import Runtime
from crane_core.config_file import load_config
from crane_core.errors import EXIT_DATA, EXIT_OK
from crane_core.release.ledger import Ledger
from crane_core.release.registry import open_registry
from crane_core.storage.artifacts import ArtifactStore
from jobs import prune
from jobs.ml import export, live, promote, register
from jobs.stores import open_store
from tests.worlds.jobs import last_line
from tests.worlds.live import write_exported, write_source
from tests.worlds.raw_data import at
from tests.worlds.release_runs import copy_registered, make_run

DAY = timedelta(days=1)
START, END = at("2026-01-10"), at("2026-01-11")
LOG = [
    ("a", "i1", at("2026-01-01")),
    ("b", "i2", at("2026-01-02")),
    ("a", "i3", at("2026-01-09 12:00")),
    ("a", "i2", at("2026-01-10 08:00")),
    ("b", "i1", at("2026-01-10 10:00")),
    ("z", "i3", at("2026-01-10 23:59")),
]
GOOD = {"a": ["i2"], "b": ["i1"]}
BAD = {"a": ["i9"], "b": ["i9"]}
POPULAR = ["i3", "i1"]


class Place:
    """A store with a run of one day, and exports of earlier days."""

    def __init__(self, uri: str, folder: Path) -> None:
        self.uri, self.folder = uri, folder
        self.store: ArtifactStore = open_store(uri)
        (folder / "log").mkdir(parents=True)
        facts = write_source(folder / "log" / "out", LOG, at("2026-01-05"))
        manifest = {"stage": "etl.interactions", "part": "", "fingerprint": "log", "facts": facts}
        artifact = self.store.publish(folder / "log" / "out", manifest)
        self.log = {"status": "done", "fingerprint": "log", "content": artifact.manifest["content"]}

    def export(self, name: str, made: datetime, lists: dict[str, list[str]], **entry: Any) -> None:
        """Publish lists made from events before an instant, and record them for a run of that day.

        Among exports that finished at the same time, the one of the later window is the last.
        """
        config = load_config(None, [f"window.start={made - DAY}", f"window.end={made}"])
        self.store.start_run(name, config)
        write_exported(self.folder / name, lists, POPULAR)
        manifest = {"stage": "ml.export", "part": "", "fingerprint": name, "facts": {}}
        artifact = self.store.publish(self.folder / name, manifest)
        told = {"version": name, "champion_run": name, "shipped_run": name, "model": "crane"}
        told |= {"window_end": made.isoformat(), "finished_at": "2026-01-10T01:00:00+00:00"}
        told |= {"fingerprint": name, "content": artifact.manifest["content"], **entry}
        self.store.record(name, "ml.export", {key: value for key, value in told.items() if value is not None})

    def run(self, *settings: str, run: str = "today", code: int = EXIT_OK) -> dict[str, Any]:
        """Run the job; return the record of the run."""
        if self.store.entry(run, "etl.interactions") is None:
            self.store.record(run, "etl.interactions", self.log)
        pairs = (f"window.start={START}", f"window.end={END}", "evaluate.num_bootstrap=100", *settings)
        flags = [word for pair in pairs for word in ("--set", pair)]
        assert live.main(["--store", self.uri, "--run", run, *flags]) == code
        return self.store.entry(run, "ml.live") or {}


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    uri = str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("s3_uri")
    return Place(uri, tmp_path / "made")


@pytest.fixture
def here(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "store"), tmp_path / "made")


def test_the_lists_of_the_day_before_are_scored(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.export("yesterday", START, GOOD)
    entry = place.run("evaluate.live_min_users=3")
    score = entry["live"]
    assert (score["status"], score["version"], entry["verdict"]) == ("scored", "yesterday", "ok")
    assert (score["from"], score["until"]) == (START.isoformat(), END.isoformat())
    # a and b find their item in a list of their own; z, who is new, saw the popular list, and found i3 at its top.
    assert (score["users"], score["events"], score["covered"]) == (3, 3, pytest.approx(2 / 3))
    assert score["models"]["champion"] == {"recall@20": 1.0, "ndcg@20": 1.0, "hit@20": 1.0}
    # i1, i2 and i3 are equally popular, and lists have two places: a is shown i2, b is shown i1 and i3, z i1 and i2.
    assert score["models"]["recent_popularity"]["recall@20"] == pytest.approx(2 / 3)
    assert score["ratio"] == pytest.approx(1.5)
    artifact = place.store.artifact("today", "ml.live")
    whole = json.loads(artifact.file("live.json").read_text())
    assert whole["models"]["champion"]["recall@20"]["low"] == 1.0
    assert pq.read_table(artifact.file("per_user.parquet")).column("user_id").to_pylist() == ["a", "b", "z"]
    capsys.readouterr()
    place.run("evaluate.live_min_users=3")
    assert last_line(capsys)["status"] == "found"


def test_without_lists_the_artifact_says_why(here: Place) -> None:
    # Lists of the same window know its events, and those of a later one more.
    here.export("same", END, GOOD)
    here.export("later", END + DAY, GOOD)
    entry = here.run()
    assert (entry["live"]["status"], entry["verdict"]) == ("no_export", "unknown")
    assert "2026-01-11" in entry["live"]["reason"]
    assert json.loads(here.store.artifact("today", "ml.live").file("live.json").read_text()) == entry["live"]


def test_lists_that_were_removed_are_named(place: Place) -> None:
    place.export("yesterday", START, GOOD)
    first = place.run()
    place.store.storage.discard(place.store.storage.withdraw("ml.export/yesterday"))
    gone = place.run(run="again")
    assert gone["live"] == {
        "status": "export_gone",
        "reason": "The lists of version yesterday were removed from the store.",
    }
    # What was scored before is not taken for it.
    assert gone["fingerprint"] != first["fingerprint"]


def test_a_window_in_which_nobody_met_anything_new_says_so(here: Place) -> None:
    here.export("yesterday", START, GOOD)
    quiet = [f"window.start={END + 5 * DAY}", f"window.end={END + 6 * DAY}"]
    assert here.run(*quiet)["live"]["status"] == "no_events"


def test_the_last_export_was_in_service(here: Place) -> None:
    here.export("old", START - 3 * DAY, GOOD)
    here.export("yesterday", START, BAD)
    assert here.run(run="one")["live"]["version"] == "yesterday"
    # A rollback exports the older lists again, and they are judged on the new day alone.
    here.export("back", START - 3 * DAY, GOOD, finished_at="2026-01-10T09:00:00+00:00")
    score = here.run(run="two")["live"]
    assert (score["version"], score["from"], score["events"]) == ("back", START.isoformat(), 3)
    # Another model of the store has lists of its own, and a run without a champion has none.
    here.export("other", START, BAD, model="other", finished_at="2026-01-10T10:00:00+00:00")
    here.export("none", START, BAD, version=None, finished_at="2026-01-10T11:00:00+00:00")
    assert here.run(run="three")["live"]["version"] == "back"
    assert here.run("runtime.model_name=other", run="four")["live"]["version"] == "other"


def test_a_long_window_counts_from_the_export_on(here: Place) -> None:
    here.export("before", at("2026-01-09"), GOOD)
    score = here.run(f"window.start={START - 30 * DAY}")["live"]
    assert (score["from"], score["events"]) == ("2026-01-09T00:00:00+00:00", 4)


def test_records_of_earlier_versions_are_read(here: Place) -> None:
    here.export("yesterday", START, GOOD, model=None, window_end=None, shipped_run=None)
    assert here.run()["live"]["window_end"] == START.isoformat()


def test_below_the_threshold_it_warns(here: Place, capsys: pytest.CaptureFixture[str]) -> None:
    here.export("yesterday", START, BAD)
    assert here.run("evaluate.live_min_users=3")["verdict"] == "warn"
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if " WARNING " in line]
    assert "version yesterday" in warning and "0.3333" in warning and "0.6667" in warning
    # Too few users decide nothing.
    assert here.run("evaluate.live_stop=9", run="few")["verdict"] == "unknown"


def test_far_below_it_stops_and_leaves_the_score(here: Place, capsys: pytest.CaptureFixture[str]) -> None:
    here.export("yesterday", START, BAD)
    stops = ("evaluate.live_stop=0.6", "evaluate.live_min_users=1")
    capsys.readouterr()
    entry = here.run(*stops, code=EXIT_DATA)
    told = last_line(capsys)
    assert told["error"] == "DataError" and "evaluate.live_stop is 0.6" in told["found"]
    assert "evaluate.live_stop=null" in told["remedy"]
    assert entry["verdict"] == "stop" and here.store.artifact("today", "ml.live").facts == entry["live"]
    # It is the same when the task is cleared, and thresholds make no other artifact.
    assert here.run(*stops, code=EXIT_DATA)["fingerprint"] == entry["fingerprint"]
    other = here.run("evaluate.live_stop=0.5", "evaluate.live_min_users=1", run="other")
    assert (other["fingerprint"], other["verdict"]) == (entry["fingerprint"], "warn")


def test_a_refit_run_has_none(here: Place) -> None:
    here.run()
    here.store.start_run("today.refit", load_config(None, [], here.store.recorded_config("today")))
    flags = ["--store", here.uri, "--run", "today"]
    assert live.main([*flags, "--refit"]) == EXIT_OK
    assert here.store.entry("today.refit", "ml.live")["status"] == "skipped"


def test_ledger_and_registry_have_the_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And pruning keeps the lists that the next run judges."""
    store = tmp_path / "store"
    (first,) = copy_registered(store, (0.8,), 1)
    assert export.main(first) == EXIT_OK
    second = make_run(store, "run-2", noise=0.3, window_end="2026-03-02")
    assert live.main(second) == register.main(second) == promote.main(second) == EXIT_OK
    score = open_store(str(store)).entry("run-2", "ml.live")["live"]
    assert (score["status"], score["version"], score["shipped_run"]) == ("scored", "1", "run-1")
    entry = Ledger(open_store(str(store)).storage, "crane").history()[-1]
    assert (entry.action, entry.champion, entry.numbers["live"]) == ("promote", "2", score)
    registry = open_registry(Runtime(), str(store))
    metrics = MlflowClient(registry.uri, registry.uri).get_run(registry.version("2").mlflow_run).data.metrics
    assert {name: metrics[f"live/{name}"] for name in ("users", "covered", "new_items")} == {
        name: score[name] for name in ("users", "covered", "new_items")
    }
    # All events of this world are of one instant, so nothing was popular before.
    assert score["ratio"] is None and "live/ratio" not in metrics
    assert metrics["live/champion/recall_at_20"] == score["models"]["champion"]["recall@20"]
    assert metrics["live/recent_popularity/ndcg_at_20"] == score["models"]["recent_popularity"]["ndcg@20"]

    # Version 2 has served for long; all other runs are too old to be kept for their windows.
    assert export.main(second) == EXIT_OK
    late = make_run(store, "run-9", noise=0.3, window_end="2026-03-30")
    assert prune.main(["--store", str(store), "--keep-days", "1"]) == EXIT_OK
    assert live.main(late) == EXIT_OK
    kept = open_store(str(store)).entry("run-9", "ml.live")["live"]
    assert (kept["status"], kept["version"], kept["from"]) == ("scored", "2", "2026-03-29T00:00:00+00:00")


def test_a_first_version_has_no_figures_of_lists(tmp_path: Path) -> None:
    copy_registered(tmp_path / "store", (), 0)
    argv = make_run(tmp_path / "store", "run-1", noise=0.3)
    assert live.main(argv) == register.main(argv) == promote.main(argv) == EXIT_OK
    registry = open_registry(Runtime(), str(tmp_path / "store"))
    metrics = MlflowClient(registry.uri, registry.uri).get_run(registry.version("1").mlflow_run).data.metrics
    assert not [name for name in metrics if name.startswith("live/")]
    entry = Ledger(open_store(str(tmp_path / "store")).storage, "crane").history()[-1]
    assert entry.numbers["live"]["status"] == "no_export"
