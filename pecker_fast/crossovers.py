"""Where a masked weight gradient stops paying on this machine: every way to compute it, timed on typical layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from pecker_fast.blocks import Block, BlockGrid, ParameterMask
from pecker_fast.ops.fastest import Choice
from pecker_fast.ops.problem import Problem, problem
from pecker_fast.ops.weight_grad_ways import measure_ways

DENSITIES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
BLOCKS: tuple[Block, ...] = ("row", (64, 64))


@dataclass(frozen=True)
class Layer:
    """A layer to time: its weight, and the size of what it is given.

    Attributes:
        name: For people.
        shape: Of the weight.
        batch: Images, or rows of a linear layer's input.
        size: Height and width of an image; 1 for a linear layer.
    """

    name: str
    shape: tuple[int, ...]
    batch: int
    size: int


CPU_LAYERS = (
    Layer("conv3x3 of 256 channels, 16 images of 16x16", (256, 256, 3, 3), 16, 16),
    Layer("linear 1024, 2048 rows", (1024, 1024), 2048, 1),
)
GPU_LAYERS = (
    Layer("conv3x3 of 256 channels, 128 images of 32x32", (256, 256, 3, 3), 128, 32),
    Layer("conv3x3 of 640 channels, 8 images of 32x32", (640, 640, 3, 3), 8, 32),
    Layer("linear 1280, 8192 rows", (1280, 1280), 8192, 1),
)


@dataclass(frozen=True)
class Measured:
    """One layer at one density, and the times of all ways."""

    layer: str
    block: Block
    density: float
    choice: Choice


def measure_crossovers(
    device: torch.device,
    layers: Sequence[Layer] | None = None,
    densities: Sequence[float] = DENSITIES,
    *,
    progress: bool = False,
) -> list[Measured]:
    """Time every way to compute the gradient of random blocks: bfloat16 on a GPU, float32 on a CPU, channels-last.

    Args:
        device: Where.
        layers: Which layers; None takes typical ones for the device.
        densities: Shares of the blocks that are active.
        progress: Show a progress bar.
    """
    layers = layers or (GPU_LAYERS if device.type == "cuda" else CPU_LAYERS)
    cases = [(layer, block, density) for layer in layers for block in BLOCKS for density in densities]
    return [
        Measured(layer.name, block, density, measure_ways(_problem(layer, block, density, device)))
        for layer, block, density in tqdm(cases, desc="timing weight gradients", disable=not progress)
    ]


def _problem(layer: Layer, block: Block, density: float, device: torch.device) -> Problem:
    grid = BlockGrid.of(layer.shape, block)
    count = max(round(density * grid.num_blocks), 1)
    order = torch.randperm(grid.num_blocks, generator=torch.Generator().manual_seed(0), device="cpu")
    active = order[:count].sort().values
    out, in_ = layer.shape[:2]
    padding = 1 if layer.shape[2:] == (3, 3) else 0
    return problem(
        _operand(layer, out, device),
        _operand(layer, in_, device),
        ParameterMask(grid, active),
        (1, 1),
        (padding, padding),
        (1, 1),
        1,
        channels_last=True,
    )


def _operand(layer: Layer, channels: int, device: torch.device) -> torch.Tensor:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if len(layer.shape) == 2:
        return torch.randn(layer.batch, channels, dtype=dtype, device=device)
    images = torch.randn(layer.batch, channels, layer.size, layer.size, dtype=dtype, device=device)
    return images.to(memory_format=torch.channels_last)
