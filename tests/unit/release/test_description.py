"""The description of a version in MLflow."""

from __future__ import annotations

from crane_core.release.description import describe
from crane_core.release.version import SHIPPED_TAG, Version

TAGS = {
    "crane.run": "daily",
    "crane.window_start": "2026-03-01T00:00:00Z",
    "crane.window_end": "2026-03-02T00:00:00Z",
}
FIGURES = {
    "standings": {
        "challenger": {"version": "7", "recall@20": 0.25, "ndcg@20": 0.125},
        "champion": {"version": "6", "recall@20": 0.2, "ndcg@20": 0.1},
    },
    "baselines": {"lightgcn": 0.15},
}


def test_it_says_what_the_version_is_how_good_and_what_was_decided() -> None:
    text = describe(Version("7", "m", TAGS, ()), FIGURES, "Promoted: better.", "/store/reports/daily.html")
    assert text.splitlines() == [
        "CRANE recommender of run `daily`, window 2026-03-01 to 2026-03-02 (UTC).",
        "",
        "**Decision.** Promoted: better.",
        "",
        "| on the same users | recall@20 | ndcg@20 |",
        "|---|---|---|",
        "| challenger (version 7) | 0.2500 | 0.1250 |",
        "| champion (version 6) | 0.2000 | 0.1000 |",
        "| lightgcn | 0.1500 | – |",
        "",
        "**Report.** `/store/reports/daily.html`",
    ]


def test_before_a_decision_there_is_no_table() -> None:
    assert "|" not in describe(Version("7", "m", TAGS, ()), {}, "Not judged yet.", "/r.html")


def test_a_version_with_a_twin_says_whose_figures_these_are() -> None:
    figures = {"standings": {"challenger": FIGURES["standings"]["challenger"] | {"model": "twin"}}, "baselines": {}}
    figures["standings"]["champion"] = FIGURES["standings"]["champion"] | {"model": "shipped"}
    text = describe(Version("7", "m", TAGS | {SHIPPED_TAG: "daily.refit"}, ()), figures, "Promoted.", "/r.html")
    assert "Served is the model of run `daily.refit`" in text and "its evaluation twin" in text
    assert "| challenger (version 7, evaluation twin) |" in text and "| champion (version 6) |" in text
    before = describe(Version("7", "m", TAGS | {SHIPPED_TAG: "daily.refit"}, ()), {}, "Not judged yet.", "/r.html")
    assert "Served is the model of run `daily.refit`" in before
