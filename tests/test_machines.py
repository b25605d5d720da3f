"""How the benchmarks time a GPU, with torch.cuda played by a clock that the test moves."""

from __future__ import annotations

import importlib
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch


@pytest.fixture
def machines(monkeypatch):
    monkeypatch.delenv("PECKER_FAST_REHEARSE", raising=False)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    for name in ("machines", "measure", "power"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("machines")
    for name in ("machines", "measure", "power"):
        sys.modules.pop(name, None)


class Device:
    """Seconds of work that were queued; waiting for the device is an error while it is said to be one."""

    def __init__(self, monkeypatch) -> None:
        self.clock, self.mode, self.slept = 0.0, "default", []
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = cuda.clock

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Graph:
            def replay(self):
                self.run()

        @contextmanager
        def graph(captured):
            begin = cuda.clock
            yield
            seconds, cuda.clock = cuda.clock - begin, begin  # captured, not run
            captured.run = lambda: cuda.work(seconds)

        replaced = {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": graph,
            "synchronize": lambda: None,
            "_sleep": self.slept.append,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
            "memory_allocated": lambda: 100,
            "max_memory_allocated": lambda: 140,
            "reset_peak_memory_stats": lambda: None,
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def work(self, seconds: float) -> None:
        self.clock += seconds

    def wait(self) -> None:
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


@pytest.fixture
def cuda(machines, device, monkeypatch):
    monkeypatch.setattr(machines.Cuda, "device", torch.device("cpu"))
    monkeypatch.setattr(machines, "SCRATCH", 4)
    benchmark = torch.backends.cudnn.benchmark
    yield machines.Cuda()
    torch.backends.cudnn.benchmark = benchmark


def test_the_device_waits_for_the_host_and_only_its_work_is_timed(cuda, device):
    assert torch.backends.cudnn.benchmark
    assert cuda.seconds(lambda: device.work(0.25), host_seconds=1e-3) == pytest.approx(0.25)
    assert cuda.seconds(lambda: device.work(0.5), host_seconds=10.0) == pytest.approx(0.5)
    assert device.slept[0] == pytest.approx(cuda.CYCLES * (1.5e-3 + 5e-5), rel=1e-6)
    assert device.slept[1] == cuda.CYCLES * cuda.WAIT_AT_MOST


def test_a_burst_is_a_graph_unless_a_call_waits_for_the_device(cuda, device):
    burst = cuda.burst([lambda: device.work(1.0), lambda: device.work(2.0)])
    assert burst.captured and burst.calls == 2
    assert cuda.seconds(burst) == pytest.approx(3.0)
    eager = cuda.burst([device.wait, lambda: device.work(2.0)])
    assert not eager.captured and eager.calls == 2
    assert cuda.seconds(eager) == pytest.approx(2.0)
    assert device.mode == "default"


def test_other_errors_of_a_call_are_not_taken_for_waiting(machines, device):
    def broken():
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        machines.waits_for_device(broken)
    assert device.mode == "default"


def test_a_race_reports_seconds_of_one_call_and_its_spread(cuda, device, machines, monkeypatch):
    measure = importlib.import_module("measure")
    monkeypatch.setattr(measure, "here", lambda: cuda)
    seconds = measure.race({"one": lambda: device.work(1.0), "two": cuda.burst([lambda: device.work(3.0)] * 4)})
    assert seconds["one"] == pytest.approx(1.0) and seconds["two"] == pytest.approx(3.0)
    assert seconds["one"].spread == pytest.approx(0.0)
    assert measure.Seconds.of([1.0, 2.0, 3.0, 4.0, 5.0]).spread == pytest.approx(2 / 3)


def test_energy_is_power_times_time(cuda, machines, monkeypatch):
    power, steps = machines.power, []
    monkeypatch.setattr(power, "SECONDS", 0.2)
    monkeypatch.setattr(power, "PAUSE", 0.001)
    monkeypatch.setattr(power, "reader", lambda: lambda: 100.0)
    monkeypatch.setattr(cuda, "wall_seconds", lambda run: run() or time.sleep(0.05) or 0.4)
    assert cuda.joules(lambda: steps.append(0), seconds=0.05) == pytest.approx(100.0 * 0.4 / 4)
    assert len(steps) == 4
    monkeypatch.setattr(power, "reader", lambda: "not measured: no NVML")
    assert cuda.joules(lambda: None, seconds=0.05) == "not measured: no NVML"


def test_memory_is_the_peak_of_a_step_above_what_was_there(cuda):
    step, most = cuda.footprint(lambda: lambda: None)
    assert callable(step) and most == 40


def test_without_nvml_and_nvidia_smi_nothing_is_read(machines, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", "")
    assert str(machines.power.reader()).startswith("not measured: no NVML")


def test_kernels_are_told_from_copies_and_named_ranges(machines):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3).add_(1)
    events = profile.events()
    assert events and not any(machines.is_kernel(event) for event in events)  # none is on a GPU
