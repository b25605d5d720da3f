"""Layers whose forward is unchanged and whose backward computes what the active blocks need, and no more.

A masked layer keeps its dense weight under its own name, frozen for autograd, and beside it one parameter
``<name>_active`` with the active weights alone: that one gets gradients and is what an optimizer sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecker_fast.block_scores import ScoreKind
from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.frozen_channels import channels_with_gradient
from pecker_fast.functional import link, masked_conv2d, masked_linear, require_grad_like, score
from pecker_fast.ops.layout import is_channels_last
from pecker_fast.ops.masked_weight_grad import register_flops

SUFFIX = "_active"

Sums: TypeAlias = tuple[Tensor, BlockGrid, ScoreKind]
"""Running sums over blocks, how the weight is cut, and of what."""


class MaskedLayer(nn.Module):
    """What all masked layers share: their masks, and how masters move, save and load.

    Attributes:
        masks: Own name of a weight -> its active blocks; only weights that have some.
        channels_last: Own name of a weight -> order of its active weights, as in ``ParameterMask.index``.
        store: Reference to the masked model's store (``ActiveParameters``); None where ``score_blocks`` alone listens.
        scored: Own name of a weight -> where its gradient is summed over blocks, while ``score_blocks`` listens.
    """

    masks: dict[str, ParameterMask]
    channels_last: dict[str, bool]
    store: Callable[[], Any] | None = None
    scored: Mapping[str, Sums] = MappingProxyType({})

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to another store, which introduces itself.
        state: dict[str, Any] = super().__getstate__()
        state.pop("store", None)
        return state

    def master(self, name: str) -> nn.Parameter | None:
        """The active weights of ``name``, or None if it is frozen; the weight itself if it trains as a whole."""
        return self._parameters.get(name + SUFFIX)

    def linked(self, name: str) -> Tensor | None:
        """The dense weight, with gradients for its active blocks."""
        dense, master = self._parameters[name], self.master(name)
        if dense is None:
            return None
        weight: Tensor = dense
        if master is not None and master is not dense:
            weight = link(dense, master, self.masks[name], self.channels_last[name])
        return score(weight, *self.scored[name]) if name in self.scored else weight

    def sync(self) -> None:
        """Bring this layer's weights together, where the forward of the masked model has not done it just now."""
        if torch.compiler.is_compiling() or self.store is None or (store := self.store()) is None:
            return
        # Within a backward pass a checkpoint computes again what has been computed, with the same weights.
        if not store.running and torch._C._current_graph_task_id() == -1:
            store.sync_layer(self)

    def wants_dense_gradient(self, name: str) -> bool:
        """Whether the whole gradient of a weight is computed: most of it is active, or all its blocks are scored."""
        if name in self.scored:
            return True
        master = self.master(name)
        return master is not None and not _masked_gradient_pays(self.masks[name], master.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedLayer:
        """Masters follow the device, never the dtype: ``.half()`` narrows the dense weights only."""
        masters = {name: cast(nn.Parameter, self._parameters.pop(name + SUFFIX)) for name in self.masks}
        whole = [name for name, master in masters.items() if self._parameters[name] is master]
        for name in whole:  # a stand-in is converted, and is what the weight becomes if its dtype changes
            self._parameters[name] = nn.Parameter(masters[name].detach(), requires_grad=False)
        try:
            super()._apply(fn, recurse)
        except BaseException:  # out of memory, say
            self._parameters.update({name: masters[name] for name in whole})
            raise
        else:
            for name, master in masters.items():
                self._follow_device(name, master, whole=name in whole)
        finally:
            self._parameters.update({name + SUFFIX: master for name, master in masters.items()})
        return self

    def _follow_device(self, name: str, master: nn.Parameter, whole: bool) -> None:
        dense = cast(nn.Parameter, self._parameters[name])
        if whole and dense.dtype == master.dtype:
            master.data = dense.data
            self._parameters[name] = master
        elif dense.device != master.device:
            master.data = master.data.to(dense.device)
        if master.grad is not None and master.grad.device != master.device:
            master.grad = master.grad.to(master.device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The keys are those of the dense model: masters are a part of the dense weights."""
        if self.store is not None and (store := self.store()) is not None:
            store.sync_layer(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.masks:
            destination.pop(prefix + name + SUFFIX, None)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """A dense checkpoint loads strictly: masters are gathered from its dense weights."""
        masters = {name: cast(nn.Parameter, self._parameters.pop(name + SUFFIX)) for name in self.masks}
        whole = [name for name, master in masters.items() if self._parameters[name] is master]
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._parameters.update({name + SUFFIX: master for name, master in masters.items()})
        for name, master in masters.items():
            dense, mask = state_dict.get(prefix + name), self.masks[name]
            if dense is None or tuple(dense.shape) != mask.grid.shape:  # which is reported
                continue
            with torch.no_grad():  # the checkpoint may have more digits than the dense weight
                master.copy_(mask.gather(dense.detach(), self.channels_last[name]).view(master.shape))
            if name in whole:  # load_state_dict(assign=True) has put another parameter there
                self._parameters[name] = master


class MaskedLinear(MaskedLayer, nn.Linear):
    """``nn.Linear`` with a weight gradient for active blocks only."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        self.sync()
        master = self.master("weight")
        if master is None or self.wants_dense_gradient("weight"):
            return F.linear(input, cast(Tensor, self.linked("weight")), self.linked("bias"))
        context, (x, weight, bias) = _autocast(input, self.weight, self.linked("bias"))
        with context:
            return masked_linear(
                cast(Tensor, x),
                cast(Tensor, weight),
                master,
                bias,
                self.masks["weight"],
                self.channels_last["weight"],
            )


class MaskedConv2d(MaskedLayer, nn.Conv2d):
    """``nn.Conv2d`` with a weight gradient for active blocks only; keeps its input only if there are any."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Conv2d``."""
        self.sync()
        master = self.master("weight")
        if self.wants_dense_gradient("weight"):
            return cast(Tensor, self._conv_forward(input, cast(Tensor, self.linked("weight")), self.linked("bias")))
        padding, wanted = self.padding, channels_with_gradient(input)
        if self.padding_mode != "zeros" or isinstance(padding, str):  # pad first, as torch does
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
        context, (x, weight, bias) = _autocast(input, self.weight, self.linked("bias"))
        with context:
            return masked_conv2d(
                cast(Tensor, x),
                cast(Tensor, weight),
                master,
                bias,
                self.masks.get("weight"),
                self.channels_last.get("weight", False),
                (self.stride, padding, self.dilation, self.groups),
                wanted if self.groups == 1 else None,
            )


class MaskedEmbedding(MaskedLayer, nn.Embedding):
    """``nn.Embedding`` whose active rows train."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Embedding``."""
        self.sync()
        return F.embedding(input, cast(Tensor, self.linked("weight")), self.padding_idx)


class MaskedGroupNorm(MaskedLayer, nn.GroupNorm):
    """``nn.GroupNorm`` whose weight and bias are a block each."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.GroupNorm``, kept away from a crash of torch's CPU backward.

        With channels-last input that needs no gradient while weight or bias do (the first norm above a frozen prefix)
        torch 2.13 ends in a segmentation fault; an input that asks for a gradient takes another path.
        """
        self.sync()
        weight, bias = self.linked("weight"), self.linked("bias")
        wanted = next((p for p in (weight, bias) if p is not None and p.requires_grad), None)
        if wanted is not None and not input.requires_grad and input.dim() == 4 and input.device.type == "cpu":
            input = require_grad_like(input, wanted)
        return F.group_norm(input, self.num_groups, weight, bias, self.eps)


class MaskedLayerNorm(MaskedLayer, nn.LayerNorm):
    """``nn.LayerNorm`` whose weight and bias are a block each."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.LayerNorm``."""
        self.sync()
        return F.layer_norm(input, self.normalized_shape, self.linked("weight"), self.linked("bias"), self.eps)


class MaskedRMSNorm(MaskedLayer, nn.RMSNorm):
    """``nn.RMSNorm`` whose weight is one block."""

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.RMSNorm``."""
        self.sync()
        return F.rms_norm(x, self.normalized_shape, self.linked("weight"), self.eps)


class _MaskedBatchNorm(MaskedLayer):
    def forward(self, input: Tensor) -> Tensor:
        """As the batch norm it stands for."""
        self.sync()
        norm = cast(nn.BatchNorm2d, self)
        norm._check_input_dim(input)
        use_batch = norm.training or norm.running_mean is None
        momentum = 0.0 if norm.momentum is None else norm.momentum
        if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:  # a cumulative average
                momentum = 1.0 / float(norm.num_batches_tracked)
        keep = not norm.training or norm.track_running_stats
        return F.batch_norm(
            input,
            norm.running_mean if keep else None,
            norm.running_var if keep else None,
            self.linked("weight"),
            self.linked("bias"),
            use_batch,
            momentum,
            norm.eps,
        )


class MaskedBatchNorm1d(_MaskedBatchNorm, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` whose weight and bias are a block each."""


class MaskedBatchNorm2d(_MaskedBatchNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose weight and bias are a block each."""


class MaskedBatchNorm3d(_MaskedBatchNorm, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` whose weight and bias are a block each."""


MASKED_CLASSES: Mapping[type[nn.Module], type[MaskedLayer]] = {
    nn.Linear: MaskedLinear,
    nn.Conv2d: MaskedConv2d,
    nn.Embedding: MaskedEmbedding,
    nn.GroupNorm: MaskedGroupNorm,
    nn.LayerNorm: MaskedLayerNorm,
    nn.RMSNorm: MaskedRMSNorm,
    nn.BatchNorm1d: MaskedBatchNorm1d,
    nn.BatchNorm2d: MaskedBatchNorm2d,
    nn.BatchNorm3d: MaskedBatchNorm3d,
}
"""Which class stands in for which; the same object changes its class, so hooks and references to it stay valid."""

ROWS_DENSE_ABOVE, CONV_TILES_DENSE_ABOVE, LINEAR_TILES_DENSE_ABOVE = 0.8, 0.5, 0.4
"""Densities of a weight above which one dense gradient, gathered, costs less than one for its active blocks.

Measured on a CPU: benchmarks/bench_masked_weight_grad.py and bench_masked_layer.py. On a GPU the op itself chooses, by
what it measures for each mask (``ops/weight_grad_ways.py``).
"""


def mask_layer(module: nn.Module, masks: Mapping[str, ParameterMask], masters: Mapping[str, nn.Parameter]) -> None:
    """Turn ``module`` into a masked layer, in place.

    Args:
        module: Of a class in ``MASKED_CLASSES``.
        masks: Active blocks of its weights that have some, by own name.
        masters: Their active weights, shaped ``compact_shape``; the weight itself where it trains as a whole.
    """
    register_flops()
    module.__class__ = MASKED_CLASSES[type(module)]
    layer = cast(MaskedLayer, module)
    layer.masks = dict(masks)
    layer.channels_last = {name: is_channels_last(getattr(layer, name)) for name in masks}
    layer._parameters.update({name + SUFFIX: master for name, master in masters.items()})


def unmask_layer(module: nn.Module) -> None:
    """Undo ``mask_layer``; the dense weights stay as they are."""
    layer = cast(MaskedLayer, module)
    for name in layer.masks:
        layer._parameters.pop(name + SUFFIX, None)
    del layer.masks, layer.channels_last
    vars(layer).pop("store", None)
    module.__class__ = next(plain for plain, masked in MASKED_CLASSES.items() if masked is type(module))


def _masked_gradient_pays(mask: ParameterMask, device: torch.device) -> bool:
    if device.type == "cuda":
        return not mask.is_full
    if mask.grid.is_rows:
        return mask.density <= ROWS_DENSE_ABOVE
    return mask.density <= (LINEAR_TILES_DENSE_ABOVE if len(mask.grid.shape) == 2 else CONV_TILES_DENSE_ABOVE)


def _autocast(*tensors: Tensor | None) -> tuple[Any, list[Tensor | None]]:
    """Under autocast: the tensors as it would cast them, and a context in which it leaves them alone."""
    kind = cast(Tensor, tensors[0]).device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext(), list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    cast_ones = [t.to(dtype) if t is not None and _is_cast(t, kind) else t for t in tensors]
    return torch.autocast(kind, enabled=False), cast_ones


def _is_cast(tensor: Tensor, kind: str) -> bool:
    """Whether autocast for ``kind`` of device narrows a tensor: never float64, integers, or another device's."""
    return tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == kind
