"""Membership inference: can an attacker tell training images of the forgotten class from others of it?

A model that forgot a class should treat the two alike. The scores come from an attack, e.g. `denoising_scores`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pecker_fast.metrics.checks import vector

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class MembershipResult:
    """How well scores tell members from others.

    Attributes:
        auc: Probability that a member's score is above another's, ties counted half: 0.5 is blind, 1 perfect.
        interval: 95 % interval of ``auc`` by DeLong et al. 1988, cut to [0, 1]. None where that method has nothing to
            say: a side with one score, or no spread at all (sets that do not overlap, or one score for all).
        tpr: Largest share of members above a threshold that at most ``fpr`` of the others reach, without interpolation.
        fpr: The false positive rate allowed.
        false_positives: How many of the others that allows. It is 0 for fewer than ``1 / fpr`` of them: then ``tpr`` is
            the share of members above *all* others, and as noisy as their largest score.
        members: Number of members.
        nonmembers: Number of others.
        shuffled_auc: Mean AUC of the same scores dealt to the two sides at random: 0.5 but for chance.
        p_value: Share of these shuffles (the observed deal counted among them) at least as far from 0.5 as ``auc``.
    """

    auc: float
    interval: tuple[float, float] | None
    tpr: float
    fpr: float
    false_positives: int
    members: int
    nonmembers: int
    shuffled_auc: float
    p_value: float


def membership_inference(
    member_scores: Tensor, nonmember_scores: Tensor, *, seed: int = 0, fpr: float = 0.01, shuffles: int = 200
) -> MembershipResult:
    """Area under the ROC curve, true positives at few false ones, and a shuffled control, in float64.

    Args:
        member_scores: (m,) scores of images that the model was trained on, in any floating dtype; high means "member".
        nonmember_scores: (n,) scores of images of the same classes that it never saw.
        seed: Of the shuffles, which are the same on every device.
        fpr: False positive rate at which the true positives are counted, in [0, 1).
        shuffles: Shuffled controls, at least 1.

    Raises:
        ValueError: The scores or an argument are out of range.
        NonFiniteError: A score is NaN or infinite.
    """
    members = vector("member_scores", member_scores).double()
    others = vector("nonmember_scores", nonmember_scores).double().to(members.device)
    if not 0.0 <= fpr < 1.0 or shuffles < 1:
        raise ValueError(f"expected fpr in [0, 1) and at least one shuffle, got {fpr} and {shuffles}")
    m, n = len(members), len(others)
    ranks = _midranks(torch.cat([members, others]))
    auc = _auc(ranks[:m], n)
    controls = _shuffled_aucs(ranks.cpu(), m, seed, shuffles)
    # Half a pair's worth of slack: sums of ranks in another order may round differently.
    extreme = int(((controls - 0.5).abs() >= abs(auc - 0.5) - 0.5 / (m * n)).sum())
    allowed = _allowed(fpr, n)
    return MembershipResult(
        auc=auc,
        interval=_delong_interval(auc, members, others, ranks),
        tpr=_true_positives(members, others, allowed) / m,
        fpr=fpr,
        false_positives=allowed,
        members=m,
        nonmembers=n,
        shuffled_auc=float(controls.mean()),
        p_value=(extreme + 1) / (shuffles + 1),
    )


def _midranks(scores: Tensor) -> Tensor:
    """Ranks from 1, those of equal scores averaged."""
    _, index, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0) - (counts.double() - 1) / 2
    return ranks[index]


def _auc(member_ranks: Tensor, others: int) -> float:
    m = len(member_ranks)
    return float(member_ranks.sum() - m * (m + 1) / 2) / (m * others)


def _shuffled_aucs(ranks: Tensor, members: int, seed: int, shuffles: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    dealt = (ranks[torch.randperm(len(ranks), generator=draw, device="cpu")[:members]] for _ in range(shuffles))
    return torch.tensor([_auc(part, len(ranks) - members) for part in dealt], dtype=torch.float64, device="cpu")


def _delong_interval(auc: float, members: Tensor, others: Tensor, ranks: Tensor) -> tuple[float, float] | None:
    """DeLong et al. 1988, with placements from ranks (Sun and Xu 2014)."""
    m, n = len(members), len(others)
    if min(m, n) < 2:
        return None
    member_places = (ranks[:m] - _midranks(members)) / n
    other_places = (ranks[m:] - _midranks(others)) / m
    error = math.sqrt(float(member_places.var() / m + other_places.var() / n))
    if error == 0.0:
        return None
    return max(0.0, auc - _Z95 * error), min(1.0, auc + _Z95 * error)


def _allowed(fpr: float, others: int) -> int:
    """Largest count of false positives whose rate is at most ``fpr``, decided as ``count / others <= fpr``."""
    count = int(fpr * others) + 1
    while count / others > fpr:
        count -= 1
    return count


def _true_positives(members: Tensor, others: Tensor, allowed: int) -> int:
    """Members above the highest score that would be one false positive too many."""
    ceiling = others.sort(descending=True).values[allowed]
    return int((members > ceiling).sum())
