"""Weights outside the mask keep every bit over 1,000 steps, whatever optimizer, decay, dtype and schedule of masks.

Each cell has its control, dense training whose gradients are masked: it keeps them only without decay and momentum.
"""

import copy
import functools
from itertools import cycle, zip_longest

import pytest
import torch
from budget import assert_within_budget
from models import Zoo, zoo_batch
from torch import nn

from pecker_fast import BlockMask, MaskedAdamW, apply_mask, change_mask

STEPS = 1000
LR, DECAY = 0.05, 0.2  # their product moves even a bfloat16 weight in one step


class TwoDtypes(nn.Module):
    """One layer of each dtype, so that a cell covers both, and optimizers and scatters serve them together."""

    def __init__(self):
        super().__init__()
        self.fp32 = nn.Linear(6, 8, bias=False)
        self.bf16 = nn.Linear(6, 8, bias=False, dtype=torch.bfloat16)

    def loss(self, x):
        return self.fp32(x).cos().mean() + self.bf16(x.bfloat16()).cos().mean().float()


def sgd(momentum):
    return lambda parameters, decay: torch.optim.SGD(parameters, LR, momentum, weight_decay=decay)


def lion(parameters, decay):
    return pytest.importorskip("lion_pytorch").Lion(parameters, lr=LR, weight_decay=decay)


def schedule_free(parameters, decay):
    optimizer = pytest.importorskip("schedulefree").SGDScheduleFree(parameters, lr=LR, weight_decay=decay)
    optimizer.train()
    return optimizer


class Averaged(torch.optim.AdamW):
    """AdamW; between steps an EMA library puts its average into the parameters, every tenth time."""

    def __init__(self, parameters, decay):
        super().__init__(parameters, lr=LR, weight_decay=decay)
        self.ema, self.averaged, self.times = None, [], 0

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        held = [p for group in self.param_groups for p in group["params"]]
        if self.ema is None or any(a is not b for a, b in zip_longest(held, self.averaged)):
            self.ema = pytest.importorskip("diffusers.training_utils").EMAModel(held, decay=0.9)
            self.averaged = held
        self.ema.step(held)
        self.times += 1
        if self.times % 10 == 0:
            self.ema.copy_to(held)


OPTIMIZERS = {
    "SGD": sgd(0.0),
    "SGD momentum": sgd(0.9),
    "Adam": lambda parameters, decay: torch.optim.Adam(parameters, lr=LR, weight_decay=decay),
    "AdamW": lambda parameters, decay: torch.optim.AdamW(parameters, lr=LR, weight_decay=decay),
    "Lion": lion,
    "schedule-free": schedule_free,
    "AdamW and an EMA": Averaged,
}
MASKED_OPTIMIZERS = {
    name: lambda active, decay, make=make: make(active.parameters(), decay) for name, make in OPTIMIZERS.items()
}
MASKED_OPTIMIZERS["MaskedAdamW"] = lambda active, decay: MaskedAdamW(active, LR, weight_decay=decay, ema_decay=0.99)

SCHEDULES = {
    "from the start": lambda model: [(BlockMask.random(model, 0.5, "row"), STEPS)],
    "late": lambda model: [(BlockMask.dense(model), 100), (BlockMask.random(model, 0.5, "element"), STEPS - 100)],
    "refreshed": lambda model: [
        (BlockMask.random(model, 0.4, block, seed), STEPS // 10)
        for seed, block in zip(range(10), cycle(["row", (3, 4), "element"]), strict=False)
    ],
}
"""What is trained for how many steps, one mask after the other."""


def bits_outside(model, mask):
    """The weights outside the mask, as integers."""
    integers = {"fp32.weight": torch.int32, "bf16.weight": torch.int16}
    return {
        name: model.get_parameter(name).detach().view(kind)[~mask.to_dense(name)] for name, kind in integers.items()
    }


def batches():
    return cycle(torch.randn(4, 8, 6).unbind())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("optimizer", MASKED_OPTIMIZERS)
def test_weights_outside_the_mask_keep_every_bit(optimizer, decay, schedule):
    model, batch, opt = TwoDtypes(), batches(), None
    for mask, steps in SCHEDULES[schedule](model):
        if opt is None:
            active = apply_mask(model, mask)
            opt = MASKED_OPTIMIZERS[optimizer](active, decay)
        else:
            change_mask(active, mask, opt)
        before, start = bits_outside(model, mask), active.values.clone()
        for _ in range(steps):
            opt.zero_grad()
            model.loss(next(batch)).backward()
            opt.step()
        after = bits_outside(model, mask)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert int((active.values != start).sum()) > active.numel // 4 and active.values.isfinite().all()
    active.remove()
    assert all(torch.equal(after[name], bits) for name, bits in bits_outside(model, mask).items())


def moved_by_masked_gradients(make, decay, stretches, model):
    """Names of the weights that a dense optimizer moves outside the mask although their gradients are zero."""
    batch, opt, moved = batches(), make(model.parameters(), decay), set()
    for mask, steps in stretches:
        before = bits_outside(model, mask)
        on = {name: mask.to_dense(name) for name in before}
        for step in range(steps):
            opt.zero_grad()
            model.loss(next(batch)).backward()
            for name, weight in model.named_parameters():
                weight.grad *= on[name]
            opt.step()
            if step % 50 and step < steps - 1:
                continue  # what has moved is seen somewhat later
            moved |= {name for name, bits in bits_outside(model, mask).items() if not torch.equal(bits, before[name])}
            if len(moved) == len(before):
                return moved
    return moved


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_control_masked_gradients_hold_only_without_decay_and_without_moments(optimizer, decay, schedule):
    model = TwoDtypes()
    has_old_moments = optimizer != "SGD" and schedule != "from the start"
    moved = moved_by_masked_gradients(OPTIMIZERS[optimizer], decay, SCHEDULES[schedule](model), model)
    assert moved == ({"fp32.weight", "bf16.weight"} if decay or has_old_moments else set())


# -- the same steps as dense training --------------------------------------------------------------


def train(model, optimizer, steps, mask=None):
    """All weights after steps on the same batches in every dtype; with a mask gradients are masked afterwards."""
    generator, classes = torch.Generator().manual_seed(1), zoo_batch()[1]
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    dtype = model.out.weight.dtype
    for _ in range(steps):
        images = torch.randn(6, 3, 9, 9, dtype=torch.float64, generator=generator).to(dtype)
        optimizer.zero_grad()
        model(images, classes).square().mean().backward()
        for name, weight in trained.items() if mask is not None else ():
            weight.grad *= mask.to_dense(name)
        optimizer.step()
    return torch.cat([weight.detach().flatten() for weight in model.state_dict().values()])


@functools.cache  # the float64 runs are the truth of the float32 ones
def after_masked_and_dense_steps(block, density, steps, decay, dtype):
    """All weights after ``MaskedAdamW``, and after AdamW on masked gradients (with density 1: on all gradients)."""
    torch.manual_seed(0)
    model = Zoo().double().eval().to(dtype)
    model.upsample.requires_grad_(False)  # it cannot be masked
    dense, mask = copy.deepcopy(model), BlockMask.random(model, density, block)
    settings = {"lr": 1e-3, "eps": 1e-6, "weight_decay": decay}
    expected = torch.optim.AdamW([weight for weight in dense.parameters() if weight.requires_grad], **settings)
    expected = train(dense, expected, steps, mask if density < 1 else None)
    return train(model, MaskedAdamW(apply_mask(model, mask), **settings), steps), expected


CASES = {
    "everything": ("row", 1.0, 200, 0.1),
    "rows": ("row", 0.4, 40, 0.0),
    "tiles": ((8, 8), 0.4, 40, 0.0),
    "elements": ("element", 0.4, 40, 0.0),
}
"""Block, density, steps, decay."""


@pytest.mark.parametrize("case", CASES)
def test_masked_steps_are_those_of_dense_training_in_float64(case):
    got, expected = after_masked_and_dense_steps(*CASES[case], torch.float64)
    tolerance = 1e-12 if case == "everything" else 1e-10
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_masked_steps_are_those_of_dense_training_in_float32_within_budget(case):
    got, plain = after_masked_and_dense_steps(*CASES[case], torch.float32)
    _, truth = after_masked_and_dense_steps(*CASES[case], torch.float64)
    assert_within_budget(got, truth, plain)
