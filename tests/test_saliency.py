"""compute_saliency: the definition, and a model that comes back untouched."""

import copy

import pytest
import torch
from models import Zoo, zoo_batch
from torch import nn

from pecker_fast import BlockMask, compute_saliency
from pecker_fast.errors import NonFiniteError

DEFINITION = {
    "signed_sum": lambda grads: sum(grads).abs(),
    "abs": lambda grads: sum(g.abs() for g in grads),
    "square": lambda grads: sum(g**2 for g in grads),
}


def loss_fn(model, batch):
    return model(*batch).square().mean()


@pytest.mark.parametrize("accumulate", DEFINITION)
def test_against_autograd(accumulate):
    model = Zoo().eval()
    batches = [zoo_batch() for _ in range(3)]
    grads = []
    for batch in batches:
        copied = copy.deepcopy(model)
        loss_fn(copied, batch).backward()
        grads.append({name: p.grad for name, p in copied.named_parameters()})
    saliency = compute_saliency(model, loss_fn, batches, accumulate)
    assert "upsample.weight" not in saliency and saliency.total == sum(p.numel() for p in model.parameters())
    for name, value in saliency.items():
        expected = DEFINITION[accumulate]([g[name] for g in grads])
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-8)
        assert (value >= 0).all() and value.dtype == torch.float32


def test_the_model_is_untouched():
    model = Zoo().train()
    model.batch_norm.eval()
    model.hidden.weight.requires_grad_(False)
    model.out.weight.grad = torch.ones_like(model.out.weight)
    state = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    saliency = compute_saliency(model, loss_fn, [zoo_batch()])
    assert saliency["hidden.weight"].abs().sum() > 0  # frozen weights have saliency too
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()] and modes == [m.training for m in model.modules()]
    assert torch.equal(model.out.weight.grad, torch.ones_like(model.out.weight)) and model.conv_in.weight.grad is None


def test_the_model_is_untouched_after_an_error():
    model = Zoo().train()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(NonFiniteError, match="loss of batch 1 is nan"):
        compute_saliency(model, lambda m, b: loss_fn(m, zoo_batch()) * b, [1.0, float("nan")])
    assert model.training and flags == [p.requires_grad for p in model.parameters()]


def test_bad_arguments():
    model = Zoo()
    with pytest.raises(ValueError, match="at least one batch"):
        compute_saliency(model, loss_fn, [])
    with pytest.raises(ValueError, match="must return a scalar"):
        compute_saliency(model, lambda m, b: m(*b), [zoo_batch()])
    with pytest.raises(ValueError, match="accumulate must be one of"):
        compute_saliency(model, loss_fn, [zoo_batch()], "cube")
    with pytest.raises(ValueError, match="no maskable weight"):
        compute_saliency(nn.ReLU(), loss_fn, [zoo_batch()])


def test_embeddings_are_cut_by_rows_even_into_tiles():
    model = Zoo()
    mask = BlockMask.from_saliency(compute_saliency(model, loss_fn, [zoo_batch()]), 0.3, (8, 8))
    assert mask.parameters["classes.weight"].grid.block == (1, 24)
    assert mask.parameters["hidden.weight"].grid.block == (8, 8)
    used = compute_saliency(model, loss_fn, [zoo_batch()])["classes.weight"].sum(1) > 0
    assert used.tolist() == [True, True, True, True, False, False, True]  # the classes of the batch
