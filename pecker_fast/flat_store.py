"""FlatStore: active weights and their gradients in one flat buffer each, and every parameter a view of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pecker_fast import step_hooks
from pecker_fast.arrangement import Arrangement, arrange, dense_parameters, same_place, view_of
from pecker_fast.layers import SUFFIX, MaskedLayer, mask_layer, unmask_layer
from pecker_fast.layout import Entry
from pecker_fast.mask import BlockMask
from pecker_fast.maskable import STORE
from pecker_fast.memory_order import as_they_lie, reorder_, reorder_state_
from pecker_fast.scatter import ScatterTable, Target
from pecker_fast.seal import Seal, Slot


class FlatStore:
    """The buffers of ``ActiveParameters``: laid out, and bound to the model's parameters.

    Attributes:
        model: The masked model.
        modules: All its modules by the names that they had when it was masked.
        mask: Its mask.
        values: Active weights (numel,).
        grads: Their gradients, same shape.
        ema: Running average of the weights or of a part of them, or None.
        followers: Optimizers whose state is laid out as the active parameters are.
    """

    mask: BlockMask
    values: Tensor
    grads: Tensor

    def __init__(self, model: nn.Module, mask: BlockMask, layers: Sequence[str], adopted: frozenset[str]) -> None:
        """Turn ``layers`` of ``model`` into masked ones; weights that are ``adopted`` train dense."""
        self.model = model
        self.modules = dict(model.named_modules())
        self.ema: Tensor | None = None
        self.followers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._adopted = adopted
        self._layers: list[nn.Module] = []
        self._required_grad = {name: p.requires_grad for name, p in dense_parameters(self.modules).items()}
        self._entries: tuple[Entry, ...] = ()
        self._active: list[nn.Parameter] = []
        arrangement = arrange(self.modules, mask, layers, adopted)
        model.__dict__[STORE] = self
        self._install(arrangement)

    def _install(self, arrangement: Arrangement) -> None:
        """Turn the layers of the dense model into masked ones; nothing here can fail."""
        for parameter in dense_parameters(self.modules).values():
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimizer would apply it, frozen or not
        for layer, masks, masters in arrangement.layers:
            mask_layer(layer, masks, masters)
        for parameter, view in zip(arrangement.active, arrangement.views, strict=True):
            parameter.data = view
            parameter.requires_grad_(True)
        self.mask = arrangement.mask
        self.values, self.grads = arrangement.values, arrangement.grads
        self._layers = [layer for layer, _, _ in arrangement.layers]
        self._entries, self._active = arrangement.entries, arrangement.active
        self._views: list[tuple[Tensor, Tensor]] = []
        self._table: ScatterTable | None = None
        self._split: list[tuple[Entry, nn.Parameter]] = []  # weights that train as a whole in another dtype
        self._seal: Seal | None = None

    def _uninstall(self, own: dict[str, Tensor]) -> None:
        """The other way: ordinary layers whose dense weights have memory of their own; nothing here can fail.

        Args:
            own: Name -> what a weight that is its own active parameter holds from now on.
        """
        for entry, parameter in zip(self._entries, self._active, strict=True):
            if entry.name in own:
                parameter.data = own[entry.name]
                parameter.grad = None
            else:
                step_hooks.abandon(entry.name, parameter)
        for layer in self._layers:
            unmask_layer(layer)
        for name, parameter in dense_parameters(self.modules).items():
            if name in self._required_grad:  # an adapter may have brought others
                parameter.requires_grad_(self._required_grad[name])

    def _own_memory(self) -> dict[str, Tensor]:
        """Copies of the weights that are views of the buffer, strides kept: what ``_uninstall`` takes."""
        trained = zip(self._entries, self._active, strict=True)
        return {entry.name: p.data.clone() for entry, p in trained if self._dense(entry) is p}

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

    def pairs(self) -> Iterator[tuple[str, nn.Parameter | None, nn.Parameter]]:
        """Name of the dense weight, the dense weight (None: gone from its module), and its active parameter."""
        for entry, parameter in zip(self._entries, self._active, strict=True):
            yield entry.name, self._held(entry).get(entry.own), parameter

    def _entries_parameters(self) -> Iterator[tuple[Entry, nn.Parameter]]:
        self._check_installed()
        yield from zip(self._entries, self._active, strict=True)

    def _check_installed(self) -> None:
        if self.model.__dict__.get(STORE) is not self:  # the model may have another store by now
            raise RuntimeError(
                f"the mask of this {type(self.model).__name__} was removed, and its active parameters with it; "
                f"ActiveParameters.of(model) is the store that a model has now"
            )

    def _held(self, entry: Entry) -> dict[str, nn.Parameter | None]:
        """Where the module of a weight keeps its parameters."""
        return cast("dict[str, nn.Parameter | None]", self.modules[entry.module]._parameters)

    def _dense(self, entry: Entry) -> nn.Parameter:
        return cast(nn.Parameter, self._held(entry)[entry.own])

    def _all_views(self) -> list[tuple[Tensor, Tensor]]:
        """Every parameter's stretch of the values and of the gradients, made once for as long as the buffers stay."""
        if not self._views:
            self._views = [(view_of(self.values, entry), entry.view(self.grads)) for entry in self._entries]
        return self._views

    # -- views -------------------------------------------------------------------------------------

    @torch.no_grad()
    def bind_(self) -> None:
        """Make every ``p.data`` and ``p.grad`` a view of the flat buffers again, keeping what they hold.

        Cheap where nothing was replaced: it compares addresses. ``zero_grad(set_to_none=True)``, ``deepcopy``,
        ``.to(device)`` and DDP's ``gradient_as_bucket_view`` all replace them. Where ``.to(memory_format=...)`` put the
        dense weights into another order, the buffers follow, and with them the state of every optimizer that steps.

        Raises:
            RuntimeError: The mask was removed, or a module has lost one of its weights.
        """
        self._check_installed()
        entries = self._entries
        if self._seal is not None and self._seal.tensors_hold():
            if self._seal.grads_hold():
                return
        else:
            self._check_held()
            entries = as_they_lie(entries, [self._dense(entry) for entry in entries])
            self._bind_values()
        self._bind_grads()
        if entries is not self._entries:
            self._lay_out_anew(entries)
        self._seal = Seal(self._slots(), trained=len(self._entries))

    def _check_held(self) -> None:
        """Refuse to go on where a weight is gone, or is another one: kernels write at addresses."""
        held = {entry.name: self._held(entry).get(entry.own) for entry in self._entries}
        lost = [name for name, dense in held.items() if dense is None]
        if lost:
            raise RuntimeError(
                f"{len(lost)} weights of the masked {type(self.model).__name__} are gone from their modules: "
                f"{', '.join(lost[:3])}. Pruning, a weight norm or a parametrization after apply_mask takes them away; "
                f"undo it, and apply it before apply_mask or after active.remove()"
            )
        for entry in self._entries:
            dense = self._dense(entry)
            if tuple(dense.shape) != entry.mask.grid.shape or (dense.is_meta and not self.values.is_meta):
                raise RuntimeError(
                    f"{entry.name} was replaced after apply_mask: expected {entry.mask.grid.shape} with data, got "
                    f"{tuple(dense.shape)} on {dense.device}; put the weight back, or call active.remove() before such "
                    f"a change and apply_mask after it"
                )
            if not torch.ops.aten.is_non_overlapping_and_dense(dense):
                dense.data = dense.data.contiguous()  # part of a larger tensor, or the same memory several times

    def _bind_values(self) -> None:
        self._follow_device()
        # A gradient that was handed out may be elsewhere too: nn.Module moves .data.
        self._views, self._table = [], None
        for entry, parameter, (value, _) in zip(self._entries, self._active, self._all_views(), strict=True):
            held = self._held(entry)
            if not entry.adopted and (found := held.get(entry.own + SUFFIX)) is not parameter:
                if found is not None:  # another object, and its values: the optimizer has ours
                    parameter.data = found.data
                held[entry.own + SUFFIX] = parameter
            if parameter.dtype != self.values.dtype:
                raise RuntimeError(
                    f"{entry.name} trains dense and was converted to {parameter.dtype}; convert the model before "
                    f"apply_mask, or keep unmaskable weights frozen"
                )
            if not same_place(parameter, value):
                value.copy_(parameter.data)
                parameter.data = value

    def _bind_grads(self) -> None:
        """Gradients that are no views are copied together, in one launch or a few: there may be hundreds."""
        views, strays, owners = [], [], []
        for parameter, (_, view) in zip(self._active, self._all_views(), strict=True):
            if parameter.grad is not None and not same_place(parameter.grad, view):
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
            if not entry.adopted:
                cast(MaskedLayer, self.modules[entry.module]).channels_last[entry.own] = entry.channels_last

    def _slots(self) -> list[Slot]:
        """Where modules hold the active parameters, and then the dense weights."""
        held = [self._held(entry) for entry in self._entries]
        active = [entry.own if entry.adopted else entry.own + SUFFIX for entry in self._entries]
        dense = [entry.own for entry in self._entries]
        return [*zip(held, active, strict=True), *zip(held, dense, strict=True)]

    def _follow_device(self) -> None:
        device = self._active[0].device
        if device != self.values.device:
            self.values, self.grads, self._views = self.values.to(device), self.grads.to(device), []
            self.ema = None if self.ema is None else self.ema.to(device)

    def scatter_table(self) -> ScatterTable:
        """Where the buffer goes in the dense weights, as ``bind_()`` last found them."""
        self.bind_()
        if self._table is None:
            self._table = self._make_table()
        return self._table

    def _make_table(self) -> ScatterTable:
        pairs = [(entry, self._dense(entry), p) for entry, p in zip(self._entries, self._active, strict=True)]
        self._split = [(entry, p) for entry, dense, p in pairs if dense is not p and entry.mask.is_full]
        targets = [Target(e.mask, None if dense is p else dense.detach(), e.channels_last) for e, dense, p in pairs]
        return ScatterTable(targets, self.values.device)

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
