"""apply_mask and remove: what is refused, what is saved for backward, and the way back to a dense model."""

import copy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from models import Zoo, conv_net, loss_of, mask_of, masked_net
from torch import nn

from pecker_fast import ActiveParameters, BlockMask, MaskedAdamW, ParameterMask, apply_mask
from pecker_fast.layers import MaskedConv2d


def test_frozen_convolutions_do_not_keep_their_input():
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)))

    def saved_bytes():
        kept = {}
        weights = {p.data_ptr() for p in model.parameters()}

        def pack(tensor):
            if tensor.data_ptr() not in weights:
                kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(torch.randn(2, 4, 16, 16, requires_grad=True)).sum()
        del loss
        return sum(kept.values())

    dense = saved_bytes()
    apply_mask(model, mask_of(model, ("3.weight",)))
    one_input = 2 * 4 * 16 * 16 * 4
    assert dense == 4 * one_input and saved_bytes() == one_input
    assert type(model[0]) is MaskedConv2d


def test_a_frozen_prefix_in_channels_last_survives_the_group_norm_crash():
    """torch 2.13 ends in a segmentation fault here, so it runs in a process of its own."""
    code = """
        import torch
        from models import conv_net, mask_of
        from pecker_fast import apply_mask
        model = conv_net().to(memory_format=torch.channels_last)
        active = apply_mask(model, mask_of(model, ("1.weight", "1.bias"), share=1.0))
        x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
        model(x).square().mean().backward()
        active.bind_()
        print(bool(active.grads.abs().sum() > 0))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "True"


def test_a_mask_for_another_model_is_refused_and_nothing_changes():
    model = conv_net()
    for other in (Zoo(), nn.Sequential(nn.Conv2d(3, 8, 3))):
        with pytest.raises(ValueError, match="not made for this Sequential"):
            apply_mask(model, BlockMask.random(other, 0.5, "row"))
    empty = mask_of(model, ())
    with pytest.raises(ValueError, match="no active block"):
        apply_mask(model, empty)
    assert type(model[0]) is nn.Conv2d and all(p.requires_grad for p in model.parameters())


def test_masking_twice_is_refused():
    model, active = masked_net()
    with pytest.raises(ValueError, match="masked already"):
        apply_mask(model, active.mask)


def test_remove_gives_back_an_ordinary_model():
    model = conv_net()
    model[0].weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    seen = []
    model[3].register_forward_hook(lambda *_: seen.append(1))
    active = apply_mask(model, BlockMask.random(model, 0.5, "row"))
    loss_of(model)
    assert active.remove() is model
    assert [type(m) for m in model] == [type(m) for m in conv_net()]
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert len(seen) == 1
    with pytest.raises(ValueError, match="not masked"):
        ActiveParameters.of(model)


def test_ema_weights_come_and_go():
    model, active = masked_net()
    with pytest.raises(RuntimeError, match="no running average"), active.ema_weights():
        pass
    opt = MaskedAdamW(active, lr=0.1, ema_decay=0.5)
    expected = active.values.clone()
    for _ in range(3):
        opt.zero_grad()
        loss_of(model).backward()
        opt.step()
        expected += 0.5 * (active.values - expected)
    trained = copy.deepcopy(model.state_dict())
    with active.ema_weights():
        torch.testing.assert_close(active.values, expected)
        active.check()
        assert any(not torch.equal(trained[n], w) for n, w in model.state_dict().items())
    assert all(torch.equal(trained[n], w) for n, w in model.state_dict().items())
    active.remove(ema=True)
    assert any(not torch.equal(trained[n], w) for n, w in model.state_dict().items())


def test_partial_masks_are_plain_data():
    grid = BlockMask.random(conv_net(), 0.5, "row").parameters["0.weight"].grid
    mask = ParameterMask(grid, torch.tensor([1, 3]))
    assert copy.deepcopy(mask) is mask and mask == ParameterMask(grid, torch.tensor([1, 3]))
