import math
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from crane_core.config import Evaluate, Promote
from crane_core.release.gate import PRIMARY, advice, decide
from crane_core.release.measure import Measurement

RULE = Promote(min_users=50)
BOOTSTRAP = Evaluate(num_bootstrap=500)
BASELINES = {"lightgcn": 0.30, "popularity": 0.10, "recent_popularity": 0.25}


def measured(version: str, recall: np.ndarray, ndcg: np.ndarray | None = None, **changes) -> Measurement:
    metrics = {"recall@20": recall, "ndcg@20": recall / 2 if ndcg is None else ndcg}
    fixed = {"coverage": 0.5, "popularity_bias": 1.0, "cold_recall": 0.1, "cold_share": 0.05, "cold_held_out": 0.04}
    return replace(Measurement(version, datetime(2026, 3, 1, tzinfo=UTC), metrics, **fixed), **changes)


@pytest.fixture(scope="module")
def recall() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.1, 0.7, size=400)


def judge(challenger: Measurement, champion: Measurement | None, rule: Promote = RULE):
    return decide(challenger, champion, BASELINES, rule, BOOTSTRAP)


def failed(decision) -> list[str]:
    return [check.name for check in decision.checks if not check.passed]


def test_a_truly_better_model_is_promoted(recall):
    noise = np.random.default_rng(1).normal(0, 0.05, size=len(recall))
    decision = judge(measured("2", recall + 0.03 + noise), measured("1", recall))
    assert decision.promoted and not failed(decision)
    assert decision.champion == "1" and decision.num_users == 400
    assert 0.02 < decision.differences["recall@20"].low < 0.03 + noise.mean() < decision.differences["recall@20"].high
    assert decision.reason.startswith("Promoted: better than champion 1 on 400 users")


def test_a_worse_model_is_refused(recall):
    decision = judge(measured("2", recall - 0.05), measured("1", recall))
    assert not decision.promoted
    assert decision.reason.startswith("Refused: not better than champion 1 (ndcg@20 -0.0250 [")


def test_an_equal_model_is_refused(recall):
    decision = judge(measured("2", recall.copy()), measured("1", recall))
    assert not decision.promoted
    assert failed(decision) == ["larger of the two means"]


def test_better_in_one_metric_and_equal_in_the_other_is_promoted(recall):
    assert judge(measured("2", recall, recall / 2 + 0.01), measured("1", recall)).promoted


def test_better_in_one_metric_and_a_little_worse_in_the_other_is_refused(recall):
    decision = judge(measured("2", recall + 0.05, recall / 2 - 0.001), measured("1", recall))
    assert failed(decision) == ["mean of ndcg@20"]


def test_a_lucky_model_is_refused():
    """Ten of eighty users gain a lot, the others lose: the mean is above, the interval is not."""
    gain = np.full(80, -0.09)
    gain[:10] = 0.7
    assert gain.mean() > 0
    decision = judge(measured("2", 0.3 + gain), measured("1", np.full(80, 0.3)))
    assert not decision.promoted
    assert "too uncertain to be better than champion 1" in decision.reason


def test_too_few_users_decide_nothing(recall):
    decision = judge(measured("2", recall[:49] + 0.2), measured("1", recall[:49]))
    assert failed(decision) == ["number of users"]
    assert judge(measured("2", recall[:50] + 0.2), measured("1", recall[:50])).promoted


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"cold_recall": 0.079}, "recall@20 of cold items"),
        ({"coverage": 0.24}, "coverage@20"),
        ({"popularity_bias": 1.51}, "popularity bias@20"),
        ({"popularity_bias": math.nan}, "popularity bias@20"),
    ],
)
def test_a_better_model_that_breaks_a_guardrail_is_refused(recall, changes, check):
    decision = judge(measured("2", recall + 0.1, **changes), measured("1", recall))
    assert failed(decision) == [check]
    assert check in decision.reason


def test_no_cold_items_no_cold_guardrail(recall):
    assert judge(measured("2", recall + 0.1, cold_recall=None), measured("1", recall, cold_recall=None)).promoted


def test_an_older_window_is_refused_without_a_look_at_the_champion(recall):
    champion = measured("1", np.array([]), window_end=datetime(2026, 3, 2, tzinfo=UTC))
    decision = judge(measured("2", recall + 0.2), champion)
    assert not decision.promoted
    assert "ends 2026-03-01, before that of champion 1, 2026-03-02" in decision.reason


def test_the_first_champion_must_reach_every_baseline():
    first = judge(measured("1", np.full(60, 0.30)), None)
    assert (
        first.promoted
        and "reaches its baselines (lightgcn 0.3000, popularity 0.1000, recent_popularity 0.2500)" in first.reason
    )
    decision = judge(measured("1", np.full(60, 0.2999)), None)
    assert failed(decision) == ["recall@20 against lightgcn"]
    only_popularity = RULE.model_copy(update={"beats": ("popularity",)})
    assert judge(measured("1", np.full(60, 0.2999)), None, only_popularity).promoted


def test_a_baseline_without_evidence_is_not_beaten():
    decision = decide(measured("1", np.full(60, 0.9)), None, {"popularity": 0.1}, RULE, BOOTSTRAP)
    assert failed(decision) == ["recall@20 against lightgcn", "recall@20 against recent_popularity"]


def test_a_first_champion_below_what_was_popular_last_week_is_refused_by_name():
    """MovieLens 100K: a model that knows no times beats LightGCN and all-time popularity, and not last week's list."""
    stored = {"lightgcn": 0.1155, "popularity": 0.0876, "recent_popularity": 0.1745}
    decision = decide(measured("1", np.full(77, 0.1250)), None, stored, RULE, BOOTSTRAP)
    assert failed(decision) == ["recall@20 against recent_popularity"]
    assert "recall@20 against recent_popularity" in decision.reason and "0.1745" in decision.reason


def test_the_margin_is_the_configured_one(recall):
    """A gain of 0.0001 with a wide interval: only a wide margin admits it."""
    noise = np.random.default_rng(3).normal(0, 0.1, size=len(recall))
    noise -= noise.mean() - 1e-4
    challenger = measured("2", recall + noise)
    assert not judge(challenger, measured("1", recall)).promoted
    assert judge(challenger, measured("1", recall), RULE.model_copy(update={"margin": 0.05})).promoted


def test_numbers_are_json_and_complete(recall):
    numbers = judge(measured("2", recall + 0.1, popularity_bias=math.nan), measured("1", recall)).as_dict()
    assert numbers["rule"] == RULE.rule()
    # How many champions are kept decides nothing.
    assert "keep_versions" not in numbers["rule"]
    assert {check["name"]: check["found"] for check in numbers["checks"]}["popularity bias@20"] is None
    assert set(numbers["differences"]) == set(PRIMARY)


def test_a_refusal_comes_with_what_helps(recall):
    """What it names makes the same measurements pass."""
    few = judge(measured("1", recall[:12] + 0.2), None)
    assert few.reason == "Refused: number of users is 12, must be >= 50."
    told = advice(few.as_dict()["checks"], True)
    assert "--set etl.test_days=28" in told and "--set promote.min_users=12 " in told
    assert judge(measured("1", recall[:12] + 0.2), None, Promote(min_users=12)).promoted
    weak = judge(measured("1", recall - 0.3), None)
    told = advice(weak.as_dict()["checks"], True)
    assert "no better than lightgcn and recent_popularity here" in told and "min_users" not in told
    assert judge(measured("1", recall - 0.3), None, Promote(beats=("popularity",))).promoted is (
        float(np.mean(recall - 0.3)) >= BASELINES["popularity"]
    )
    beaten = judge(measured("2", recall - 0.05), measured("1", recall))
    assert advice(beaten.as_dict()["checks"], False) == "The champion stays in service."
    none = judge(measured("1", recall[:0]), None)
    assert "promote.min_users" not in advice(none.as_dict()["checks"], True)


@pytest.mark.parametrize("with_champion", [True, False])
@pytest.mark.parametrize(
    ("share", "held_out", "passes"),
    [(0.12, 0.04, True), (0.13, 0.04, False), (0.02, 0.0, True), (0.03, 0.0, False), (0.0, 0.5, True)],
)
def test_lists_hold_no_more_cold_items_than_users_would_choose(recall, with_champion, share, held_out, passes):
    challenger = measured("2", recall + 0.03, cold_share=share, cold_held_out=held_out)
    decision = judge(challenger, measured("1", recall) if with_champion else None)
    assert decision.promoted == passes
    assert failed(decision) == ([] if passes else ["share of cold items in the top 20"])
    if not passes:
        assert "share of cold items in the top 20" in decision.reason
        assert "head.cold_exposure" in advice([vars(check) for check in decision.checks], not with_champion)
