"""FLOPs by network and by kind, told apart while they are done: a dispatch mode and hooks of autograd's nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pecker_fast.flops import formulas

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = KINDS = ("forward", "input_gradient", "weight_gradient")

aten = torch.ops.aten

_PRODUCTS = frozenset({aten.mm, aten.bmm, aten.addmm, aten.baddbmm})
_PASSING = frozenset(
    {
        *(f"{name}Backward0" for name in ("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Expand")),
        *(f"{name}Backward0" for name in ("Alias", "AsStrided", "Clone", "Squeeze", "Unsqueeze", "ToCopy")),
        "_LinkBackward",
        "_ScoreBackward",
    }
)
"""Nodes between a weight and the product that uses it: another view, dtype or place of the same numbers."""


@contextmanager
def count_by_network(networks: Mapping[str, nn.Module]) -> Iterator[FlopTable]:
    """As ``count_flops``, and every FLOP goes to a network and a kind.

    In the forward pass it is the network whose root module runs. In the backward pass it is the one whose forward pass
    made the autograd node that runs: when a root module returns, the graph behind its output gets hooks. Kinds:

    * ``convolution_backward`` is divided by its ``output_mask``, ``masked_weight_grad`` is a weight gradient;
    * a matrix product is the gradient of whatever the node hands on to: a weight gradient if that is a parameter, or a
      parameter transposed, cast or linked, else an input gradient (attention written as products, for example);
    * any other backward, that of fused attention above all, is an input gradient: it has no weights;
    * anything else in a backward pass is a forward pass done again, as checkpointing does.

    Args:
        networks: Root modules by name; they have hooks until the block ends.

    Yields:
        The table, which fills as the block runs.
    """
    table = FlopTable(networks)
    try:
        with table:
            yield table
    finally:
        table.let_go()


class FlopTable(TorchDispatchMode):
    """What ``count_by_network`` has counted.

    Attributes:
        counts: Network -> kind -> FLOPs.
        outside: FLOPs that belong to none of the networks.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.counts = {name: dict.fromkeys(KINDS, 0) for name in networks}
        self.outside = 0
        self._formulas = formulas()
        self._running: list[str] = []
        self._differentiated: str | None = None
        self._products: list[tuple[Any, int, Tensor]] = []
        self._claimed: set[Any] = set()
        self._hooks = []
        for name, network in networks.items():
            self._hooks.append(network.register_forward_pre_hook(partial(self._enter_forward, name)))
            leave = partial(self._leave_forward, name)
            self._hooks.append(network.register_forward_hook(leave, with_kwargs=True))

    @property
    def total(self) -> int:
        """Everything that was counted."""
        return self.outside + sum(sum(kinds.values()) for kinds in self.counts.values())

    def let_go(self) -> None:
        """Take the hooks back, and drop the nodes, whose hooks hold this."""
        for hook in self._hooks:
            hook.remove()
        self._claimed.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operator = func._overloadpacket
        if operator not in self._formulas and torch.is_inference_mode_enabled():
            with self:  # composite operators arrive whole there
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if operator not in self._formulas:
            return out
        if operator is aten.convolution_backward:
            self._count_convolution_backward(args, kwargs, out)
        else:
            self._count(operator, self._formulas[operator](*args, **kwargs, out_val=out), out)
        return out

    def _count(self, operator: Any, flops: int, out: Any) -> None:
        if self._differentiated is None:
            self._add(self._running[-1] if self._running else None, FORWARD, flops)
        elif operator in _PRODUCTS:
            self._products.append((operator, flops, out))
        elif operator is torch.ops.pecker_fast.masked_weight_grad:
            self._add(self._differentiated, WEIGHT_GRADIENT, flops)
        else:
            again = not operator.__name__.endswith("_backward")
            self._add(self._differentiated, FORWARD if again else INPUT_GRADIENT, flops)

    def _count_convolution_backward(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        formula, (*operands, wanted) = self._formulas[aten.convolution_backward], args
        for kind, mask in ((INPUT_GRADIENT, [wanted[0], False, False]), (WEIGHT_GRADIENT, [False, wanted[1], False])):
            self._add(self._differentiated, kind, formula(*operands, mask, **kwargs, out_val=out))

    def _add(self, network: str | None, kind: str, flops: int) -> None:
        if network is None:
            self.outside += flops
        else:
            self.counts[network][kind] += flops

    # -- hooks -------------------------------------------------------------------------------------

    def _enter_forward(self, network: str, *_: Any) -> None:
        self._running.append(network)

    def _leave_forward(self, network: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._running.pop()
        given = {tensor.grad_fn for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        nodes = [tensor.grad_fn for tensor in tree_leaves(output) if isinstance(tensor, Tensor)]
        while nodes:
            node: Any = nodes.pop()
            if node in given or node in self._claimed or not node.next_functions:
                continue  # made before, or a leaf, which computes nothing
            self._claimed.add(node)
            sources = [source for source, _ in node.next_functions]
            node.register_prehook(partial(self._enter_backward, network))
            node.register_hook(partial(self._leave_backward, network, [_is_parameter(source) for source in sources]))
            nodes += [source for source in sources if source is not None]

    def _enter_backward(self, network: str, *_: Any) -> None:
        self._differentiated = network

    def _leave_backward(self, network: str, leaves: list[bool], gradients: Sequence[Tensor | None], *_: Any) -> None:
        for operator, flops, product in self._products:
            handed_on = [i for i, gradient in enumerate(gradients) if _same_memory(product, gradient)]
            if handed_on:
                kind = WEIGHT_GRADIENT if leaves[handed_on[0]] else INPUT_GRADIENT
            else:
                kind = FORWARD if operator in (aten.addmm, aten.baddbmm) else INPUT_GRADIENT
            self._add(network, kind, flops)
        self._products.clear()
        self._differentiated = None


def _is_parameter(node: Any) -> bool:
    """Whether a gradient that is handed to ``node`` becomes that of a parameter, with no more computed from it."""
    while node is not None and node.name() in _PASSING:
        node = next((source for source, _ in node.next_functions if source is not None), None)
    return isinstance(getattr(node, "variable", None), nn.Parameter)


def _same_memory(product: Tensor, gradient: Tensor | None) -> bool:
    return gradient is not None and product.untyped_storage()._cdata == gradient.untyped_storage()._cdata
