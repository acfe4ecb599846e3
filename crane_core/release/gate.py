"""The promotion gate: one pure decision from per-user evidence, by the rule in `promote` of the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import numpy as np
import torch

from crane_core.config import Evaluate, Promote
from crane_core.dataset.interactions import Interactions
from crane_core.evaluation.metrics import (
    Interval,
    coverage,
    dot_product,
    paired_bootstrap,
    popularity_bias,
    rank_users,
    slices,
    user_metrics,
)
from crane_core.serving.model_folder import ServedModel

PRIMARY = ("ndcg@20", "recall@20")
_K = 20


@dataclass(frozen=True)
class Standing:
    """How a model does on the window that is judged.

    Attributes:
        version: registered version.
        window_end: end of the window it was made from.
        metrics: `ndcg@20` and `recall@20`, each float [num_users]; all standings of one decision list the same users
            in the same order.
        coverage: share of the catalog in at least one top 20.
        popularity_bias: training popularity of the top 20 over that of the users' own items.
        cold_recall: Recall@20 of held-out items without training interactions, None where there are none.
    """

    version: str
    window_end: datetime
    metrics: Mapping[str, np.ndarray]
    coverage: float
    popularity_bias: float
    cold_recall: float | None


@dataclass(frozen=True)
class Check:
    """One condition of the gate.

    Attributes:
        name: what is looked at.
        found: the number found, None where it cannot be told.
        limit: the number it is held against.
        sense: how `found` must relate to `limit`: `>`, `>=` or `<=`.
        passed: whether it does.
        compares: whether it compares the primary metrics with the champion's.
    """

    name: str
    found: float | None
    limit: float
    sense: str
    passed: bool
    compares: bool = False

    def sentence(self) -> str:
        found = "not a number" if self.found is None else f"{self.found:.4f}"
        return f"{self.name} is {found}, must be {self.sense} {self.limit:.4f}"


@dataclass(frozen=True)
class Decision:
    """What the gate says.

    Attributes:
        promoted: whether the challenger becomes champion.
        reason: one sentence.
        challenger: its version.
        champion: version it was compared with, None when there was none.
        num_users: users in the comparison.
        differences: challenger - champion with 95 % intervals, empty without a champion.
        checks: every condition, in order.
        rule: the configuration of the gate.
    """

    promoted: bool
    reason: str
    challenger: str
    champion: str | None
    num_users: int
    differences: Mapping[str, Interval]
    checks: tuple[Check, ...]
    rule: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """JSON values; what is not a number becomes null."""
        return _finite(asdict(self))


def decide(
    challenger: Standing,
    champion: Standing | None,
    baselines: Mapping[str, float],
    rule: Promote,
    bootstrap: Evaluate,
) -> Decision:
    """Judge a challenger.

    With a champion: the paired 95 % intervals of both primary metrics must lie above `-margin`, neither mean may be
    below the champion's and one must be above, and coverage, popularity bias and cold-item recall must hold. Without
    one: Recall@20 must reach every baseline of `beats`. In both cases on at least `min_users` users.

    Args:
        challenger: the candidate.
        champion: the champion on the same users; its metrics are not looked at when its window ends later.
        baselines: mean Recall@20 of each baseline on the same users.
        rule: limits.
        bootstrap: number of resamples and seed of the intervals.
    """
    num_users = len(challenger.metrics["recall@20"])
    checks = [_check("number of users", num_users, ">=", rule.min_users)]
    differences: Mapping[str, Interval] = {}
    if champion is None:
        recall = _mean(challenger.metrics["recall@20"])
        checks += [
            _check(f"recall@20 against {name}", recall, ">=", baselines.get(name, math.nan)) for name in rule.beats
        ]
    elif challenger.window_end < champion.window_end:
        reason = (
            f"Refused: version {challenger.version} is made from a window that ends {challenger.window_end:%Y-%m-%d}, "
            f"before that of champion {champion.version}, {champion.window_end:%Y-%m-%d}."
        )
        return _decision(False, reason, challenger, champion, num_users, {}, checks, rule)
    else:
        differences = paired_bootstrap(challenger.metrics, champion.metrics, bootstrap.num_bootstrap, bootstrap.seed)
        lows, means = ({name: getattr(differences[name], which) for name in PRIMARY} for which in ("low", "mean"))
        checks += [_check(f"lower bound of {name}", lows[name], ">", -rule.margin, True) for name in PRIMARY]
        checks += [_check(f"mean of {name}", means[name], ">=", 0.0, True) for name in PRIMARY]
        checks.append(_check("larger of the two means", max(means.values()), ">", 0.0, True))
        checks += _guardrails(challenger, champion, rule)
    failed = [check for check in checks if not check.passed]
    if failed:
        reason = f"Refused: {_why(failed, champion, differences)}."
    elif champion:
        gains = ", ".join(_difference(name, differences[name]) for name in PRIMARY)
        reason = f"Promoted: better than champion {champion.version} on {num_users} users ({gains}); guardrails hold."
    else:
        best = ", ".join(f"{name} {baselines[name]:.4f}" for name in rule.beats) or "none is asked for"
        reason = (
            f"Promoted: first champion, recall@20 {recall:.4f} on {num_users} users reaches its baselines ({best})."
        )
    return _decision(not failed, reason, challenger, champion, num_users, differences, checks, rule)


def measure(
    model: ServedModel,
    version: str,
    window_end: datetime,
    interactions: Interactions,
    user_ids: np.ndarray,
    item_ids: np.ndarray,
    users: np.ndarray,
    block: int,
) -> Standing:
    """What a served model would have shown on a window, matched by external ids.

    Users the model does not know get its most popular items, as in serving. Items outside the window's catalog are
    passed over. Training items of the window are masked, whatever window the model comes from.

    Args:
        model: the model.
        version: its version.
        window_end: end of the window it was made from.
        interactions: the judged window.
        user_ids, item_ids: external ids of that window, position = index.
        users: int [n] evaluated users of that window.
        block: users at a time.
    """
    rows = model.item_ids.get_indexer(item_ids)
    # Tombstones keep their numbers, and a model from before knows them: they are outside the catalog all the same.
    rows[interactions.gone] = -1
    absent = np.where(rows >= 0, 0.0, -np.inf).astype(np.float32)
    known = model.user_ids.get_indexer(user_ids[users])
    ranked = np.full((len(users), _K), -1, dtype=np.int32)
    counts = np.where(rows >= 0, model.popularity()[rows], -np.inf)
    # Places, not counts: many are equal, and the evaluation puts equal ones by row.
    popularity = np.empty(len(rows), dtype=np.float32)
    popularity[np.argsort(-counts, kind="stable")] = -np.arange(len(rows))
    popularity[rows < 0] = -np.inf
    one = np.ones((interactions.num_users, 1), dtype=np.float32)
    everybody = np.zeros((interactions.num_users, model.user_embeddings.shape[1]), dtype=np.float32)
    everybody[users[known >= 0]] = model.user_embeddings[known[known >= 0]]
    # A constant coordinate carries -inf into the scores of items the model has never heard of.
    item_rows = np.column_stack([np.where(rows[:, None] >= 0, model.item_embeddings[rows], 0.0), absent])
    sides = (
        (known >= 0, np.column_stack([everybody, one]), item_rows),
        (known < 0, one, popularity[:, None]),
    )
    for who, left, right in sides:
        score = dot_product(torch.from_numpy(left), torch.from_numpy(right))
        ranked[who] = rank_users(score, interactions.train, users[who], _K, block)
    cold = slices(interactions)["cold_items"]
    members = np.flatnonzero(cold.counts()[users] > 0)
    return Standing(
        version,
        window_end,
        user_metrics(ranked, interactions.test, users, (_K,)),
        coverage(ranked, interactions.num_items - len(interactions.gone)),
        popularity_bias(ranked, users, interactions.train, interactions.num_items),
        float(user_metrics(ranked[members], cold, users[members], (_K,))["recall@20"].mean()) if len(members) else None,
    )


def _why(failed: list[Check], champion: Standing | None, differences: Mapping[str, Interval]) -> str:
    others = [check.sentence() for check in failed if not check.compares]
    if champion is None or len(others) == len(failed):
        return "; ".join(check.sentence() for check in failed)
    better = all(differences[name].mean >= 0 for name in PRIMARY) and any(
        differences[name].mean > 0 for name in PRIMARY
    )
    verdict = "too uncertain to be better than" if better else "not better than"
    gains = ", ".join(_difference(name, differences[name]) for name in PRIMARY)
    return "; ".join([f"{verdict} champion {champion.version} ({gains})", *others])


def _difference(name: str, interval: Interval) -> str:
    return f"{name} {interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def _guardrails(challenger: Standing, champion: Standing, rule: Promote) -> list[Check]:
    checks = [
        _check("coverage@20", challenger.coverage, ">=", rule.min_coverage_ratio * champion.coverage),
        _check(
            "popularity bias@20", challenger.popularity_bias, "<=", rule.max_popularity_ratio * champion.popularity_bias
        ),
    ]
    if challenger.cold_recall is not None and champion.cold_recall is not None:
        least = champion.cold_recall - rule.max_cold_recall_loss
        checks.append(_check("recall@20 of cold items", challenger.cold_recall, ">=", least))
    return checks


def _check(name: str, found: float, sense: str, limit: float, compares: bool = False) -> Check:
    passed = {">": found > limit, ">=": found >= limit, "<=": found <= limit}[sense]
    return Check(name, float(found) if math.isfinite(found) else None, float(limit), sense, bool(passed), compares)


def _decision(
    promoted: bool,
    reason: str,
    challenger: Standing,
    champion: Standing | None,
    num_users: int,
    differences: Mapping[str, Interval],
    checks: list[Check],
    rule: Promote,
) -> Decision:
    return Decision(
        promoted,
        reason,
        challenger.version,
        champion.version if champion else None,
        num_users,
        differences,
        tuple(checks),
        rule.model_dump(mode="json"),
    )


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
