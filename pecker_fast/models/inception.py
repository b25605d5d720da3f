"""The Inception network of FID and of the inception score, without torchvision and without a download.

It is the graph that Google published in December 2015, in the PyTorch form of pytorch-fid and torch-fidelity, whose
one file of weights (``pt_inception-2015-12-05-6726825d.pth``) fits by name. It is not torchvision's Inception v3: it
has 1008 outputs; average pooling leaves the padding out of the count; the pool of ``Mixed_7c`` takes the maximum
where the paper has the mean; images are resized as TensorFlow 1 does, with corners and not centres of pixels aligned.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecker_fast.metrics.fid import InceptionStatistics

NUM_FEATURES, NUM_LOGITS, IMAGE_SIZE = 2048, 1008, 299

Kernel = int | tuple[int, int]
Step = tuple[str, int, Kernel]
"""Name, output channels and kernel of a convolution."""
Fork = tuple[Step, Step]
"""Two convolutions of one input, whose outputs are concatenated."""
Branch = list[Step | Fork]


class _Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: Kernel, stride: int = 1, padding: int | str = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class _Mixed(nn.Module):
    """Branches of one input, side by side, and a pool."""

    def __init__(self, channels: int, branches: list[Branch], pool: str, pool_channels: int = 0) -> None:
        super().__init__()
        self._branches, self._pool = branches, pool
        for branch in branches:
            current = channels
            for step in branch:
                for name, out, kernel in _steps(step):
                    halves = pool == "halve" and step is branch[-1]
                    unit = _Unit(current, out, kernel, 2) if halves else _Unit(current, out, kernel, padding="same")
                    self.add_module(name, unit)
                current = sum(out for _, out, _ in _steps(step))
        if pool_channels:
            self.branch_pool = _Unit(channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self._branches:
            h = x
            for step in branch:
                h = torch.cat([self.get_submodule(name)(h) for name, _, _ in _steps(step)], dim=1)
            outputs.append(h)
        return torch.cat([*outputs, self._pooled(x)], dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self._pool == "halve":
            return F.max_pool2d(x, 3, stride=2)
        if self._pool == "max":
            x = F.max_pool2d(x, 3, stride=1, padding=1)
        else:
            x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        pooled: Tensor = self.branch_pool(x)
        return pooled


class InceptionV3(nn.Module):
    """Images -> 2048 features, and from them 1008 logits. Get one with `load_inception`.

    Attributes:
        weights: Digest of the pretrained weights; None if they are only initial ones.
    """

    def __init__(self) -> None:
        """Build the network with torch's default initialisation; useful only on the meta device or in tests."""
        super().__init__()
        self.weights: str | None = None
        self.Conv2d_1a_3x3 = _Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = _Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = _Unit(80, 192, 3)
        for name, channels, pool_channels in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
            self.add_module(f"Mixed_{name}", _Mixed(channels, _branches_35(), "mean", pool_channels))
        self.Mixed_6a = _Mixed(288, _branches_35_to_17(), "halve")
        for name, inner in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            self.add_module(f"Mixed_{name}", _Mixed(768, _branches_17(inner), "mean", 192))
        self.Mixed_7a = _Mixed(768, _branches_17_to_8(), "halve")
        self.Mixed_7b = _Mixed(1280, _branches_8(), "mean", 192)
        self.Mixed_7c = _Mixed(2048, _branches_8(), "max", 192)
        self.fc = nn.Linear(NUM_FEATURES, NUM_LOGITS)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) uint8 images of any size to (B, 2048) features ("pool3") in the dtype of the weights.

        Raises:
            ValueError: The images have another form.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise ValueError(
                f"images: expected uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}; "
                "convert images in [-1, 1] with to_uint8, and repeat a single channel three times"
            )
        x = (resize_like_tf1(images.to(self.fc.weight.dtype), IMAGE_SIZE) - 128) / 128
        for name, module in self.named_children():
            if name == "fc":
                break
            x = module(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, stride=2)
        return x.mean(dim=(2, 3))

    def logits(self, features: Tensor, *, bias: bool = False) -> Tensor:
        """Map (B, 2048) features to (B, 1008) logits, for ``inception_score``.

        Without the bias, as the evaluators that scores are published with take them (torch-fidelity, torchmetrics).
        """
        return F.linear(features, self.fc.weight, self.fc.bias if bias else None)

    @torch.no_grad()
    def statistics(self, batches: Iterable[Tensor]) -> InceptionStatistics:
        """Statistics for ``fid`` of batches of images, each as in ``forward``, moved to the network's device.

        Raises:
            ValueError: The network has no pretrained weights or is in training mode, or images have another form.
            NonFiniteError: A feature is NaN or infinite.
        """
        if self.weights is None or self.training:
            raise ValueError("FID needs pretrained weights and eval mode; get the network with load_inception(file)")
        statistics = InceptionStatistics(self.weights)
        for images in batches:
            statistics.update(self(images.to(self.fc.weight.device)))
        return statistics


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as they would be saved: clamped, and rounded to the nearest of 256 levels.

    Metrics of published images are those of their files, so a fair comparison rounds too.
    """
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def resize_like_tf1(images: Tensor, size: int) -> Tensor:
    """Bilinear resize of (B, C, H, W) to (B, C, size, size): output pixel i reads at ``i * H / size``.

    TensorFlow 1's ``resize_bilinear``. ``F.interpolate`` reads at ``(i + 0.5) * H / size - 0.5``, half a pixel apart
    on enlarged images, which alone moves FID.
    """
    for dim in (3, 2):
        length = images.shape[dim]
        position = torch.arange(size, device=images.device, dtype=torch.float64) * (length / size)
        low = position.long().clamp(max=length - 1)
        shape = [size if axis == dim else 1 for axis in range(4)]
        weight = (position - low).to(images.dtype).view(shape)
        high = (low + 1).clamp(max=length - 1)
        images = torch.lerp(images.index_select(dim, low), images.index_select(dim, high), weight)
    return images


def _steps(step: Step | Fork) -> tuple[Step, ...]:
    match step:
        case (str(name), out, kernel):
            return ((name, out, kernel),)
        case (first, second):
            return (first, second)


def _branches_35() -> list[Branch]:
    return [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
    ]


def _branches_35_to_17() -> list[Branch]:
    return [
        [("branch3x3", 384, 3)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
    ]


def _branches_17(inner: int) -> list[Branch]:
    row, column = (1, 7), (7, 1)
    long: Branch = [("branch7x7dbl_1", inner, 1), ("branch7x7dbl_2", inner, column), ("branch7x7dbl_3", inner, row)]
    return [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", inner, 1), ("branch7x7_2", inner, row), ("branch7x7_3", 192, column)],
        [*long, ("branch7x7dbl_4", inner, column), ("branch7x7dbl_5", 192, row)],
    ]


def _branches_17_to_8() -> list[Branch]:
    head: Branch = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1))]
    return [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)], [*head, ("branch7x7x3_4", 192, 3)]]


def _branches_8() -> list[Branch]:
    def fork(name: str) -> Fork:
        return (f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))

    return [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), fork("branch3x3_2")],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")],
    ]
