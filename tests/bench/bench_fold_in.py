"""Fold-in on a log with times: users whom the model has never met, and users whom it knows.

    python -m tests.bench.bench_fold_in --data ml-100k.inter \
        --ends 1997-11-15 1997-12-15 1998-01-15 1998-02-15 1998-03-15

`--data` is as for `bench_time`. For each end, LightGCN and the head are trained and chosen with the last week before
it as validation. They are then trained once more, with these choices, on every row before the end: the shipped model.
Of every user who is new in the 28 days after the end, the first half of these days' events, by time, is the history.
The other half is to be found. Beside it stands what is popular at the end, with the half-life that was chosen. The
known users' own training events, with their times, are folded in too, and the lists are compared with those of the
trained rows: by the whole score, and by LightGCN's rows alone.

The last line on stdout is one JSON object: means and paired differences with 95 % intervals over users, and the overlap
of the top 20 of known users.
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
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.evaluation.baselines import first_unseen, popular_items
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import dot_product, rank_users
from crane_core.experiments.models import behaviour
from crane_core.model.fold_in import FoldIn, History
from crane_core.model.views import Rows
from crane_core.model_config import Choices, ModelConfig
from crane_core.numerics.bootstrap import bootstrap, paired_bootstrap
from crane_core.training.fold_in import fit_fold_in
from crane_core.training.head import ChosenHead, choose_head
from tests.bench.bench_time import DAY, METRICS, NUM_RESAMPLES, read_log

VALIDATION_DAYS, LATER_DAYS = 7, 28


@dataclass(frozen=True)
class World:
    """A log before an end, and the days after it.

    Attributes:
        twin: interactions with validation rows.
        shipped: every row before the end is training.
        later: `user`, `item`, `age` (days before the user's latest event of the history) and `is_history` of new users.
    """

    twin: Interactions
    shipped: Interactions
    later: pd.DataFrame


def worlds(log: pd.DataFrame, end: str) -> World:
    """Return the interactions around an end."""
    last = pd.Timestamp(end, tz="UTC").timestamp()
    items = np.sort(log["item"].unique())
    log = log.assign(item=np.searchsorted(items, log["item"]))
    before = log[log["time"] < last]
    later = log[(log["time"] >= last) & (log["time"] < last + LATER_DAYS * DAY) & ~log["user"].isin(before["user"])]
    later = later[later.groupby("user")["item"].transform("size") > 1].copy()
    place = later.groupby("user").cumcount()
    later["is_history"] = place < later.groupby("user")["item"].transform("size") // 2
    newest = later["time"].where(later["is_history"]).groupby(later["user"]).transform("max")
    later["age"] = (newest - later["time"]) / DAY
    later["user"] = np.unique(later["user"], return_inverse=True)[1]
    return World(
        interactions(before, len(items), last - VALIDATION_DAYS * DAY), interactions(before, len(items), last), later
    )


def interactions(log: pd.DataFrame, num_items: int, cutoff: float) -> Interactions:
    """Return the training rows up to a cutoff, and later ones of the users who have any as validation."""
    users = np.sort(log.loc[log["time"] < cutoff, "user"].unique())
    log = log[log["user"].isin(users)].assign(user=lambda rows: np.searchsorted(users, rows["user"]))
    log = log.sort_values(["user", "item"])
    train, validation = log[log["time"] < cutoff], log[log["time"] >= cutoff]
    lists = [ItemLists.from_pairs(part["user"].values, part["item"].values, len(users)) for part in (train, validation)]
    nothing = ItemLists(np.zeros(len(users) + 1, dtype=np.int64), np.empty(0, dtype=np.int32))
    ages = ((cutoff - train["time"].to_numpy()) / DAY).astype(np.float32)
    return Interactions(len(users), num_items, lists[0], lists[1], nothing, ages=ages)


def ship(world: World, config: ModelConfig) -> tuple[Rows, ChosenHead]:
    """Choose on the twin, and train and combine again on every row; return LightGCN's rows and the head."""
    with tempfile.TemporaryDirectory() as folder:
        rows, summary = behaviour(world.twin, config, Path(folder) / "twin")
        chosen = choose_head(rows, world.twin, config)
        assert chosen is not None
        choices = Choices(
            behaviour_epochs=summary["best_epoch"] + 1,
            crane_epochs=1,
            crane_ranking="dot",
            share=0.0,
            half_life=chosen.half_life,
            history_half_life=chosen.history_half_life,
            head=chosen.weights,
        )
        refit = config.model_copy(update={"choices": choices})
        # Behaviour keeps trainings by their data: choices are no part of its key, but the data differ.
        rows, _ = behaviour(world.shipped, refit, Path(folder) / "shipped")
    head = choose_head(rows, world.shipped, refit)
    assert head is not None
    return rows, head


def newcomers(world: World, head: ChosenHead) -> dict[str, dict[str, np.ndarray]]:
    """Return the metrics of the new users, by the fold-in and by recent popularity."""
    known, later = world.shipped, world.later
    num_users = int(later["user"].max()) + 1
    ordered = later.sort_values(["user", "item"])
    given, rest = ordered[ordered["is_history"]], ordered[~ordered["is_history"]]
    history = History(given["user"].values, given["item"].values, np.ones(len(given)), given["age"].values)
    seen, relevant = (
        ItemLists.from_pairs(part["user"].values, part["item"].values, num_users) for part in (given, rest)
    )
    users = np.arange(num_users)
    rows = torch.from_numpy(head.fold_in.fold(history, num_users))
    lists = {
        "fold_in": rank_users(dot_product(rows, head.rows[1]), seen, users, 20, 256),
        "recent_popularity": first_unseen(popular_items(known, known.popularity(head.half_life)), seen, users, 20),
    }
    return {name: user_metrics(ranked, relevant, users, (20,)) for name, ranked in lists.items()}


def overlaps(rows: Rows, fold_in: FoldIn, known: Interactions) -> np.ndarray:
    """Return for each known user the share of the top 20 that the own history gives again."""
    train, users = known.train, np.flatnonzero(known.train.counts() > 0)
    folded = fold_in.fold(History(train.users(), train.items, known.decayed(None), known.ages), known.num_users)
    lists = [
        rank_users(dot_product(of_users, rows[1]), train, users, 20, 256).tolist()
        for of_users in (rows[0], torch.from_numpy(folded))
    ]
    return np.array([len(set(left) & set(right)) / 20 for left, right in zip(*lists, strict=True)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--ends", nargs="+", required=True, help="dates in UTC")
    arguments = parser.parse_args(argv)
    config, log = ModelConfig(), read_log(arguments.data)
    found: dict[str, list[dict[str, np.ndarray]]] = {"fold_in": [], "recent_popularity": []}
    shares: dict[str, list[np.ndarray]] = {"model": [], "score": []}
    chosen = []
    for end in arguments.ends:
        world = worlds(log, end)
        rows, head = ship(world, config)
        for name, metrics in newcomers(world, head).items():
            found[name].append(metrics)
        shares["model"].append(overlaps(rows, fit_fold_in(rows, world.shipped), world.shipped))
        shares["score"].append(overlaps(head.rows, head.fold_in, world.shipped))
        medians = {name: float(np.median(each[-1])) for name, each in shares.items()}
        chosen.append(
            {"end": end, **head.facts(), "users": int(world.later["user"].max()) + 1, "median_overlap": medians}
        )
        print(json.dumps(chosen[-1]), file=sys.stderr, flush=True)
    pooled = {
        name: {metric: np.concatenate([each[metric] for each in windows]) for metric in METRICS}
        for name, windows in found.items()
    }
    difference = paired_bootstrap(pooled["fold_in"], pooled["recent_popularity"], NUM_RESAMPLES, 0)
    together = {name: np.concatenate(each) for name, each in shares.items()}
    report = {
        "command": " ".join(sys.argv),
        "new_users": len(pooled["fold_in"]["recall@20"]),
        "models": {
            name: {metric: interval.as_dict() for metric, interval in bootstrap(values, NUM_RESAMPLES, 0).items()}
            for name, values in pooled.items()
        },
        "difference": {metric: interval.as_dict() for metric, interval in difference.items()},
        "overlap": {
            name: {"users": len(each), "median": float(np.median(each)), "at_least_0.8": float((each >= 0.8).mean())}
            for name, each in together.items()
        },
        "windows": chosen,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
