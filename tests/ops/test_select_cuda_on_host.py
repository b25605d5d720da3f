"""The CUDA sources of select_threshold and compact_active, compiled for the host and run as fibers in random order.

What a GPU alone shows (speed, its memory model) is in test_select_on_gpu.py; what is wrong with the logic shows here.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HOST = ROOT / "tests" / "cuda_on_host" / "fibers"
SOURCES = [ROOT / "csrc" / "cuda" / f"{stem}.cu" for stem in ("select_threshold", "compact_active")]
TILE_BYTES = 512 * 4 * 16
INF, NAN = torch.inf, torch.nan

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ not found"),
    pytest.mark.skipif(os.environ.get("PECKER_FAST_SANITIZED") == "1", reason="the sanitizers do not know our fibers"),
]


class OnHost:
    """The two ops as the library has them."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(library)

    def select(self, tensors, k, seed=0):
        threshold, ties = torch.empty((), dtype=tensors[0].dtype), torch.empty((), dtype=torch.int64)
        results = (ctypes.c_void_p(x.data_ptr()) for x in (threshold, ties))
        self.library.select_threshold(*arrays(tensors), ctypes.c_int64(k), seed, *results)
        return threshold, ties

    def compact(self, tensors, threshold, ties, k, seed=0):
        index, offsets = torch.full((k,), -7), torch.full((len(tensors) + 1,), -7)
        numbers = (ctypes.c_void_p(x.data_ptr()) for x in (threshold, ties))
        results = ctypes.c_void_p(index.data_ptr()), ctypes.c_int64(k), ctypes.c_void_p(offsets.data_ptr())
        self.library.compact_active(*arrays(tensors), *numbers, seed, *results)
        return index, offsets


def arrays(tensors):
    count, is_double = len(tensors), tensors[0].dtype == torch.float64
    addresses = (ctypes.c_void_p * count)(*(t.data_ptr() for t in tensors))
    numels = (ctypes.c_int64 * count)(*(t.numel() for t in tensors))
    return addresses, numels, count, ctypes.c_bool(is_double)


def build(folder, *sources, optimize="-O1"):
    library = folder / "select.so"
    options = ["-std=c++17", optimize, "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    options += ["-fPIC", "-shared", "-pthread", "-fno-gnu-unique"]
    command = ["g++", *options, "-I", HOST, "-x", "c++", HOST / "select.cpp", *sources, "-o", library]
    subprocess.run(command, check=True)
    return OnHost(library)


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    return build(tmp_path_factory.mktemp("cuda_on_host"), *SOURCES)


def check(on_host, tensors, k, seed=0):
    """Both ops against a stable sort."""
    flat = torch.cat(tensors)
    flat = torch.where(flat.isnan(), -INF, flat)
    order = flat.argsort(descending=True, stable=True)
    expected = flat[order[k - 1]] + 0.0
    threshold, ties = on_host.select(tensors, k, seed)
    assert threshold == expected and str(float(threshold)) != "-0.0"
    assert int(ties) == k - int((flat > expected).sum())
    index, offsets = on_host.compact(tensors, threshold, ties, k, seed)
    assert offsets[0] == 0 and offsets[-1] == k
    starts = torch.tensor([0, *map(len, tensors)]).cumsum(0)
    pieces = zip(index.split(offsets.diff().tolist()), starts, strict=False)
    assert torch.equal(torch.cat([piece + start for piece, start in pieces]), order[:k].sort().values)


def values_of(kind, numel, dtype):
    values = torch.randn(numel).to(dtype)
    if kind == "special":
        values[::3], values[1::7], values[2::11], values[3::13] = 0.0, -0.0, NAN, INF
        values[4::17], values[5::19] = -INF, -1e-45
    elif kind == "all equal":
        values[:] = 0.5
    elif kind == "zeros":
        values = values.abs() * (torch.rand(numel) < 0.3)
    elif kind == "few values":
        values = (values * 2).round()
    elif kind == "all magnitudes":
        values = values * 10.0 ** torch.randint(-44, 38, (numel,))
    return values


@pytest.mark.parametrize("kind", ["normal", "special", "all equal", "zeros", "few values", "all magnitudes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_a_stable_sort(on_host, kind, dtype):
    tensors = [values_of(kind, numel, dtype) for numel in (0, 17_001, 1, 0, 0, 8193, 40, 0)]
    numel = sum(map(len, tensors))
    one, other = ((1, numel // 3), (2, numel // 2 + 1))[dtype == torch.float64]  # every kind meets them all
    for seed, k in enumerate((one, other, numel)):
        check(on_host, tensors, k, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("begin", [0, 1, 2, 3])
def test_slices_that_begin_and_end_anywhere(on_host, dtype, begin):
    tile = TILE_BYTES // dtype.itemsize
    for numel in (1, tile - begin - 1, tile - begin, tile - begin + 1, 2 * tile):
        whole = torch.full((begin + numel + 9,), INF, dtype=dtype)  # what lies around is larger than all values
        values = whole[begin : begin + numel].copy_(torch.randn(numel))
        check(on_host, [values], max(1, numel // 2))


@pytest.mark.parametrize("count", [160, 161, 330])
def test_more_arrays_than_one_launch_has_room_for(on_host, count):
    lengths = torch.randint(0, 9, (count,)).tolist()
    check(on_host, [torch.randn(n).round(decimals=1) for n in lengths], sum(lengths) // 4)


@pytest.mark.parametrize("seed", range(3))
def test_looking_back_over_more_tiles_than_a_warp_has_lanes(on_host, seed):
    tensors = [torch.randn(TILE_BYTES // 4 * 45), torch.zeros(TILE_BYTES // 4 * 5 + 3)]
    check(on_host, tensors, 200_000, seed)


def test_a_threshold_of_another_k_writes_only_its_own_list(on_host):
    tensors = [torch.randn(9000), torch.zeros(0), torch.randn(70)]
    threshold, ties = on_host.select(tensors, 500)
    whole, offsets = on_host.compact(tensors, threshold, ties, 500)
    short, short_offsets = on_host.compact(tensors, threshold, ties, 300)
    assert torch.equal(short, whole[:300]) and torch.equal(short_offsets, offsets)
    long, long_offsets = on_host.compact(tensors, threshold, ties, 700)
    assert torch.equal(long, torch.cat([whole, torch.full((200,), -1)])) and torch.equal(long_offsets, offsets)


@pytest.mark.parametrize("stem", ["select_threshold", "compact_active"])
def test_kernels_without_their_barriers_give_wrong_results_here(tmp_path, stem):
    """The control: the order of fibers does show a missing barrier."""
    for source in SOURCES:
        text = source.read_text().replace('#include "', f'#include "{source.parent}/')
        assert "__syncthreads();" in text
        (tmp_path / source.name).write_text(text.replace("__syncthreads();", "") if source.stem == stem else text)
    broken = build(tmp_path, *(tmp_path / source.name for source in SOURCES), optimize="-O0")  # it runs but once
    with pytest.raises(AssertionError):
        check(broken, [torch.randn(5000)], 2000)  # one tile: without barriers more of them might wait for ever
