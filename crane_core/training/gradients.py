"""Gradients of a step, summed over its batches and over the ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from crane_core.model.lightgcn import LightGCN
from crane_core.model.propagation import SymmetricGraph
from crane_core.model.views import Batch, PickedViews
from crane_core.ranks import ranks
from crane_core.training.curve import GRADIENT


class Gradients:
    """Computes the gradients of a model.

    Args:
        model: sharded over the ranks.
    """

    def __init__(self, model: LightGCN) -> None:
        self._model = model
        self._replicated = [each for each in model.parameters() if each.requires_grad and each is not model.ids]

    def compute(
        self, graph: SymmetricGraph, batches: Iterable[Batch], num_rows: int, term: str | None = None
    ) -> dict[str, Tensor]:
        """Leave the gradient of the mean loss, or of one term of it, in the parameters.

        Gradients add up at the rows of the nodes before they go back through the propagation, so memory holds what
        one batch needs.

        Args:
            graph: to propagate over.
            batches: of the step; they share one propagation.
            num_rows: interactions in all of them.
            term: of the loss; all terms when None.

        Returns:
            This rank's part of every term.
        """
        model = self._model
        model.zero_grad()
        views = model(graph)
        picked = PickedViews.of(views, model.ids, model.shards)
        losses: dict[str, Tensor] = {}
        for batch in batches:
            share = len(batch.users) / num_rows
            terms = {name: share * value for name, value in model.losses(picked, batch).items()}
            torch.stack(list(terms.values()) if term is None else [terms[term]]).sum().backward()
            losses = {name: value.detach() + losses.get(name, 0.0) for name, value in terms.items()}
        picked.backward(views, model.ids, model.shards)
        if ranks()[1] > 1:
            for parameter in self._replicated:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
        return losses

    def norms(self, graph: SymmetricGraph, batch: Batch, terms: Iterable[str]) -> dict[str, float]:
        """Return the norm of the gradient of every term of the loss over all parameters, at the current weights."""
        norms = {}
        for term in terms:
            self.compute(graph, [batch], len(batch.users), term)
            squares = torch.stack([_square(self._model.ids), *(_square(each) for each in self._replicated)])
            if ranks()[1] > 1:
                # Every rank holds a part of the embeddings, and the whole of the other parameters.
                dist.all_reduce(squares[:1])
            norms[f"{GRADIENT}{term}"] = float(squares.sum().sqrt())
        return norms


def _square(parameter: Tensor) -> Tensor:
    """Return the squared norm of the parameter's gradient; 0 where no gradient has reached it."""
    return parameter.new_zeros(()) if parameter.grad is None else parameter.grad.square().sum()
