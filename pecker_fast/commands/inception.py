"""``--inception FILE``: the figures that carry Inception's name, of the retained classes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from pecker_fast.data import ImageData
from pecker_fast.metrics import InceptionStatistics, fid, inception_score, precision_recall
from pecker_fast.models.inception import InceptionV3, to_uint8
from pecker_fast.models.inception_weights import load_inception

_BATCH = 32


def inception_figures(
    file: Path, images: Tensor, labels: Tensor, real: ImageData, forget: list[int], device: torch.device, quiet: bool
) -> dict[str, float]:
    """FID, inception score, precision and recall of generated against real images of the retained classes.

    Args:
        file: Weights of the Inception network, see ``load_inception``.
        images: (N, C, H, W) in [-1, 1].
        labels: (N,) what they were asked for.
        real: Real images.
        forget: Classes that do not count.
        device: Where the network runs.
        quiet: Show no progress bars.

    Raises:
        FileFormatError: The weights are missing, damaged, or those of another network.
    """
    network = load_inception(file).to(device).eval()
    classes = torch.tensor(forget, device="cpu")
    generated = _features(network, images[~torch.isin(labels.cpu(), classes).to(images.device)], "generated", quiet)
    known = _features(network, real.images[~torch.isin(real.labels, classes)], "real", quiet)
    near = precision_recall(real=known, generated=generated)
    sets = []
    for features in (known, generated):
        sets.append(InceptionStatistics(network.weights or ""))
        sets[-1].update(features)
    score, _ = inception_score(network.logits(generated))
    distance = fid(real=sets[0], generated=sets[1])
    return {"fid": distance, "inception_score": score, "precision": near.precision, "recall": near.recall}


@torch.no_grad()
def _features(network: InceptionV3, images: Tensor, what: str, quiet: bool) -> Tensor:
    """(N, 2048), grey images as colours that are all alike."""
    device = next(network.parameters()).device
    parts = tqdm(images.split(_BATCH), desc=f"Inception, {what}", unit="batch", disable=quiet)
    return torch.cat([network(to_uint8(part.to(device)).expand(-1, 3, -1, -1)) for part in parts])
