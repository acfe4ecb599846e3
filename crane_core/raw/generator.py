"""Generate an interaction log with features in the raw layout, of any size, from known latent variables.

Users and items follow power laws. Latent categories decide which items a user chooses. The category and a latent vector
of an item decide its features in every modality. Events follow weights of hours and weekdays; some arrive late, and
some rows are invalid in a known way. Days are drawn and written one by one, so memory is bounded by the largest day.
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
"""Shares of a user's events in the first, second and third of the user's categories; the rest is from any category."""
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
"""Kinds of invalid rows, named as the reasons of `etl.interactions`."""
LATENT_DIM = 8
DRAWS = 5
"""Attempts to draw an item that is launched by the day of the event; after them, the most popular item is taken."""
FEATURE_ROWS = 65_536
FILE_GROUP_ROWS = 262_144
DAY_MICROS = 86_400_000_000


@dataclass(frozen=True)
class GeneratorSettings:
    """Sizes and shares of a generated log. Equal settings give equal rows.

    Attributes:
        num_rows: rows of the log, invalid ones included.
        num_users, num_items: users and items that exist; the rarest may not appear in the log.
        num_days: arrival days.
        start: the first arrival day.
        num_categories: latent categories.
        modalities: name to width of the vectors.
        user_exponent, item_exponent: exponents of the power laws of activity, and of popularity in a category; below 1.
        late_share: share of the events that arrive after the day of the event.
        most_days_late: longest delay, days.
        dirt_share: share of invalid rows; all kinds are equally frequent.
        new_item_share: share of the items that are launched after the first day.
        missing_share: share of the items without features in a modality.
        seed: seed of all random numbers.
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
            described = ", ".join(f"{name}={getattr(self, name)}" for name in wrong) or "no modality"
            raise ConfigError(
                f"A log cannot be generated with {described}.",
                "Give counts of 1 or more, shares and exponents in [0, 1), and at most as many categories as items.",
            )


@dataclass(frozen=True)
class World:
    """The latent variables of a generated log.

    Attributes:
        item_category: int32 [num_items].
        item_launch: int32 [num_items], first day of the item.
        item_latent: float32 [num_items, LATENT_DIM], common to all modalities of an item.
        user_categories: int32 [num_users, 3], favourite first.
        user_ids, item_ids: string arrays; the ids are in random order, independent of activity and popularity.
        members: items by category, the most popular first.
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


def make_world(settings: GeneratorSettings) -> World:
    """Draw users, items and categories."""
    rng = np.random.default_rng([settings.seed, 0])
    category = rng.permutation(np.arange(settings.num_items) % settings.num_categories).astype(np.int32)
    members = np.argsort(category, kind="stable")
    starts = np.searchsorted(category[members], np.arange(settings.num_categories + 1))
    launch = np.where(
        rng.random(settings.num_items) < settings.new_item_share,
        rng.integers(0, settings.num_days, settings.num_items),
        0,
    )
    # The most popular item of a category exists from the first day: it replaces items that are not launched yet.
    launch[members[starts[:-1]]] = 0
    centres = rng.standard_normal((settings.num_categories, LATENT_DIM))
    latent = centres[category] + 0.5 * rng.standard_normal((settings.num_items, LATENT_DIM))
    return World(
        category,
        launch.astype(np.int32),
        latent.astype(np.float32),
        rng.integers(0, settings.num_categories, (settings.num_users, 3)).astype(np.int32),
        _ids("u", rng.permutation(settings.num_users)),
        _ids("i", rng.permutation(settings.num_items)),
        members,
        starts,
    )


def generate(settings: GeneratorSettings, raw: str | Path) -> Imported:
    """Write a log, a catalog and features into `raw`, and the latent variables into `raw/truth/`.

    `truth/world.npz` holds the arrays of `World`; `truth/counts.json` the rows, the late rows and the invalid rows by
    kind. A second call with the same settings changes nothing.

    Raises:
        DataError: `raw` holds other data.
    """
    described = {**asdict(settings), "start": settings.start.isoformat()}

    def build(folder: Path) -> Imported:
        world = make_world(settings)
        counts: dict[str, Any] = {"rows": 0, "late": 0, "dirt": dict.fromkeys(DIRT, 0)}
        seen = np.zeros(settings.num_users, dtype=bool)
        for day, table in draw_log(settings, world, counts, seen):
            path = folder / INTERACTIONS_FOLDER / f"{DAY_PREFIX}{day.isoformat()}" / "part-0.parquet"
            path.parent.mkdir(parents=True)
            pq.write_table(table, path, compression="zstd", row_group_size=FILE_GROUP_ROWS)
        titles: list[str | None] = [f"Item {n} of category {c}" for n, c in enumerate(world.item_category.tolist())]
        write_items(folder, world.item_ids.to_pylist(), titles)
        for index, (name, dim) in enumerate(sorted(settings.modalities.items())):
            _write_modality(folder / FEATURES_FOLDER / name, settings, world, index, dim)
        _write_truth(folder / TRUTH_FOLDER, world, counts)
        end = settings.start + timedelta(days=settings.num_days)
        return Imported(
            dataset=f"generated-{settings.seed}",
            raw=str(Path(raw).absolute()),
            num_users=int(seen.sum()),
            num_items=settings.num_items,
            num_interactions=settings.num_rows,
            modalities=dict(settings.modalities),
            split="temporal",
            start=end - timedelta(days=1),
            end=end,
        )

    source = {"dataset": f"generated-{settings.seed}", "format": FORMAT, "plan": described}
    return write_raw(Path(raw), source, build)


def draw_log(
    settings: GeneratorSettings, world: World, counts: dict[str, Any], seen: NDArray[np.bool_]
) -> Iterator[tuple[date, pa.Table]]:
    """Yield the rows of every arrival day.

    Args:
        settings, world: settings and latent variables.
        counts: the numbers of rows, late rows and invalid rows by kind are added to it.
        seen: bool [num_users], set for users with a valid row.
    """
    rng = np.random.default_rng([settings.seed, 1])
    weekdays = np.array([(settings.start + timedelta(days=day)).weekday() for day in range(settings.num_days)])
    num_dirty = round(settings.num_rows * settings.dirt_share)
    per_day = _apportion(settings.num_rows - num_dirty, WEEKDAY_WEIGHTS[weekdays])
    dirt_per_day = _apportion(num_dirty, WEEKDAY_WEIGHTS[weekdays])
    midnight = int(datetime.combine(settings.start, time(), UTC).timestamp()) * 1_000_000
    waiting: dict[int, list[pa.Table]] = {day: [] for day in range(settings.num_days)}
    for day in range(settings.num_days):
        users, items, within, events = _draw_events(settings, world, day, int(per_day[day]), rng)
        seen[users] = True
        table = _table(world, users, items, midnight + day * DAY_MICROS + within, events)
        # Rows that would arrive after the last day arrive on it.
        delay = np.where(
            rng.random(len(users)) < settings.late_share, rng.integers(1, settings.most_days_late + 1, len(users)), 0
        )
        delay = np.minimum(delay, settings.num_days - 1 - day)
        counts["late"] += int((delay > 0).sum())
        for days in np.unique(delay).tolist():
            waiting[day + days].append(table.filter(pa.array(delay == days)))
        clean = waiting.pop(day)
        dirt = _draw_dirt(pa.concat_tables(clean), int(dirt_per_day[day]), midnight + day * DAY_MICROS, rng, counts)
        arrived = pa.concat_tables([*clean, *dirt])
        counts["rows"] += arrived.num_rows
        yield settings.start + timedelta(days=day), arrived


def _draw_events(
    settings: GeneratorSettings, world: World, day: int, count: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int8]]:
    users = _power_law(rng.random(count), settings.num_users, settings.user_exponent)
    choice = np.searchsorted(np.cumsum(CATEGORY_SHARES), rng.random(count), side="right")
    category = world.user_categories[users, np.minimum(choice, 2)]
    category = np.where(choice == 3, rng.integers(0, settings.num_categories, count), category)
    sizes = np.diff(world.starts)
    items = np.full(count, -1)
    absent = np.arange(count)
    for _ in range(DRAWS):
        chosen = category[absent]
        positions = _power_law(rng.random(len(absent)), sizes[chosen], settings.item_exponent)
        items[absent] = world.members[world.starts[chosen] + positions]
        absent = absent[world.item_launch[items[absent]] > day]
    items[absent] = world.members[world.starts[category[absent]]]
    hours = np.searchsorted(np.cumsum(HOUR_WEIGHTS / HOUR_WEIGHTS.sum()), rng.random(count), side="right")
    within = np.minimum(hours, 23) * 3_600_000_000 + rng.integers(0, 3_600_000_000, count)
    events = np.searchsorted(np.cumsum(list(EVENT_SHARES.values()))[:-1], rng.random(count), side="right")
    return users, items, within, events.astype(np.int8)


def _draw_dirt(
    clean: pa.Table, count: int, midnight: int, rng: np.random.Generator, counts: dict[str, Any]
) -> list[pa.Table]:
    """Copy valid rows and make them invalid, one table per kind."""
    if clean.num_rows == 0:
        return []
    invalid = []
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
        invalid.append(rows)
    return invalid


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
    """Draw ranks from 0 with frequency (rank + 1) ** -exponent, by the inverse of the distribution function.

    Args:
        uniform: random numbers in [0, 1).
        size: number of ranks, one for all draws or one for each.
        exponent: below 1.
    """
    power = 1 - exponent
    rank = (uniform * ((np.asarray(size) + 1.0) ** power - 1) + 1) ** (1 / power) - 1
    return np.minimum(rank.astype(np.int64), np.asarray(size) - 1)


def _apportion(total: int, weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Split a total into whole numbers in proportion to the weights."""
    ends = np.round(total * np.cumsum(weights) / weights.sum()).astype(np.int64)
    return np.diff(ends, prepend=0)


def _ids(letter: str, numbers: NDArray[np.int64]) -> pa.Array:
    return pc.binary_join_element_wise(letter, pa.array(numbers).cast(pa.string()), "")


def _write_modality(folder: Path, settings: GeneratorSettings, world: World, index: int, dim: int) -> None:
    rng = np.random.default_rng([settings.seed, 2, index])
    mixing = rng.standard_normal((LATENT_DIM, dim)) / np.sqrt(LATENT_DIM)
    folder.mkdir(parents=True)
    with pq.ParquetWriter(folder / "part-0.parquet", FEATURES, compression="zstd") as writer:
        for start in range(0, settings.num_items, FEATURE_ROWS):
            latent = world.item_latent[start : start + FEATURE_ROWS]
            rows = latent @ mixing + 0.3 * rng.standard_normal((len(latent), dim))
            keep = rng.random(len(latent)) >= settings.missing_share
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
