"""The peak of a step's tensors on a CPU, against sums by hand, and how often it looks for those that are gone."""

import random

import pytest
import torch

from pecker_fast import memory_meter

UNIT = 2**12
"""float32 values, a 64th of a MiB."""


def peak(step, held):
    return memory_meter.peak_mib(step, held, torch.device("cpu")) * 64


def test_any_order_of_making_and_dropping():
    draw, held, made = random.Random(0), torch.zeros(4, UNIT), []
    sums = [4]

    def step():
        for _ in range(60):
            if made and draw.random() < 0.5:
                del made[draw.randrange(len(made))]
            else:
                made.append(torch.zeros(draw.randint(1, 5), UNIT))
                held.add_(1)  # what is held is seen again, and counts once
                made[-1].view(-1).mul_(2)
            sums.append(4 + sum(map(len, made)))

    assert peak(step, [held, held[1:]]) == max(sums) > 20


def test_gradients_from_before_are_dropped_in_the_step():
    weight = torch.zeros(UNIT, requires_grad=True)
    weight.grad = torch.ones(UNIT)

    def step():
        weight.grad = None
        weight.grad = torch.ones(UNIT)

    found = peak(step, iter([weight, weight.grad]))  # pytest keeps what an assertion mentions
    assert found == 2


def test_what_grows_in_place_is_measured_anew():
    held, other = torch.zeros(UNIT), []

    def step():
        held.resize_(3, UNIT)
        other.append(torch.zeros(2, UNIT))
        other[0].resize_(4, UNIT)

    assert peak(step, [held]) == 7


@pytest.mark.parametrize("count", [1, 300])
def test_what_is_held_is_rarely_looked_through(count, monkeypatch):
    looks = []
    expired = memory_meter.StorageWeakRef.expired
    monkeypatch.setattr(memory_meter.StorageWeakRef, "expired", lambda self: looks.append(self) or expired(self))
    held = [torch.zeros(8) for _ in range(count)]
    peak(lambda: [tensor.add_(tensor + 1) for tensor in held], held)
    assert len(looks) < 4 * count + 10
