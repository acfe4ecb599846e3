"""`crane plan`: its formulas by hand, its constants against measured runs that they were not fitted to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from crane_core.capacity import FORMS, TERMS, WORK, Size, estimate, fit, load_constants, recommend
from crane_core.config_file import preset_names
from crane_core.errors import ConfigError
from jobs import cli

HELD_OUT = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "bench" / "results" / "capacity_held_out.jsonl").read_text().splitlines()
]
SIZE = Size(users=1000, items=200, interactions=50_000, dims=(30, 10), refined_dim=8, embedding_dim=16, k=5)


def test_terms_by_hand() -> None:
    values = {name: term(SIZE) for name, term in TERMS.items()}
    assert values["4 items dims"] == 4 * 200 * 40
    assert values["4 users dims"] == 4 * 1000 * 40
    assert values["4 (users + items) (modalities + 1) refined_dim"] == 4 * 1200 * 3 * 8
    assert values["8 items k"] == 8 * 200 * 5
    assert values["4 (users + items) embedding_dim"] == 4 * 1200 * 16
    assert values["4 users_ranked_at_a_time items"] == 4 * 1000 * 200
    assert values["users num_recommendations"] == 1000 * 50
    assert values["items num_similar"] == 200 * 20
    assert values["interactions steps"] == 50_000 * 25
    forms = {term for forms in FORMS.values() for terms in forms.values() for term in terms}
    assert forms | set(WORK.values()) == set(TERMS)


def test_the_fit_finds_the_factors_of_runs_that_follow_the_formulas() -> None:
    constants = load_constants()
    runs = []
    for number in range(6):
        size = Size(1000 * (number + 1) ** 2, 700 + 900 * (number % 3), 10_000 + 3000 * number**3, (16 + 8 * number,))
        found = estimate(size, constants)
        stages = {
            stage: {
                "peak_bytes": values["memory_bytes"],
                "bytes": values["storage_bytes"],
                "epoch_core_seconds": values["epoch_core_seconds"],
            }
            for stage, values in found.items()
        }
        runs.append(
            {
                "users": size.users,
                "items": size.items,
                "interactions": size.interactions,
                "dims": size.dims,
                "stages": stages,
            }
        )
    refitted = fit(runs)
    size = Size(5000, 4000, 90_000, (48,))
    for stage, values in estimate(size, refitted).items():
        expected = estimate(size, constants)[stage]
        assert values["memory_bytes"] == pytest.approx(expected["memory_bytes"], rel=0.01), stage
        assert values["storage_bytes"] == pytest.approx(expected["storage_bytes"], rel=0.01), stage


def test_no_measured_run_that_is_compared_was_fitted() -> None:
    fitted = {(run["users"], run["items"], run["interactions"]) for run in load_constants()["measured"]}
    held_out = {(run["users"], run["items"], run["interactions"]) for run in HELD_OUT}
    assert held_out
    assert not fitted & held_out
    assert all(run["command"] for run in [*load_constants()["measured"], *HELD_OUT])


@pytest.mark.parametrize("run", HELD_OUT, ids=lambda run: f"{run['users']}x{run['items']}x{run['interactions']}")
def test_within_a_quarter_of_measured_runs(run: dict) -> None:
    size = Size(run["users"], run["items"], run["interactions"], tuple(run["dims"]))
    found = estimate(size)
    measured = run["stages"]
    peak = max(stage["peak_bytes"] for stage in measured.values())
    storage = sum(stage["bytes"] for stage in measured.values())
    assert max(found[stage]["memory_bytes"] for stage in measured) == pytest.approx(peak, rel=0.25)
    assert sum(found[stage]["storage_bytes"] for stage in measured) == pytest.approx(storage, rel=0.25)


def test_more_of_anything_never_takes_less() -> None:
    base = estimate(SIZE)
    for change in ({"users": 5000}, {"items": 5000}, {"interactions": 500_000}, {"dims": (300, 10)}):
        more = estimate(Size(**{**vars(SIZE), **change}))
        for stage, values in more.items():
            assert values["memory_bytes"] >= base[stage]["memory_bytes"]
            assert values["storage_bytes"] >= base[stage]["storage_bytes"]


def test_large_runs_take_large_steps_and_are_sharded() -> None:
    small, large = Size(1000, 1000, 20_000, (64,)), Size(2_000_000, 1_000_000, 100_000_000, (768, 512))
    assert recommend(small, estimate(small))["preset"] == "staged"
    choice = recommend(large, estimate(large))
    assert (choice["preset"], choice["settings"]["knn.num_shards"]) == ("million", 4)
    assert {"staged", "million"} <= set(preset_names())


def test_an_epoch_propagates_the_whole_graph_in_every_step() -> None:
    size = Size(1000, 500, 1_000_000, (8,), step_interactions=2048)
    once, twice, larger = (
        estimate(each)["ml.train"]["epoch_core_seconds"]
        for each in (size, replace(size, interactions=2_000_000), replace(size, step_interactions=4096))
    )
    assert twice == pytest.approx(4 * once, rel=0.01) and larger == pytest.approx(once / 2, rel=0.01)


@pytest.mark.parametrize("wrong", [{"users": 0}, {"items": -1}, {"interactions": 0}, {"dims": ()}, {"dims": (0,)}])
def test_a_size_that_is_none(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        Size(**{**vars(SIZE), **wrong})


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--users", "1000", "--items", "500", "--interactions", "20000", "--modalities", "text:384", "image:512"]
    assert cli.main(["plan", *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["stages"]) == set(FORMS)
    assert found["stages"] == json.loads(json.dumps(estimate(Size(1000, 500, 20_000, (384, 512)))))
    assert cli.main(["plan", *flags]) == 0
    shown = capsys.readouterr().out
    assert "ml.train" in shown and "memory = " in shown and "x 4 items dims" in shown
    assert cli.main(["plan", *flags[:-2], "text"]) == 2
    assert "text" in capsys.readouterr().err
    assert cli.main(["plan", "--users", "0", *flags[2:]]) == 2
