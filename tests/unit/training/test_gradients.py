"""The gradients of a step: by hand, by term, and over several batches."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # Adam imports it at its first use: here, before the processes that are killed are forked.

from tests.worlds.settings import changed
from tests.worlds.trainings import SMALL, Kind, both_kinds, trainer


@both_kinds
def test_batches_that_share_a_step_are_one_loss(tmp_path: Path, kind: Kind) -> None:
    """The gradient of a step is that of the mean loss over its rows, whose batches draw their own negatives."""
    config = changed(SMALL, batch_size=50, batches_per_step=3, learning_rate=0.01)
    ours, plain = trainer(tmp_path, config=config, kind=kind), trainer(tmp_path, config=config, kind=kind)
    picked = np.arange(120)
    ours.step(ours.graph, ours.batches.of_step(picked, 0, 0), 120)
    batches = list(plain.batches.of_step(picked, 0, 0))
    assert [len(batch.users) for batch in batches] == [50, 50, 20]
    losses = [sum(plain.model.losses(plain.model(plain.graph), batch).values()) for batch in batches]
    loss = torch.stack([value * share for value, share in zip(losses, (5 / 12, 5 / 12, 1 / 6), strict=True)]).sum()
    loss.backward()
    assert sum(ours.progress.sums.values()) == pytest.approx(loss.item(), rel=1e-5)
    for found, expected in zip(ours.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-7)
    assert ours.optimiser.param_groups[0]["lr"] == pytest.approx(0.01 * 3**0.5)


@both_kinds
def test_the_gradient_norms_are_those_of_the_first_batch_at_the_last_weights(tmp_path: Path, kind: Kind) -> None:
    config = changed(SMALL, num_epochs=1, regularisation=0.1, contrast_weight=0.1)
    ours = trainer(tmp_path, config=config, kind=kind)
    ours.run()
    ours.progress.epoch = 0
    graph = ours.epoch_graph()
    batch = ours.batches.first(ours.batches.order(0), 0)
    losses = ours.model.losses(ours.model(graph), batch)
    for name, term in losses.items():
        ours.optimiser.zero_grad()
        term.backward(retain_graph=True)
        squares = sum(float(each.grad.square().sum()) for each in ours.parameters if each.grad is not None)
        assert ours.progress.curve[0][f"gradient_{name}"] == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert len(losses) == (2 if kind == "lightgcn" else 3)
