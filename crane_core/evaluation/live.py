"""The live score: how lists that were exported did on the events that followed.

Which events judge a list. A run has the window `[start, end)`: what is new to it. The lists are those that the
champion had exported from events before an instant `made`, the end of its own window. They are judged on the events of
the window that lie at or after `made`, that is from `max(start, made)` to `end`. So no list is judged on an event that
it was made from, and no event is judged by two runs of successive windows. In daily runs `made` is `start` where the
champion is of the day before, and earlier where it has stayed for longer.

What counts as an event. The first event of a user with an item, as `etl.interactions` kept it: a list never shows what
its user has met, so later events with the same item, and events that were delivered twice, count nowhere. Users and
items that the evaluation twin does not know count as well (the table `cold`). An event that arrives after its window
was read is in no live score: it belongs to a window that is over, and lists made since may know it. Items that nobody
had met before `made` stay in the denominator, since their users did choose them; `new_items` is their share.

Who saw which list. A user with exported recommendations saw these. Any other user saw `popular.parquet` of the export,
as its contract says. `champion` scores every user with what that user saw; `covered` is the share of users with a list
of their own, and `covered_users` scores these alone. Beside it stands `recent_popularity`, for the same users and with
lists of the same length: the items that were most popular at `made`, but for those that the user had met before it. Its
half-life is chosen on the validation split of the run, as in `ml.evaluate`. With `etl.repeats` other than `first`, a
weight may hold events of the window, which favours this baseline.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from crane_core.config import Evaluate
from crane_core.dataset.interactions import ItemLists, blocks_of, load_ids
from crane_core.evaluation.baselines import first_unseen
from crane_core.evaluation.metrics import user_metrics
from crane_core.numerics.bootstrap import bootstrap, paired_bootstrap
from crane_core.schema import EVENT_TIME, ITEM_ID, ITEM_IDX, USER_ID, USER_IDX, WEIGHT
from crane_core.storage.artifacts import Artifact

logger = logging.getLogger(__name__)

DAY_MICROS = 86_400_000_000
COLUMNS = (USER_IDX, ITEM_IDX, WEIGHT, EVENT_TIME)


@dataclass(frozen=True)
class Period:
    """The events that judge a list.

    Attributes:
        made: the list was made from events before this instant.
        start: first instant of the events.
        end: first instant after them.
    """

    made: datetime
    start: datetime
    end: datetime

    @classmethod
    def of(cls, made: datetime, start: datetime, end: datetime) -> Period:
        """Return the part of the window `[start, end)` that a list made from events before `made` is judged on."""
        return cls(made, max(made, start), end)


@dataclass(frozen=True)
class Judged:
    """The events of a period, and what was known when the lists were made.

    Attributes:
        user_ids: external ids of the users with an event in the period, object [n].
        item_ids: external ids of all items of the log.
        relevant: the items of these events, by user.
        met: items that each of these users had met before `made`.
        popular: items that somebody had met before `made`, by falling popularity, equal ones by id: int64.
        num_new: events whose item nobody had met before `made`.
    """

    user_ids: np.ndarray
    item_ids: pd.Index
    relevant: ItemLists
    met: ItemLists
    popular: np.ndarray
    num_new: int


def load_judged(source: Artifact, period: Period, half_life: float | None) -> Judged:
    """Read the events of a period from the output of `etl.interactions`, a block of rows at a time.

    Args:
        source: of the run whose window is judged.
        period: the events.
        half_life: of the popularity, days; None for no decay.
    """
    users, items, cold = _with_cold_ids(source)
    made, start, end = (_micros(instant) for instant in (period.made, period.start, period.end))
    found = [_pairs(block, (start <= block[3]) & (block[3] < end)) for block in _rows(source, cold)]
    pairs = np.concatenate(found, axis=1)
    judged, rows = np.unique(pairs[0], return_inverse=True)
    counts, num_events = np.zeros(len(items)), np.zeros(len(items), dtype=np.int64)
    met = [np.empty((2, 0), dtype=np.int64)]
    for block in _rows(source, cold):
        _, own_items, weights, times = block
        before = times < made
        ages = (made - times[before]) / DAY_MICROS
        values = weights[before] * (1.0 if half_life is None else 0.5 ** (ages / half_life))
        counts += np.bincount(own_items[before], weights=values, minlength=len(items))
        num_events += np.bincount(own_items[before], minlength=len(items))
        met.append(_pairs(block, before & np.isin(block[0], judged)))
    known = np.concatenate(met, axis=1)
    return Judged(
        users[judged],
        pd.Index(items, dtype=object),
        ItemLists.from_pairs(rows, pairs[1], len(judged)),
        ItemLists.from_pairs(np.searchsorted(judged, known[0]), known[1], len(judged)),
        _by_popularity(items, counts, num_events > 0),
        int((num_events[pairs[1]] == 0).sum()),
    )


def score_lists(export: Artifact, judged: Judged, config: Evaluate) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Score exported lists and recent popularity on the events of a period.

    Args:
        export: output of `ml.export`.
        judged: the events; at least one.
        config: cut-offs, resamples and seed.

    Returns:
        JSON values: `users`, `covered`, `events`, `new_items`, `models` with 95 % intervals over users, `differences`
        of the champion to recent popularity, paired by user, and the means over `covered_users`. And for each user
        `covered`, and `model.metric` of every model and metric. `hit@k` is 1 where the top k has an item of the user.
    """
    width, users = max(config.ks), np.arange(len(judged.user_ids))
    shown, covered, length = _exported(export, judged, width)
    popular = np.full_like(shown, -1)
    popular[:, :length] = first_unseen(judged.popular, judged.met, users, length)
    metrics = {
        name: _metrics(ranked, judged.relevant, users, config)
        for name, ranked in (("champion", shown), ("recent_popularity", popular))
    }
    intervals = {name: bootstrap(values, config.num_bootstrap, config.seed) for name, values in metrics.items()}
    gains = paired_bootstrap(metrics["champion"], metrics["recent_popularity"], config.num_bootstrap, config.seed)
    num_events = len(judged.relevant.items)
    report = {
        "users": len(users),
        "covered": float(covered.mean()),
        "events": num_events,
        "new_items": judged.num_new / num_events,
        "models": {name: {m: value.as_dict() for m, value in found.items()} for name, found in intervals.items()},
        "differences": {"recent_popularity": {metric: gain.as_dict() for metric, gain in gains.items()}},
        "covered_users": {
            name: {metric: float(values[covered].mean()) for metric, values in found.items()}
            for name, found in metrics.items()
        }
        if covered.any()
        else None,
    }
    per_user = {f"{name}.{metric}": values for name, found in metrics.items() for metric, values in found.items()}
    return report, {"covered": covered, **per_user}


def write_per_user(path: Path, judged: Judged, per_user: Mapping[str, np.ndarray]) -> None:
    """Write the metrics of each user: `user_id`, `num_relevant` and a column of each of `per_user`."""
    columns = {USER_ID: pa.array(judged.user_ids, pa.string()), "num_relevant": judged.relevant.counts()}
    pq.write_table(pa.table(columns | dict(per_user)), path)


def _metrics(ranked: np.ndarray, relevant: ItemLists, users: np.ndarray, config: Evaluate) -> dict[str, np.ndarray]:
    metrics = user_metrics(ranked, relevant, users, config.ks)
    return metrics | {f"hit@{k}": (metrics[f"recall@{k}"] > 0).astype(np.float64) for k in config.ks}


def _exported(export: Artifact, judged: Judged, width: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the list that each user saw.

    Args:
        export: output of `ml.export`.
        judged: users and items.
        width: places of a list that count.

    Returns:
        int32 [n, width], -1 where the list has ended or shows an item that the log does not have; bool [n], whether it
        is the user's own; and the length of an exported list, at most `width`.
    """
    wanted = [(USER_ID, "in", set(judged.user_ids.tolist()))]
    own = pq.read_table(export.file("recommendations"), columns=[USER_ID, "rank", ITEM_ID], filters=wanted).to_pandas()
    popular = pq.read_table(export.file("popular.parquet")).to_pandas()
    length = min(width, int(pd.concat([own["rank"], popular["rank"]]).max()))
    own, popular = (table[table["rank"] <= width] for table in (own, popular))
    users = pd.Index(judged.user_ids, dtype=object).get_indexer(own[USER_ID])
    shown = np.full((len(judged.user_ids), width), -1, dtype=np.int32)
    shown[:, popular["rank"] - 1] = judged.item_ids.get_indexer(popular[ITEM_ID])
    covered = np.isin(np.arange(len(shown)), users)
    shown[covered] = -1
    shown[users, own["rank"] - 1] = judged.item_ids.get_indexer(own[ITEM_ID])
    return shown, covered, length


def _with_cold_ids(source: Artifact) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Return the external ids of all users and items, object, and the rows of the table `cold` under their numbers.

    Ids that the run has no number for are numbered behind the others.
    """
    cold = pq.read_table(source.file("cold"), columns=[*COLUMNS, USER_ID, ITEM_ID]).to_pandas()
    ids = []
    for table, index, name in (("users", USER_IDX, USER_ID), ("items", ITEM_IDX, ITEM_ID)):
        known = load_ids(source, table, name).to_numpy(zero_copy_only=False)
        is_new = cold[index].isna()
        new, numbers = np.unique(cold.loc[is_new, name].to_numpy(dtype=object), return_inverse=True)
        cold[index] = cold[index].fillna(-1).astype(np.int64)
        cold.loc[is_new, index] = numbers + len(known)
        ids.append(np.concatenate([known, new]))
    return ids[0], ids[1], cold


def _rows(source: Artifact, cold: pd.DataFrame) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield user, item, weight and time (microseconds since 1970) of all rows, a block at a time."""
    for users, items, weights, times in blocks_of(source, COLUMNS):
        yield users, items, weights, _as_micros(times)
    columns = [cold[name].to_numpy() for name in COLUMNS[:-1]]
    yield *columns, _as_micros(cold[EVENT_TIME].dt.tz_localize(None).to_numpy())


def _pairs(block: tuple[np.ndarray, ...], keep: np.ndarray) -> np.ndarray:
    """Return user and item of some rows of a block, int64 [2, n]."""
    return np.stack([block[0][keep], block[1][keep]]).astype(np.int64)


def _by_popularity(ids: np.ndarray, counts: np.ndarray, is_known: np.ndarray) -> np.ndarray:
    """Return the known items by falling counts, equal ones by id.

    The order of the rows, and with it the last digits of a sum, is not that of another run over the same events. So
    counts are equal if their first 40 bits are.
    """
    mantissas, exponents = np.frexp(counts)
    rounded = np.ldexp(np.round(mantissas * 2**40), exponents)
    known = np.flatnonzero(is_known)
    return known[np.lexsort((ids[known].astype(str), -rounded[known]))]


def _micros(instant: datetime) -> int:
    return int(_as_micros(np.array(instant.astimezone(UTC).replace(tzinfo=None), "datetime64[us]")))


def _as_micros(times: np.ndarray) -> np.ndarray:
    return times.astype("datetime64[us]").astype(np.int64)
