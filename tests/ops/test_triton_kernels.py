"""Loading the Triton kernels: what is said where they cannot run."""

import importlib

import pytest
import torch

from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops import masked_weight_grad, tiled_weight_grad, triton_kernels
from pecker_fast.ops.problem import problem


def test_a_gpu_that_is_too_old_is_named():
    assert triton_kernels.too_old((8, 0)) is None and triton_kernels.too_old((9, 0)) is None
    assert "compute capability 7.5, the kernels need 8.0" in triton_kernels.too_old((7, 5))


def test_without_triton_the_cause_is_told(monkeypatch):
    def missing(name, *args, **kwargs):
        if name == "triton":
            raise ImportError("No module named 'triton'")
        return importlib.__import__(name, *args, **kwargs)

    monkeypatch.setattr(importlib, "import_module", missing)
    triton_kernels.why_not.cache_clear()
    try:
        assert "No module named 'triton'. pip install triton" in triton_kernels.why_not()
        mask = ParameterMask.full(BlockGrid.of((16, 16), "row"))
        with pytest.raises(RuntimeError, match="backend 'triton' cannot run on .*pip install triton"):
            masked_weight_grad(torch.randn(3, 16), torch.randn(3, 16), mask, backend="triton")
    finally:
        triton_kernels.why_not.cache_clear()


def test_tensors_of_more_elements_than_the_kernel_counts_are_refused():
    mask = ParameterMask(BlockGrid.of((64, 64), (16, 16)), torch.tensor([3]))
    positions = 2**31 // 64
    few, many = (torch.empty(n, 64, device="meta", dtype=torch.bfloat16) for n in (positions - 1, positions))
    for operands, refused in (((few, few), False), ((many, many), True)):
        given = problem(*operands, mask, (1, 1), (0, 0), (1, 1), 1, False)
        reason = tiled_weight_grad.why_not(given)
        assert (reason is not None) == refused
    assert "fewer than 2**31 elements" in reason
