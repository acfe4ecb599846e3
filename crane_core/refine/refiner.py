"""The refiner: projection of every modality, RCA and fusion; and the rows that it reads."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from crane_core.config import Refine
from crane_core.dataset.modalities import Modality
from crane_core.errors import DataError
from crane_core.numerics.initial import xavier
from crane_core.refine.attention import Correlation
from crane_core.refine.recursion import RecursiveCrossModalAttention

CPU = torch.device("cpu")


class Refiner(nn.Module):
    """Projection of every modality, RCA, and the fusion `F = [X_1 ; ... ; X_M] W_F`.

    Args:
        dims: width of each modality.
        profile_scales: divisor of the profiles of each modality. A profile that is a sum grows with the number of
            items. One constant per modality brings a typical profile to the length of an item row and keeps the
            differences between active and quiet users.
        config: sizes and correlation function.
    """

    def __init__(self, dims: list[int], profile_scales: list[float], config: Refine) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        dim = config.embedding_dim
        self.weights = nn.ParameterList(xavier((width, dim), generator) for width in dims)
        self.biases = nn.Parameter(torch.zeros(len(dims), dim))
        self.missing = nn.Parameter(torch.randn(len(dims), dim, generator=generator) * 0.01)
        self.register_buffer("profile_scales", torch.tensor(profile_scales))
        correlation = Correlation(
            config.phi,
            config.num_lists,
            config.num_probes,
            config.num_attention_landmarks,
            config.seed,
            config.precision,
        )
        self.rca = RecursiveCrossModalAttention(len(dims), dim, config.num_recursions, correlation, generator)
        # Fusion starts as the plain average of the modalities.
        self.fusion = nn.Parameter(torch.eye(dim).repeat(len(dims), 1) / len(dims))

    def project(self, rows: list[Tensor], present: list[Tensor]) -> Tensor:
        """Return `X_m = raw_m W_m + b_m`, or a learned vector where the modality is missing.

        Args:
            rows: per modality float32 [n, dim_m].
            present: per modality bool [n].

        Returns:
            float32 [n, M, d].
        """
        projected = [
            torch.where(mask[:, None], block @ self.weights[m] + self.biases[m], self.missing[m])
            for m, (block, mask) in enumerate(zip(rows, present, strict=True))
        ]
        return torch.stack(projected, dim=1)

    def fuse(self, rows: Tensor) -> Tensor:
        """Return `[X_1 ; ... ; X_M] W_F`: float [n, M, d] -> [n, d]."""
        return rows.flatten(1) @ self.fusion


def profile_scales(modalities: list[Modality]) -> list[float]:
    """Divide the mean length of the non-empty profiles by that of the present item rows, for each modality."""
    scales = []
    for modality in modalities:
        profiles = _mean_norm(modality.profiles, modality.counts > 0)
        items = _mean_norm(modality.items, modality.present)
        scales.append(profiles / items if profiles > 0 and items > 0 else 1.0)
    return scales


def project_items(refiner: Refiner, modalities: list[Modality], rows: np.ndarray | slice) -> Tensor:
    """Project some items, float32 [n, M, d].

    Raises:
        DataError: a feature is not finite.
    """
    return refiner.project(*item_rows(modalities, rows, refiner.fusion.device))


def item_rows(
    modalities: list[Modality], rows: np.ndarray | slice, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Read the features of some items onto a device: per modality float32 [n, dim_m], and bool [n], present.

    Raises:
        DataError: a feature is not finite.
    """
    return (
        # Converted to float32 on the device: half precision halves the bytes that are copied to a GPU.
        [to_device(device, finite_rows(m.items[rows], m.name, "items")).float() for m in modalities],
        [to_device(device, m.present[rows]) for m in modalities],
    )


def user_rows(
    modalities: list[Modality], rows: np.ndarray | slice, refiner: Refiner
) -> tuple[list[Tensor], list[Tensor]]:
    """Read the scaled profiles of some users: per modality float32 [n, dim_m], and bool [n], not empty.

    Raises:
        DataError: a profile is not finite.
    """
    device, scales = refiner.fusion.device, refiner.get_buffer("profile_scales")
    return (
        [
            to_device(device, finite_rows(m.profiles[rows], m.name, "users")) / scales[i]
            for i, m in enumerate(modalities)
        ],
        [to_device(device, m.counts[rows] > 0) for m in modalities],
    )


def finite_rows(rows: np.ndarray, modality: str, whose: str) -> np.ndarray:
    """Return the rows, float [n, dim].

    Raises:
        DataError: a row of `whose` (items or users) is not finite.
    """
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise DataError(
            f"Modality {modality} has NaN or infinity in {bad.sum()} of {len(rows)} rows of {whose} that were read.",
            "Run python -m jobs.etl.features and jobs.etl.profiles for this run again: they set such rows aside.",
        )
    return rows


def to_device(device: torch.device, rows: np.ndarray) -> Tensor:
    """Copy rows of a memory map to the device, through page-locked memory when that is a GPU."""
    host = torch.from_numpy(np.array(rows))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _mean_norm(rows: np.ndarray, keep: np.ndarray) -> float:
    picked = np.flatnonzero(keep)[:100_000]
    # The squares of numbers in half precision overflow it.
    return float(np.linalg.norm(rows[picked].astype(np.float32), axis=1).mean()) if len(picked) else 0.0
