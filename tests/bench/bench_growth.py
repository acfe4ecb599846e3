"""What growing costs and saves: rows and neighbours of a catalog that grew, beside the same catalog built anew.

    python -m tests.bench.bench_growth --data lfm2k --modalities text audio_whisper --share 0.99

RCA is fitted and its keys are made on a share of the items and their interactions; the other items then join. The check
comes first: the grown lists must be those of a search from nothing over the grown rows. The last line on stdout is one
JSON object:

- `drift`: share of the neighbours that keys of all items would replace, the weights staying; `drift_of_sample` is what
  a run sees that knows `--anchors` of the items only.
- `refit`: share that a catalog refined by weights fitted anew would replace; `seeds`: share in which two such catalogs
  differ whose fits differ in the seed alone, what there is of chance in `refit`.
- `seconds`: of growing rows and lists, and of fitting, refining and searching anew.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from crane_core.config import Features, Knn, Refine
from crane_core.dataset.interactions import Interactions, ItemLists
from crane_core.experiments.data import Dataset, load_dataset
from crane_core.graph.drift import drift
from crane_core.graph.exact import search
from crane_core.graph.growth import BaseGraph, grow_neighbours
from crane_core.refine import growth
from crane_core.refine.catalog import refine_catalog
from crane_core.refine.fit import fit
from crane_core.refine.growth import Anchors
from crane_core.refine.refiner import Refiner, project_items


def only(dataset: Dataset, num_items: int) -> Dataset:
    """The first items and their interactions."""

    def cut(lists: ItemLists) -> ItemLists:
        return lists.where(lists.items < num_items)

    whole = dataset.interactions
    splits = (cut(part) for part in (whole.train, whole.validation, whole.test))
    features = {name: rows[:num_items] for name, rows in dataset.features.items()}
    return replace(dataset, interactions=Interactions(whole.num_users, num_items, *splits), features=features)


def differ(left: np.ndarray, right: np.ndarray) -> float:
    return 1 - float((left[:, :, None] == right[:, None, :]).any(axis=2).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder in MMRec layout")
    parser.add_argument("--modalities", nargs="+", default=[])
    parser.add_argument("--share", type=float, default=0.99, help="of the items, that are there before")
    parser.add_argument("--anchors", type=int, default=1024)
    parser.add_argument("--phi", default="linear")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    features, config, knn = Features(modalities=arguments.modalities), Refine(phi=arguments.phi), Knn(mode="exact")
    dataset = load_dataset(arguments.data)
    num_items = dataset.interactions.num_items
    before = round(arguments.share * num_items)
    now = dataset.modalities(features, "sum")
    earlier = only(dataset, before)
    then = earlier.modalities(features, "sum")

    def build(seed: int) -> tuple[Refiner, np.ndarray, np.ndarray]:
        refiner, _ = fit(now, dataset.interactions.train, "sum", config.model_copy(update={"seed": seed}))
        return refiner, *_searched(refiner, refine_catalog(refiner, now, config.chunk_size)[0], knn.k)

    refiner, _ = fit(then, earlier.interactions.train, "sum", config)
    rows_then, lists_then = _searched(refiner, refine_catalog(refiner, then, config.chunk_size)[0], knn.k)
    similarities = search(rows_then, range(before), knn.k)[1]
    seconds = {}
    started = time.perf_counter()
    with torch.no_grad():
        projected = project_items(refiner, then, np.arange(before))
        _, joined = refiner.rca(projected, project_items(refiner, now, np.arange(before, num_items)))
        rows = np.concatenate([rows_then, refiner.fuse(joined).numpy()])
    base = BaseGraph(rows_then, lists_then, similarities)
    grown = grow_neighbours(rows, base, range(num_items), knn).neighbours
    seconds["grow"] = time.perf_counter() - started
    np.testing.assert_array_equal(grown, search(rows, range(num_items), knn.k)[0])
    started = time.perf_counter()
    _, _, anew = build(0)
    seconds["build"] = time.perf_counter() - started
    found = {}
    for name, size in (("drift", before), ("drift_of_sample", arguments.anchors)):
        growth.NUM_ANCHORS = size
        found[name] = drift(refiner, Anchors.choose(refiner, then, 0), now, knn.k, config.chunk_size)
    found |= {"refit": differ(grown, anew), "seeds": differ(build(1)[2], anew)}
    sizes = {"dataset": dataset.name, "items": num_items, "before": before, "phi": arguments.phi}
    print(json.dumps(sizes | found | {"seconds": seconds}))


def _searched(refiner: Refiner, items: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        rows = refiner.fuse(items).numpy()
    return rows, search(rows, range(len(rows)), k)[0]


if __name__ == "__main__":
    main()
