"""Shipped rows beside their evaluation twin and recent popularity, on the week that follows each end.

    python -m tests.bench.bench_ship --data movietweetings --ends 2013-08-05 2013-08-19 2013-08-26

Data, windows and head are those of `bench_time`: the twin learns up to 14 days before an end and chooses by the week
after that. The shipped rows are made with the twin's choices from every row before the end, as a refit run makes them.
Both, and recent popularity with the twin's half-life at the end, are scored as they would be served: each masks what it
knows that a user has met, and answers users whom it does not know by what is popular. Judged are all users with a first
meeting in the seven days after an end; `known` are those of them that the twin knows too. `--train` trains LightGCN
twice, for twin and shipped rows, and offers its rows to the head; without it the head has the users' recent items and
the popularity. The rows of CRANE and the features are not in it.

The last line on stdout is one JSON object: the means, and the paired differences with 95 % intervals over users.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.evaluation.baselines import first_unseen, popular_items
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import dot_product, rank_users
from crane_core.experiments.models import behaviour
from crane_core.model_config import Choices, ModelConfig
from crane_core.numerics.bootstrap import bootstrap, paired_bootstrap
from crane_core.training.head import ChosenHead, choose_head
from tests.bench.bench_time import DAY, METRICS, NUM_RESAMPLES, model_rows, read_log, window

K = 20


@dataclass(frozen=True)
class Week:
    """The week after an end.

    Attributes:
        users: external ids of its users, ascending.
        relevant: the items that each of them met first in it.
    """

    users: np.ndarray
    relevant: ItemLists


def following(log: pd.DataFrame, end: str) -> Week:
    """Return the first meetings of the seven days after an end; items by their place among those of the log."""
    last = pd.Timestamp(end, tz="UTC").timestamp()
    rows = log[(log["time"] >= last) & (log["time"] < last + 7 * DAY)]
    items = np.searchsorted(np.sort(log["item"].unique()), rows["item"])
    users, numbers = np.unique(rows["user"], return_inverse=True)
    return Week(users, ItemLists.from_pairs(numbers, items, len(users)))


def everything(log: pd.DataFrame, end: str) -> tuple[Interactions, np.ndarray]:
    """Return all rows before an end as training, as a refit run has them, and the ids of the users."""
    last = pd.Timestamp(end, tz="UTC").timestamp()
    items = np.sort(log["item"].unique())
    rows = log[log["time"] < last]
    users = np.sort(rows["user"].unique())
    numbered = rows.assign(user=np.searchsorted(users, rows["user"]), item=np.searchsorted(items, rows["item"]))
    numbered = numbered.sort_values(["user", "item"])
    train = ItemLists.from_pairs(numbered["user"].to_numpy(), numbered["item"].to_numpy(), len(users))
    none = ItemLists(np.zeros(len(users) + 1, dtype=np.int64), np.empty(0, dtype=np.int32))
    ages = ((last - numbered["time"].to_numpy()) / DAY).astype(np.float32)
    return Interactions(len(users), len(items), train, none, none, ages=ages), users


def served(
    head: ChosenHead | None, half_life: float | None, data: Interactions, ids: np.ndarray, week: Week
) -> np.ndarray:
    """Return the lists that the users of a week are shown, int32 [n, K]: by the head, or by recent popularity."""
    order = popular_items(data, data.popularity(half_life))
    shown = np.tile(order[:K].astype(np.int32), (len(week.users), 1))
    known = np.flatnonzero(np.isin(week.users, ids))
    rows = np.searchsorted(ids, week.users[known])
    if head is None:
        shown[known] = first_unseen(order, data.train, rows, K)
    else:
        shown[known] = rank_users(dot_product(*head.rows), data.train, rows, K, 256)
    return shown


def refitted(twin: ChosenHead, data: Interactions, config: ModelConfig, epochs: int) -> ChosenHead:
    """Return the head over rows of all data, with the choices of the twin; 0 epochs are no training."""
    choices = Choices(
        behaviour_epochs=max(1, epochs),
        crane_epochs=1,
        crane_ranking="dot",
        share=0,
        half_life=twin.half_life,
        history_half_life=twin.history_half_life,
        head=twin.weights,
    )
    config = config.model_copy(update={"choices": choices})
    head = choose_head(model_rows(data, config, epochs > 0), data, config)
    assert head is not None
    return head


def one_window(
    log: pd.DataFrame, end: str, config: ModelConfig, train: bool
) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray, dict]:
    """Return the metrics of each model and user, whether the twin knows the user, and what was chosen."""
    twin_data = window(log, end)
    last = pd.Timestamp(end, tz="UTC").timestamp()
    twin_ids = np.sort(log.loc[log["time"] < last - 14 * DAY, "user"].unique())
    rows, epochs = model_rows(twin_data, config, False), 0
    if train:
        with tempfile.TemporaryDirectory() as folder:
            rows, summary = behaviour(twin_data, config, Path(folder) / "lightgcn")
        epochs = summary["best_epoch"] + 1
    twin = choose_head(rows, twin_data, config)
    assert twin is not None
    data, ids = everything(log, end)
    week = following(log, end)
    lists = {
        "shipped": served(refitted(twin, data, config, epochs), twin.half_life, data, ids, week),
        "twin": served(twin, twin.half_life, twin_data, twin_ids, week),
        "recent_popularity": served(None, twin.half_life, data, ids, week),
    }
    everybody = np.arange(len(week.users))
    metrics = {name: user_metrics(ranked, week.relevant, everybody, (K,)) for name, ranked in lists.items()}
    return (
        metrics,
        np.isin(week.users, twin_ids),
        {"end": end, "users": len(week.users), "epochs": epochs, **twin.facts()},
    )


def compared(found: dict[str, dict[str, np.ndarray]]) -> dict:
    """Return means with intervals, and the differences of the shipped rows to the others, paired by user."""
    pairs = {name: paired_bootstrap(found["shipped"], found[name], NUM_RESAMPLES, 0) for name in list(found)[1:]}
    return {
        "users": len(found["shipped"]["recall@20"]),
        "models": {
            name: {metric: value.as_dict() for metric, value in bootstrap(values, NUM_RESAMPLES, 0).items()}
            for name, values in found.items()
        },
        "shipped_minus": {
            name: {metric: value.as_dict() for metric, value in values.items()} for name, values in pairs.items()
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--ends", nargs="+", required=True, help="ends of the windows, dates in UTC")
    parser.add_argument("--train", action="store_true", help="train LightGCN and offer its rows to the head")
    arguments = parser.parse_args(argv)
    log, config = read_log(arguments.data), ModelConfig()
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    chosen = []
    for end in arguments.ends:
        metrics, is_known, facts = one_window(log, end, config, arguments.train)
        known = {name: {m: values[is_known] for m, values in each.items()} for name, each in metrics.items()}
        found |= {end: metrics, f"{end} known": known}
        chosen.append(facts)
        print(json.dumps(facts), file=sys.stderr)
    for which in ("", " known"):
        parts = [found[f"{end}{which}"] for end in arguments.ends]
        found[f"pooled{which}"] = {
            name: {metric: np.concatenate([part[name][metric] for part in parts]) for metric in METRICS}
            for name in parts[0]
        }
    report = {
        "command": " ".join(sys.argv),
        **{name: compared(each) for name, each in found.items()},
        "windows": chosen,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
