"""Fidelity and variety of generated images by nearest neighbours of features, in chunks.

A ball around each image reaches to its k-th nearest neighbour of the same set; the balls of a set are its manifold.
Distances are ``torch.cdist`` without the matrix product: sums of squared differences, the same bits whichever set comes
first, so that equal points are at distance zero and a point on a ball's surface is on it both times. No more than
``chunk_size**2`` of them are kept at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pecker_fast.metrics.checks import matrix


class PrecisionRecall(NamedTuple):
    """What `precision_recall` finds.

    Attributes:
        precision: Share of the generated images inside the manifold of the real ones (fidelity).
        recall: Share of the real images inside the manifold of the generated ones (variety).
    """

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """What `density_coverage` finds.

    Attributes:
        density: Mean number of real balls that a generated image lies in, over k; about 1 for equal distributions, and
            above it where generated images crowd where the real ones are dense.
        coverage: Share of the real balls that hold a generated image.
    """

    density: float
    coverage: float


def precision_recall(
    *,
    real: Tensor,
    generated: Tensor,
    k: int = 3,
    chunk_size: int = 1024,
    dtype: torch.dtype = torch.float64,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), closed balls as there.

    Sets are named, so that they cannot be swapped: swapped sets swap the two figures and no other metric notices.

    Args:
        real: (N, D) features of real images.
        generated: (M, D) features of generated images, of the same network and on the same device.
        k: Neighbours that a ball reaches to, below N and M.
        chunk_size: Rows and columns of distances at a time.
        dtype: Of the distances: ``torch.float64``, or ``torch.float32`` where a GPU is slow at the other.

    Raises:
        ValueError: The features or an argument are out of range.
        NonFiniteError: A feature is NaN or infinite.
    """
    real, generated = _checked(real, generated, k, chunk_size, dtype, least_generated=k + 1)
    inside_real = _inside(generated, real, _radii(real, k, chunk_size), chunk_size)
    inside_generated = _inside(real, generated, _radii(generated, k, chunk_size), chunk_size)
    return PrecisionRecall(_share(inside_real), _share(inside_generated))


def density_coverage(
    *,
    real: Tensor,
    generated: Tensor,
    k: int = 5,
    chunk_size: int = 1024,
    dtype: torch.dtype = torch.float64,
) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797), open balls as in its code: equal sets give exactly 1.

    Unlike precision, density does not let one outlier among the real images, with its large ball, vouch for many
    generated ones; unlike recall, coverage makes no manifold of the generated images, which have outliers of their own.

    Args:
        real: (N, D) features of real images.
        generated: (M, D) features of generated images, of the same network and on the same device.
        k: Neighbours that a ball reaches to, below N.
        chunk_size: Rows and columns of distances at a time.
        dtype: Of the distances: ``torch.float64`` or ``torch.float32``.

    Raises:
        ValueError: The features or an argument are out of range.
        NonFiniteError: A feature is NaN or infinite.
    """
    real, generated = _checked(real, generated, k, chunk_size, dtype, least_generated=1)
    radii = _radii(real, k, chunk_size)
    hits, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for _, columns, distances in _distances(generated, real, chunk_size):
        inside = distances < radii[columns]
        hits += int(inside.sum())
        covered[columns] |= inside.any(dim=0)
    return DensityCoverage(hits / (k * len(generated)), _share(covered))


def _inside(points: Tensor, centres: Tensor, radii: Tensor, chunk_size: int) -> Tensor:
    """Which points lie in the closed ball of any centre, (len(points),) bool."""
    found = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for rows, columns, distances in _distances(points, centres, chunk_size):
        found[rows] |= (distances <= radii[columns]).any(dim=1)
    return found


def _radii(points: Tensor, k: int, chunk_size: int) -> Tensor:
    """Distance of each point to its k-th nearest other point, (len(points),)."""
    nearest = points.new_full((len(points), k), torch.inf)
    for rows, columns, distances in _distances(points, points, chunk_size):
        if rows == columns:
            distances.fill_diagonal_(torch.inf)
        closest = torch.cat([nearest[rows], distances], dim=1).topk(k, dim=1, largest=False)
        nearest[rows] = closest.values
    return nearest.amax(dim=1)


def _distances(a: Tensor, b: Tensor, chunk_size: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and their distances, a chunk at a time."""
    for i in range(0, len(a), chunk_size):
        for j in range(0, len(b), chunk_size):
            rows, columns = slice(i, i + chunk_size), slice(j, j + chunk_size)
            yield rows, columns, torch.cdist(a[rows], b[columns], compute_mode="donot_use_mm_for_euclid_dist")


def _checked(
    real: Tensor, generated: Tensor, k: int, chunk_size: int, dtype: torch.dtype, least_generated: int
) -> tuple[Tensor, Tensor]:
    real, generated = matrix("real", real, "D"), matrix("generated", generated, "D")
    if real.shape[1] != generated.shape[1] or real.device != generated.device:
        raise ValueError(
            f"real has features of size {real.shape[1]} on {real.device}, generated of size {generated.shape[1]} on "
            f"{generated.device}; take both from one network and put them on one device"
        )
    if k < 1 or len(real) <= k or len(generated) < least_generated:
        raise ValueError(f"k={k}: expected at least 1, and fewer than the {len(real)} real, {len(generated)} generated")
    if chunk_size < 1 or dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"expected chunk_size of at least 1 and dtype torch.float32 or float64, got {chunk_size}, {dtype}"
        )
    return real.to(dtype), generated.to(dtype)


def _share(hits: Tensor) -> float:
    return int(hits.sum()) / len(hits)
