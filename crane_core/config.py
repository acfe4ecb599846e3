"""One frozen configuration for a run: what to compute, and apart from it, where.

`RunConfig` without `runtime` decides the result and enters the fingerprints. `runtime` says where the work
runs and never changes a result.
"""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from functools import cache
from typing import Any, Literal
from zoneinfo import available_timezones

from pydantic import Field, field_validator, model_validator

from crane_core.model_config import ModelConfig
from crane_core.section import Section

Phi = Literal["softmax", "tanh", "linear", "block", "landmark"]
Precision = Literal["float32", "bfloat16"]
PREVIOUS = "previous"
"""Value of `etl.base_run` that stands for the run before this one."""


def known_zone(name: str) -> str:
    """Return the name if the IANA database has it; raise a ValueError otherwise."""
    if name != "UTC" and name not in _zones():
        raise ValueError("not a time zone of the IANA database")
    return name


@cache
def _zones() -> set[str]:
    """Return the names of the zones, without files beside them which Spark and Arrow do not know."""
    return available_timezones() - {"Factory", "localtime"}


class Window(Section):
    start: datetime
    """First instant whose data is new to this run, UTC."""
    end: datetime
    """First instant this run must not see, UTC. No row at or after it is read."""

    @field_validator("start", "end", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        elif isinstance(value, date) and not isinstance(value, datetime):
            value = datetime(value.year, value.month, value.day)
        if isinstance(value, datetime):
            return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Window:
        if self.start >= self.end:
            raise ValueError(f"window.start {self.start} must lie before window.end {self.end}")
        return self


class Etl(Section):
    split: Literal["temporal", "leave_last", "label", "none"] = "temporal"
    """`temporal`: by global time. `leave_last`: each user's last two items. `label`: the column `label`. `none`: every
    event is training; only a refit run can be trained on it, since nothing can be chosen."""
    refit: bool = True
    """Serve a second model, which has learned from every event before `window.end` with the choices of the evaluated
    one. Without it the evaluated model is served, which has not seen its validation and test periods."""
    validation_days: int = Field(7, ge=1)
    """Length of the validation period of a temporal split; it ends where the test period starts."""
    test_days: int = Field(7, ge=1)
    """Length of the test period of a temporal split; it ends at `window.end`."""
    history_days: int | None = Field(None, ge=1)
    """Days before `window.end` that are read; all when absent."""
    lookback_days: int = Field(3, ge=0)
    """An event may arrive in a daily partition up to this many days after it happened."""
    time_zone: str = "UTC"
    """Zone whose midnights cut the daily partitions `dt=` and the days of reports and caps. Events are instants."""
    event_weights: dict[str, float] = Field({})
    """Event type to the factor on its rows' weights, for example `{view: 1, cart: 3, purchase: 5}`. Rows of a type that
    is not named are set aside (`unknown_event_type`), rows without a type count once. Types are not read when empty."""
    repeats: Literal["first", "sum", "max"] = "first"
    """Weight of an interaction with several events: that of the first, or the sum or maximum of those that lie in the
    split period of the first."""
    max_events_per_day: int | None = Field(None, ge=1)
    """Later events of a user on the same day are set aside (`over_daily_cap`)."""
    max_interactions: int | None = Field(None, ge=1)
    """Users with more training interactions are taken for bots and set aside (`bot`)."""
    base_run: str | None = None
    """Run of an earlier window whose ids keep their numbers; new ids are appended to them, and those no longer in
    use stay as tombstones. Its content enters the fingerprint. Without it, ids are numbered by this run alone.
    `previous` stands for the run with an item graph whose window ends last before this one's, in the same store; the
    run is recorded with the id that was found when it started, or with none."""
    min_weight: float = 0.0
    """Events with a smaller weight are set aside (quarantine reason `below_min_weight`)."""
    k_core: int = Field(1, ge=1)
    """Users and items with fewer training interactions are set aside, repeatedly until none is left."""
    max_quarantine_share: float = Field(0.5, gt=0, le=1)
    """The run stops when a larger share of the rows read is malformed."""
    drift_days: int = Field(28, ge=1)
    """Days before the last one that it is compared with in `quality.json`."""
    drift_min_rows: int = Field(1000, ge=1)
    """With fewer rows on either side nothing is compared."""
    drift_warn: float = Field(0.25, gt=0)
    """A population stability index above this is a warning in the log and in `quality.json`."""
    drift_stop: float | None = Field(None, gt=0)
    """The run stops when one is above this."""
    completeness_warn: float = Field(0.5, ge=0)
    """The last day has as many events as a day of its kind has (`completeness` in `quality.json`), or fewer. A share
    below this is a warning in the log and in the report. A day of its kind has the median of the same weekdays of
    eight weeks; where there are fewer than three of them, that of the days of four weeks."""
    completeness_stop: float | None = Field(0.2, ge=0)
    """The run stops when the share is below this; never when null."""
    completeness_min_rows: int = Field(1000, ge=1)
    """Fewest events of a day of its kind; with fewer nothing is judged."""

    def going_on_from(self, run: str | None) -> Etl:
        """Return the same with another `base_run`."""
        return self.model_copy(update={"base_run": run})

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, name: str) -> str:
        return known_zone(name)

    @field_validator("event_weights")
    @classmethod
    def _usable_weights(cls, weights: dict[str, float]) -> dict[str, float]:
        if len(weights) > 100 or any(not name or not 0 <= value < float("inf") for name, value in weights.items()):
            raise ValueError("at most 100 event types with names and finite weights of 0 or more")
        return dict(sorted(weights.items()))

    def first_instant(self, window: Window) -> datetime | None:
        """Events before it are not read: `history_days` before the end of the window."""
        return None if self.history_days is None else window.end - timedelta(days=self.history_days)

    def cutoffs(self, window: Window) -> tuple[datetime, datetime]:
        """First instants of the validation and of the test period of a temporal split."""
        test_start = window.end - timedelta(days=self.test_days)
        return test_start - timedelta(days=self.validation_days), test_start


class Features(Section):
    modalities: tuple[str, ...] = ()
    """Modalities to use, by folder name; all that are found when empty."""
    standardise: Literal["zscore", "l2", "none"] = "l2"
    """`zscore` per column, fitted on items with training interactions; `l2` per row; or as they are."""
    max_dim: int | None = Field(None, ge=1)
    """Modalities that are wider are projected to this width once they are standardised. User profiles are sums, so
    they are taken over the narrow rows."""
    projection: Literal["pca", "svd"] = "pca"
    """Projection onto the principal axes of the items with training interactions, around their mean or the origin."""
    dtype: Literal["float16", "float32"] = "float32"
    """Number type of the matrices. `float16` halves what they take on disk and on the way to a GPU; whatever reads them
    goes on from the rounded numbers in float32 or float64. The run stops where a number does not fit."""
    binary: Literal["float16", "float32", "float64"] = "float32"
    """Number type of vectors that are delivered as fixed-size binary, little-endian."""
    max_quarantine_share: float = Field(0.5, gt=0, le=1)
    """The run stops when a larger share of a modality's rows is malformed."""
    min_trained_coverage: float = Field(0.0, ge=0, le=1)
    """The run stops when a modality has a smaller share of the items with training interactions."""

    @field_validator("modalities")
    @classmethod
    def _distinct(cls, modalities: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({name for name in modalities if modalities.count(name) > 1})
        if twice:
            raise ValueError(f"features.modalities names {', '.join(twice)} more than once")
        return modalities


class Profiles(Section):
    aggregate: Literal["sum", "mean"] = "sum"
    """Aggregate of the feature rows of a user's training items, which is the user's profile."""


class Refine(Section):
    embedding_dim: int = Field(64, ge=1)
    """Width d of the refined rows."""
    phi: Phi = "linear"
    """Correlation function of RCA: `softmax`, `tanh` and `linear` over every item, computed exactly; `block` and
    `landmark` are softmax over some of them."""
    num_lists: int | None = Field(None, ge=1)
    """`block`: inverted lists the items are clustered into; sqrt(number of items) when absent."""
    num_probes: int = Field(8, ge=1)
    """`block`: nearest lists a row attends to; more are closer to softmax and slower."""
    num_attention_landmarks: int | None = Field(None, ge=1)
    """`landmark`: items in the fixed sample every row attends to; 8 sqrt(number of items) when absent."""
    precision: Precision = "float32"
    """Number type of queries and keys in the products of RCA, which are summed in float32; `linear` ignores it.
    `bfloat16` is what the matrix units of a GPU are fastest at; a CPU gains nothing from it."""
    num_recursions: int = Field(3, ge=0)
    """R, the number of RCA passes; 0 is a plain projection."""
    num_steps: int = Field(300, ge=0)
    """Mini-batches the RCA weights are fitted on."""
    batch_size: int = Field(512, ge=2)
    """Users per mini-batch."""
    num_landmarks: int = Field(2048, ge=1)
    """Items that serve as keys and as ranking candidates while fitting."""
    learning_rate: float = Field(1e-3, gt=0)
    """Adam's step size."""
    temperature: float = Field(0.2, gt=0)
    """Temperature of the ranking softmax and of the agreement loss."""
    agreement_weight: float = Field(0.1, ge=0)
    """Weight of the InfoNCE loss between the modalities of one item."""
    max_drift: float = Field(0.0, ge=0, le=1)
    """Largest drift at which a run with `etl.base_run` keeps that run's weights, keys and rows of RCA and refines only
    new and changed items. The drift is the share of an item's neighbours that would differ if the whole catalog were
    refined anew with these weights. Everything is built anew above it; where the settings of the two runs differ; where
    most items have other features than in that run (`zscore` and `max_dim` change all of them every day); and where the
    catalog has doubled. 0: everything is built anew in every run."""
    chunk_size: int = Field(16384, ge=1)
    """Rows refined at a time, written at a time, and lost at most when a job is killed; also the upper bound of the
    edges of a block of scores. Memory grows with it, the result does not depend on it beyond rounding."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the weights, the mini-batches, and the lists or landmarks of the sparse forms."""


class Knn(Section):
    k: int = Field(10, ge=1)
    """Neighbours per item, the item itself excluded."""
    num_shards: int = Field(2, ge=1)
    """Query shards, each a task of its own."""
    mode: Literal["exact", "approx", "auto"] = "auto"
    """`exact`: every item is compared with every other. `approx`: with those in the nearest inverted lists. `auto`:
    exact up to `exact_items` items."""
    exact_items: int = Field(100_000, ge=0)
    """Most items that `auto` searches exactly; the time grows with their square."""
    num_lists: int | None = Field(None, ge=1)
    """Inverted lists of the approximate search; sqrt(number of items) when absent."""
    num_probes: int = Field(8, ge=1)
    """Nearest lists an item is compared with; more find more and take longer. Four times as many are tried once where
    the certified recall is below `min_recall`."""
    memory: int = Field(1 << 30, ge=1 << 20)
    """Bytes for blocks of rows and scores, whatever the number of items; the rows themselves stay on disk. On a GPU a
    million rows took a third of the time with 8 GiB (`tests/bench/results/gpu.md`)."""
    certificate_sample: int = Field(1000, ge=1)
    """Items whose neighbours are checked against brute force."""
    min_recall: float = Field(0.95, ge=0, le=1)
    """The run stops when the lower bound of the certified recall is below."""

    def approximate(self, num_items: int) -> bool:
        """Return whether so many items are searched approximately."""
        return self.mode == "approx" or (self.mode == "auto" and num_items > self.exact_items)


class Evaluate(Section):
    ks: tuple[int, ...] = (5, 10, 20, 50)
    """Cut-offs of recall and NDCG; 20 must be one of them."""
    num_bootstrap: int = Field(2000, ge=100)
    """Bootstrap resamples behind every interval."""
    user_block: int = Field(1024, ge=1)
    """Users ranked at a time; bounds the memory of the ranking."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the bootstrap, and of the clusters of items that tell diverse users from focused ones."""
    live_warn: float = Field(0.8, ge=0)
    """The live score is the Recall@20 of the lists that the champion had exported, on the events of the window, divided
    by that of recent popularity for the same users (`ml.live`). Below this it is a warning in the log and in the
    report."""
    live_stop: float | None = Field(None, ge=0)
    """The run stops before its model is registered when the live score is below this; never when null."""
    live_min_users: int = Field(50, ge=1)
    """Fewest users with an event in the window; with fewer the live score is not compared with `live_warn` and
    `live_stop`."""

    @field_validator("ks")
    @classmethod
    def _has_20(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        if 20 not in ks or min(ks) < 1:
            raise ValueError("evaluate.ks must hold positive numbers, 20 among them")
        return tuple(sorted(set(ks)))


class Promote(Section):
    margin: float = Field(0.005, ge=0)
    """Largest loss of NDCG@20 and Recall@20 the interval against the champion may still admit."""
    min_users: int = Field(50, ge=1)
    """Fewer evaluated users than this decide nothing: the challenger is refused."""
    min_coverage_ratio: float = Field(0.5, ge=0)
    """The challenger's catalog coverage must be at least this share of the champion's."""
    max_popularity_ratio: float = Field(1.5, gt=0)
    """The challenger's popularity bias may be at most this multiple of the champion's."""
    max_cold_recall_loss: float = Field(0.02, ge=0)
    """Largest loss of the recall of cold items."""
    max_cold_share_ratio: float = Field(3.0, ge=0)
    """Cold items may have at most this multiple of their share of the held-out interactions in a challenger's lists."""
    min_cold_share: float = Field(0.02, ge=0, le=1)
    """A share of cold items in lists that is always allowed: new items can be found where few were chosen."""
    beats: tuple[Literal["lightgcn", "popularity", "recent_popularity"], ...] = (
        "lightgcn",
        "popularity",
        "recent_popularity",
    )
    """Baselines a first champion must reach or exceed in Recall@20."""
    keep_versions: int = Field(5, ge=1)
    """Newest champions, the one in service included, whose runs `crane prune` keeps so that one can roll back to
    them."""

    def rule(self) -> dict[str, Any]:
        """Return what decides about a challenger, as JSON values."""
        return self.model_dump(mode="json", exclude={"keep_versions"})


class Rules(Section):
    available: bool = False
    """Leave out items that cannot be had at `window.end`: those whose `in_stock` is false, whose `available_from` is
    later, or whose `available_until` is not. A null restricts nothing."""
    repeat_categories: tuple[str, ...] = ()
    """Categories of what is bought again: their items are shown to users who have them, all other items are not."""
    max_per_category: int | None = Field(None, ge=1)
    """Most items of a category in a list; any number when absent, and of items without a category."""
    boosts: dict[str, dict[str, float]] = Field({})
    """Column to value to a factor on the odds of the items with that value, for example `{brand: {acme: 1.5}}`: the
    logarithm of the factor is added to their scores, and their popularity is multiplied by it. Factors of several
    columns are multiplied. Numbers and flags are given as text: `3`, `true`."""

    @field_validator("repeat_categories")
    @classmethod
    def _in_order(cls, categories: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(categories)))

    @field_validator("boosts", mode="before")
    @classmethod
    def _as_text(cls, boosts: Any) -> Any:
        """Return the values as text: YAML reads `true` and `3` as a flag and a number."""
        if not isinstance(boosts, dict) or not all(isinstance(factors, dict) for factors in boosts.values()):
            return boosts
        return {
            column: {value if isinstance(value, str) else json.dumps(value): f for value, f in factors.items()}
            for column, factors in boosts.items()
        }

    @field_validator("boosts")
    @classmethod
    def _usable_factors(cls, boosts: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        if len(boosts) > 10 or any(not 1e-3 <= f <= 1e3 for factors in boosts.values() for f in factors.values()):
            raise ValueError("at most 10 columns, and factors from 0.001 to 1000")
        return {column: dict(sorted(factors.items())) for column, factors in sorted(boosts.items()) if factors}

    def are_set(self) -> bool:
        """Return whether any rule is set."""
        return self != Rules()


class Export(Section):
    k: int = Field(50, ge=1)
    """Recommendations per user."""
    num_similar: int = Field(20, ge=1)
    """Similar items per item."""
    rules: Rules = Rules()
    """Rules of what the export, `crane recommend` and the served model may show. They belong to the run, so other rules
    count from the next champion on."""


class Runtime(Section):
    raw: str | None = None
    """URI of the raw data; `{store}/raw` when absent."""
    registry: str | None = None
    """MLflow tracking and registry URI; a SQLite file in the store when absent."""
    model_name: str = "crane"
    """Name of the registered model."""
    device: str = "cpu"
    """Device of refining, training and the exact kNN: `cpu` or `cuda`. Approximate kNN and ranking run on the CPU."""
    world_size: int = Field(1, ge=1)
    """Refining and training processes on this machine; on `cuda` no more than it has devices."""
    live_curves: bool = False
    """Show the curves of a training in MLflow while it runs; they are registered with the model in any case."""
    num_threads: int | None = Field(None, ge=1)
    """Threads per process for torch and faiss; the library's choice when absent."""
    spark_master: str = "local[*]"
    """Spark master or `sc://` Connect URL."""
    spark_memory: str = "1g"
    """Memory of the Spark driver."""
    scratch_days: int = Field(7, ge=2)
    """Days after which `jobs.tidy` clears what nobody has used from the scratch folder; longer than a job may take."""
    backfill: bool = False
    """A backfill registers its model but moves no alias."""
    keep_days: int | None = Field(None, ge=1)
    """The daily run removes runs whose window ended more than so many days before the newest one's, and the artifacts
    that nothing else needs (`crane prune`); nothing is removed when absent."""
    delivery: Literal["quiet", "marker", "none"] = "quiet"
    """Sign of a complete daily partition, which a scheduled run waits for: its files have stopped changing, or it
    holds a marker; `none`: the run does not wait."""
    delivery_marker: str = Field("_SUCCESS", pattern=r"^[^/\x00]+$")
    """Name of the file that the producer writes last into a partition."""
    delivery_quiet_minutes: float = Field(5, ge=0)
    """Minutes without a change after which the files of a partition are complete."""
    delivery_deadline_hours: float = Field(6, ge=0)
    """Hours after the end of the window at which the run fails if a partition is missing."""


class RunConfig(ModelConfig):
    """Everything that defines one run."""

    window: Window
    etl: Etl = Etl()
    features: Features = Features()
    profiles: Profiles = Profiles()
    refine: Refine = Refine()
    knn: Knn = Knn()
    evaluate: Evaluate = Evaluate()
    promote: Promote = Promote()
    export: Export = Export()
    runtime: Runtime = Runtime()

    def identity(self) -> dict[str, Any]:
        """The configuration without `runtime`, as JSON values: what two runs must share to be the same."""
        return self.model_dump(mode="json", exclude={"runtime"})
