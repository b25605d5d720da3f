"""ActiveParameters: where the active weights of a model live while they train, one flat buffer for all of them."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from pecker_fast import distributed, step_hooks
from pecker_fast.arrangement import arrange
from pecker_fast.layers import MaskedConv2d, MaskedLinear
from pecker_fast.mask import BlockMask
from pecker_fast.maskable import STORE, Survey
from pecker_fast.ops.weight_grad_ways import choices_to_save, chosen_ways, restore_choices
from pecker_fast.synced_store import SyncedStore

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ActiveParameters(SyncedStore):
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
        self.found = found
        self.ema_shard: distributed.Shard | None = None
        self._agreed: tuple[object, object] | None = None
        self._trained: set[str] = set()
        self._warned: set[str] = set()
        self._all_trained = False
        self._requires_grad = True
        super().__init__(model, mask, layers, frozenset(adopted))
        step_hooks.watch(self)

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

    # -- gradients ---------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear the gradients: the flat buffer at once, or every ``p.grad`` to None."""
        if set_to_none:
            for parameter in self.parameters():
                parameter.grad = None
        else:
            self.bind_()
            self.grads.zero_()

    def check_gradients(self) -> list[str]:
        """Before a step: which active parameters have no gradient, so that an optimizer passes over them.

        A layer that did not run in this step has none. One that never ran so far is warned of, once.

        Returns:
            Names of their dense weights.

        Raises:
            RuntimeError: None has ever had a gradient, or somebody switched ``requires_grad`` off.
        """
        if self._all_trained and self._seal is not None and self._seal.has_all_grads:
            return []  # bind_() has just looked at every one
        skipped, switched_off = [], []
        for entry, parameter in self._entries_parameters():
            if parameter.grad is not None:
                self._trained.add(entry.name)
                continue
            skipped.append(entry.name)
            entry.view(self.grads).zero_()  # the buffer still holds an old one
            if self._requires_grad and not parameter.requires_grad:
                switched_off.append(entry.name)
        self._all_trained = len(self._trained) == len(self._entries)
        if switched_off:
            raise RuntimeError(
                f"{len(switched_off)} active weights have requires_grad=False: {', '.join(switched_off[:3])}. "
                f"Something switched it off after apply_mask (add_adapter of diffusers and peft does); call "
                f"active.requires_grad_(True) to train them, or active.requires_grad_(False) to leave them alone"
            )
        if not self._trained:
            raise RuntimeError(
                f"{len(skipped)} active weights have never had a gradient: {', '.join(skipped[:3])}. Call backward() "
                f"before the step; if you did, the model reads them without calling their modules: leave those out of "
                f"the mask"
            )
        self._warn_of_untrained(skipped)
        return skipped

    def _warn_of_untrained(self, skipped: Sequence[str]) -> None:
        never = [name for name in skipped if name not in self._trained and name not in self._warned]
        self._warned.update(never)
        if never:
            warnings.warn(
                f"{len(never)} active weights have had no gradient so far and are passed over: "
                f"{', '.join(never[:3])}. That is right for layers that did not run yet; a model that reads a weight "
                f"without calling its module cannot train it, so leave such weights out of the mask",
                stacklevel=4,
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
        self.bind_()
        self.check_same_mask(group)
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
        if self._agreed is None or self._agreed[0] is not self._entries or self._agreed[1] is not group:
            distributed.check_agreement(self.fingerprint(), self.values.device, group)
            self._agreed = (self._entries, group)

    def fingerprint(self) -> bytes:
        """32 bytes that differ where the flat buffers are laid out differently: another mask, dtype or memory order."""
        layout = ((entry.name, entry.mask, entry.channels_last) for entry in self._entries)
        return distributed.fingerprint(self.values.dtype, layout)

    def requires_grad_(self, requires_grad: bool = True) -> None:
        """Switch gradients of the active parameters on or off, as ``nn.Module.requires_grad_`` does."""
        self._requires_grad = requires_grad
        for _, parameter in self._entries_parameters():
            parameter.requires_grad_(requires_grad)

    # -- running average ---------------------------------------------------------------------------

    @contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        """Within the block the model has its running-average weights; afterwards its trained ones again.

        Where the optimizer's state is sharded, every rank must enter the block: the parts are gathered.

        Raises:
            RuntimeError: No running average is kept.
        """
        average = self._whole_ema()
        self.sync_()
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
    def remove(self, *, ema: bool = False) -> nn.Module:
        """Make the model an ordinary dense one again, trained weights kept.

        Args:
            ema: Keep the running average of the weights instead of the last ones.

        Returns:
            The model.

        Raises:
            RuntimeError: No running average is kept, or a module has lost one of its weights. The model stays masked.
        """
        self.sync_()
        if ema:
            self.values.copy_(self._whole_ema())
            self.scatter_()
        self._leave(self._own_memory())
        step_hooks.forget(self)
        return self.model

    @torch.no_grad()
    def replace_mask(self, mask: BlockMask, layers: Sequence[str]) -> None:
        """Lay the store out anew for another mask; ``change_mask`` checks the mask and takes the optimizers along.

        Weights that leave keep the values they have; gradients are dropped.

        Raises:
            RuntimeError: A module has lost one of its weights, or memory runs out; nothing is changed.
        """
        self.sync_()
        arrangement, own = arrange(self.modules, mask, layers, self._adopted), self._own_memory()
        self._uninstall(own)
        self._install(arrangement)
        self.bump_versions()
        self.remember_()

    def weight_gradients(self) -> dict[str, str]:
        """How the gradient of each masked weight of a linear layer or convolution is computed.

        Returns:
            Name -> "dense" (the whole gradient, of which the active blocks are taken), "masked" (on a CPU: products of
            the active blocks' channels), or on a GPU what was fastest: "triton", "slabs" or "dense", for each size of
            input that it has had; "not yet chosen" before the first backward pass.
        """
        found = {}
        for entry in self._entries:
            layer = self.modules[entry.module]
            if not isinstance(layer, (MaskedLinear, MaskedConv2d)) or entry.own != "weight" or entry.adopted:
                continue
            if layer.wants_dense_gradient(entry.own):
                found[entry.name] = "dense"
            elif self.values.device.type != "cuda":
                found[entry.name] = "masked"
            else:
                ways = dict.fromkeys(choice.used for choice in chosen_ways(entry.mask))
                found[entry.name] = ", ".join(ways) or "not yet chosen"
        return found

    def measured_ways(self) -> dict[str, str]:
        """How a GPU computes the gradients of these weights, as far as it was measured: for a checkpoint of your own.

        Measured anew, a resumed run could choose otherwise and get other bits; ``use_measured_ways`` takes it back.

        Returns:
            Kind of problem, as a text -> name of the way. Empty on a CPU, where nothing is measured.
        """
        return choices_to_save(entry.mask for entry in self._entries)

    def use_measured_ways(self, ways: Mapping[str, str]) -> None:
        """Compute gradients as the run did that ``measured_ways`` was asked in.

        Raises:
            ValueError: It is not what ``measured_ways`` gives; nothing is changed.
        """
        restore_choices(ways)

    def summary(self) -> str:
        """What trains and what does not, one line each."""
        trained = {entry.name for entry in self._entries}
        ways = Counter(self.weight_gradients().values())
        gradients = ", ".join(f"{way} {count}" for way, count in ways.most_common())
        lines = [repr(self), f"weight gradients: {gradients or 'none of linear layers or convolutions'}"]
        lines.append(self.mask.summary())
        for name, reason in self.found.refused.items():
            lines.append(f"  {name:<40} {'trains dense' if name in trained else 'frozen'}: {reason}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        model = type(self.model).__name__
        return f"ActiveParameters({self.numel:,} weights of {model} in {len(self._entries)} parameters)"

    def __getstate__(self) -> dict[str, Any]:
        # Addresses in the model that this is a copy of would outlive it.
        fresh: dict[str, Any] = {"_table": None, "_seal": None, "_views": [], "_parts": {}, "_own": {}}
        return self.__dict__ | fresh | {"_agreed": None, "running": False, "followers": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.followers = weakref.WeakSet()  # they register themselves; no file can hold one
        step_hooks.watch(self)
