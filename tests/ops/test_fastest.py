"""The choice between ways to compute the same: the lowest median wins, and nothing is measured where it may not be."""

from __future__ import annotations

import contextlib

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


# -- on a GPU, played by counters ------------------------------------------------------------------


class Gpu:
    """A device whose host is ready after ``host`` flushes of its cache."""

    def __init__(self, monkeypatch, host=1, memory=fastest.FLUSHED_BYTES):
        self.log, self.flushed, self.host, self.memory = [], 0, host, memory
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event(self))
        monkeypatch.setattr(torch.cuda, "device", self.guard)
        monkeypatch.setattr(fastest.torch, "empty", self.empty)

    @contextlib.contextmanager
    def guard(self, device):
        self.log.append(str(device))
        yield
        self.log.append("left")

    def empty(self, size, **_):
        if size > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Scratch(self, size)


class Scratch:
    def __init__(self, gpu, size):
        self.gpu, self.size = gpu, size

    def zero_(self):
        self.gpu.log.append("flush")
        self.gpu.flushed += self.size / fastest.FLUSHED_BYTES


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.queued, self.gpu.flushed = self.gpu.flushed, 0

    def query(self):
        return self.queued < self.gpu.host  # the GPU came to it before the host was ready

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1.0


@pytest.mark.parametrize("number", [0, 1, 7])
def test_a_way_is_timed_on_its_own_gpu(monkeypatch, number):
    gpu = Gpu(monkeypatch)
    fastest.fastest({"a": lambda: gpu.log.append("way")}, torch.device("cuda", number))
    runs = ",".join(gpu.log).split("left")[:-1]
    assert len(runs) == 1 + fastest.ROUNDS
    assert all(run.strip(",") == ",".join([f"cuda:{number}", *["flush"] * 4, "way"]) for run in runs)


@pytest.mark.parametrize("host, calls", [(1, 1), (4, 1), (5, 2), (30, 4), (1e9, 5)])
def test_the_gpu_is_kept_busy_until_the_host_is_ready(monkeypatch, host, calls):
    gpu = Gpu(monkeypatch, host)
    fastest.fastest({"a": lambda: gpu.log.append("way")}, torch.device("cuda", 0))
    assert gpu.log.count("way") == calls * (1 + fastest.ROUNDS)  # and one that waits for the GPU itself ends too


@pytest.mark.parametrize("memory, flushes", [(256 << 20, 4), (100 << 20, 16), (16 << 20, 64), (1 << 20, 0)])
def test_no_memory_left_to_flush_the_cache_stops_no_step(monkeypatch, memory, flushes):
    gpu = Gpu(monkeypatch, host=0, memory=memory)
    choice = fastest.fastest({"a": lambda: None, "b": lambda: None}, torch.device("cuda", 0))
    assert choice.used == "a" and gpu.log.count("flush") == flushes * 2 * (1 + fastest.ROUNDS)
