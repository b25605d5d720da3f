"""The choice between ways to compute the same: the lowest median wins, and nothing is measured where it may not be."""

from __future__ import annotations

import pytest
import torch

from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops import fastest, weight_grad_ways
from pecker_fast.ops.problem import problem

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Ways take as long as they say."""
    monkeypatch.setattr(fastest, "_cpu_ms", lambda way: way())


def test_the_lowest_median_wins(clock):
    times = {"steady": iter([9.0] + [2.0] * 5), "noisy": iter([0.0, 1.0, 1.0, 50.0, 60.0, 70.0])}
    choice = fastest.fastest({name: values.__next__ for name, values in times.items()}, CPU)
    assert choice.used == "steady" and choice.ms == {"steady": 2.0, "noisy": 50.0} and choice.why == "measured"


def test_the_first_call_of_a_way_does_not_count(clock):
    slow_start = iter([1e6] + [1.0] * 5)
    assert fastest.fastest({"a": slow_start.__next__, "b": lambda: 2.0}, CPU).used == "a"


def test_nothing_is_measured_where_results_must_repeat():
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in fastest.why_not_measured()
        choice = weight_grad_ways.choose_way(given := small_problem())
        assert choice.used == "slabs" and not choice.ms
        assert weight_grad_ways.chosen_ways(given.mask) == [choice]
    finally:
        torch.use_deterministic_algorithms(False)
    assert fastest.why_not_measured() is None


def small_problem():
    mask = ParameterMask(BlockGrid.of((32, 32), (16, 16)), torch.tensor([1, 2]))
    return problem(torch.randn(5, 32), torch.randn(5, 32), mask, (1, 1), (0, 0), (1, 1), 1, False)


def test_a_choice_is_made_once_for_a_mask_and_a_size(monkeypatch):
    given, calls = small_problem(), []
    monkeypatch.setattr(weight_grad_ways, "_measured", {})
    measure = weight_grad_ways.measure_ways
    monkeypatch.setattr(weight_grad_ways, "measure_ways", lambda p: calls.append(p) or measure(p))
    assert weight_grad_ways.chosen_ways(given.mask) == []
    first = weight_grad_ways.choose_way(given)
    assert weight_grad_ways.choose_way(given) is first and len(calls) == 1
    assert set(first.ms) == {"slabs", "dense"}  # the kernel is for GPUs
    larger = problem(torch.randn(9, 32), torch.randn(9, 32), given.mask, (1, 1), (0, 0), (1, 1), 1, False)
    weight_grad_ways.choose_way(larger)
    assert len(calls) == 2 and len(weight_grad_ways.chosen_ways(given.mask)) == 2
    other = small_problem()  # another mask of as many blocks: nothing to measure
    assert weight_grad_ways.choose_way(other) is first and len(calls) == 2


def test_all_ways_give_the_same():
    given = small_problem()
    results = [weight_grad_ways.WAYS[name](given) for name in weight_grad_ways.possible_ways(given)]
    for result in results:
        torch.testing.assert_close(result, results[0])


def test_a_way_that_fails_is_left_out_and_told(clock):
    def broken():
        raise MemoryError("not enough")

    with pytest.warns(UserWarning, match="'broken' fails and is left out, fine remain: MemoryError: not enough"):
        assert fastest.fastest({"broken": broken, "fine": lambda: 1.0}, CPU).used == "fine"
    with pytest.raises(MemoryError):
        fastest.fastest({"broken": broken}, CPU)
