"""torch.set_default_device says where a user's tensors are made. Ours, such as the blocks of a mask, are on the CPU.

The meta device stands in for a GPU: what is made there by accident holds nothing, and no step with it works. Each run
must come out as without it.
"""

from __future__ import annotations

import ast
import contextlib

import pytest
import torch
from baselines import baseline
from models import Zoo, zoo_batch
from test_distiller import SCHEDULE, config, unet
from test_imports import PACKAGE
from torch.utils._device import _device_constructors

from pecker_fast import BlockMask, Delta, MaskedAdamW, MaskedDistiller, NoiseSchedule, apply_mask, change_mask
from pecker_fast.ops.tiles import best_tiles
from pecker_fast.saliency import compute_saliency
from pecker_fast.scoring import score_blocks

FACTORIES = {function.__name__ for function in _device_constructors()}
BLOCKS = ["row", (8, 8), (5, 7), "element", "auto"]


@contextlib.contextmanager
def elsewhere():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def assert_same_elsewhere(run, *arguments):
    """``run`` gives tensors by name."""
    expected = run(*arguments)
    with elsewhere():
        found = run(*arguments)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def without_device(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES:
            named = any(keyword.arg in ("device", None) for keyword in node.keywords)
            if ast.unparse(node.func.value) == "torch" and not named:
                yield f"{path.name}:{node.lineno}"


def test_every_tensor_of_the_package_is_made_on_a_device_that_is_named():
    found = [place for path in PACKAGE.rglob("*.py") for place in without_device(path)]
    assert not found, 'say device="cpu", or where else'


def zoo():
    """The user's own model and data, which they make where they want to."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        return Zoo(), zoo_batch()


def loss_of(net, batch):
    return net(*batch).square().mean()


OPTIMIZERS = {
    "MaskedAdamW": lambda active: MaskedAdamW(active, ema_decay=0.9, saliency="abs"),
    "reference": lambda active: MaskedAdamW(active, backend="reference"),
    "SGD": lambda active: torch.optim.SGD(active.parameters(), lr=0.1, momentum=0.9),
}


def masked_run(block, optimizer_of, folder):
    """A mask is made, saved and loaded, a model trains, its mask changes, and a delta is taken of it."""
    net, batch = zoo()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    BlockMask.random(net, 0.4, block, seed=1).save(folder / "mask.safetensors")
    active = apply_mask(net, BlockMask.load(folder / "mask.safetensors"))
    optimizer = optimizer_of(active)
    masks = active.mask, BlockMask.random(net, 0.3, block, seed=2)
    for mask in masks:
        if mask is not active.mask:
            change_mask(active, mask, optimizer)
        loss_of(net, batch).backward()
        optimizer.step()
    active.check()
    assert "weights" in active.summary() and (masks[0] | ~masks[1]).numel
    found = {f"gradient {name}": active.to_dense(active.grads, name) for name in active.names}
    found |= {f"mask {name}": active.mask.to_dense(name) for name in active.names}
    active.remove().eval()
    statistics = {name: buffer.clone() for name, buffer in net.named_buffers()}
    delta = Delta.extract(before | statistics, net.state_dict(), masks[0] | masks[1], progress=False)
    delta.save(folder / "delta", overwrite=True)
    weights = {**before, **statistics}
    Delta.load(folder / "delta").apply(weights, progress=False)
    return found | weights


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("optimizer_of", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_masks_and_steps(block, optimizer_of, tmp_path):
    assert_same_elsewhere(masked_run, block, optimizer_of, tmp_path)


def salient(block):
    net, batch = zoo()
    saliency = compute_saliency(net, loss_of, [batch])
    with score_blocks(net, block) as scores:
        loss_of(net, batch).backward()
    masks = {
        "saliency": BlockMask.from_saliency(saliency, 0.2, block),
        "layer": BlockMask.from_saliency(saliency, 0.2, block, scope="layer"),
        "scores": BlockMask.from_block_scores(scores, 0.2),
        "dense": BlockMask.dense(net),
    }
    found = {f"{kind} {name}": p.active for kind, mask in masks.items() for name, p in mask.parameters.items()}
    return found | dict(saliency)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_saliency_and_selection(block):
    assert_same_elsewhere(salient, block)


def tables(block):
    net, _ = zoo()
    found = {}
    for name, parameter in BlockMask.random(net, 0.4, block, seed=1).parameters.items():
        if len(parameter.grid.shape) in (2, 4) and parameter.grid.view[0] == parameter.grid.shape[0]:
            tiles = best_tiles(parameter, parameter.grid.is_rows, False, [(64, 16), (128, 64)], 1)
            found |= {f"table {name}": tiles.table, f"rows {name}": tiles.block_rows}
    return found


@pytest.mark.parametrize("block", ["row", (8, 8), (5, 7)], ids=str)
def test_tables_of_a_gpu_kernel(block):
    assert_same_elsewhere(tables, block)


def distilled(folder, mask):
    with torch.device("cpu"):
        teacher = unet()
    schedule, settings = NoiseSchedule.linear(), config(mask=mask)
    distiller = MaskedDistiller(teacher, schedule, settings)
    distiller.step()
    path = distiller.save_checkpoint(folder)
    resumed = MaskedDistiller(teacher, SCHEDULE, settings)
    resumed.load_checkpoint(path)
    resumed.step()
    return dict(resumed.generator.state_dict()) | {"flat": resumed.active.values}


@pytest.mark.parametrize("mask", [{"kind": "saliency"}, {"block": (4, 4)}])
def test_a_distillation_its_checkpoint_and_the_next_step(mask, tmp_path):
    assert_same_elsewhere(distilled, tmp_path, mask)


def erased(method):
    with torch.device("cpu"):
        made = baseline(method, mask={"kind": "saliency"})
    made.step()
    return dict(made.network.state_dict())


@pytest.mark.parametrize("method", ["random_label", "esd", "selective_amnesia"])
def test_a_baseline(method):
    assert_same_elsewhere(erased, method)
