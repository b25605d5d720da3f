"""How sure a judge is of what it sees in images of forgotten classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pecker_fast.metrics.checks import classes, log_probabilities


class LabelEntropy(NamedTuple):
    """What `label_entropy` finds.

    Attributes:
        entropy: Mean entropy of the judge's prediction, in nats: 0 where it is sure, ``log(classes)`` where blind.
        forgotten_probability: Mean probability that the image shows any forgotten class.
    """

    entropy: float
    forgotten_probability: float


def label_entropy(logits: Tensor, forget: Sequence[int]) -> LabelEntropy:
    """Mean entropy of the judge's predictions, and the probability it leaves to the forgotten classes.

    The two figures of Selective Amnesia (Heng and Soh 2023, arXiv 2305.10120). A method that turns the class to noise
    has a high entropy, one that draws another class in its place a low one; the probability should be low for both.

    Args:
        logits: (N, classes) in any floating dtype, of images that were asked for the forgotten classes and no others.
        forget: The forgotten classes; each counts once.

    Raises:
        ValueError: The logits have another form, or a class is not among theirs.
        NonFiniteError: A logit is NaN or infinite.
    """
    probabilities = log_probabilities(logits, False).exp()
    forgotten = classes("forget", forget, probabilities.shape[1])
    entropy = torch.special.entr(probabilities).sum(dim=1).mean()
    return LabelEntropy(float(entropy), float(probabilities[:, forgotten].sum(dim=1).mean()))
