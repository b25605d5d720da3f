"""The class-conditional DDPM UNet of Score Forgetting Distillation, Selective Amnesia and SalUn.

Ho et al. 2020 (arXiv 2006.11239) with a class embedding. The unconditional ("null") class is one more row of
the embedding table, so that it is a layer like any other: it can be masked, saved and exported.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecker_fast.models.blocks import (
    DownLevel,
    EmbeddingMLP,
    Middle,
    UpLevel,
    group_norm,
    sinusoidal_embedding,
)


class DDPMUNet(nn.Module):
    """Predict the noise in ``x_t`` given the timestep and a class label.

    Label ``num_classes`` means "no class". ``config`` holds the constructor's arguments as plain JSON values,
    so that ``DDPMUNet(**model.config)`` is the same network.
    """

    def __init__(
        self,
        *,
        width: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        image_size: int = 32,
        channels: int = 3,
        num_classes: int = 10,
        dropout: float = 0.1,
        norm_groups: int = 32,
    ) -> None:
        """Build and initialise the network.

        Args:
            width: Channels of the first level; also the size of the sinusoidal and class embeddings.
            channel_mult: Channels of each level as multiples of ``width``, full resolution first.
            num_res_blocks: Residual blocks a level on the way down; the way up has one more.
            attention_resolutions: Heights of the feature maps that get attention after each residual block.
            image_size: Height and width of the images; only places the attention, other sizes can be fed.
            channels: Image channels.
            num_classes: Classes, without the null class.
            dropout: Dropout before the second convolution of each residual block.
            norm_groups: Groups of the group norms; fewer where they do not divide the channels.

        Raises:
            ValueError: An argument is out of range; the message names it.
        """
        super().__init__()
        self.config: dict[str, Any] = {
            "width": width,
            "channel_mult": list(channel_mult),
            "num_res_blocks": num_res_blocks,
            "attention_resolutions": list(attention_resolutions),
            "image_size": image_size,
            "channels": channels,
            "num_classes": num_classes,
            "dropout": dropout,
            "norm_groups": norm_groups,
        }
        _check_config(self.config)
        options = {"embedding": 8 * width, "dropout": dropout, "norm_groups": norm_groups}
        level_channels = [width * multiple for multiple in channel_mult]
        with_attention = [image_size >> level in attention_resolutions for level in range(len(channel_mult))]

        self.temb = EmbeddingMLP(width)
        self.classes_emb = nn.Embedding(num_classes + 1, width)
        self.cemb = EmbeddingMLP(width)

        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        skips, current = [width], width
        for level, out in enumerate(level_channels):
            blocks = [current] + [out] * (num_res_blocks - 1)
            last = level == len(level_channels) - 1
            self.down.append(DownLevel(blocks, out, with_attention[level], not last, options))
            skips += [out] * (num_res_blocks + (not last))
            current = out

        self.mid = Middle(current, options)

        up_levels: list[nn.Module] = []
        for level, out in reversed(list(enumerate(level_channels))):
            blocks = []
            for _ in range(num_res_blocks + 1):
                blocks.append(current + skips.pop())
                current = out
            up_levels.insert(0, UpLevel(blocks, out, with_attention[level], level > 0, options))
        self.up = nn.ModuleList(up_levels)

        self.norm_out = group_norm(current, norm_groups)
        self.conv_out = nn.Conv2d(current, channels, 3, padding=1)
        self._initialise_embedding_path()

    @classmethod
    def cifar10(cls) -> "DDPMUNet":
        """The published CIFAR-10 network: 32x32x3, 10 classes, 38 632 323 parameters."""
        return cls()

    @classmethod
    def stl10(cls) -> "DDPMUNet":
        """The published STL-10 network: 64x64x3, 10 classes, 83 159 683 parameters."""
        return cls(channel_mult=(1, 2, 2, 2, 4), image_size=64)

    @classmethod
    def digits(cls, width: int = 16) -> "DDPMUNet":
        """A small network for the 8x8 digits of scikit-learn, quick to train on a CPU."""
        return cls(
            width=width,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(4,),
            image_size=8,
            channels=1,
            dropout=0.0,
            norm_groups=8,
        )

    def _initialise_embedding_path(self) -> None:
        """Keep the variance through the embedding's three linear layers; elsewhere torch's defaults serve.

        Those defaults shrink the label to a twentieth, and the network is slow to notice it.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            x_t: (B, C, H, W) noisy images, in the dtype of the weights (or under autocast).
            t: (B,) int64 timesteps.
            condition: (B,) int64 labels in [0, num_classes]; ``num_classes`` is the null class.

        Returns:
            (B, C, H, W) predicted noise.
        """
        time = self.temb(sinusoidal_embedding(t, self.config["width"]).to(x_t.dtype))
        label = self.cemb(self.classes_emb(condition))
        embedding = F.silu(torch.cat([time, label], dim=1))
        h = self.conv_in(x_t)
        skips = [h]
        for level in self.down:
            skips += level(skips[-1], embedding)
        h = self.mid(skips[-1], embedding)
        for level in reversed(self.up):
            h = level(h, skips, embedding)
        return self.conv_out(F.silu(self.norm_out(h)))  # type: ignore[no-any-return]


def _check_config(config: dict[str, Any]) -> None:
    """Refuse architectures that cannot be built, naming the argument."""
    for name in ("width", "num_res_blocks", "image_size", "channels", "num_classes", "norm_groups"):
        _check_positive(name, config[name])
    if config["width"] < 4 or config["width"] % 2:
        raise ValueError(f"width must be even and at least 4 (sines and cosines), got {config['width']}")
    if not config["channel_mult"]:
        raise ValueError("channel_mult must name at least one level, got an empty sequence")
    for name in ("channel_mult", "attention_resolutions"):
        for value in config[name]:
            _check_positive(f"every entry of {name}", value)
    factor = 2 ** (len(config["channel_mult"]) - 1)
    if config["image_size"] % factor:
        raise ValueError(
            f"image_size must be divisible by {factor} (one halving per level of channel_mult but the last), "
            f"got {config['image_size']}"
        )
    if not 0.0 <= config["dropout"] < 1.0:
        raise ValueError(f"dropout must lie in [0, 1), got {config['dropout']}")


def _check_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
