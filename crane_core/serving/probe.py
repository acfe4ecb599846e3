"""Compare a served model with the embeddings that it was evaluated with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from crane_core.errors import ArtifactError
from crane_core.schema import USER_ID
from crane_core.serving.model_folder import DEFAULT_K, Recommender


def make_probe(recommender: Recommender, most: int, k: int = DEFAULT_K) -> dict[str, Any]:
    """Compute the top k of some users directly from the embeddings, to compare a served model with.

    Args:
        recommender: holds the rows the model was evaluated with.
        most: number of users at most, spread evenly.
        k: list length.
    """
    answers = []
    user_embeddings, item_embeddings = recommender.user_embeddings, recommender.item_embeddings
    user_ids, item_ids, rules = recommender.user_ids, recommender.item_ids, recommender.shown
    had, added = rules.had(recommender.seen), rules.added
    users = np.linspace(0, len(user_ids) - 1, min(most, len(user_ids))).astype(int)
    for user in users.tolist():
        scores = item_embeddings.astype(np.float64) @ user_embeddings[user].astype(np.float64)
        scores[had.items[had.indptr[user] : had.indptr[user + 1]]] = -np.inf
        if added is not None:
            scores += added
        order = np.argsort(-scores, kind="stable")
        shown = rules.first(order[scores[order] > -np.inf].tolist(), k)
        answers.append(
            {
                USER_ID: user_ids[user].as_py(),
                "item_ids": [item_ids[item].as_py() for item in shown],
                "scores": scores[shown].tolist(),
            }
        )
    return {"k": k, "answers": answers}


def smoke_test(predict: Callable[..., pd.DataFrame], probe: Mapping[str, Any]) -> int:
    """Compare a served model's recommendations with those of the embeddings it was evaluated with.

    Args:
        predict: method of the served model.
        probe: result of `make_probe`.

    Returns:
        The number of users compared.

    Raises:
        ArtifactError: a list differs by more than rounding, or an unknown user gets no list marked as fallback.
    """
    answers = probe["answers"]
    nobody = "\x00nobody"
    asked = pd.DataFrame({USER_ID: [answer[USER_ID] for answer in answers] + [nobody]})
    table = predict(asked, params={"k": probe["k"]})
    for answer, row in zip(answers, table.itertuples(), strict=False):
        expected, found = np.asarray(answer["scores"]), np.asarray(row.scores)
        tolerance = 1e-4 * max(1.0, float(np.abs(expected).max(initial=0.0)))
        same = (
            not row.fallback and found.shape == expected.shape and bool(np.all(np.abs(found - expected) <= tolerance))
        )
        if not same or not _same_but_for_ties(answer["item_ids"], list(row.item_ids), expected, tolerance):
            raise ArtifactError(
                f"The served model recommends {list(row.item_ids)[:3]}... to user {answer[USER_ID]!r}, its evaluation "
                f"{answer['item_ids'][:3]}...",
                "Run python -m jobs.ml.register --store STORE --run RUN, then crane promote --run RUN.",
            )
    last = table.iloc[-1]
    if not last["fallback"] or not len(last["item_ids"]):
        raise ArtifactError(
            "The served model has no fallback for an unknown user.",
            "Run python -m jobs.ml.register --store STORE --run RUN, then crane promote --run RUN.",
        )
    return len(answers)


def _same_but_for_ties(expected: list[str], found: list[str], scores: np.ndarray, tolerance: float) -> bool:
    for position, (left, right) in enumerate(zip(expected, found, strict=True)):
        around = scores[max(0, position - 1) : position + 2]
        tied = position == len(scores) - 1 or np.sum(np.abs(around - scores[position]) <= tolerance) > 1
        if left != right and not tied:
            return False
    return True
