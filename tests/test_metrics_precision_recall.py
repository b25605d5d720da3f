"""Precision, recall, density and coverage against an N x M reference, scikit-learn and known answers."""

import math

import pytest
import torch

from pecker_fast.errors import NonFiniteError
from pecker_fast.metrics import density_coverage, precision_recall


@pytest.fixture(scope="module")
def sets():
    generator = torch.Generator().manual_seed(5)
    real = torch.randn(157, 3, dtype=torch.float64, generator=generator)
    generated = torch.randn(90, 3, dtype=torch.float64, generator=generator) * 0.7 + 0.5
    return real, generated


def _radii(points, k):
    distances = (points[:, None] - points[None]).norm(dim=2).fill_diagonal_(math.inf)
    return distances.sort(dim=1).values[:, k - 1]


def _reference(real, generated, k):
    distances = (generated[:, None] - real[None]).norm(dim=2)
    radii = _radii(real, k)
    precision = (distances <= radii).any(1).double().mean()
    recall = (distances <= _radii(generated, k)[:, None]).any(0).double().mean()
    density = int((distances < radii).sum()) / (k * len(generated))
    coverage = (distances.amin(0) < radii).double().mean()
    return [float(value) for value in (precision, recall, density, coverage)]


def _ours(real, generated, k, **options):
    return [
        *precision_recall(real=real, generated=generated, k=k, **options),
        *density_coverage(real=real, generated=generated, k=k, **options),
    ]


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("chunk_size", [16, 157, 1024])
def test_chunks_equal_the_whole_matrix(sets, k, chunk_size):
    assert _ours(*sets, k, chunk_size=chunk_size) == pytest.approx(_reference(*sets, k), abs=1e-12)


def test_they_agree_with_scikit_learn(sets):
    neighbors = pytest.importorskip("sklearn.neighbors")
    real, generated = (part.numpy() for part in sets)

    def share(points, centres, k=3):
        # Without points of their own to look up, kneighbors leaves each point out of its own neighbours.
        radii = neighbors.NearestNeighbors(n_neighbors=k).fit(centres).kneighbors()[0][:, -1]
        distances = neighbors.NearestNeighbors(n_neighbors=len(centres)).fit(centres)
        distance, index = distances.kneighbors(points)
        return (distance <= radii[index]).any(axis=1).mean()

    expected = [share(generated, real), share(real, generated)]
    assert list(precision_recall(real=sets[0], generated=sets[1])) == pytest.approx(expected, abs=1e-12)


def test_equal_sets_are_perfect(sets):
    assert _ours(sets[0], sets[0][torch.randperm(157)], 4, chunk_size=50) == [1.0, 1.0, 1.0, 1.0]


def test_disjoint_sets_share_nothing(sets):
    assert _ours(sets[0], sets[1] + 100.0, 3) == [0.0, 0.0, 0.0, 0.0]


def test_a_corner_of_the_real_images_is_precise_and_recalls_little():
    grid = torch.cartesian_prod(torch.arange(20.0), torch.arange(20.0))
    corner = torch.rand(60, 2) * 4
    found = precision_recall(real=grid, generated=corner)
    assert found.precision == 1.0
    assert 0.0 < found.recall < 0.1
    swapped = precision_recall(real=corner, generated=grid)
    assert (swapped.recall, swapped.precision) == (1.0, found.recall)
    assert density_coverage(real=grid, generated=corner).coverage < 0.2


def test_one_outlier_vouches_in_precision_and_not_in_density():
    real = torch.cat([torch.randn(50, 2), torch.tensor([[60.0, 0.0]])])
    generated = torch.rand(40, 2) * 8 + torch.tensor([50.0, -4.0])
    assert precision_recall(real=real, generated=generated).precision == 1.0
    assert density_coverage(real=real, generated=generated).density == pytest.approx(1 / 5)


def test_a_large_offset_costs_no_digits_in_float64(sets):
    assert _ours(sets[0] + 1e8, sets[1] + 1e8, 3) == pytest.approx(_reference(*sets, 3), abs=0.02)
    equal = (sets[0] + 1e4).float()
    assert _ours(equal, equal, 3, dtype=torch.float32) == [1.0, 1.0, 1.0, 1.0]  # a matrix product would not find 0


def test_bad_input_is_refused(sets):
    real, generated = sets
    with pytest.raises(TypeError):
        precision_recall(real, generated)
    for function in (precision_recall, density_coverage):
        with pytest.raises(ValueError, match="size 3 on cpu, generated of size 2"):
            function(real=real, generated=generated[:, :2])
        with pytest.raises(ValueError, match="real must be"):
            function(real=real[0], generated=generated)
        with pytest.raises(ValueError, match="k=0"):
            function(real=real, generated=generated, k=0)
        with pytest.raises(ValueError, match="fewer than the 5 real"):
            function(real=real[:5], generated=generated, k=5)
        with pytest.raises(ValueError, match="chunk_size"):
            function(real=real, generated=generated, chunk_size=0)
        with pytest.raises(ValueError, match="float32"):
            function(real=real, generated=generated, dtype=torch.float16)
        with pytest.raises(NonFiniteError, match="generated"):
            function(real=real, generated=generated * math.inf)
    with pytest.raises(ValueError, match="3 generated"):
        precision_recall(real=real, generated=generated[:3])
    assert density_coverage(real=real, generated=real[:1]).coverage < 0.1
