"""Small models with every kind of layer, for tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pecker_fast import ActiveParameters, BlockMask, ParameterMask, apply_mask
from pecker_fast.maskable import survey


class Zoo(nn.Module):
    """Strided, dilated, grouped convolutions, norms, an embedding, linear layers, and layers that cannot be masked."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 20, 3, padding=1)
        self.norm = nn.GroupNorm(4, 20)
        self.strided = nn.Conv2d(20, 24, 3, stride=2, padding=2, dilation=2)
        self.grouped = nn.Conv2d(24, 24, 3, padding="same", groups=4, bias=False)
        self.batch_norm = nn.BatchNorm2d(24)
        self.classes = nn.Embedding(7, 24)
        self.hidden = nn.Linear(24, 36)
        self.layer_norm = nn.LayerNorm(36)
        self.out = nn.Linear(36, 5, bias=False)
        self.upsample = nn.ConvTranspose2d(24, 24, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv_in(x)))
        h = self.upsample(self.batch_norm(self.grouped(self.strided(h))))
        h = h.mean((2, 3)) + self.classes(c)
        return self.out(self.layer_norm(torch.relu(self.hidden(h))))


def zoo_batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, 9, 9, dtype=dtype), torch.tensor([0, 1, 2, 3, 3, 6])


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.SiLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Flatten(),
        nn.Linear(16 * 64, 10),
    )


def mask_of(model: nn.Module, names: tuple[str, ...], share: float = 0.5) -> BlockMask:
    """A mask with the first ``share`` of the rows of ``names`` active and everything else frozen."""
    found = survey(model)
    parameters = {}
    for name, grid in found.grids("row").items():
        count = max(1, round(share * grid.num_blocks)) if name in names else 0
        parameters[name] = ParameterMask(grid, torch.arange(count))
    return BlockMask(parameters, found.total, share)


def masked_net(density: float = 0.3, block: str = "row") -> tuple[nn.Sequential, ActiveParameters]:
    model = conv_net()
    return model, apply_mask(model, BlockMask.random(model, density, block))


def loss_of(model: nn.Module) -> Tensor:
    return model(torch.randn(4, 3, 8, 8)).square().mean()
