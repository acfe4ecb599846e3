"""The promotion gate: one pure decision from per-user evidence, by the rule in `promote` of the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from crane_core.config import Evaluate, Promote
from crane_core.numerics.bootstrap import Interval, paired_bootstrap
from crane_core.release.measure import Measurement

PRIMARY = ("ndcg@20", "recall@20")


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
    challenger: Measurement,
    champion: Measurement | None,
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


def _why(failed: list[Check], champion: Measurement | None, differences: Mapping[str, Interval]) -> str:
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


def _guardrails(challenger: Measurement, champion: Measurement, rule: Promote) -> list[Check]:
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
    challenger: Measurement,
    champion: Measurement | None,
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
