"""A whole masked step on a GPU: it waits for nothing, fits a CUDA graph, and chooses how gradients are computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pecker_fast import BlockMask, MaskedAdamW, apply_mask

pytestmark = pytest.mark.gpu
BLOCKS = ["row", (64, 64), (40, 24), "element"]


def network() -> nn.Module:
    layers = nn.Conv2d(64, 128, 3, padding=1), nn.GroupNorm(8, 128), nn.SiLU(), nn.Conv2d(128, 128, 3, 2, 1)
    net = nn.Sequential(*layers, nn.Conv2d(128, 64, 1), nn.Flatten(), nn.Linear(64 * 64, 256))
    return net.to("cuda", torch.bfloat16, memory_format=torch.channels_last)


def masked(block, **settings):
    torch.manual_seed(0)
    net = network()
    active = apply_mask(net, BlockMask.random(net, 0.3, block))
    optimizer = MaskedAdamW(active, lr=1e-3, **settings)
    x = torch.randn(8, 64, 16, 16, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        net(x).float().square().mean().backward()
        optimizer.step()

    return active, step


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_step_waits_for_nothing(block):
    active, step = masked(block)
    for _ in range(3):  # tables are copied, ways are timed
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    active.check()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_captured_step_trains_like_an_eager_one(block):
    torch.use_deterministic_algorithms(True, warn_only=True)  # both take the usual ways
    try:
        eager, step = masked(block, capturable=True)
        for _ in range(8):
            step()
        captured, step = masked(block, capturable=True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for _ in range(5):
            graph.replay()
    finally:
        torch.use_deterministic_algorithms(False)
    captured.check()
    torch.testing.assert_close(captured.values, eager.values, rtol=1e-3, atol=1e-4)
    assert not torch.equal(captured.values, masked(block)[0].values)


def test_the_way_of_every_layer_is_chosen_by_time():
    active, step = masked((32, 32))
    assert set(active.weight_gradients().values()) == {"not yet chosen"}
    step()
    ways = active.weight_gradients()
    assert ways and set(ways.values()) <= {"triton", "slabs", "dense"}


@pytest.mark.parametrize("block", ["row", (64, 64)], ids=str)
def test_a_compiled_step_has_no_graph_break(block):
    net = network()
    active = apply_mask(net, BlockMask.random(net, 0.3, block))
    x = torch.randn(8, 64, 16, 16, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    grads = []
    for model in (net, torch.compile(net, fullgraph=True)):
        active.zero_grad()
        model(x).float().square().mean().backward()
        active.bind_()
        grads.append(active.grads.clone())
    assert (grads[0] - grads[1]).norm() / grads[0].norm() < 2e-2


def test_the_input_gradient_stays_channels_last():
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 128, 3, padding=1).to("cuda", memory_format=torch.channels_last)
    layer = nn.Sequential(nn.Conv2d(64, 128, 3, padding=1)).to("cuda", memory_format=torch.channels_last)
    layer[0].load_state_dict(plain.state_dict())
    apply_mask(layer, BlockMask.random(layer, 0.3, (32, 32)))
    x = torch.randn(4, 64, 16, 16, device="cuda").to(memory_format=torch.channels_last)
    grads = []
    for net in (plain, layer):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        net(leaf).square().sum().backward()
        grads.append(leaf.grad)
        assert leaf.grad.is_contiguous(memory_format=torch.channels_last)
    assert (grads[0] - grads[1]).norm() / grads[0].norm() < 2e-3  # TF32
