"""ActiveParameters: where the active weights of a model live while they train, one flat buffer for all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from pecker_fast import distributed, step_hooks
from pecker_fast.layers import SUFFIX, mask_layer, unmask_layer
from pecker_fast.layout import Entry, lay_out
from pecker_fast.mask import BlockMask
from pecker_fast.maskable import STORE, Survey
from pecker_fast.scatter import ScatterTable, Target

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ActiveParameters:
    """The active weights of a masked model in one flat buffer, block after block, and their gradients in another.

    Each masked layer owns an ``nn.Parameter`` that is a view of the buffer. Weights with every block active and
    float32 are not even copied: their dense tensor is a view as well. ``p.data`` and ``p.grad`` are the truth:
    whatever replaces them, ``bind_()`` copies it back and makes it a view again.

    Attributes:
        model: The masked model.
        mask: Its mask.
        found: What of the model can be masked, and why not the rest.
        values: Active weights, float32 (numel,); float64 for a model of float64.
        grads: Their gradients, same shape.
        ema: Running average of the weights, or None; an optimizer with ``ema_decay`` keeps it.
        ema_shard: Which part of the running average ``ema`` is, where the optimizer's state is sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: BlockMask,
        layers: Sequence[str],
        found: Survey,
        adopted: Collection[str],
    ) -> None:
        """Use ``apply_mask``, which checks; here it is done.

        Args:
            model: The model, not masked yet.
            mask: Its mask.
            layers: Names of the modules that become masked layers.
            found: What of the model can be masked.
            adopted: Weights that cannot, and train dense.
        """
        self.model = model
        self.found = found
        self.ema: Tensor | None = None
        self.ema_shard: distributed.Shard | None = None
        self._agreed: tuple[BlockMask, object] | None = None
        self._adopted = frozenset(adopted)
        self._required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._trained: set[str] = set()
        self._install(mask, layers)
        model.__dict__[STORE] = self
        step_hooks.watch(self)

    def _install(self, mask: BlockMask, layers: Sequence[str]) -> None:
        """Turn ``layers`` of the dense model into masked ones, and lay their active weights out in new buffers."""
        parameters = dict(self.model.named_parameters())
        self.mask = mask
        self._swapped = tuple(layers)
        self._owners: dict[str, nn.Module] = {}
        self._views: list[tuple[Tensor, Tensor]] = []
        self._table: ScatterTable | None = None
        self._table_key: tuple[object, ...] = ()
        for name, parameter in parameters.items():
            if parameter.is_floating_point():
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

    @staticmethod
    def of(model: nn.Module) -> ActiveParameters:
        """The store of a masked model.

        Raises:
            ValueError: The model is not masked.
        """
        store = model.__dict__.get(STORE)
        if store is None:
            raise ValueError(f"{type(model).__name__} is not masked; call apply_mask(model, mask) first")
        return cast(ActiveParameters, store)

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
        for entry in self._entries:
            parameter = self._module(entry)._parameters[entry.own if entry.adopted else entry.own + SUFFIX]
            yield entry, cast(nn.Parameter, parameter)

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
        ``.to(device)`` and DDP's ``gradient_as_bucket_view`` all replace them.
        """
        self._follow_device()
        for (entry, parameter), (value, grad) in zip(self._entries_parameters(), self._all_views(), strict=True):
            if parameter.dtype != self.values.dtype:
                raise RuntimeError(
                    f"{entry.name} trains dense and was converted to {parameter.dtype}; convert the model before "
                    f"apply_mask, or keep unmaskable weights frozen"
                )
            if not _same_place(parameter, value):
                value.copy_(parameter.data)
                parameter.data = value
            if parameter.grad is not None and not _same_place(parameter.grad, grad):
                grad.copy_(parameter.grad)
                parameter.grad = grad
            dense = self._dense(entry)
            if self._aliases(entry, dense) and not _same_place(dense, value):
                dense.data = value

    def _aliases(self, entry: Entry, dense: Tensor) -> bool:
        """Whether the dense weight can be a view of the buffer: nothing to scatter then."""
        return entry.mask.is_full and dense.dtype == self.values.dtype and dense.device == self.values.device

    def _follow_device(self) -> None:
        device = next(self._entries_parameters())[1].device
        if device != self.values.device:
            self.values, self.grads, self._views = self.values.to(device), self.grads.to(device), []
            self.ema = None if self.ema is None else self.ema.to(device)

    def scatter_table(self) -> ScatterTable:
        """Where the buffer goes in the dense weights, as they lie now."""
        pairs = [(entry, self._dense(entry)) for entry in self._entries]
        key = tuple((dense.data_ptr(), dense.dtype, dense.stride()) for _, dense in pairs)
        if self._table is None or key != self._table_key:
            targets = [
                Target(e.mask, None if e.adopted or self._aliases(e, d) else d.detach(), e.channels_last)
                for e, d in pairs
            ]
            self._table, self._table_key = ScatterTable(targets, self.values.device), key
        return self._table

    @torch.no_grad()
    def scatter_(self) -> None:
        """Copy the active weights into the dense ones, as every step of any optimizer does."""
        self.bind_()
        self.scatter_table().scatter_(self.values)
        self.bump_versions()

    def bump_versions(self) -> None:
        """Tell autograd that dense weights changed, so that a stale backward raises instead of mixing two states."""
        torch.autograd.graph.increment_version([self._dense(entry) for entry in self._entries])

    # -- gradients ---------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear the gradients: the flat buffer at once, or every ``p.grad`` to None."""
        for _, parameter in self._entries_parameters():
            parameter.grad = None if set_to_none else parameter.grad
        if not set_to_none:
            self.bind_()
            self.grads.zero_()

    def check_gradients(self) -> None:
        """Before a step: refuse active parameters that have never had a gradient.

        Raises:
            RuntimeError: Their module's forward does not use them, so they would only decay.
        """
        never = []
        for entry, parameter in self._entries_parameters():
            if parameter.grad is not None:
                self._trained.add(entry.name)
            elif entry.name not in self._trained:
                never.append(entry.name)
            else:
                self._view(self.grads, entry).zero_()  # no gradient this time: the buffer still holds an old one
        if never:
            raise RuntimeError(
                f"{len(never)} active weights have never had a gradient: {', '.join(never[:3])}. Either backward() was "
                f"not called, or the model reads them without calling their module; leave those out of the mask"
            )

    @torch.no_grad()
    def all_reduce_(self, group: ProcessGroup | None = None) -> None:
        """Average the gradients over the processes of ``group``, with one all-reduce: what DDP does, without DDP.

        Every rank calls it after its last backward and before it clips or steps; all of them must have started from the
        same weights and the same mask. An active weight without a gradient on this rank counts as zeros.

        Args:
            group: The processes; None is all of them.

        Raises:
            RuntimeError: torch.distributed is not initialised, or the masks differ; on every rank.
        """
        group = distributed.group_or_default(group)
        self.check_same_mask(group)
        self.bind_()
        for _, parameter, grad in self._with_gradient_views():
            if parameter.grad is None:
                grad.zero_()
        distributed.all_reduce_mean_(self.grads, group)
        for name, parameter, grad in self._with_gradient_views():
            # Where no rank ever had a gradient it stays None, for check_gradients() to refuse.
            if parameter.grad is None and (name in self._trained or bool(grad.any())):
                parameter.grad = grad

    def _with_gradient_views(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        for (entry, parameter), (_, grad) in zip(self._entries_parameters(), self._all_views(), strict=True):
            yield entry.name, parameter, grad

    def check_same_mask(self, group: ProcessGroup | None = None) -> None:
        """Compare the masks of all processes of ``group``; asks the others once for each mask, so all must call it.

        ``DistributedDataParallel`` compares shapes only: call this before you wrap a masked model in it.

        Raises:
            RuntimeError: torch.distributed is not initialised, or the masks differ; on every rank.
        """
        group = distributed.group_or_default(group)
        if self._agreed is None or self._agreed[0] is not self.mask or self._agreed[1] is not group:
            layout = ((entry.name, entry.mask, entry.channels_last) for entry in self._entries)
            own = distributed.fingerprint(self.values.dtype, layout)
            distributed.check_agreement(own, self.values.device, group)
            self._agreed = (self.mask, group)

    def requires_grad_(self, requires_grad: bool = True) -> None:
        """Switch gradients of the active parameters on or off, as ``nn.Module.requires_grad_`` does."""
        for _, parameter in self._entries_parameters():
            parameter.requires_grad_(requires_grad)

    def to_dense(self, flat: Tensor, name: str) -> Tensor:
        """One weight's stretch of a flat buffer (``values``, ``grads``, ``ema``) as a dense tensor, zero elsewhere.

        Raises:
            KeyError: ``name`` has no active blocks.
        """
        entry = next((entry for entry in self._entries if entry.name == name), None)
        if entry is None:
            raise KeyError(f"{name!r} has no active blocks; weights with some: {', '.join(self.names[:5])}, ...")
        if entry.mask.is_full:
            return self._view(flat, entry).clone(memory_format=torch.contiguous_format)
        dense = flat.new_zeros(entry.mask.grid.numel)
        dense[entry.mask.index(entry.channels_last).to(flat.device)] = entry.stretch(flat)
        return dense.view(entry.mask.grid.shape)

    # -- running average ---------------------------------------------------------------------------

    @contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        """Within the block the model has its running-average weights; afterwards its trained ones again.

        Where the optimizer's state is sharded, every rank must enter the block: the parts are gathered.

        Raises:
            RuntimeError: No running average is kept.
        """
        average = self._whole_ema()
        self.bind_()
        trained = self.values.clone()
        try:
            self.values.copy_(average)
            self.scatter_()
            yield self.model
        finally:
            self.values.copy_(trained)
            self.scatter_()

    def _whole_ema(self) -> Tensor:
        if self.ema is None:
            raise RuntimeError("no running average is kept; make MaskedAdamW with ema_decay, and step once")
        return self.ema if self.ema_shard is None else self.ema_shard.gather(self.ema)

    # -- the end -----------------------------------------------------------------------------------

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

    @torch.no_grad()
    def remove(self, *, ema: bool = False) -> nn.Module:
        """Make the model an ordinary dense one again, trained weights kept.

        Args:
            ema: Keep the running average of the weights instead of the last ones.

        Returns:
            The model.

        Raises:
            RuntimeError: A dense weight was changed behind the store's back, or no running average is kept.
        """
        self.check()
        self.bind_()
        if ema:
            self.values.copy_(self._whole_ema())
            self.scatter_()
        self._uninstall()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required_grad[name])
        del self.model.__dict__[STORE]
        step_hooks.forget(self)
        return self.model

    @torch.no_grad()
    def replace_mask(self, mask: BlockMask, layers: Sequence[str]) -> None:
        """Lay the store out anew for another mask; ``change_mask`` checks the mask and takes the optimizers along.

        Weights that leave keep the values they have; gradients are dropped.

        Raises:
            RuntimeError: A dense weight was changed behind the store's back; nothing is changed.
        """
        self.check()
        self.bind_()
        self._uninstall()
        self._install(mask, layers)
        self.bump_versions()

    def summary(self) -> str:
        """What trains and what does not, one line each."""
        trained = {entry.name for entry in self._entries}
        lines = [repr(self), self.mask.summary()]
        for name, reason in self.found.refused.items():
            lines.append(f"  {name:<40} {'trains dense' if name in trained else 'frozen'}: {reason}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        model = type(self.model).__name__
        return f"ActiveParameters({self.numel:,} weights of {model} in {len(self._entries)} parameters)"

    def __getstate__(self) -> dict[str, Any]:
        # Addresses and modules of the model that this is a copy of would outlive it.
        return self.__dict__ | {"_table": None, "_table_key": (), "_owners": {}, "_views": [], "_agreed": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        step_hooks.watch(self)


def _join(module: str, own: str) -> str:
    return f"{module}.{own}" if module else own


def _with_own_storage(view: Tensor) -> Tensor:
    """The same memory under a storage of its own.

    Accelerate takes weights that share a storage for tied ones, and leaves all but one out of its checkpoints.
    """
    return torch.utils.dlpack.from_dlpack(view) if view.numel() else view


def _same_place(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.stride() == b.stride()
