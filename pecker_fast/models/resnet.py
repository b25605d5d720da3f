"""A small residual network that judges images: their class, and features for Frechet distances."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_STAGES = (1, 2, 4)


class ImageClassifier(nn.Module):
    """ResNet for small images (He et al. 2016, arXiv 1512.03385, section 4.2): three stages, global average pool.

    ``config`` holds the constructor's arguments as plain JSON values.
    """

    def __init__(
        self,
        *,
        width: int = 32,
        blocks_per_stage: int = 2,
        image_size: int = 32,
        channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        """Build the network with torch's default initialisation.

        Args:
            width: Channels of the first stage; the others have twice and four times as many.
            blocks_per_stage: Residual blocks of two convolutions each.
            image_size: Height and width of the images, divisible by 4.
            channels: Image channels.
            num_classes: Classes.

        Raises:
            ValueError: An argument is not positive, or ``image_size`` is not divisible by 4.
        """
        super().__init__()
        self.config: dict[str, Any] = {
            "width": width,
            "blocks_per_stage": blocks_per_stage,
            "image_size": image_size,
            "channels": channels,
            "num_classes": num_classes,
        }
        for name, value in self.config.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if image_size % 4:
            raise ValueError(f"image_size must be divisible by 4 (it is halved twice), got {image_size}")
        blocks: list[nn.Module] = []
        current = width
        for stage, multiple in enumerate(_STAGES):
            for index in range(blocks_per_stage):
                stride = 2 if stage and not index else 1
                blocks.append(_ResidualBlock(current, multiple * width, stride))
                current = multiple * width
        stem = (nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.body = nn.Sequential(*stem, *blocks)
        self.head = nn.Linear(current, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) images in [-1, 1] to (B, 4 width) non-negative means over all positions.

        Raises:
            ValueError: The images are not of the size and channels that the network was made for.
        """
        size = self.config["image_size"]
        expected = (self.config["channels"], size, size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"images must be (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}")
        return self.body(images).mean((2, 3))  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) images in [-1, 1] to (B, num_classes) logits."""
        return self.head(self.features(images))  # type: ignore[no-any-return]


class _ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions; a 1x1 shortcut where size or channels change."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.stride = stride
        projection = (nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        self.shortcut = nn.Identity() if same else nn.Sequential(*projection)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)), inplace=True)
        # A 1x1 convolution with a stride, taken apart: on CPUs without AVX-512 torch 2.13's backward of one with few
        # channels in channels-last order writes beyond its memory.
        return F.relu(self.shortcut(x[..., :: self.stride, :: self.stride]) + self.norm2(self.conv2(h)))
