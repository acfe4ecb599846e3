"""Versions of two models: the gate compares the evaluation twins, and the shipped models are served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from crane_core.config import Runtime
from crane_core.errors import ArtifactError
from crane_core.release.ledger import Ledger
from crane_core.release.registry import Registry, open_registry
from jobs.commands.query import verify_ledger
from jobs.ml import export, promote, register, repair, report, rollback
from jobs.stores import open_store
from tests.worlds.mlflow_tables import copy_tables
from tests.worlds.release_runs import damage, make_run, ship, user_ids


class Place:
    """A store, and its jobs in this process."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        copy_tables(root)
        self.root = root
        self._capsys = capsys

    def job(self, module, argv: list[str], code: int = 0) -> dict:
        self._capsys.readouterr()
        assert module.main(argv) == code
        return json.loads(self._capsys.readouterr().out.splitlines()[-1])

    @property
    def registry(self) -> Registry:
        return open_registry(Runtime(), str(self.root))

    def numbers(self) -> dict:
        """Numbers of the last entry of the ledger."""
        return Ledger(open_store(str(self.root)).storage, "crane").history()[-1].numbers


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place(tmp_path / "store", capsys)


def test_the_gate_compares_twins(place: Place) -> None:
    """A shipped champion that has seen the judged window would beat every challenger."""
    first = ship(make_run(place.root, "run-1", noise=0.8), noise=0.0)
    assert place.job(register, first)["shipped_run"] == "run-1.refit"
    assert place.job(promote, first)["decision"] == "promoted"
    second = ship(make_run(place.root, "run-2", noise=0.3, window_end="2026-03-02"), noise=3.0)
    place.job(register, second)
    assert place.job(promote, second)["decision"] == "promoted"
    measured = place.numbers()["standings"]
    assert {each["model"] for each in measured.values()} == {"twin"}
    evaluated = open_store(str(place.root)).artifact("run-1", "ml.evaluate").facts["models"]["crane"]
    # The world is the same in both windows, so the champion's twin repeats its figures there.
    assert measured["champion"]["recall@20"] == pytest.approx(evaluated["recall@20"]["mean"], abs=1e-6)


def test_a_champion_without_a_twin_is_judged_by_what_it_serves(place: Place) -> None:
    first = make_run(place.root, "run-1", noise=0.3)
    place.job(register, first)
    assert place.job(promote, first)["decision"] == "promoted"
    second = ship(make_run(place.root, "run-2", noise=0.9, window_end="2026-03-02"), noise=0.0)
    place.job(register, second)
    assert place.job(promote, second)["decision"] == "refused"
    assert {role: each["model"] for role, each in place.numbers()["standings"].items()} == {
        "challenger": "twin",
        "champion": "shipped",
    }


def test_the_shipped_model_is_tested_and_exported(place: Place) -> None:
    argv = ship(make_run(place.root, "run-1", noise=0.3, num_untrained=3), noise=0.5)
    place.job(register, argv)
    place.job(promote, argv)
    entry = place.job(export, argv)
    assert (entry["champion_run"], entry["shipped_run"]) == ("run-1", "run-1.refit")
    store = open_store(str(place.root))
    shipped = store.artifact("run-1.refit", "etl.interactions")
    met = pq.read_table(shipped.file("interactions"))
    users = pq.read_table(shipped.file("users"))["user_id"].to_pylist()
    seen = {
        (users[user], f"item-{item}")
        for user, item in zip(met["user_idx"].to_pylist(), met["item_idx"].to_pylist(), strict=True)
    }
    lists = pq.read_table(store.artifact("run-1", "ml.export").file("recommendations")).to_pylist()
    assert {row["user_id"] for row in lists} == set(user_ids())
    assert not seen & {(row["user_id"], row["item_id"]) for row in lists}


def test_the_page_says_which_model_its_figures_are_of(place: Place) -> None:
    plain = make_run(place.root, "run-1", noise=0.5)
    both = ship(make_run(place.root, "run-2", noise=0.3), noise=0.5)
    pages = []
    for argv in (plain, both):
        for module in (register, promote, export):
            place.job(module, argv)
        pages.append(Path(place.job(report, argv)["report"]).read_text())
    assert 'made by run <span class="mono">run-2.refit</span>' in pages[1] and "evaluation twin" not in pages[0]
    assert pages[1].count('<td class="text">twin</td>') == 1 and ">shipped</td>" in pages[1]
    assert "ml.train, shipped model" in pages[1] and "shipped model" not in pages[0]


def test_a_damaged_twin_is_not_judged(place: Place) -> None:
    argv = ship(make_run(place.root, "run-1", noise=0.3), noise=0.3)
    place.job(register, argv)
    (stored,) = (path for path in (place.root / "mlartifacts").rglob("checksums.json") if path.parent.name == "twin")
    stored.write_text("{}")
    assert "its checksums are not those that were registered" in place.job(promote, argv, code=4)["found"]


def twin_of(place: Place, number: str) -> Path:
    """The stored twin of a version; the registry itself gives a copy."""
    (folder,) = place.root.glob(f"mlartifacts/**/{place.registry.version(number).mlflow_run}/artifacts/twin")
    return folder


def champions(place: Place) -> list[list[str]]:
    """Make version 2 champion after version 1, both with twins; return the flags of their runs."""
    made = [
        ship(make_run(place.root, f"run-{number}", noise, window_end=f"2026-03-0{number}"), noise=0.3)
        for number, noise in ((1, 0.8), (2, 0.3))
    ]
    for argv in made:
        place.job(register, argv)
        assert place.job(promote, argv)["decision"] == "promoted"
    return made


def test_the_page_in_mlflow_names_the_served_run_and_the_twin(place: Place) -> None:
    champions(place)
    page = MlflowClient(place.registry.uri).get_model_version("crane", "2").description
    assert "Served is the model of run `run-2.refit`" in page
    assert "| challenger (version 2, evaluation twin) |" in page and "| champion (version 1, evaluation twin) |" in page


@pytest.mark.parametrize("harm", ["changed", "removed", "without_a_file"])
def test_a_champion_whose_twin_is_gone_is_found_and_replaced(place: Place, harm: str) -> None:
    """It could not be compared with any challenger."""
    champions(place)
    assert verify_ledger(open_store(str(place.root)), Runtime())["champion"] == "2"
    twin = twin_of(place, "2")
    if harm == "changed":
        damage(twin / "items.parquet")
    elif harm == "removed":
        shutil.rmtree(twin)
    else:
        (twin / "items.parquet").unlink()
    with pytest.raises(ArtifactError, match="The champion cannot be served or judged"):
        verify_ledger(open_store(str(place.root)), Runtime())
    repaired = place.job(repair, ["--store", str(place.root)])
    assert (repaired["status"], repaired["champion"]) == ("repaired", "1")
    assert verify_ledger(open_store(str(place.root)), Runtime())["champion"] == "1"


def test_a_challenger_of_a_champion_without_its_twin_is_judged_as_the_first_one(place: Place) -> None:
    champions(place)
    shutil.rmtree(twin_of(place, "2"))
    argv = ship(make_run(place.root, "run-3", noise=0.1, window_end="2026-03-03"), noise=0.3)
    place.job(register, argv)
    assert place.job(promote, argv)["decision"] == "promoted"
    assert set(place.numbers()["standings"]) == {"challenger"} and "its twin" in place.numbers()["lost"]


def test_a_version_whose_refit_run_was_removed_is_no_way_back(place: Place) -> None:
    champions(place)
    shutil.rmtree(place.root / "runs" / "run-1.refit")
    store = ["--store", str(place.root)]
    assert "'run-1.refit'" in place.job(rollback, [*store, "--to", "1"], code=4)["found"]
    place.job(rollback, store, code=4)
    shutil.rmtree(twin_of(place, "2"))
    assert place.job(repair, store)["champion"] is None
