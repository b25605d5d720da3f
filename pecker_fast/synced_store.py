"""SyncedStore: dense weights that follow the active ones, and active ones that take over what is written elsewhere."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pecker_fast.arrangement import Arrangement, same_place
from pecker_fast.compiled_calls import sync_before_compiled_calls
from pecker_fast.flat_store import FlatStore
from pecker_fast.layers import MaskedLayer
from pecker_fast.layout import Entry
from pecker_fast.mask import BlockMask
from pecker_fast.maskable import STORE
from pecker_fast.reconcile import dense_checksums, reconcile_
from pecker_fast.scatter import ScatterTable


class SyncedStore(FlatStore):
    """A ``FlatStore`` that notices what others write, into its parameters or into the dense weights of the model.

    Libraries write through ``.data``, which leaves no trace but the values. So the store keeps a checksum of every
    dense weight, taken when it wrote the weight itself. A dense weight with another checksum was written by somebody
    else: its active weights take it over. The others follow theirs. On a GPU all of that is decided on the device.

    Attributes:
        running: Whether the model's own forward is running, which has brought all weights together.
    """

    def __init__(self, model: nn.Module, mask: BlockMask, layers: Sequence[str], adopted: frozenset[str]) -> None:
        self.running = False
        super().__init__(model, mask, layers, adopted)
        self._hooks = (
            model.register_forward_pre_hook(_before_forward, prepend=True),
            model.register_forward_hook(_after_forward),
        )
        try:
            self.remember_()
        except BaseException:  # out of memory, say: the model is what it was
            self._leave({name: parameter.data for name, parameter in self.named_parameters()})
            raise

    def _install(self, arrangement: Arrangement) -> None:
        super()._install(arrangement)
        self._point_layers_here()
        self._sums = torch.zeros(len(self._entries), dtype=torch.int64, device=self.values.device)

    def _leave(self, own: dict[str, Tensor]) -> None:
        """Give the model back; see ``_uninstall``."""
        self._uninstall(own)
        del self.model.__dict__[STORE]
        for hook in self._hooks:
            hook.remove()

    def _point_layers_here(self) -> None:
        """Layers know their store, and the store which entries are a layer's: they lie side by side."""
        self._parts: dict[int, ScatterTable] = {}
        self._own: dict[int, slice] = {}
        for number, entry in enumerate(self._entries):
            key = id(self.modules[entry.module])
            self._own[key] = slice(self._own[key].start if key in self._own else number, number + 1)
        for layer in self._layers:
            if isinstance(layer, MaskedLayer):
                layer.store = weakref.ref(self)

    def _bind_values(self) -> None:
        super()._bind_values()
        self._point_layers_here()  # those of a copy know no store
        self._sums = self._sums.to(self.values.device)

    def _lay_out_anew(self, entries: tuple[Entry, ...]) -> None:
        """Checksums count positions: what was written is settled in the old order, and remembered in the new one."""
        self._settle(self._make_table(), follow=True)
        super()._lay_out_anew(entries)
        self._sums = dense_checksums(self._make_table(), self.values.dtype)

    # -- both ways ---------------------------------------------------------------------------------

    def sync_(self) -> None:
        """Bring dense and active weights together, as the model's forward and its state dict do when they begin.

        What was written into a dense weight since the last time goes into its active weights (of an element that was
        written in both, the dense one counts); all other dense weights are made those of their active ones, rounded.
        The host does not wait for the device.

        Raises:
            RuntimeError: The mask was removed, or a module has lost one of its weights.
        """
        if (table := self._table_in_reach()) is not None:
            self._bring_together(table, follow=True)

    def adopt_(self) -> None:
        """The first half of ``sync_``, as every step of an optimizer does when it begins.

        Raises:
            RuntimeError: As ``sync_``.
        """
        sync_before_compiled_calls(self.model)
        if (table := self._table_in_reach()) is not None:
            self._bring_together(table, follow=False)

    def _table_in_reach(self) -> ScatterTable | None:
        """The table, if modules hold parameters with data: ``functional_call`` lends them other tensors for a while."""
        if type(self.values) is not Tensor or self.values.is_meta:
            return None
        self._check_installed()
        table = self._table
        if table is None or self._seal is None or not self._seal.tensors_hold():
            held = (self._held(entry).get(entry.own) for entry in self._entries)
            if not all(tensor is None or isinstance(tensor, nn.Parameter) for tensor in held):
                return None
            with _trainable():
                table = self.scatter_table()
        return None if table.is_empty else table

    def _bring_together(self, table: ScatterTable, follow: bool) -> None:
        with _trainable():
            if self._settle(table, follow):
                self.bump_versions()
            if self._split:
                self._join()

    def _settle(self, table: ScatterTable, follow: bool) -> bool:
        """Whether dense weights are known to have changed; a GPU does not say."""
        before = dense_checksums(table, self.values.dtype)
        on_host = table.device.type == "cpu"
        if on_host and not follow and torch.equal(before, self._sums):
            return False
        self._sums = reconcile_(self.values, table, before != self._sums, follow=follow)
        return on_host and not torch.equal(before, self._sums)

    def sync_layer(self, layer: nn.Module) -> None:
        """``sync_`` for the weights of one layer, which is used without the model's own forward."""
        which = self._own.get(id(layer))  # none: a replica of DataParallel, or a layer that is frozen
        if which is None or (table := self._table_in_reach()) is None:
            return
        with _trainable():
            part = self._part(which, table)
            if part.is_empty:
                return
            base = self._entries[which.start].offset
            stretch = self.values[base : base + part.numel]
            before = dense_checksums(part, self.values.dtype, base)
            self._sums[which] = reconcile_(stretch, part, before != self._sums[which], base=base)

    def _part(self, which: slice, table: ScatterTable) -> ScatterTable:
        """The table of some entries alone."""
        if which.start not in self._parts:
            self._parts[which.start] = ScatterTable(table.targets[which], table.device)
        return self._parts[which.start]

    def _join(self) -> None:
        """Let weights that train as a whole be their own active parameters again, after a change of dtype and back."""
        joined = False
        for entry, parameter in self._split:
            if self._dense(entry).dtype == parameter.dtype:
                self._held(entry)[entry.own] = parameter
                joined = True
        if joined:
            self._table = self._seal = None

    # -- one way -----------------------------------------------------------------------------------

    @torch.no_grad()
    def scatter_(self) -> None:
        """Copy the active weights into the dense ones, as every step of any optimizer does."""
        self.scatter_table().scatter_(self.values)
        self.bump_versions()
        self.remember_()

    @torch.no_grad()
    def remember_(self) -> None:
        """Take the dense weights as they are for what the store itself has written."""
        table = self.scatter_table()
        if not table.is_empty:
            self._sums = dense_checksums(table, self.values.dtype)

    @torch.no_grad()
    def check(self) -> None:
        """Compare the dense weights with the active ones, exactly; ``sync_`` would make them agree.

        Raises:
            RuntimeError: One of the two was written since the last step or forward.
        """
        for entry, parameter in self._entries_parameters():
            dense = self._dense(entry)
            if dense is parameter or same_place(dense, parameter):
                continue
            active = entry.mask.gather(dense.data, entry.channels_last).reshape(parameter.shape)
            expected = parameter.data.to(dense.dtype)
            if not torch.equal(active.nan_to_num(0.0), expected.nan_to_num(0.0)):
                changed = int((active != expected).sum())
                raise RuntimeError(
                    f"{entry.name}: {changed} of {active.numel()} active weights were changed outside the optimizer; "
                    f"call active.sync_() to bring them together"
                )


def _trainable() -> AbstractContextManager[Any]:
    """What is made within the block can be trained and changed, also where somebody only infers."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def _before_forward(module: nn.Module, args: Any) -> None:
    # A compiled forward cannot look; compiled_calls.py has done it.
    if torch.compiler.is_compiling():
        return
    store = module.__dict__.get(STORE)
    if store is not None and store.model is module:
        store.sync_()
        store.running = True


def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    store = module.__dict__.get(STORE)
    if store is not None:
        store.running = False
