"""The Triton kernels of sid_loss, interpreted where there is no GPU."""

import importlib

import pytest
import torch
from budget import assert_within_budget

from pecker_fast.ops import sid_loss
from pecker_fast.ops.sid_loss import sid_loss_reference

pytest.importorskip("triton")
kernels = importlib.import_module("pecker_fast.kernels.sid_loss")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FUSED, CHUNK = kernels.FUSED_ELEMENTS, kernels.CHUNK
SHAPES = [(5, 2, 3, 4), (1, 1), (3, 1000), (2, 3, 32, 32), (2, 4, 40, 40), (1, FUSED), (0, 8), (4, 0)]
LARGE = [(2, FUSED + 1), (1, 12 * CHUNK), (3, 3, 80, 80)]


def inputs(shape, dtype=torch.float64):
    tensors = [torch.randn(shape).to(DEVICE, dtype) for _ in range(3)]
    return *tensors, (torch.rand(shape[0]) + 0.1).to(DEVICE, dtype)


def results(arguments, backend, alpha=1.2):
    """The loss of every sample and its gradients in both predictions."""
    epsilon, true, fake, sigma = arguments
    true, fake = true.detach().requires_grad_(), fake.detach().requires_grad_()
    loss = sid_loss(epsilon, true, fake, sigma, alpha, backend=backend)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (true, fake))


@pytest.mark.parametrize("shape", SHAPES + LARGE)
@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_equals_the_reference_in_float64(shape, alpha):
    arguments = inputs(shape)
    for got, expected in zip(results(arguments, "triton", alpha), results(arguments, "reference", alpha), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES[:-2] + LARGE)
def test_float32_within_budget(shape):
    arguments = inputs(shape)
    single = [tensor.float() for tensor in arguments]
    truth = results([tensor.double() for tensor in single], "reference")
    for got, plain, exact in zip(results(single, "triton"), results(single, "reference"), truth, strict=True):
        assert got.dtype == torch.float32
        assert_within_budget(got, exact, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    half = [tensor.to(dtype) for tensor in inputs((3, 500))]
    exact = results([tensor.double() for tensor in half], "reference")
    for got, expected in zip(results(half, "triton"), exact, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    mixed = [half[0].float(), half[1], half[2], half[3].float()]
    for got, expected in zip(results(mixed, "triton"), exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 3, 74, 74)])
def test_any_layout(shape):
    arguments = inputs(shape)
    expected = results(arguments, "reference")
    gaps = torch.full((*shape[:-1], 2 * shape[-1]), torch.nan, dtype=torch.float64, device=DEVICE)
    for i in range(3):
        gaps[..., ::2] = arguments[i]
        batch_inside = arguments[i].permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        for laid_out in (arguments[i].to(memory_format=torch.channels_last), batch_inside, gaps[..., ::2]):
            got = results([laid_out if j == i else x for j, x in enumerate(arguments)], "triton")
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    last = [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in arguments]
    grads = results(last, "triton")[1:]
    assert all(grad.is_contiguous(memory_format=torch.channels_last) for grad in grads)


@pytest.mark.parametrize("numel", [100, FUSED + 5])
def test_omega_is_clamped_and_nan_stays_in_its_sample(numel):
    epsilon, true, fake, sigma = inputs((3, numel))
    epsilon[0] = true[0]  # mean |r| = 0: the denominator is the published 1e-5
    fake[1, 7] = torch.nan
    for backend in ("triton", "reference"):
        loss, grad_true, grad_fake = results((epsilon, true, fake, sigma), backend)
        assert loss.isfinite().tolist() == [True, False, True]
        assert not grad_true[1, 7].isfinite() and grad_true[[0, 2]].isfinite().all()
    expected = sid_loss_reference(epsilon, true, fake, sigma, 1.2)
    for got, want in zip(results((epsilon, true, fake, sigma), "triton"), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, equal_nan=True)
    epsilon[2, 3] = torch.nan  # now the mean itself
    assert results((epsilon, true, fake, sigma), "triton")[2][2].isnan().all()


def test_wrong_arguments():
    epsilon, true, fake, sigma = inputs((4, 6))
    for bad in (
        lambda: sid_loss(epsilon, true[:2], fake, sigma, backend="triton"),
        lambda: sid_loss(epsilon, true, fake, sigma[:2], backend="triton"),
        lambda: sid_loss(epsilon.long(), true, fake, sigma, backend="triton"),
        lambda: sid_loss(epsilon, true.to("meta"), fake, sigma, backend="triton"),
        lambda: sid_loss(epsilon[:, 0], true[:, 0], fake[:, 0], sigma, backend="triton"),
    ):
        with pytest.raises(ValueError, match="sid_loss"):
            bad()


@pytest.mark.parametrize("shape", [(4, 6), (1, FUSED + 1)])
def test_opcheck(shape):
    arguments = (*inputs(shape, torch.float32), 1.2, "triton")
    torch.library.opcheck(torch.ops.pecker_fast.sid_loss, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(128, 3, 32, 32), (4, 4, 64, 64), (2, 4, 128, 128)])
def test_on_a_gpu_it_is_preferred_repeatable_never_waits_and_can_be_captured(shape):
    arguments = inputs(shape, torch.float32)
    first = results(arguments, "triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [results(arguments, None) for _ in range(10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for run in again:
        assert all(torch.equal(a, b) for a, b in zip(run, first, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.pecker_fast.sid_loss(*arguments, 1.2, None)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))
