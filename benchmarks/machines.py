"""What a benchmark needs of the machine it runs on: cold caches, clocks, graphs, and counters of launches and power.

One class a kind of machine. With PECKER_FAST_REHEARSE=1 the GPU benchmarks run at tiny sizes on a CPU, with Triton's
interpreter: whatever a CPU cannot measure is then a text that says so, never a number.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import power
import torch

REHEARSAL = os.environ.get("PECKER_FAST_REHEARSE") == "1"
if REHEARSAL:
    os.environ["TRITON_INTERPRET"] = "1"  # read when pecker_fast is imported

Contestant = Callable[[], object]
T = TypeVar("T")

NOT_MEASURED = "not measured: this is a rehearsal"
SCRATCH = 64 << 20
"""Floats that are read, or on a GPU written, to put other lines into the caches: 256 MB."""


def sized(real: T, rehearsal: T) -> T:
    """A size of a benchmark, or the one that a CPU rehearses with."""
    return rehearsal if REHEARSAL else real


class Burst:
    """The same operation on several sets of operands, as one contestant: ``seconds`` are of one call.

    Attributes:
        calls: How many calls one run makes.
        captured: Whether they are one CUDA graph, so that no call waits for the host.
    """

    def __init__(self, run: Contestant, calls: int, captured: bool) -> None:
        self.run, self.calls, self.captured = run, calls, captured

    def __call__(self) -> None:
        self.run()


class Cpu:
    """A CPU: everything is done when a call returns."""

    device = torch.device("cpu")
    native = "cpu"
    """Backend of the ops in the native module."""

    @property
    def name(self) -> str:
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"

    def rounds(self, asked: int) -> int:
        return asked

    @functools.cached_property
    def _scratch(self) -> torch.Tensor:
        return torch.ones(SCRATCH, device=self.device)

    def settle(self) -> None:
        """The same start for every contestant: no work under way, no lines of the one before left in the caches."""
        self._scratch.sum()

    def warm(self, contestant: Contestant) -> float:
        """Run it until nothing is left to compile or choose. Seconds of the host, where a device works beside it."""
        contestant()
        return 0.0

    def seconds(self, contestant: Contestant, host_seconds: float = 0.0) -> float:
        """Of one call, with cold caches."""
        self.settle()
        return self.wall_seconds(contestant)

    def wall_seconds(self, contestant: Contestant, host_seconds: float = 0.0) -> float:
        """Of one call, host included, caches as they are."""
        started = time.perf_counter()
        contestant()
        return time.perf_counter() - started

    def host_seconds(self, contestant: Contestant, host_seconds: float = 0.0) -> float:
        """Until a call returns; on a GPU its work may still be under way."""
        return self.wall_seconds(contestant)

    def burst(self, calls: Sequence[Contestant]) -> Burst:
        """All calls, one after the other."""
        return Burst(lambda: [call() for call in calls], len(calls), captured=False)

    def captured(self, step: Contestant) -> Contestant | str:
        """A CUDA graph of ``step``, or why there is none."""
        return NOT_MEASURED

    def launches(self, step: Contestant) -> int | str:
        """How many kernels one call launches."""
        return NOT_MEASURED

    def footprint(self, build: Callable[[], Contestant]) -> tuple[Contestant, int | str]:
        """A step, and the most bytes that are allocated during one of its calls, beyond those before it was built."""
        return build(), NOT_MEASURED

    def joules(self, step: Contestant, seconds: float) -> float | str:
        """Energy of one call, from the power drawn during some seconds of them."""
        return NOT_MEASURED

    def compile_all(self, compilations: Sequence[Callable[[], object]]) -> None:
        """Compile Triton kernels, several at a time; each is a call of a kernel's ``warmup``."""


class Rehearsal(Cpu):
    """A CPU that plays a GPU: each contestant runs, hardly anything is timed."""

    @property
    def name(self) -> str:
        return f"rehearsal on a {super().name}"

    def rounds(self, asked: int) -> int:
        return 2

    def settle(self) -> None:
        pass


class Cuda(Cpu):
    """The current CUDA device.

    A contestant is timed by events on the device, which is kept waiting until the host has had time to queue all of a
    call: its work is timed, and what the host takes is measured on its own (``host_seconds``).
    """

    device = torch.device("cuda")
    native = "cuda"
    WAIT_AT_MOST = 0.03
    """Seconds that the device may be kept waiting."""
    CYCLES = 2e9
    """A second, no shorter at any clock there is."""

    def __init__(self) -> None:
        torch.backends.cudnn.benchmark = True  # the opponents at their best

    @property
    def name(self) -> str:
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"

    def settle(self) -> None:
        self._scratch.fill_(0.0)

    def warm(self, contestant: Contestant) -> float:
        for _ in range(3):
            contestant()
        torch.cuda.synchronize()
        return self.host_seconds(contestant)

    def seconds(self, contestant: Contestant, host_seconds: float = 0.0) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.settle()
        torch.cuda._sleep(int(self.CYCLES * min(1.5 * host_seconds + 5e-5, self.WAIT_AT_MOST)))
        begin.record()
        contestant()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end)

    def wall_seconds(self, contestant: Contestant, host_seconds: float = 0.0) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        contestant()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def host_seconds(self, contestant: Contestant, host_seconds: float = 0.0) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        contestant()
        host = time.perf_counter() - started
        torch.cuda.synchronize()
        return host

    def burst(self, calls: Sequence[Contestant]) -> Burst:
        for call in calls:  # compiles, and fills what is made once
            call()
        if waits_for_device(calls[0]):
            return super().burst(calls)
        return Burst(self._graph(lambda: [call() for call in calls]), len(calls), captured=True)

    def captured(self, step: Contestant) -> Contestant | str:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        if waits_for_device(step):
            return "not measured: the step waits for the device, which no CUDA graph can hold"
        return self._graph(step)

    def _graph(self, run: Contestant) -> Contestant:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def launches(self, step: Contestant) -> int | str:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            step()
            torch.cuda.synchronize()
        return sum(is_kernel(event) for event in profile.events())

    def footprint(self, build: Callable[[], Contestant]) -> tuple[Contestant, int | str]:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        step = build()
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return step, torch.cuda.max_memory_allocated() - before

    def joules(self, step: Contestant, seconds: float) -> float | str:
        def run(steps: int) -> float:
            return self.wall_seconds(lambda: queue(step, steps))

        return power.joules(run, seconds)

    def compile_all(self, compilations: Sequence[Callable[[], object]]) -> None:
        import triton

        # What does not compile is told to whoever runs it.
        with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for compilation in compilations:
                compilation()


def waits_for_device(call: Contestant) -> bool:
    """Whether a call makes the host wait for the device, so that no CUDA graph can hold it."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def queue(step: Contestant, steps: int) -> None:
    """Many steps, of which the host is never far ahead."""
    for number in range(1, steps + 1):
        step()
        if number % 8 == 0:
            torch.cuda.synchronize()


def is_kernel(event: Any) -> bool:
    """Whether an event of torch's profiler is a kernel: not a copy, nor a range that somebody named."""
    on_device = event.device_type == torch.autograd.DeviceType.CUDA
    return on_device and not event.is_user_annotation and not event.name.startswith(("Memcpy", "Memset", "Optimizer."))


@functools.cache
def here() -> Any:
    """The machine."""
    if REHEARSAL:
        return Rehearsal()
    return Cuda() if torch.cuda.is_available() else Cpu()
