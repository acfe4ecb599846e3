"""The promotion gate: one pure decision from metrics per user, by the rule in `promote` of the configuration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from crane_core.config import Evaluate, Promote
from crane_core.numerics.bootstrap import Interval, paired_bootstrap
from crane_core.release.measure import Measurement

PRIMARY = ("ndcg@20", "recall@20")
NUM_USERS = "number of users"
AGAINST = "recall@20 against "
COLD_SHARE = "share of cold items in the top 20"


@dataclass(frozen=True)
class Condition:
    """One condition of the gate.

    Attributes:
        name: the number that is looked at.
        found: its value, None where it is not a number.
        limit: the value it is compared with.
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
        form = ".0f" if self.name == NUM_USERS else ".4f"
        found = "not a number" if self.found is None else f"{self.found:{form}}"
        return f"{self.name} is {found}, must be {self.sense} {self.limit:{form}}"


@dataclass(frozen=True)
class Decision:
    """Decision of the gate about one challenger.

    Attributes:
        promoted: whether the challenger becomes champion.
        reason: one sentence.
        challenger: its version.
        champion: version it was compared with, None when there was none.
        num_users: users in the comparison.
        differences: challenger - champion with 95 % intervals, empty without a champion.
        checks: all conditions, in order.
        rule: the configuration of the gate.
    """

    promoted: bool
    reason: str
    challenger: str
    champion: str | None
    num_users: int
    differences: Mapping[str, Interval]
    checks: tuple[Condition, ...]
    rule: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values; a float that is not finite becomes null."""
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
    one: Recall@20 must reach every baseline of `beats`. In both cases on at least `min_users` users, and lists may not
    hold far more cold items than users choose.

    Args:
        challenger: the candidate.
        champion: the champion on the same users; its metrics are not looked at when its window ends later.
        baselines: mean Recall@20 of each baseline on the same users.
        rule: limits.
        bootstrap: number of resamples and seed of the intervals.
    """
    num_users = len(challenger.metrics["recall@20"])
    checks = [_check(NUM_USERS, num_users, ">=", rule.min_users)]
    differences: Mapping[str, Interval] = {}
    if champion is None:
        checks += [*_against_baselines(challenger, baselines, rule), _exposure(challenger, rule)]
        promoted, reason = _first_champion(checks, challenger, baselines, rule)
    elif challenger.window_end < champion.window_end:
        promoted, reason = False, _older_window(challenger, champion)
    else:
        differences = paired_bootstrap(challenger.metrics, champion.metrics, bootstrap.num_bootstrap, bootstrap.seed)
        checks += [*_against_champion(differences, rule), *_guardrails(challenger, champion, rule)]
        checks.append(_exposure(challenger, rule))
        promoted, reason = _next_champion(checks, champion, differences, num_users)
    return Decision(
        promoted=promoted,
        reason=reason,
        challenger=challenger.version,
        champion=champion.version if champion else None,
        num_users=num_users,
        differences=differences,
        checks=tuple(checks),
        rule=rule.rule(),
    )


def advice(checks: Iterable[Mapping[str, Any]], is_first: bool) -> str:
    """Return what a person can do about a refusal.

    Args:
        checks: conditions of the decision as JSON values, those of `Condition`.
        is_first: whether there is no champion.
    """
    failed = {check["name"]: check["found"] for check in checks if not check["passed"]}
    ways = []
    if NUM_USERS in failed:
        found = int(failed[NUM_USERS] or 0)
        enough = f", or give --set promote.min_users={found} to let {found} users decide" if found else ""
        ways.append(
            "Judge more users: a longer test period has more of them, such as --set etl.validation_days=28 --set "
            f"etl.test_days=28. Or deliver more data{enough}."
        )
    above = [name.removeprefix(AGAINST) for name in failed if name.startswith(AGAINST)]
    if above:
        ways.append(
            f"The model recommends no better than {' and '.join(above)} here, so it is not worth serving yet: deliver "
            "more interactions, or features that tell more about the items, and run again; or try longer periods and a "
            "longer training, such as --config movielens. promote.beats names the baselines that a first champion must "
            "reach."
        )
    if COLD_SHARE in failed:
        ways.append(
            "Show fewer cold items: lower head.cold_exposure. Or allow them: promote.max_cold_share_ratio is the most "
            "they may have in lists as a multiple of what users choose."
        )
    if not is_first:
        ways.append("The champion stays in service.")
    return " ".join(ways)


def _older_window(challenger: Measurement, champion: Measurement) -> str:
    return (
        f"Refused: version {challenger.version} is made from a window that ends {challenger.window_end:%Y-%m-%d}, "
        f"before that of champion {champion.version}, {champion.window_end:%Y-%m-%d}."
    )


def _first_champion(
    checks: list[Condition], challenger: Measurement, baselines: Mapping[str, float], rule: Promote
) -> tuple[bool, str]:
    """Return whether all conditions hold, and the reason, when there is no champion to compare with."""
    failed = [check.sentence() for check in checks if not check.passed]
    if failed:
        return False, f"Refused: {'; '.join(failed)}."
    num_users, recall = len(challenger.metrics["recall@20"]), _mean(challenger.metrics["recall@20"])
    best = ", ".join(f"{name} {baselines[name]:.4f}" for name in rule.beats) or "none is asked for"
    return True, (
        f"Promoted: first champion, recall@20 {recall:.4f} on {num_users} users reaches its baselines ({best})."
    )


def _next_champion(
    checks: list[Condition], champion: Measurement, differences: Mapping[str, Interval], num_users: int
) -> tuple[bool, str]:
    """Return whether all conditions hold, and the reason, beside a champion."""
    gains = ", ".join(_difference(name, differences[name]) for name in PRIMARY)
    failed = [check for check in checks if not check.passed]
    if not failed:
        return True, (
            f"Promoted: better than champion {champion.version} on {num_users} users ({gains}); guardrails hold."
        )
    reasons = [check.sentence() for check in failed if not check.compares]
    if len(reasons) < len(failed):
        means = [differences[name].mean for name in PRIMARY]
        better = all(mean >= 0 for mean in means) and any(mean > 0 for mean in means)
        verdict = "too uncertain to be better than" if better else "not better than"
        reasons.insert(0, f"{verdict} champion {champion.version} ({gains})")
    return False, f"Refused: {'; '.join(reasons)}."


def _against_baselines(challenger: Measurement, baselines: Mapping[str, float], rule: Promote) -> list[Condition]:
    recall = _mean(challenger.metrics["recall@20"])
    return [_check(f"{AGAINST}{name}", recall, ">=", baselines.get(name, math.nan)) for name in rule.beats]


def _against_champion(differences: Mapping[str, Interval], rule: Promote) -> list[Condition]:
    lows, means = ({name: getattr(differences[name], which) for name in PRIMARY} for which in ("low", "mean"))
    return [
        *(_check(f"lower bound of {name}", lows[name], ">", -rule.margin, True) for name in PRIMARY),
        *(_check(f"mean of {name}", means[name], ">=", 0.0, True) for name in PRIMARY),
        _check("larger of the two means", max(means.values()), ">", 0.0, True),
    ]


def _difference(name: str, interval: Interval) -> str:
    return f"{name} {interval.mean:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def _guardrails(challenger: Measurement, champion: Measurement, rule: Promote) -> list[Condition]:
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


def _exposure(challenger: Measurement, rule: Promote) -> Condition:
    most = max(rule.max_cold_share_ratio * challenger.cold_held_out, rule.min_cold_share)
    return _check(COLD_SHARE, challenger.cold_share, "<=", most)


def _check(name: str, found: float, sense: str, limit: float, compares: bool = False) -> Condition:
    passed = {">": found > limit, ">=": found >= limit, "<=": found <= limit}[sense]
    return Condition(name, float(found) if math.isfinite(found) else None, float(limit), sense, bool(passed), compares)


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
