"""A small CNN that judges generated digits: their class, and features for Frechet distances."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class DigitsClassifier(nn.Module):
    """Three convolutions with batch norm, then a 64-d feature layer and a linear head.

    ``config`` holds the constructor's arguments as plain JSON values.
    """

    def __init__(
        self,
        *,
        width: int = 32,
        image_size: int = 8,
        channels: int = 1,
        num_classes: int = 10,
        features: int = 64,
    ) -> None:
        """Build the network with torch's default initialisation.

        Args:
            width: Channels of the first convolution; the others have twice as many.
            image_size: Height and width of the images, divisible by 4.
            channels: Image channels.
            num_classes: Classes.
            features: Size of the penultimate layer.

        Raises:
            ValueError: An argument is not positive, or ``image_size`` is not divisible by 4.
        """
        super().__init__()
        self.config: dict[str, Any] = {
            "width": width,
            "image_size": image_size,
            "channels": channels,
            "num_classes": num_classes,
            "features": features,
        }
        for name, value in self.config.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if image_size % 4:
            raise ValueError(f"image_size must be divisible by 4 (it is halved twice), got {image_size}")
        self.body = nn.Sequential(
            *_conv_norm_relu(channels, width),
            *_conv_norm_relu(width, 2 * width),
            nn.MaxPool2d(2),
            *_conv_norm_relu(2 * width, 2 * width),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.feature_layer = nn.Linear(2 * width * (image_size // 4) ** 2, features)
        self.head = nn.Linear(features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) images in [-1, 1] to (B, features) non-negative penultimate activations."""
        return F.relu(self.feature_layer(self.body(images)))

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) images in [-1, 1] to (B, num_classes) logits."""
        return self.head(self.features(images))  # type: ignore[no-any-return]


def _conv_norm_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]
