"""The head beside recent popularity on logs with times: windows of 7 + 7 days, users of all windows pooled.

    python -m tests.bench.bench_time --data movietweetings --ends 2013-08-05 2013-08-19 2013-09-02
    python -m tests.bench.bench_time --data ml-100k.inter --ends 1998-02-01 1998-03-01 1998-04-23

`--data` is the folder of MovieTweetings (`ratings.csv`, `movies.csv`) or the MovieLens 100K file of the wheel
`recbole==1.2.1`. The model is trained up to 14 days before each end, chooses by the week after that, and is tested on
the last week. Recent popularity has its half-life from the same validation week; both count training rows only. Every
item of the log is in the catalog, also those that no training row has. `--train` trains LightGCN too and gives its rows
to the head; without it the head has the users' recent items and the popularity. `--catalog` names a file with titles
and genres of the items (`movies.csv`, or `ml-100k.item` of the same wheel). The head then has content too: genres and
decades.

The last line on stdout is one JSON object: the means, and the paired differences with 95 % intervals over users.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.evaluation.baselines import recent_popularity
from crane_core.evaluation.metrics import user_metrics
from crane_core.evaluation.ranking import dot_product, rank_users
from crane_core.experiments.models import behaviour
from crane_core.model.views import Rows
from crane_core.model_config import ModelConfig
from crane_core.numerics.bootstrap import bootstrap, paired_bootstrap
from crane_core.training.head import choose_head

DAY = 86400
NUM_RESAMPLES = 2000
METRICS = ("recall@20", "ndcg@20")


def read_log(path: Path) -> pd.DataFrame:
    """Read `user`, `item` and `time` (seconds), one row per pair of user and item: the first."""
    log = pd.read_csv(path / "ratings.csv") if path.is_dir() else pd.read_csv(path, sep="\t")
    log.columns = ["user", "item", "rating", "time"]
    return log.sort_values(["time", "user", "item"], kind="stable").drop_duplicates(["user", "item"])


def window(log: pd.DataFrame, end: str) -> Interactions:
    """Return the interactions before an end; the last two weeks of known users are validation and test."""
    last = pd.Timestamp(end, tz="UTC").timestamp()
    cutoffs = last - 14 * DAY, last - 7 * DAY
    items = np.sort(log["item"].unique())
    log = log[log["time"] < last]
    users = np.sort(log.loc[log["time"] < cutoffs[0], "user"].unique())
    log = log[log["user"].isin(users)]
    numbered = log.assign(
        user=np.searchsorted(users, log["user"]), item=np.searchsorted(items, log["item"])
    ).sort_values(["user", "item"])
    split = np.searchsorted(cutoffs, numbered["time"], side="right")
    parts = [numbered[split == part] for part in range(3)]
    lists = [ItemLists.from_pairs(part["user"].to_numpy(), part["item"].to_numpy(), len(users)) for part in parts]
    ages = ((cutoffs[0] - parts[0]["time"].to_numpy()) / DAY).astype(np.float32)
    return Interactions(len(users), len(items), lists[0], lists[1], lists[2], ages=ages)


def content(path: Path, log: pd.DataFrame) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return genres and decade of the items of a log, as two modalities of zeros and ones."""
    if path.suffix == ".csv":
        table = pd.read_csv(path).set_index("movie_id")
        year, genres = table["title"].str.extract(r"\((\d{4})\)\s*$")[0], table["genres"].str.split("|")
    else:
        table = pd.read_csv(path, sep="\t", index_col=0)
        year, genres = table.iloc[:, 1].astype(str).str.extract(r"(\d{4})")[0], table.iloc[:, 2].str.split(" ")
    items = np.sort(log["item"].unique())
    decade = pd.get_dummies(year.str[:3]).reindex(items).astype("float32")
    words = pd.get_dummies(genres.explode()).groupby(level=0).max().reindex(items).astype("float32")
    return [(each.fillna(0).to_numpy(), each.notna().any(axis=1).to_numpy()) for each in (words, decade)]


def model_rows(interactions: Interactions, config: ModelConfig, train: bool) -> Rows:
    """Return LightGCN's rows, or rows whose scores are all 0."""
    if not train:
        return torch.zeros(interactions.num_users, 1), torch.zeros(interactions.num_items, 1)
    with tempfile.TemporaryDirectory() as folder:
        rows, _ = behaviour(interactions, config, Path(folder) / "lightgcn")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--ends", nargs="+", required=True, help="ends of the windows, dates in UTC")
    parser.add_argument("--train", action="store_true", help="train LightGCN and offer its rows to the head")
    parser.add_argument("--catalog", type=Path, help="file with titles and genres")
    arguments = parser.parse_args(argv)
    config, log = ModelConfig(), read_log(arguments.data)
    features = content(arguments.catalog, log) if arguments.catalog else []
    found: dict[str, list[dict[str, np.ndarray]]] = {"head": [], "recent_popularity": []}
    chosen = []
    for end in arguments.ends:
        interactions = window(log, end)
        assert (interactions.ages >= 0).all(), "a training row lies after the cutoff"
        head = choose_head(model_rows(interactions, config, arguments.train), interactions, config, features)
        assert head is not None
        users = np.flatnonzero(interactions.test.counts() > 0)
        scores = {
            "head": dot_product(*head.rows),
            "recent_popularity": recent_popularity(interactions, head.half_life),
        }
        for name, score in scores.items():
            ranked = rank_users(score, interactions.train, users, 20, 256)
            found[name].append(user_metrics(ranked, interactions.test, users, (20,)))
        chosen.append({"end": end, "users": len(users), **head.facts()})
        print(json.dumps(chosen[-1]), file=sys.stderr)
    pooled = {
        name: {metric: np.concatenate([each[metric] for each in windows]) for metric in METRICS}
        for name, windows in found.items()
    }
    difference = paired_bootstrap(pooled["head"], pooled["recent_popularity"], NUM_RESAMPLES, 0)
    report = {
        "command": " ".join(sys.argv),
        "users": len(pooled["head"]["recall@20"]),
        "models": {
            name: {metric: interval.as_dict() for metric, interval in bootstrap(values, NUM_RESAMPLES, 0).items()}
            for name, values in pooled.items()
        },
        "difference": {metric: interval.as_dict() for metric, interval in difference.items()},
        "windows": chosen,
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
