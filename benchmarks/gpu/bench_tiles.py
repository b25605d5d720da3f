"""Which tiles and configurations of the Triton weight gradient are fastest: what to ship in its table."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from machines import Contestant, sized
from measure import FACTS, Row, race, record
from torch import Tensor
from weight_grads import DTYPE, TOLERANCE, Layer, assert_near, conv, linear

from pecker_fast.ops import costs, tiled_weight_grad, triton_kernels
from pecker_fast.ops.problem import Problem

BLOCKS = sized([(64, 64), (128, 128)], [(16, 16)])
DENSITIES = sized((0.25, 0.1), (0.5,))
SIZE = DTYPE.itemsize
TILES = sized({3: [(64, 64), (128, 64)], 1: [(64, 64), (128, 64), (128, 128)]}, {3: [(64, 16)], 1: [(64, 16)]})
"""Side of the kernel -> tiles of (out, in) channels."""
CONFIGS = sized(
    {
        3: list(itertools.product((32, 64), (4, 8), (2, 3, 4))),
        1: [*itertools.product((32, 64), (4, 8), (3, 4, 5)), *itertools.product((128,), (4, 8), (2, 3))],
    },
    {3: [(16, 4, 2)], 1: [(16, 4, 2)]},
)
"""Positions at a time, warps, depth of the pipeline."""
PROGRAMS = sized((1, 2, 4), (2,))
"""Programs that a multiprocessor is taken to run at once: they decide how many share the positions of a tile."""
SHARED_BYTES = 227 << 10
LAYERS = sized(
    [conv(512, 4, 64), linear(1280, 16384), conv(1280, 4, 16), linear(1280, 4096)],
    [conv(20, 1, 4, out=24), linear(40, 24)],
)


@dataclass(frozen=True)
class Variant:
    """The kernel as it might be shipped; called as a way to compute a problem."""

    tile: tuple[int, int]
    config: tuple[int, int, int]
    programs: int

    def __str__(self) -> str:
        block_k, warps, stages = self.config
        return f"{self.tile[0]}x{self.tile[1]}x{block_k}, {warps} warps, {stages} stages, {self.programs} a processor"

    def fits(self, kernel: int) -> bool:
        """Whether its pipeline fits into shared memory."""
        (block_m, block_n), (block_k, _, stages) = self.tile, self.config
        return (block_m + kernel * block_n) * block_k * SIZE * stages <= SHARED_BYTES

    def __call__(self, problem: Problem) -> Tensor:
        kernels: Any = triton_kernels.load("masked_weight_grad")
        key = (problem.kernel[0], SIZE, *self.tile)
        configs = {key: kernels.Config(*self.config)}
        with patched(kernels, "CONFIGS", configs), patched(tiled_weight_grad, "PROGRAMS_A_PROCESSOR", self.programs):
            return tiled_weight_grad.tiled_weight_grad(problem)


@contextmanager
def patched(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class Recorder:
    """Stands in for a kernel: launches nothing, keeps what it would have compiled."""

    def __init__(self, kernel: Any, compilations: list[Callable[[], object]]) -> None:
        self.kernel, self.compilations = kernel, compilations

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.compilations.append(functools.partial(self.kernel.warmup, *args, grid=grid, **options))

        return launch


def compile_ahead(machine: Any, calls: list[Contestant]) -> None:
    """Compile what the calls will launch, many kernels at a time."""
    kernels: Any = triton_kernels.load("masked_weight_grad")
    compilations: list[Callable[[], object]] = []
    first, second = (Recorder(k, compilations) for k in (kernels.weight_grad_kernel, kernels.reduce_kernel))
    with patched(kernels, "weight_grad_kernel", first), patched(kernels, "reduce_kernel", second):
        for call in calls:
            call()
    assert compilations
    machine.compile_all(compilations)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def bench_tiles(benchmark, machine, limits, layer: Layer):
    if reason := triton_kernels.why_not():
        pytest.skip(reason)
    kernel = 1 if layer.is_linear else layer.shape[2]
    sets = layer.sets()
    truth = layer.truth(sets[0])
    for block in BLOCKS if layer.is_linear else BLOCKS[:1]:
        variants = [
            variant
            for tile, config, programs in itertools.product(TILES[kernel], CONFIGS[kernel], PROGRAMS)
            if tile[1] <= block[1] and (variant := Variant(tile, config, programs)).fits(kernel)
        ]
        for density, mask in layer.masks(block, DENSITIES).items():
            problems = [layer.problem(operands, mask) for operands in sets]
            compile_ahead(machine, [functools.partial(variant, problems[0]) for variant in variants])
            expected = mask.gather(truth, problems[0].channels_last)
            seconds = sweep(machine, variants, problems, expected)
            add_row(layer, block, density, problems[0], seconds, limits)
    benchmark.pedantic(functools.partial(variants[0], problems[0]), rounds=1)


def sweep(machine: Any, variants: list[Variant], problems: list[Problem], expected: Tensor) -> dict[object, Any]:
    """Seconds of every variant that runs, and of what is shipped."""
    shipped = [functools.partial(tiled_weight_grad.tiled_weight_grad, problem) for problem in problems]
    contestants = {"shipped": machine.burst(shipped)}
    for variant in variants:
        try:
            got = variant(problems[0])
        except Exception as error:  # of triton: registers or shared memory that the card does not have
            if type(error).__name__ not in ("OutOfResources", "PTXASError"):
                raise
            record(f"{variant}: {error}")
            continue
        assert_near(got, expected.view(got.shape), TOLERANCE["ours"])
        contestants[variant] = machine.burst([functools.partial(variant, problem) for problem in problems])
    return race(contestants)


def add_row(layer: Layer, block: tuple[int, int], density: float, problem: Problem, seconds: Any, limits: Any) -> None:
    """The best against what is shipped; all of them in the result file."""
    name, cost = f"{layer}, {block[0]}x{block[1]}", costs.masked_weight_grad(problem)
    ranked = sorted((v for v in seconds if v != "shipped"), key=lambda variant: seconds[variant])
    FACTS.setdefault("sweep", []).extend(
        {"what": name, "density": density, "variant": str(v), "us": 1e6 * seconds[v], "spread": seconds[v].spread}
        for v in [*ranked, "shipped"]
    )
    best = ranked[0]
    times = 1e3 * seconds[best], 1e3 * seconds["shipped"]
    spreads = {"ours_spread": seconds[best].spread, "theirs_spread": seconds["shipped"].spread}
    work, share = f"{cost.flops / 1e9:.2f} GFLOP", limits.share(cost, seconds[best])
    record(Row(f"{name}: {best}", "shipped tiles", density, *times, work, share, **spreads))
