"""The class-conditional DDPM of the published checkpoints, written out a second time, as functions of a weight dict.

Nothing is shared with ``pecker_fast.models``: every tensor has its published name, attention is two matrix products
and a softmax, and the label is dropped by replacing its embedding with the learned null vector.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
GROUPS = 32


def random_weights(
    *, width: int = 32, multiples: tuple[int, ...] = (1, 2), size: int = 16, blocks: int = 2, classes: int = 10
) -> Weights:
    """Weights of every published name and shape, with attention at 16 x 16 and in the middle."""
    weights: Weights = {}

    def add(name: str, *shape: int) -> None:
        fan_in = max(1, math.prod(shape[1:]))
        weights[f"{name}.weight"] = torch.randn(shape, dtype=torch.float64) / fan_in**0.5
        weights[f"{name}.bias"] = 0.3 * torch.randn(shape[0], dtype=torch.float64)

    def norm(name: str, channels: int) -> None:
        weights[f"{name}.weight"] = 1 + 0.3 * torch.randn(channels, dtype=torch.float64)
        weights[f"{name}.bias"] = 0.3 * torch.randn(channels, dtype=torch.float64)

    def resnet(name: str, inside: int, out: int) -> None:
        norm(f"{name}.norm1", inside)
        add(f"{name}.conv1", out, inside, 3, 3)
        add(f"{name}.temb_cemb_proj", out, 8 * width)
        norm(f"{name}.norm2", out)
        add(f"{name}.conv2", out, out, 3, 3)
        if inside != out:
            add(f"{name}.nin_shortcut", out, inside, 1, 1)

    def attention(name: str, channels: int) -> None:
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            add(f"{name}.{part}", channels, channels, 1, 1)

    for path in ("temb", "cemb"):
        add(f"{path}.dense.0", 4 * width, width)
        add(f"{path}.dense.1", 4 * width, 4 * width)
    weights["classes_emb.weight"] = torch.randn(classes, width, dtype=torch.float64)
    weights["null_classes_emb"] = torch.randn(width, dtype=torch.float64)
    add("conv_in", width, 3, 3, 3)

    channels, skips = width, [width]
    for level, multiple in enumerate(multiples):
        for block in range(blocks):
            resnet(f"down.{level}.block.{block}", channels, multiple * width)
            channels = multiple * width
            skips.append(channels)
            if size >> level == 16:
                attention(f"down.{level}.attn.{block}", channels)
        if level < len(multiples) - 1:
            add(f"down.{level}.downsample.conv", channels, channels, 3, 3)
            skips.append(channels)
    resnet("mid.block_1", channels, channels)
    attention("mid.attn_1", channels)
    resnet("mid.block_2", channels, channels)
    for level in range(len(multiples) - 1, -1, -1):
        for block in range(blocks + 1):
            resnet(f"up.{level}.block.{block}", channels + skips.pop(), multiples[level] * width)
            channels = multiples[level] * width
            if size >> level == 16:
                attention(f"up.{level}.attn.{block}", channels)
        if level:
            add(f"up.{level}.upsample.conv", channels, channels, 3, 3)
    norm("norm_out", channels)
    add("conv_out", 3, channels, 3, 3)
    return weights


def forward(weights: Weights, x: Tensor, t: Tensor, labels: Tensor, drop: Tensor) -> Tensor:
    """Predicted noise; where ``drop`` is true the label is replaced by the null vector."""
    width, levels = (
        weights["conv_in.weight"].shape[0],
        1 + max(int(n.split(".")[1]) for n in weights if n[:5] == "down."),
    )

    def affine(name: str, h: Tensor, **how: int) -> Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.linear(h, weight, bias) if weight.dim() == 2 else F.conv2d(h, weight, bias, **how)

    def normed(name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, GROUPS, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    def dense(name: str, h: Tensor) -> Tensor:
        h = affine(f"{name}.dense.0", h)
        return affine(f"{name}.dense.1", h * h.sigmoid())

    def resnet(name: str, h: Tensor) -> Tensor:
        inner = normed(f"{name}.norm1", h)
        inner = affine(f"{name}.conv1", inner * inner.sigmoid(), padding=1)
        both = torch.cat([time, label], dim=-1)
        inner = inner + affine(f"{name}.temb_cemb_proj", both * both.sigmoid())[:, :, None, None]
        inner = normed(f"{name}.norm2", inner)
        inner = affine(f"{name}.conv2", inner * inner.sigmoid(), padding=1)
        return (affine(f"{name}.nin_shortcut", h) if f"{name}.nin_shortcut.weight" in weights else h) + inner

    def attend(name: str, h: Tensor) -> Tensor:
        if f"{name}.q.weight" not in weights:
            return h
        shape = h.shape
        inner = normed(f"{name}.norm", h)
        query, key, value = (affine(f"{name}.{part}", inner).flatten(2) for part in "qkv")
        scores = torch.einsum("bci,bcj->bij", query, key) * shape[1] ** -0.5
        mixed = torch.einsum("bij,bcj->bci", scores.softmax(-1), value).reshape(shape)
        return h + affine(f"{name}.proj_out", mixed)

    half = width // 2
    # In float32 as in the published code, whatever the weights are: float64 ones would be compared to 1e-6 otherwise.
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10_000) / (half - 1)))
    angles = t.float()[:, None] * frequencies[None]
    time = dense("temb", torch.cat([angles.sin(), angles.cos()], dim=1).to(x.dtype))
    rows = weights["classes_emb.weight"][labels]
    label = dense("cemb", torch.where(drop[:, None], weights["null_classes_emb"].expand_as(rows), rows))

    h = affine("conv_in", x, padding=1)
    skips = [h]
    for level in range(levels):
        block = 0
        while f"down.{level}.block.{block}.conv1.weight" in weights:
            h = attend(f"down.{level}.attn.{block}", resnet(f"down.{level}.block.{block}", h))
            skips.append(h)
            block += 1
        if f"down.{level}.downsample.conv.weight" in weights:
            h = affine(f"down.{level}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2)
            skips.append(h)
    h = resnet("mid.block_2", attend("mid.attn_1", resnet("mid.block_1", h)))
    for level in reversed(range(levels)):
        block = 0
        while f"up.{level}.block.{block}.conv1.weight" in weights:
            h = resnet(f"up.{level}.block.{block}", torch.cat([h, skips.pop()], dim=1))
            h = attend(f"up.{level}.attn.{block}", h)
            block += 1
        if f"up.{level}.upsample.conv.weight" in weights:
            doubled = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            h = affine(f"up.{level}.upsample.conv", doubled, padding=1)
    h = normed("norm_out", h)
    return affine("conv_out", h * h.sigmoid(), padding=1)
