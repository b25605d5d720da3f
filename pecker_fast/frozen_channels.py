"""Which channels of a convolution's input want a gradient: not those that a skip connection brings from frozen layers.

The way up of a UNet concatenates its own features with those of the way down. Where the way down is frozen, the
gradient of that half is computed by autograd only to be dropped. The graph, as it stands when a convolution is called,
says so: this file reads it, and ``masked_conv2d`` leaves those channels out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

CHANNELWISE = frozenset(
    f"{name}Backward0"
    for name in ("Silu", "Relu", "Gelu", "Mish", "Tanh", "Sigmoid", "Hardswish", "LeakyRelu", "Clone", "ToCopy")
)
"""Nodes whose input's gradient in a channel depends on no other channel of their output's."""


_every_channel: ContextVar[bool] = ContextVar("every_channel", default=False)


@contextmanager
def every_channel() -> Iterator[None]:
    """Within the block no channel is left out: for comparisons, and for hooks that look between."""
    token = _every_channel.set(True)
    try:
        yield
    finally:
        _every_channel.reset(token)


def channels_with_gradient(input: Tensor) -> int | None:
    """How many leading channels of ``input`` (batch, channels, height, width) want a gradient; None: all of them.

    Sees through elementwise functions and group norms without a gradient of their own to a concatenation along the
    channels whose last parts want none. The gradient of the channels left out would reach nothing but tensor hooks on
    what lies between the concatenation and the convolution; such hooks see zeros there.
    """
    if torch.compiler.is_compiling() or input.dim() != 4 or _every_channel.get():
        return None
    node: Any = input.grad_fn
    granularity = 1
    while node is not None:
        name = node.name()
        if name == "CatBackward0":
            channels = _wanted(node)
            return None if channels is None else _round_up(channels, granularity, input.shape[1])
        sources = [source for source, _ in node.next_functions if source is not None]
        if name == "NativeGroupNormBackward0":
            granularity = max(granularity, input.shape[1] // node._saved_group)
        elif name not in CHANNELWISE:
            return None
        if len(sources) != 1 or sources[0] is not node.next_functions[0][0]:
            return None  # a norm that trains its weight needs the gradient of every channel
        node = sources[0]
    return None


def _wanted(cat: Any) -> int | None:
    """Channels of a concatenation up to the last part that wants a gradient; None: that is the last part."""
    parts = cat.next_functions
    last = max((i for i, (source, _) in enumerate(parts) if source is not None), default=-1)
    if cat._saved_dim != 1 or last == len(parts) - 1 or any(source is None for source, _ in parts[: last + 1]):
        return None
    return sum(int(source._input_metadata[output].shape[1]) for source, output in parts[: last + 1])


def _round_up(channels: int, granularity: int, total: int) -> int | None:
    """Whole groups of a norm, whose channels share their statistics."""
    rounded = -(-channels // granularity) * granularity
    return rounded if rounded < total else None
