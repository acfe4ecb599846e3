"""Scores per second of full-catalog ranking, beside the matrix product alone and a RecBole-style loop.

    python -m tests.bench.bench_rank --users 2000 --items 300000

Rows are normal, histories random. First the lists are checked against a full sort of float64 scores in which the items
of the user's history are left out: every score of a list must be the one of the sort at its place, and no item of the
history may be in it. Then they take turns over the same users. The last line on stdout is one JSON object:

- `scores_per_second`: users times items per second of `rank_blocks`: scores, mask and the k best.
- `gemm_scores_per_second`: the product alone, in blocks of the same size, into one buffer.
- `peer_scores_per_second`: a loop as RecBole's evaluation has it: for each batch of users a fresh product, the history
  set to -inf by index, `torch.topk`, and the hits looked up in a dense matrix of the positives. A batch has
  `--eval-batch-size` over the number of items users, one at least: with RecBole's default of 4096, one.
- `ruled_scores_per_second`: `rank_blocks` under rules: a tenth of the items cannot be had, a tenth is boosted, and of
  each of `--categories` categories a list has at most `--max-per-category` items. With `--taste` the items of a
  category are alike, so that a user's best items are of few categories: the rows of the items are their category's
  times this, plus noise. Its lists are first checked against a walk along the sort in float64.
- `cpu_...`: the same by the time of the processor, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from crane_core.dataset.interactions import ItemLists
from crane_core.evaluation.ranking import SCORE_BYTES, dot_product, groups_of, rank_blocks
from crane_core.evaluation.rules import ItemRules
from tests.bench.device import origin, wait_for

LIMIT = 1e-4
"""Largest difference of a score to that of the sort in float64."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=2_000)
    parser.add_argument("--items", type=int, default=300_000)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--history", type=int, default=42, help="mean items per user")
    parser.add_argument("--block", type=int, help="users at a time; as many as fit into SCORE_BYTES when absent")
    parser.add_argument("--eval-batch-size", type=int, default=4096, help="the peer's, in scores")
    parser.add_argument("--categories", type=int, default=500)
    parser.add_argument("--max-per-category", type=int, default=3)
    parser.add_argument("--taste", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="torch's choice when absent")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device, block = torch.device(args.device), args.block or max(1, SCORE_BYTES // (4 * args.items))
    generator = torch.Generator().manual_seed(0)
    users, items = (torch.randn(size, args.dim, generator=generator).to(device) for size in (args.users, args.items))
    seen = histories(args.users, args.items, args.history)
    rules = draw_rules(args.items, args.categories, args.max_per_category)
    centres = args.taste * torch.randn(args.categories, args.dim, generator=generator)
    items += centres[torch.from_numpy(rules.categories.astype(np.int64))].to(device)

    worst = check(users, items, seen, args.k, block)
    if not worst < LIMIT:
        print(f"A list is wrong by {worst}, expected below {LIMIT}.", file=sys.stderr)
        return 1
    short_by = check_ruled(users, items, seen, args.k, rules)
    if not short_by < LIMIT:
        print(f"A list that obeys rules is wrong by {short_by}, expected below {LIMIT}.", file=sys.stderr)
        return 1
    sides: dict[str, Callable[[], None]] = {
        "": lambda: exhaust(users, items, seen, args.k, block),
        "ruled_": lambda: exhaust_ruled(users, items, seen, args.k, block, rules),
        "gemm_": lambda: multiply(users, items, block),
        "peer_": lambda: recbole(users, items, seen, args.k, args.eval_batch_size),
    }
    best = {name: np.full(2, np.inf) for name in sides}
    for turn in range(args.repeats + 1):
        # Backwards every second turn: a side is slower behind one that has given its memory back.
        for name, run in list(sides.items())[:: 1 if turn % 2 else -1]:
            started, worked = time.perf_counter(), time.process_time()
            run()
            wait_for(device)
            if turn:
                best[name] = np.minimum(best[name], (time.perf_counter() - started, time.process_time() - worked))
    scores = args.users * args.items
    result = {"max_difference": worst}
    for name, (seconds, cpu_seconds) in best.items():
        result[f"{name}scores_per_second"] = scores / seconds
        result[f"cpu_{name}scores_per_second"] = scores / cpu_seconds
    result |= {
        "share_with_rules": float(best[""][0] / best["ruled_"][0]),
        "cpu_share_with_rules": float(best[""][1] / best["ruled_"][1]),
        "share_of_gemm": float(best["gemm_"][0] / best[""][0]),
        "cpu_share_of_gemm": float(best["gemm_"][1] / best[""][1]),
        "times_peer": float(best["peer_"][0] / best[""][0]),
        "cpu_times_peer": float(best["peer_"][1] / best[""][1]),
        "peer": "RecBole-style full_sort_predict loop",
        **origin("bench_rank", device),
    }
    print(json.dumps(result))
    return 0


def histories(num_users: int, num_items: int, mean: int) -> ItemLists:
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(num_users), generator.poisson(mean, num_users))
    keys = np.unique(users * num_items + generator.integers(num_items, size=len(users)))
    return ItemLists.from_pairs(keys // num_items, keys % num_items, num_users)


def check(users: Tensor, items: Tensor, seen: ItemLists, k: int, block: int) -> float:
    """Largest difference of the first users' lists to those of a full sort."""
    worst = 0.0
    exact = users.cpu().double(), items.cpu().double().T
    for picked, values, columns in rank_blocks(
        dot_product(users, items), seen, np.arange(min(64, len(users))), k, block
    ):
        scores = exact[0][torch.from_numpy(picked)] @ exact[1]
        for row, user in enumerate(picked.tolist()):
            own = seen.rows(np.array([user]))[1]
            assert not np.isin(columns[row].numpy(), own).any()
            scores[row, torch.from_numpy(own.astype(np.int64))] = -torch.inf
        expected = scores.sort(dim=1, descending=True).values[:, :k]
        worst = max(worst, float((values - expected).abs().max()))
        worst = max(worst, float((scores.gather(1, columns) - expected).abs().max()))
    return worst


def draw_rules(num_items: int, num_categories: int, most: int) -> ItemRules:
    """Rules for random items: a tenth cannot be had, a tenth is boosted."""
    generator = np.random.default_rng(1)
    factors = generator.choice(np.float32([0, 1.5, *[1] * 8]), num_items)
    categories = generator.integers(num_categories, size=num_items, dtype=np.int32)
    return ItemRules(factors, np.zeros(num_items, dtype=bool), categories, most, {})


def check_ruled(users: Tensor, items: Tensor, seen: ItemLists, k: int, rules: ItemRules) -> float:
    """Largest difference of the first users' lists under rules to a walk along a full sort."""
    worst = 0.0
    asked = np.arange(min(32, len(users)))
    with np.errstate(divide="ignore"):
        added = np.log(rules.factors.astype(np.float64))
    scores = users[: len(asked)].cpu().double().numpy() @ items.cpu().double().numpy().T + added
    for _, values, columns in ruled_blocks(users, items, seen, asked, k, len(asked), rules):
        for row, user in enumerate(asked.tolist()):
            own = scores[row]
            own[seen.rows(np.array([user]))[1]] = -np.inf
            order = np.argsort(-own)
            expected = own[rules.first(order[own[order] > -np.inf].tolist(), k)]
            found = values[row][values[row] > -torch.inf].double().numpy()
            assert len(found) == len(expected)
            worst = max(worst, np.abs(found - expected).max(), np.abs(own[columns[row, : len(found)]] - expected).max())
    return float(worst)


def ruled_blocks(
    users: Tensor, items: Tensor, seen: ItemLists, asked: np.ndarray, k: int, block: int, rules: ItemRules
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    added = rules.added
    assert added is not None
    score = dot_product(users, items, torch.from_numpy(added).to(items.device))
    return rank_blocks(score, rules.had(seen), asked, k, block, groups_of(rules, items.device))


def exhaust_ruled(users: Tensor, items: Tensor, seen: ItemLists, k: int, block: int, rules: ItemRules) -> None:
    for _ in ruled_blocks(users, items, seen, np.arange(len(users)), k, block, rules):
        pass


def exhaust(users: Tensor, items: Tensor, seen: ItemLists, k: int, block: int) -> None:
    for _ in rank_blocks(dot_product(users, items), seen, np.arange(len(users)), k, block):
        pass


def multiply(users: Tensor, items: Tensor, block: int) -> None:
    buffer = users.new_empty(min(block, len(users)), len(items))
    for part in users.split(block):
        torch.mm(part, items.T, out=buffer[: len(part)])


def recbole(users: Tensor, items: Tensor, seen: ItemLists, k: int, batch_scores: int) -> None:
    batch = max(1, batch_scores // len(items))
    for start in range(0, len(users), batch):
        picked = np.arange(start, min(start + batch, len(users)))
        scores = torch.matmul(users[start : start + batch], items.transpose(0, 1))
        rows, own = seen.rows(picked)
        scores[torch.from_numpy(rows), torch.from_numpy(own.astype(np.int64))] = -np.inf
        _, columns = torch.topk(scores, k, dim=-1)
        positives = torch.zeros_like(scores, dtype=torch.int)
        positives[torch.from_numpy(rows[::2]), torch.from_numpy(own[::2].astype(np.int64))] = 1
        torch.cat([torch.gather(positives, 1, columns), positives.sum(dim=1, keepdim=True)], dim=1)


if __name__ == "__main__":
    raise SystemExit(main())
