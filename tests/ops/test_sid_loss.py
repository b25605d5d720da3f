"""sid_loss: the closed form equals the published one, and its gradients those of autograd."""

import pytest
import torch

from pecker_fast import NoiseSchedule
from pecker_fast.objectives import denoising_loss
from pecker_fast.ops import sid_loss


def inputs(dtype=torch.float64, batch=5):
    return [torch.randn(batch, 2, 3, 4, dtype=dtype) for _ in range(3)]


def published(x0, epsilon, t, epsilon_true, epsilon_fake, schedule, alpha):
    """The generator loss as the reference implementation writes it, in denoised samples."""
    x_t = schedule.add_noise(x0, epsilon, t)
    x0_true = schedule.predict_x0(x_t, epsilon_true, t)
    x0_fake = schedule.predict_x0(x_t, epsilon_fake, t)
    omega = (x0_true - x0).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5).detach()
    return ((x0_true - x0_fake) * ((x0_true - x0) - alpha * (x0_true - x0_fake)) / omega).sum((1, 2, 3))


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_equals_the_published_loss_and_its_gradient_through_networks(alpha):
    schedule = NoiseSchedule.linear()
    x0, epsilon, _ = inputs()
    t = torch.tensor([38, 100, 440, 600, 711])
    true, fake = (torch.randn(2, 2, dtype=torch.float64) for _ in range(2))

    def through(loss_of):
        x = x0.clone().requires_grad_()
        x_t = schedule.add_noise(x, epsilon, t)
        predictions = [torch.tanh(torch.einsum("oc,bchw->bohw", w, x_t)) for w in (true, fake)]
        loss = loss_of(x, *predictions)
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

    sigma = schedule.sigma(t, x0).flatten()
    loss, grad = through(lambda x, p, s: sid_loss(epsilon, p, s, sigma, alpha))
    expected, expected_grad = through(lambda x, p, s: published(x, epsilon, t, p, s, schedule, alpha))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-9)


def test_gradients_by_finite_differences():
    epsilon, true, fake = inputs()
    sigma = torch.rand(5, dtype=torch.float64) + 0.1
    # omega is a constant of the loss: hold it fixed while the prediction moves.
    omega = sigma * (epsilon - true).abs().flatten(1).mean(1)

    def fixed_omega(true, fake):
        d, r = fake - true, epsilon - true
        return ((sigma**2 / omega).view(-1, 1, 1, 1) * d * (r - 1.2 * d)).sum()

    true.requires_grad_()
    fake.requires_grad_()
    sid_loss(epsilon, true, fake, sigma).sum().backward()
    step = 1e-6
    for tensor in (true, fake):
        for index in [(0, 0, 0, 0), (4, 1, 2, 3), (2, 1, 0, 1)]:
            shift = torch.zeros_like(tensor)
            shift[index] = step
            plus = (true + shift, fake) if tensor is true else (true, fake + shift)
            minus = (true - shift, fake) if tensor is true else (true, fake - shift)
            slope = float(fixed_omega(*plus) - fixed_omega(*minus)) / (2 * step)
            assert abs(slope - float(tensor.grad[index])) < 1e-5 * max(1, abs(slope))


def test_float32_is_close_to_float64():
    arguments = inputs()
    sigma = torch.rand(5, dtype=torch.float64) + 0.1
    truth = sid_loss(*arguments, sigma)
    got = sid_loss(*(a.float() for a in arguments), sigma.float())
    torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-4)


def test_identical_predictions_give_zero_loss_and_no_nan():
    epsilon, true, _ = inputs()
    loss = sid_loss(true, true, true, torch.ones(5, dtype=torch.float64))
    assert torch.equal(loss, torch.zeros(5, dtype=torch.float64))


def test_shapes_are_checked():
    epsilon, true, fake = inputs()
    with pytest.raises(ValueError, match="one shape"):
        sid_loss(epsilon, true[:2], fake, torch.ones(5))
    with pytest.raises(ValueError, match="sigma"):
        sid_loss(epsilon, true, fake, torch.ones(4))
    with pytest.raises(ValueError, match="denoising_loss"):
        denoising_loss(epsilon, true[:2])


def test_denoising_loss_is_the_sum_of_squares_of_every_sample():
    epsilon, prediction, _ = inputs()
    expected = torch.stack([((e - p) ** 2).sum() for e, p in zip(epsilon, prediction, strict=True)])
    torch.testing.assert_close(denoising_loss(epsilon, prediction), expected)


def test_opcheck():
    arguments = (*inputs(torch.float32), torch.rand(5), 1.2, None)
    torch.library.opcheck(torch.ops.pecker_fast.sid_loss, arguments)
