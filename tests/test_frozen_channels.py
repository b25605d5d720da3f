"""Channels of frozen skips get no input gradient, and every gradient that anybody wants stays what it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import mask_of
from torch import nn

from pecker_fast import BlockMask, apply_mask
from pecker_fast.flops import count_flops
from pecker_fast.frozen_channels import channels_with_gradient
from pecker_fast.models import DDPMUNet


def graph(groups=4, own=6, skip=10, *, norm_trains=False, skip_trains=False, middle=F.silu, dim=1):
    """What a block of the way up does before its convolution: concatenate, normalise, activate."""
    h = torch.randn(2, own, 5, 5, requires_grad=True) * 1.0
    s = torch.randn(2, skip, 5, 5, requires_grad=skip_trains)
    norm = nn.GroupNorm(groups, own + skip).requires_grad_(norm_trains)
    return middle(norm(torch.cat([h, s], dim)))


@pytest.mark.parametrize("groups, expected", [(16, 6), (8, 6), (4, 8), (2, 8), (1, None)])
def test_whole_groups_are_wanted(groups, expected):
    assert channels_with_gradient(graph(groups)) == expected


def test_a_bare_concatenation_and_several_parts():
    h, s = torch.randn(1, 3, 2, 2, requires_grad=True), torch.randn(1, 4, 2, 2)
    assert channels_with_gradient(torch.cat([h, s], 1)) == 3
    assert channels_with_gradient(torch.cat([h * 2, h, s, s], 1)) == 6
    assert channels_with_gradient(torch.cat([s, h], 1)) is None
    assert channels_with_gradient(torch.cat([h, s, h], 1)) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"norm_trains": True},
        {"skip_trains": True},
        {"middle": lambda x: F.softmax(x, 1)},
        {"middle": lambda x: x.flip(1)},
        {"middle": lambda x: x * x},
    ],
    ids=["norm trains", "skip trains", "softmax", "flip", "product"],
)
def test_what_it_does_not_know_wants_everything(settings):
    assert channels_with_gradient(graph(**settings)) is None


def test_no_graph_wants_nothing_special():
    with torch.no_grad():
        assert channels_with_gradient(graph()) is None
    assert channels_with_gradient(torch.randn(1, 3, 2, 2, requires_grad=True)) is None


def decoder_mask(model: nn.Module) -> BlockMask:
    names = [
        name for name, _ in model.named_parameters() if name.startswith(("up.", "conv_out")) and "norm" not in name
    ]
    return mask_of(model, tuple(names), 0.3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_unet_with_a_frozen_way_down_has_the_dense_gradients_for_fewer_flops(layout):
    torch.manual_seed(0)
    model = DDPMUNet(width=12, channel_mult=(1, 2), image_size=8, channels=1, dropout=0.0, norm_groups=8)
    model = model.to(memory_format=layout)
    dense = copy.deepcopy(model)
    mask = decoder_mask(model)
    active = apply_mask(model, mask)
    batch = torch.randn(2, 1, 8, 8).to(memory_format=layout), torch.tensor([3, 500]), torch.tensor([0, 1])
    dense(*batch).square().mean().backward()
    with count_flops() as fewer:
        model(*batch).square().mean().backward()
    active.bind_()
    for name in active.names:
        expected = dense.get_parameter(name).grad * mask.to_dense(name)
        torch.testing.assert_close(active.to_dense(active.grads, name), expected, rtol=1e-4, atol=1e-6)

    everything = copy.deepcopy(model)
    for level in everything.up:
        for block in level.block:
            block.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 1, *inputs[1:]))  # hides the concatenation
    with count_flops() as all_channels:
        everything(*batch).square().mean().backward()
    assert fewer.total < 0.95 * all_channels.total
