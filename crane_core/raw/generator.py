"""Generate an interaction log with features in the raw layout, at any size, with a known truth.

Users and items follow power laws. Latent categories decide which items a user meets and, with a latent vector of its
own, what every modality says about an item. Events have a time within the day and the week, some arrive late, some
are dirt of a known kind. Days are drawn and written one by one, so memory is bounded by the largest day.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crane_core.errors import ConfigError
from crane_core.raw.files import DAY_PREFIX, FEATURES_FOLDER, INTERACTIONS_FOLDER
from crane_core.raw.importers.target import Imported, write_items, write_raw
from crane_core.schema import EVENT_TIME, EVENT_TYPE, FEATURES, ITEM_ID, USER_ID, VECTOR, WEIGHT

FORMAT = "generated-1"
TRUTH_FOLDER = "truth"
EVENT_SHARES = {"view": 0.85, "cart": 0.10, "purchase": 0.05}
HOUR_WEIGHTS = np.array([2, 1, 1, 1, 1, 2, 4, 6, 7, 7, 7, 8, 9, 8, 7, 7, 8, 9, 11, 13, 14, 12, 8, 4], dtype=float)
WEEKDAY_WEIGHTS = np.array([1.0, 0.95, 0.95, 1.0, 1.1, 1.3, 1.25])
CATEGORY_SHARES = (0.6, 0.2, 0.1)
"""How often a user's event comes from the first, second and third of its categories; the rest comes from any."""
DIRT = (
    "null_id",
    "empty_id",
    "null_event_time",
    "non_finite_weight",
    "negative_weight",
    "after_arrival",
    "too_late",
    "duplicate",
)
"""The kinds of dirt, named as `etl.interactions` names its reasons."""
LATENT_DIM = 8
DRAWS = 5
"""How often an item is drawn again while it is not launched yet."""
FEATURE_ROWS = 65_536
FILE_GROUP_ROWS = 262_144
DAY_MICROS = 86_400_000_000


@dataclass(frozen=True)
class Plan:
    """What to generate. Equal plans give equal rows.

    Attributes:
        num_rows: rows of the log, dirt included.
        num_users, num_items: how many exist; the rarest may never appear.
        num_days: arrival days.
        start: the first of them.
        num_categories: latent categories.
        modalities: name to width of its vectors.
        user_exponent, item_exponent: of the power laws of activity and of popularity within a category, below 1.
        late_share: share of the events that arrive after the day they happened on.
        most_days_late: the longest delay.
        dirt_share: share of the rows that are dirt, all kinds alike.
        new_item_share: share of the items that are launched after the first day.
        missing_share: share of the items a modality says nothing about.
        seed: of everything.
    """

    num_rows: int = 1_000_000
    num_users: int = 50_000
    num_items: int = 10_000
    num_days: int = 30
    start: date = date(2026, 1, 1)
    num_categories: int = 50
    modalities: dict[str, int] = field(default_factory=lambda: {"text": 64, "image": 64})
    user_exponent: float = 0.6
    item_exponent: float = 0.8
    late_share: float = 0.05
    most_days_late: int = 3
    dirt_share: float = 0.01
    new_item_share: float = 0.2
    missing_share: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("num_rows", "num_users", "num_items", "num_days", "num_categories")
        shares = ("late_share", "dirt_share", "new_item_share", "missing_share")
        wrong = [name for name in counts if getattr(self, name) < 1]
        wrong += [name for name in shares if not 0 <= getattr(self, name) < 1]
        wrong += [name for name in ("user_exponent", "item_exponent") if not 0 <= getattr(self, name) < 1]
        wrong += ["num_categories"] if self.num_categories > self.num_items else []
        if wrong or not self.modalities:
            told = ", ".join(f"{name}={getattr(self, name)}" for name in wrong) or "no modality"
            raise ConfigError(
                f"A log cannot be generated with {told}.",
                "Give counts of 1 or more, shares and exponents in [0, 1), and at most as many categories as items.",
            )


@dataclass(frozen=True)
class World:
    """The latent truth behind a log.

    Attributes:
        item_category: int32 [num_items].
        item_launch: int32 [num_items], day on which the item appears.
        item_latent: float32 [num_items, LATENT_DIM], what all modalities of an item share.
        user_categories: int32 [num_users, 3], favourite first.
        user_ids, item_ids: string arrays; the order of the ids says nothing about activity or popularity.
        members: items by category, the most popular first within each.
        starts: int64 [num_categories + 1], bounds of the categories in `members`.
    """

    item_category: NDArray[np.int32]
    item_launch: NDArray[np.int32]
    item_latent: NDArray[np.float32]
    user_categories: NDArray[np.int32]
    user_ids: pa.Array
    item_ids: pa.Array
    members: NDArray[np.int64]
    starts: NDArray[np.int64]


def make_world(plan: Plan) -> World:
    """Draw users, items and categories."""
    rng = np.random.default_rng([plan.seed, 0])
    category = rng.permutation(np.arange(plan.num_items) % plan.num_categories).astype(np.int32)
    members = np.argsort(category, kind="stable")
    starts = np.searchsorted(category[members], np.arange(plan.num_categories + 1))
    launch = np.where(
        rng.random(plan.num_items) < plan.new_item_share, rng.integers(0, plan.num_days, plan.num_items), 0
    )
    # The most popular item of a category is there from the first day: it stands in for those yet to come.
    launch[members[starts[:-1]]] = 0
    centres = rng.standard_normal((plan.num_categories, LATENT_DIM))
    latent = centres[category] + 0.5 * rng.standard_normal((plan.num_items, LATENT_DIM))
    return World(
        category,
        launch.astype(np.int32),
        latent.astype(np.float32),
        rng.integers(0, plan.num_categories, (plan.num_users, 3)).astype(np.int32),
        _ids("u", rng.permutation(plan.num_users)),
        _ids("i", rng.permutation(plan.num_items)),
        members,
        starts,
    )


def generate(plan: Plan, raw: str | Path) -> Imported:
    """Write a log, a catalog and features into `raw`, and below `truth/` what is known about them.

    `truth/world.npz` holds the arrays of `World`; `truth/counts.json` the rows per kind of dirt and the late ones.
    A second call with the same plan touches nothing.

    Raises:
        DataError: `raw` holds something else.
    """
    described = {**asdict(plan), "start": plan.start.isoformat()}

    def build(folder: Path) -> Imported:
        world = make_world(plan)
        counts: dict[str, Any] = {"rows": 0, "late": 0, "dirt": dict.fromkeys(DIRT, 0)}
        seen = np.zeros(plan.num_users, dtype=bool)
        for day, table in draw_log(plan, world, counts, seen):
            path = folder / INTERACTIONS_FOLDER / f"{DAY_PREFIX}{day.isoformat()}" / "part-0.parquet"
            path.parent.mkdir(parents=True)
            pq.write_table(table, path, compression="zstd", row_group_size=FILE_GROUP_ROWS)
        titles: list[str | None] = [f"Item {n} of category {c}" for n, c in enumerate(world.item_category.tolist())]
        write_items(folder, world.item_ids.to_pylist(), titles)
        for index, (name, dim) in enumerate(sorted(plan.modalities.items())):
            _write_modality(folder / FEATURES_FOLDER / name, plan, world, index, dim)
        _write_truth(folder / TRUTH_FOLDER, world, counts)
        end = plan.start + timedelta(days=plan.num_days)
        return Imported(
            dataset=f"generated-{plan.seed}",
            raw=str(Path(raw).absolute()),
            num_users=int(seen.sum()),
            num_items=plan.num_items,
            num_interactions=plan.num_rows,
            modalities=dict(plan.modalities),
            split="temporal",
            start=end - timedelta(days=1),
            end=end,
        )

    source = {"dataset": f"generated-{plan.seed}", "format": FORMAT, "plan": described}
    return write_raw(Path(raw), source, build)


def draw_log(
    plan: Plan, world: World, counts: dict[str, Any], seen: NDArray[np.bool_]
) -> Iterator[tuple[date, pa.Table]]:
    """Yield the rows of every arrival day.

    Args:
        plan, world: what to draw from.
        counts: gets the numbers of rows, late rows and rows per kind of dirt.
        seen: bool [num_users], set where a user has a clean row.
    """
    rng = np.random.default_rng([plan.seed, 1])
    weekdays = np.array([(plan.start + timedelta(days=day)).weekday() for day in range(plan.num_days)])
    num_dirty = round(plan.num_rows * plan.dirt_share)
    per_day = _apportion(plan.num_rows - num_dirty, WEEKDAY_WEIGHTS[weekdays])
    dirt_per_day = _apportion(num_dirty, WEEKDAY_WEIGHTS[weekdays])
    midnight = int(datetime.combine(plan.start, time(), UTC).timestamp()) * 1_000_000
    waiting: dict[int, list[pa.Table]] = {day: [] for day in range(plan.num_days)}
    for day in range(plan.num_days):
        users, items, within, events = _draw_events(plan, world, day, int(per_day[day]), rng)
        seen[users] = True
        table = _table(world, users, items, midnight + day * DAY_MICROS + within, events)
        # Nothing can arrive after the last day: what would is on time.
        delay = np.where(
            rng.random(len(users)) < plan.late_share, rng.integers(1, plan.most_days_late + 1, len(users)), 0
        )
        delay = np.minimum(delay, plan.num_days - 1 - day)
        counts["late"] += int((delay > 0).sum())
        for days in np.unique(delay).tolist():
            waiting[day + days].append(table.filter(pa.array(delay == days)))
        clean = waiting.pop(day)
        dirt = _draw_dirt(pa.concat_tables(clean), int(dirt_per_day[day]), midnight + day * DAY_MICROS, rng, counts)
        arrived = pa.concat_tables([*clean, *dirt])
        counts["rows"] += arrived.num_rows
        yield plan.start + timedelta(days=day), arrived


def _draw_events(
    plan: Plan, world: World, day: int, count: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int8]]:
    users = _power_law(rng.random(count), plan.num_users, plan.user_exponent)
    place = np.searchsorted(np.cumsum(CATEGORY_SHARES), rng.random(count), side="right")
    category = world.user_categories[users, np.minimum(place, 2)]
    category = np.where(place == 3, rng.integers(0, plan.num_categories, count), category)
    sizes = np.diff(world.starts)
    items = np.full(count, -1)
    absent = np.arange(count)
    for _ in range(DRAWS):
        chosen = category[absent]
        places = _power_law(rng.random(len(absent)), sizes[chosen], plan.item_exponent)
        items[absent] = world.members[world.starts[chosen] + places]
        absent = absent[world.item_launch[items[absent]] > day]
    items[absent] = world.members[world.starts[category[absent]]]
    hours = np.searchsorted(np.cumsum(HOUR_WEIGHTS / HOUR_WEIGHTS.sum()), rng.random(count), side="right")
    within = np.minimum(hours, 23) * 3_600_000_000 + rng.integers(0, 3_600_000_000, count)
    events = np.searchsorted(np.cumsum(list(EVENT_SHARES.values()))[:-1], rng.random(count), side="right")
    return users, items, within, events.astype(np.int8)


def _draw_dirt(
    clean: pa.Table, count: int, midnight: int, rng: np.random.Generator, counts: dict[str, Any]
) -> list[pa.Table]:
    """Spoilt copies of clean rows, one kind each."""
    if clean.num_rows == 0:
        return []
    spoilt = []
    for kind, size in zip(DIRT, _apportion(count, np.ones(len(DIRT))).tolist(), strict=True):
        rows = clean.take(pa.array(rng.integers(0, clean.num_rows, size)))
        instants = pa.timestamp("us", "UTC")
        changes = {
            "null_id": (ITEM_ID, pa.nulls(size, pa.string())),
            "empty_id": (USER_ID, pa.repeat(pa.scalar(""), size)),
            "null_event_time": (EVENT_TIME, pa.nulls(size, instants)),
            "non_finite_weight": (WEIGHT, pa.repeat(pa.scalar(np.nan, pa.float32()), size)),
            "negative_weight": (WEIGHT, pa.repeat(pa.scalar(-1, pa.float32()), size)),
            "after_arrival": (EVENT_TIME, pa.repeat(pa.scalar(midnight + 2 * DAY_MICROS, instants), size)),
            "too_late": (EVENT_TIME, pa.repeat(pa.scalar(midnight - 400 * DAY_MICROS, instants), size)),
        }
        if kind in changes:
            name, values = changes[kind]
            rows = rows.set_column(rows.column_names.index(name), name, values)
        counts["dirt"][kind] += size
        spoilt.append(rows)
    return spoilt


def _table(
    world: World,
    users: NDArray[np.int64],
    items: NDArray[np.int64],
    instants: NDArray[np.int64],
    events: NDArray[np.int8],
) -> pa.Table:
    kinds = pa.DictionaryArray.from_arrays(pa.array(events), pa.array(list(EVENT_SHARES)))
    return pa.table(
        {
            USER_ID: world.user_ids.take(pa.array(users)),
            ITEM_ID: world.item_ids.take(pa.array(items)),
            EVENT_TIME: pa.array(instants).cast(pa.timestamp("us", "UTC")),
            WEIGHT: pa.repeat(pa.scalar(1, pa.float32()), len(users)),
            EVENT_TYPE: kinds.cast(pa.string()),
        }
    )


def _power_law(uniform: NDArray[np.float64], size: Any, exponent: float) -> NDArray[np.int64]:
    """Ranks from 0 whose frequency falls as (rank + 1) ** -exponent, by the inverse of the distribution function.

    Args:
        uniform: in [0, 1).
        size: number of ranks, one for all or one for each.
        exponent: below 1.
    """
    power = 1 - exponent
    rank = (uniform * ((np.asarray(size) + 1.0) ** power - 1) + 1) ** (1 / power) - 1
    return np.minimum(rank.astype(np.int64), np.asarray(size) - 1)


def _apportion(total: int, weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole numbers in proportion to the weights that add up to the total."""
    ends = np.round(total * np.cumsum(weights) / weights.sum()).astype(np.int64)
    return np.diff(ends, prepend=0)


def _ids(letter: str, numbers: NDArray[np.int64]) -> pa.Array:
    return pc.binary_join_element_wise(letter, pa.array(numbers).cast(pa.string()), "")


def _write_modality(folder: Path, plan: Plan, world: World, index: int, dim: int) -> None:
    rng = np.random.default_rng([plan.seed, 2, index])
    mixing = rng.standard_normal((LATENT_DIM, dim)) / np.sqrt(LATENT_DIM)
    folder.mkdir(parents=True)
    with pq.ParquetWriter(folder / "part-0.parquet", FEATURES, compression="zstd") as writer:
        for start in range(0, plan.num_items, FEATURE_ROWS):
            latent = world.item_latent[start : start + FEATURE_ROWS]
            rows = latent @ mixing + 0.3 * rng.standard_normal((len(latent), dim))
            keep = rng.random(len(latent)) >= plan.missing_share
            values = pa.array(rows[keep].astype(np.float32).reshape(-1))
            offsets = pa.array(np.arange(int(keep.sum()) + 1, dtype=np.int32) * dim)
            ids = world.item_ids.slice(start, len(latent)).filter(pa.array(keep))
            vectors = pa.ListArray.from_arrays(offsets, values)
            writer.write_table(pa.table({ITEM_ID: ids, VECTOR: vectors}, schema=FEATURES))


def _write_truth(folder: Path, world: World, counts: dict[str, Any]) -> None:
    folder.mkdir()
    arrays = {name: value for name, value in vars(world).items() if isinstance(value, np.ndarray)}
    ids = {name: np.array(getattr(world, name).to_pylist()) for name in ("user_ids", "item_ids")}
    np.savez_compressed(folder / "world.npz", allow_pickle=False, **arrays, **ids)
    (folder / "counts.json").write_text(json.dumps(counts, indent=1))
