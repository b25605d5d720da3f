"""Building blocks of the DDPM UNet: embeddings, residual block, attention, resampling, levels.

Attribute names are those of the published checkpoints (Score Forgetting Distillation, Selective Amnesia,
SalUn), so that their ``state_dict`` loads without a table of renamings.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoidal_embedding(t: Tensor, width: int) -> Tensor:
    """Embed timesteps as ``[sin(t f_0), ..., cos(t f_0), ...]`` with ``f_i = 10000^(-i / (width/2 - 1))``.

    Args:
        t: (batch,) timesteps, any integer or float dtype.
        width: Even size of the embedding, at least 4.

    Returns:
        (batch, width) float32.
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - 1)
    angle = t.float()[:, None] * torch.exp(-math.log(10_000.0) * exponent)[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def group_norm(channels: int, norm_groups: int) -> nn.GroupNorm:
    """Group norm with ``norm_groups`` groups, or as many of them as divide ``channels``."""
    return nn.GroupNorm(math.gcd(norm_groups, channels), channels, eps=1e-6)


class EmbeddingMLP(nn.Module):
    """``width -> 4 width -> 4 width`` with SiLU between; keys ``dense.0`` and ``dense.1``."""

    def __init__(self, width: int) -> None:
        """Create both layers for inputs of size ``width``."""
        super().__init__()
        self.dense = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)])

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, width) to (batch, 4 width)."""
        hidden: Tensor = self.dense[0](x)
        return self.dense[1](F.silu(hidden))  # type: ignore[no-any-return]


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions around an added embedding; a 1x1 shortcut where channels change."""

    def __init__(
        self, in_channels: int, out_channels: int, embedding: int, *, dropout: float, norm_groups: int
    ) -> None:
        """Create the layers; ``embedding`` is the size of the vector that every block receives."""
        super().__init__()
        self.norm1 = group_norm(in_channels, norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.temb_cemb_proj = nn.Linear(embedding, out_channels)
        self.norm2 = group_norm(out_channels, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H, W).

        ``embedding`` (B, E) has been through SiLU, which the network does once for all blocks.
        """
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.temb_cemb_proj(embedding)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Single-head self-attention over all positions: 1x1 convolutions as projections, scale C^-1/2."""

    def __init__(self, channels: int, *, norm_groups: int) -> None:
        """Create the norm and the four projections."""
        super().__init__()
        self.norm = group_norm(channels, norm_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape, residual included."""
        normed = self.norm(x)
        # (B, C, H, W) -> (B, 1 head, H*W, C): a view, not a copy, when the memory is channels-last.
        query, key, value = (
            layer(normed).permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        batch, channels, height, width = x.shape
        mixed = mixed.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return x + self.proj_out(mixed)  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Halve height and width by a 3x3 convolution of stride 2, padded on the right and at the bottom."""

    def __init__(self, channels: int) -> None:
        """Create the convolution."""
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        """Create the convolution."""
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]


class _Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where ``with_attention``."""

    def __init__(
        self, in_channels: list[int], out_channels: int, with_attention: bool, options: dict[str, Any]
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(channels, out_channels, **options) for channels in in_channels)
        groups = options["norm_groups"]
        count = len(in_channels) if with_attention else 0
        self.attn = nn.ModuleList(Attention(out_channels, norm_groups=groups) for _ in range(count))

    def _run(self, index: int, x: Tensor, embedding: Tensor) -> Tensor:
        h: Tensor = self.block[index](x, embedding)
        return self.attn[index](h) if len(self.attn) else h


class DownLevel(_Level):
    """One level of the way down: blocks, then a halving unless it is the last level."""

    def __init__(
        self,
        in_channels: list[int],
        out: int,
        with_attention: bool,
        downsample: bool,
        options: dict[str, Any],
    ) -> None:
        """Create one block per entry of ``in_channels``; ``options`` are those of `ResnetBlock`."""
        super().__init__(in_channels, out, with_attention, options)
        self.downsample = Downsample(out) if downsample else None

    def forward(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """Return every output that the way up needs; the last one is the input of the next level."""
        outputs = []
        for index in range(len(self.block)):
            x = self._run(index, x, embedding)
            outputs.append(x)
        if self.downsample is not None:
            outputs.append(self.downsample(x))
        return outputs


class Middle(nn.Module):
    """The lowest resolution: block, attention, block."""

    def __init__(self, channels: int, options: dict[str, Any]) -> None:
        """Create the layers; ``options`` are those of `ResnetBlock`."""
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, **options)
        self.attn_1 = Attention(channels, norm_groups=options["norm_groups"])
        self.block_2 = ResnetBlock(channels, channels, **options)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        h = self.attn_1(self.block_1(x, embedding))
        return self.block_2(h, embedding)  # type: ignore[no-any-return]


class UpLevel(_Level):
    """One level of the way up: blocks that each take a skip, then a doubling unless it is the first level."""

    def __init__(
        self, in_channels: list[int], out: int, with_attention: bool, upsample: bool, options: dict[str, Any]
    ) -> None:
        """Create one block per entry of ``in_channels``, skips included; ``options`` as in `DownLevel`."""
        super().__init__(in_channels, out, with_attention, options)
        self.upsample = Upsample(out) if upsample else None

    def forward(self, x: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        """Consume one skip connection from the end of ``skips`` per residual block."""
        for index in range(len(self.block)):
            x = self._run(index, torch.cat([x, skips.pop()], dim=1), embedding)
        return x if self.upsample is None else self.upsample(x)
