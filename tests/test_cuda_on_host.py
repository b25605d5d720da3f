"""The CUDA kernels of masked_adamw, scatter and reconcile, compiled as C++ and run on the CPU: no GPU needed."""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from adamw import DTYPES, SETTINGS, Model, assert_same_bits, buffers, clone, gradients, run

from pecker_fast.reconcile import dense_checksums, reconcile_
from pecker_fast.scatter import native_table

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++") or shutil.which("clang++")
LAUNCH = re.compile(r"(\w+)<<<(.+?), (\w+), 0, (.+?)>>>\(", re.DOTALL)
ENTRY = """
extern "C" void step(const pecker::AdamwBuffers* b, const pecker::AdamwSettings* s,
                     const pecker::AdamwDeviceNumbers* n, const pecker::ScatterTable* t) {
  pecker::masked_adamw_cuda(*b, *s, *n, *t, 0);
}
extern "C" void scatter(const float* value, std::int64_t numel, const pecker::ScatterTable* t) {
  pecker::scatter_cuda(value, numel, *t, 0);
}
extern "C" void checksums(std::int64_t numel, const pecker::ScatterTable* t, std::int64_t base, std::uint64_t* sums) {
  pecker::dense_checksums_cuda(numel, *t, base, sums, 0);
}
extern "C" void reconcile(float* value, std::int64_t numel, const pecker::ScatterTable* t, const bool* written,
                          bool follow, std::int64_t base, std::uint64_t* sums) {
  pecker::reconcile_cuda(value, numel, *t, {written, follow}, base, sums, 0);
}
"""
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def structure(**fields):
    return type("Structure", (ctypes.Structure,), {"_fields_": list(fields.items())})


ADDRESS, INT, DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
BUFFERS = ("value", "grad", "exp_avg", "exp_avg_sq", "ema", "saliency")
NUMBERS = ("lr", "beta1", "beta2", "eps", "weight_decay", "clip_value", "ema_decay")
TABLE = ("dense_pointers", "dense_dtypes", "run_parameter", "run_dense_offset", "run_flat_offset", "tile_run")
Buffers = structure(**dict.fromkeys(BUFFERS, ADDRESS), numel=INT)
Settings = structure(step=INT, **dict.fromkeys(NUMBERS, DOUBLE), saliency_kind=ctypes.c_int32)
DeviceNumbers = structure(step=ADDRESS, lr=ADDRESS, lr_is_double=ctypes.c_bool, constants=ADDRESS)
Table = structure(**dict.fromkeys(TABLE, ADDRESS), num_parameters=INT, num_runs=INT)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_host")
    for path in (*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.cu*")):
        to = folder / path.relative_to(ROOT / "csrc")
        to.parent.mkdir(exist_ok=True)
        to.write_text(LAUNCH.sub(r"launch_on_host(\1, \2, \3)(", path.read_text()))
    (folder / "all.cpp").write_text(
        f'#include "cuda/masked_adamw.cu"\n#include "cuda/scatter.cu"\n#include "cuda/reconcile.cu"\n{ENTRY}'
    )
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-w", "-fPIC", "-shared"]
    options += [f"-I{ROOT / 'tests' / 'cuda_on_host'}"]
    if Path(COMPILER).name.startswith(
        "g++"
    ):  # another library in this process has kernels and a threadIdx too, which must stay its own
        options += ["-fno-gnu-unique"]
    subprocess.run([COMPILER, *options, folder / "all.cpp", "-o", folder / "all.so"], check=True)
    return ctypes.CDLL(str(folder / "all.so"))


def table_of(model):
    return Table(**(native_table(model.table.tensors()) if model else {}))


def steps(kernels, state, grads, settings, model=None, on_device=False):
    settings = {"beta2": 0.999, "eps": 1e-8, "clip_value": math.inf} | settings
    kind = ("signed_sum", "abs", "square").index(settings.pop("saliency_kind", "abs"))
    step, lr, constants = torch.tensor(0.0), torch.tensor(1e-2, dtype=torch.float64), torch.full((12,), torch.nan)
    numbers = DeviceNumbers()
    if on_device:
        numbers = DeviceNumbers(step.data_ptr(), lr.data_ptr(), True, constants.data_ptr())
    for number, grad in enumerate(grads, 1):
        step += 1
        addresses = {name: b.data_ptr() for name, b in (state | {"grad": grad}).items() if b is not None}
        hyper = {"step": -1, "lr": math.nan} if on_device else {"step": number, "lr": 1e-2}
        arguments = Buffers(**addresses, numel=len(grad)), Settings(**hyper, **settings, saliency_kind=kind), numbers
        kernels.step(*map(ctypes.byref, (*arguments, table_of(model))))
    return state


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("n", [0, 1, 3, 1023, 1024, 1025, 5000])
def test_the_step_has_the_bits_of_the_reference(kernels, settings, n, on_device):
    state, grads = buffers(n, settings), gradients(n)
    expected = run(clone(state), grads, settings, "reference")
    assert_same_bits(steps(kernels, clone(state), grads, settings, on_device=on_device), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", ["row", (4, 3), "element"])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.4, 0.9, 1.0])
def test_the_scatter_writes_the_active_weights_and_no_other_bit(kernels, dtype, block, density):
    for stepped in (False, True):
        model = Model([(40, 30), (7, 9), (64, 40), (4, 8, 3, 3)], block, density, [dtype, torch.float32])
        n = model.numel
        state = buffers(n, {"beta1": 0.0})
        if stepped:
            steps(kernels, state, gradients(n, 1), {"beta1": 0.0}, model)
        else:
            kernels.scatter(ADDRESS(state["value"].data_ptr()), INT(n), ctypes.byref(table_of(model)))
        model.check(state["value"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", ["row", (4, 3), "element"])
@pytest.mark.parametrize("follow", [False, True])
def test_reconciling_is_what_the_cpu_does(kernels, dtype, block, follow):
    shapes, base = [(40, 30), (7, 9), (64, 40), (4, 8, 3, 3)], 17
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Model(shapes, block, 0.4, [dtype, torch.float32]))
    table, n = models[0].table, models[0].numel
    value = torch.randn(n, generator=torch.Generator().manual_seed(0))
    for model in models:
        model.table.scatter_(value)
        for target in model.table.targets[::2]:
            target.dense.view(-1)[::5] = 3.0
    expected = dense_checksums(models[1].table, torch.float32, base)
    sums = torch.zeros_like(expected)
    kernels.checksums(INT(n), ctypes.byref(table_of(models[0])), INT(base), ADDRESS(sums.data_ptr()))
    assert torch.equal(sums, expected)
    written = torch.tensor([True, True, False, False])
    ours, theirs = value + 1.0 * (torch.arange(n) % 3 == 0), value + 1.0 * (torch.arange(n) % 3 == 0)
    expected = reconcile_(theirs, models[1].table, written, follow=follow, base=base)
    sums.zero_()
    kernels.reconcile(
        *(ADDRESS(ours.data_ptr()), INT(n), ctypes.byref(table_of(models[0])), ADDRESS(written.data_ptr())),
        *(ctypes.c_bool(follow), INT(base), ADDRESS(sums.data_ptr())),
    )
    assert torch.equal(sums, expected) and torch.equal(ours, theirs) and not torch.equal(ours, value)
    for one, other in zip(table.targets, models[1].table.targets, strict=True):
        assert torch.equal(one.dense, other.dense)


def test_unaligned_buffers_go_element_by_element(kernels):
    model = Model([(41, 51), (200,)], "row", 0.7, DTYPES)
    settings, n = SETTINGS[1], model.numel
    state, grads = buffers(n, settings), gradients(n)
    expected = run(clone(state), grads, settings, "reference")
    for name in ("value", "exp_avg_sq"):
        moved = clone(state) | {name: torch.cat([state[name][:1], state[name]])[1:]}
        assert moved[name].data_ptr() % 16
        assert_same_bits(steps(kernels, moved, grads, settings, model), expected)
        model.check(moved["value"])


def test_random_masks(kernels):
    generator = torch.Generator().manual_seed(0)

    def pick(choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for _ in range(1000):
        shapes = [(pick(range(1, 70)), pick(range(1, 60))) for _ in range(pick([1, 2, 5]))]
        density = pick([0.01, 0.1, 0.5, 0.9, 0.99])
        model = Model(shapes, pick(["row", (4, 3), "element"]), density, [pick(DTYPES), pick(DTYPES)])
        settings = pick(SETTINGS)
        state, grads = buffers(model.numel, settings), gradients(model.numel, 1)
        grads[0][::7] = pick([torch.nan, torch.inf, 0.0, 1e-30])
        expected = run(clone(state), grads, settings, "reference")
        assert_same_bits(steps(kernels, state, grads, settings, model, pick([False, True])), expected)
        model.check(state["value"])
