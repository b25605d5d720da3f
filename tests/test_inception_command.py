"""``evaluate --inception``: which images meet which network, with a small one in its place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pecker_fast.cli import main
from pecker_fast.commands import inception
from pecker_fast.data import ImageData
from pecker_fast.errors import FileFormatError


class Small(nn.Module):
    """Five features of colour images in 256 levels."""

    weights = "digest"

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        return self.scale * images.double().flatten(2)[:, 1, :5]

    def logits(self, features):
        return features


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(inception, "load_inception", lambda file: Small())


def figures(images, labels, real):
    return inception.inception_figures("file", images, labels, real, [1], torch.device("cpu"), quiet=True)


def real_images():
    pixels = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return ImageData(pixels, torch.arange(2).repeat(20), ("kept", "forgotten"))


def test_the_real_images_themselves_are_at_no_distance_whatever_the_forgotten_class_shows(small):
    real = real_images()
    drawn = real.images.clone()
    drawn[real.labels == 1] = 0.0  # does not count
    found = figures(drawn, real.labels, real)
    assert found["fid"] == pytest.approx(0, abs=1e-6) and found["precision"] == found["recall"] == 1
    assert 1 <= found["inception_score"] <= 5


def test_other_images_are_at_a_distance(small):
    real = real_images()
    found = figures(-real.images.abs(), real.labels, real)
    assert found["fid"] > 100 and found["recall"] < 1


def test_weights_that_are_not_there_are_named(tmp_path, capsys):
    missing = tmp_path / "inception.safetensors"
    real = real_images()
    with pytest.raises(FileFormatError, match="inception.safetensors"):
        inception.inception_figures(missing, real.images, real.labels, real, [1], torch.device("cpu"), quiet=True)
    assert main(["evaluate", "--help"]) == 0 and "--inception FILE" in capsys.readouterr().out
