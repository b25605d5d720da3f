"""The weights of Stable Diffusion 1's UNet (Rombach et al. 2022, arXiv 2112.10752) as layers that are never run."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

CHANNELS, CONTEXT = (320, 640, 1280, 1280), 768
PARAMETERS, TENSORS = 859_520_964, 686
"""What the published network has; a test counts ours."""


def layers() -> Iterator[nn.Module]:
    """All 686 tensors, in the order of the network."""
    embedding, first = CHANNELS[-1], CHANNELS[0]
    yield from (nn.Linear(first, embedding), nn.Linear(embedding, embedding), nn.Conv2d(4, first, 3))
    skips, current, last = [first], first, len(CHANNELS) - 1
    for level, channels in enumerate(CHANNELS):
        for _ in range(2):
            yield from residual(current, channels, embedding)
            yield from transformer(channels) if level < last else ()
            skips.append(current := channels)
        if level < last:
            yield nn.Conv2d(channels, channels, 3)
            skips.append(channels)
    yield from (*residual(current, current, embedding), *transformer(current), *residual(current, current, embedding))
    for level, channels in reversed(list(enumerate(CHANNELS))):
        for _ in range(3):
            yield from residual(current + skips.pop(), channels, embedding)
            yield from transformer(channels) if level < last else ()
            current = channels
        if level:
            yield nn.Conv2d(channels, channels, 3)
    yield from (nn.GroupNorm(32, first), nn.Conv2d(first, 4, 3))


def residual(channels: int, out: int, embedding: int) -> Iterator[nn.Module]:
    yield from (nn.GroupNorm(32, channels), nn.Conv2d(channels, out, 3), nn.Linear(embedding, out))
    yield from (nn.GroupNorm(32, out), nn.Conv2d(out, out, 3))
    if channels != out:
        yield nn.Conv2d(channels, out, 1)


def transformer(channels: int) -> Iterator[nn.Module]:
    yield from (nn.GroupNorm(32, channels), nn.Conv2d(channels, channels, 1))
    for source in (channels, CONTEXT):
        yield from (nn.Linear(width, channels, bias=False) for width in (channels, source, source))
        yield nn.Linear(channels, channels)
    yield from (nn.LayerNorm(channels) for _ in range(3))
    yield from (nn.Linear(channels, 8 * channels), nn.Linear(4 * channels, channels), nn.Conv2d(channels, channels, 1))


def few_layers() -> Iterator[nn.Module]:
    """A handful of every kind, with ragged tiles: for rehearsals."""
    yield from (nn.Conv2d(20, 24, 3), nn.GroupNorm(4, 24), nn.Linear(70, 66), nn.Conv2d(24, 40, 1), nn.Linear(8, 8))


def on_device(modules: Iterator[nn.Module], device: torch.device) -> nn.ModuleList:
    """The layers with random weights, convolutions channels-last as they train."""
    with device:
        return nn.ModuleList(modules).to(memory_format=torch.channels_last)
