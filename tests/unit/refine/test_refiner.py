"""Projections by hand, and the scales of the profiles."""

import numpy as np
import pytest
import torch
import torch.multiprocessing

from crane_core.config import Refine
from crane_core.dataset.modalities import Modality
from crane_core.refine.refiner import Refiner, profile_scales


def test_projection_by_hand() -> None:
    refiner = Refiner([2], [1.0], Refine(embedding_dim=1, num_recursions=0))
    refiner.weights[0].data = torch.tensor([[2.0], [3.0]])
    refiner.biases.data = torch.tensor([[0.5]])
    refiner.missing.data = torch.tensor([[-7.0]])
    rows = refiner.project([torch.tensor([[1.0, 1.0], [0.0, 0.0]])], [torch.tensor([True, False])])
    assert rows.flatten().tolist() == [5.5, -7.0]


def test_profiles_are_brought_to_the_length_of_an_item_row() -> None:
    items = np.array([[3.0, 4.0], [0.0, 1.0], [9.0, 9.0]], dtype=np.float32)
    profiles = np.array([[6.0, 8.0], [0.0, 8.0], [7.0, 7.0]], dtype=np.float32)
    modality = Modality("m", items, np.array([True, True, False]), profiles, np.array([2, 8, 0]))
    assert profile_scales([modality]) == [pytest.approx(9.0 / 3.0)]
