"""FlatStore: active weights and their gradients in one flat buffer each, and every parameter a view of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pecker_fast import step_hooks
from pecker_fast.layers import SUFFIX, MaskedLayer, mask_layer, unmask_layer
from pecker_fast.layout import Entry, lay_out
from pecker_fast.mask import BlockMask
from pecker_fast.maskable import STORE
from pecker_fast.memory_order import as_they_lie, reorder_, reorder_state_
from pecker_fast.scatter import ScatterTable, Target
from pecker_fast.seal import Seal, Slot


class FlatStore:
    """The buffers of ``ActiveParameters``: laid out, bound to the model's parameters, copied into its dense weights.

    Attributes:
        model: The masked model.
        mask: Its mask.
        values: Active weights (numel,).
        grads: Their gradients, same shape.
        ema: Running average of the weights or of a part of them, or None.
        followers: Optimizers whose state is laid out as the active parameters are.
    """

    def __init__(self, model: nn.Module, mask: BlockMask, layers: Sequence[str], adopted: frozenset[str]) -> None:
        """Turn ``layers`` of ``model`` into masked ones; weights that are ``adopted`` train dense."""
        self.model = model
        self.ema: Tensor | None = None
        self.followers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._adopted = adopted
        model.__dict__[STORE] = self
        self._install(mask, layers)

    def _install(self, mask: BlockMask, layers: Sequence[str]) -> None:
        """Turn ``layers`` of the dense model into masked ones, and lay their active weights out in new buffers."""
        parameters = dict(self.model.named_parameters())
        self.mask = mask
        self._swapped = tuple(layers)
        self._owners: dict[str, nn.Module] = {}
        self._views: list[tuple[Tensor, Tensor]] = []
        self._table: ScatterTable | None = None
        self._seal: Seal | None = None
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in self._adopted)
            parameter.grad = None  # an optimizer would apply it, frozen or not
        # Masters are float32, but those of a float64 model must not lose digits.
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters.values()) else torch.float32
        for layer in layers:
            masks = {own: mask.parameters.get(_join(layer, own)) for own in ("weight", "bias")}
            mask_layer(self.model.get_submodule(layer), {own: m for own, m in masks.items() if m and m.numel}, dtype)
        self._entries = lay_out(parameters, mask, self._adopted)
        device = next(self._entries_parameters())[1].device
        self.values = torch.zeros(self.numel, dtype=dtype, device=device)
        self.grads = torch.zeros_like(self.values)
        self.bind_()

    def _uninstall(self) -> None:
        """The other way: ordinary layers with dense weights of their own."""
        for entry, parameter in self._entries_parameters():
            dense = self._dense(entry)
            if _same_place(dense, self._view(self.values, entry)):
                dense.data = dense.data.clone()  # its own memory again; strides are kept
            if entry.adopted:
                dense.grad = None
            else:
                step_hooks.abandon(entry.name, parameter)
        for module_name in self._swapped:
            unmask_layer(self.model.get_submodule(module_name))

    @property
    def numel(self) -> int:
        """Active weights, those of dense-trained unmaskable layers included."""
        return sum(entry.mask.numel for entry in self._entries)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the dense weights with active blocks, in the buffer's order."""
        return tuple(entry.name for entry in self._entries)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """How the flat buffers are laid out."""
        return self._entries

    def parameters(self) -> list[nn.Parameter]:
        """The active parameters, for any optimizer."""
        return [parameter for _, parameter in self._entries_parameters()]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name of the dense weight and its active parameter."""
        for entry, parameter in self._entries_parameters():
            yield entry.name, parameter

    def pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """Name of the dense weight, the dense weight, and its active parameter."""
        for entry in self._entries:
            held = self._module(entry)._parameters
            dense = held[entry.own]
            yield entry.name, cast(nn.Parameter, dense), cast(nn.Parameter, held.get(entry.own + SUFFIX, dense))

    def _entries_parameters(self) -> Iterator[tuple[Entry, nn.Parameter]]:
        self._check_installed()
        for entry in self._entries:
            parameter = self._module(entry)._parameters[entry.own if entry.adopted else entry.own + SUFFIX]
            yield entry, cast(nn.Parameter, parameter)

    def _check_installed(self) -> None:
        if self.model.__dict__.get(STORE) is not self:  # the model may have another store by now
            raise RuntimeError(
                f"the mask of this {type(self.model).__name__} was removed, and its active parameters with it; "
                f"ActiveParameters.of(model) is the store that a model has now"
            )

    def _dense(self, entry: Entry) -> nn.Parameter:
        return cast(nn.Parameter, self._module(entry)._parameters[entry.own])

    def _module(self, entry: Entry) -> nn.Module:
        """The owner of a parameter, looked up once: names are what a copy of the model can rely on."""
        if entry.module not in self._owners:
            self._owners[entry.module] = self.model.get_submodule(entry.module)
        return self._owners[entry.module]

    def _view(self, flat: Tensor, entry: Entry) -> Tensor:
        """The stretch of a flat buffer that belongs to one parameter, in that parameter's shape."""
        return entry.shaped(entry.stretch(flat))

    def _all_views(self) -> list[tuple[Tensor, Tensor]]:
        """Every parameter's stretch of the values and of the gradients, made once for as long as the buffers stay."""
        if not self._views:
            self._views = [
                (_with_own_storage(self._view(self.values, entry)), self._view(self.grads, entry))
                for entry in self._entries
            ]
        return self._views

    # -- views -------------------------------------------------------------------------------------

    @torch.no_grad()
    def bind_(self) -> None:
        """Make every ``p.data`` and ``p.grad`` a view of the flat buffers again, keeping what they hold.

        Cheap where nothing was replaced: it compares addresses. ``zero_grad(set_to_none=True)``, ``deepcopy``,
        ``.to(device)`` and DDP's ``gradient_as_bucket_view`` all replace them. Where ``.to(memory_format=...)`` put the
        dense weights into another order, the buffers follow, and with them the state of every optimizer that steps.
        """
        self._check_installed()
        entries = self._entries
        if self._seal is not None and self._seal.tensors_hold():
            if self._seal.grads_hold():
                return
        else:
            entries = as_they_lie(entries, [self._dense(entry) for entry in entries])
            self._bind_values()
        self._bind_grads()
        if entries is not self._entries:
            self._lay_out_anew(entries)
        self._seal = Seal(self._slots(), trained=len(self._entries))

    def _bind_values(self) -> None:
        self._follow_device()
        self._views, self._table = (
            [],
            None,
        )  # a gradient that was handed out may be elsewhere too: nn.Module moves .data
        for (entry, parameter), (value, _) in zip(self._entries_parameters(), self._all_views(), strict=True):
            if parameter.dtype != self.values.dtype:
                raise RuntimeError(
                    f"{entry.name} trains dense and was converted to {parameter.dtype}; convert the model before "
                    f"apply_mask, or keep unmaskable weights frozen"
                )
            if not _same_place(parameter, value):
                value.copy_(parameter.data)
                parameter.data = value
            dense = self._dense(entry)
            if self._aliases(entry, dense) and not _same_place(dense, value):
                dense.data = value

    def _bind_grads(self) -> None:
        """Gradients that are no views are copied together, in one launch or a few: there may be hundreds."""
        views, strays, owners = [], [], []
        for (_, parameter), (_, view) in zip(self._entries_parameters(), self._all_views(), strict=True):
            if parameter.grad is not None and not _same_place(parameter.grad, view):
                views.append(view)
                strays.append(parameter.grad)
                owners.append(parameter)
        if strays:
            torch._foreach_copy_(views, strays)
        for parameter, view in zip(owners, views, strict=True):
            parameter.grad = view

    def _lay_out_anew(self, entries: tuple[Entry, ...]) -> None:
        """Put everything into the memory order of ``entries``, the state of known optimizers included."""
        pairs = zip(self._entries, entries, self.parameters(), strict=True)
        moved = [(old, new, parameter) for old, new, parameter in pairs if old.channels_last != new.channels_last]
        for flat in (self.values, self.grads):
            reorder_(flat, moved)
        for optimizer in list(self.followers):
            reorder_state_(optimizer, moved)
        self._entries, self._views = entries, []
        for (entry, parameter), (value, grad) in zip(self._entries_parameters(), self._all_views(), strict=True):
            parameter.data = value
            parameter.grad = None if parameter.grad is None else grad
            dense = self._dense(entry)
            if self._aliases(entry, dense):
                dense.data = value
            if not entry.adopted:
                cast(MaskedLayer, self._module(entry)).channels_last[entry.own] = entry.channels_last

    def _slots(self) -> list[Slot]:
        """Where modules hold the active parameters, and then the dense weights."""
        held = [self._module(entry)._parameters for entry in self._entries]
        active = [entry.own if entry.adopted else entry.own + SUFFIX for entry in self._entries]
        dense = [entry.own for entry in self._entries]
        return [*zip(held, active, strict=True), *zip(held, dense, strict=True)]

    def _aliases(self, entry: Entry, dense: Tensor) -> bool:
        """Whether the dense weight can be a view of the buffer: nothing to scatter then."""
        return entry.mask.is_full and dense.dtype == self.values.dtype and dense.device == self.values.device

    def _follow_device(self) -> None:
        device = next(self._entries_parameters())[1].device
        if device != self.values.device:
            self.values, self.grads, self._views = self.values.to(device), self.grads.to(device), []
            self.ema = None if self.ema is None else self.ema.to(device)

    # -- into the dense weights --------------------------------------------------------------------

    def scatter_table(self) -> ScatterTable:
        """Where the buffer goes in the dense weights, as ``bind_()`` last found them."""
        if self._table is None:
            self.bind_()
            pairs = [(entry, self._dense(entry)) for entry in self._entries]
            targets = [
                Target(e.mask, None if e.adopted or self._aliases(e, d) else d.detach(), e.channels_last)
                for e, d in pairs
            ]
            self._table = ScatterTable(targets, self.values.device)
        return self._table

    @torch.no_grad()
    def scatter_(self) -> None:
        """Copy the active weights into the dense ones, as every step of any optimizer does."""
        self.bind_()
        self.scatter_table().scatter_(self.values)
        self.bump_versions()

    def bump_versions(self) -> None:
        """Tell autograd that dense weights changed, so that a stale backward raises instead of mixing two states."""
        if self._seal is None:
            self.bind_()
        torch.autograd.graph.increment_version(cast(Seal, self._seal).others)

    def to_dense(self, flat: Tensor, name: str) -> Tensor:
        """One weight's stretch of a flat buffer (``values``, ``grads``, ``ema``) as a dense tensor, zero elsewhere.

        Raises:
            KeyError: ``name`` has no active blocks.
        """
        entry = next((entry for entry in self._entries if entry.name == name), None)
        if entry is None:
            raise KeyError(f"{name!r} has no active blocks; weights with some: {', '.join(self.names[:5])}, ...")
        return entry.to_dense(entry.stretch(flat))

    @torch.no_grad()
    def check(self) -> None:
        """Compare the dense weights with the active ones, exactly.

        Raises:
            RuntimeError: A dense weight was changed behind the store's back.
        """
        for entry, parameter in self._entries_parameters():
            dense = self._dense(entry)
            if entry.adopted or _same_place(dense, parameter):
                continue
            active = entry.mask.gather(dense.data, entry.channels_last).reshape(parameter.shape)
            expected = parameter.data.to(dense.dtype)
            if not torch.equal(active.nan_to_num(0.0), expected.nan_to_num(0.0)):
                changed = int((active != expected).sum())
                raise RuntimeError(
                    f"{entry.name}: {changed} of {active.numel()} active weights were changed outside the optimizer; "
                    f"change the active parameter (active.named_parameters()) instead, then call active.scatter_()"
                )


def _join(module: str, own: str) -> str:
    return f"{module}.{own}" if module else own


def _with_own_storage(view: Tensor) -> Tensor:
    """The same memory under a storage of its own.

    Accelerate takes weights that share a storage for tied ones, and leaves all but one out of its checkpoints.
    """
    with torch.cuda.device_of(view):  # else it is refused where another GPU is the current one
        return torch.utils.dlpack.from_dlpack(view) if view.numel() else view


def _same_place(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.stride() == b.stride()
