"""select_threshold on as many saliencies as a whole network has weights, against what torch, numpy and SalUn do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from measure import ROWS, Row, race
from torch import Tensor

from pecker_fast.ops import select_threshold

MILLION = 1_000_000
DENSITY = 0.1
PASSES = 2  # over the data: one for each half of a float32
VALUES = {
    "abs(normal)": lambda n: torch.randn(n).abs_(),
    "abs(normal)**3": lambda n: torch.randn(n).abs_().pow_(3),
    "half zeros": lambda n: torch.randn(n).abs_() * torch.randint(2, (n,)),
}


def torch_kthvalue(values: Tensor, k: int) -> Tensor:
    return values.kthvalue(values.numel() - k + 1).values


def numpy_partition(values: Tensor, k: int) -> np.floating:
    return np.partition(values.numpy(), values.numel() - k)[values.numel() - k]


def salun_ranks(values: Tensor, k: int) -> Tensor:
    """Released SalUn code: the rank of every weight by a sort of a sort, then the mask of ranks below k."""
    ranks = torch.argsort(torch.argsort(-values))
    return ranks < k


def check(values: Tensor, k: int) -> None:
    """The threshold is torch's, and with its ties exactly k values are kept."""
    threshold, ties = select_threshold([values], k)
    assert threshold == torch_kthvalue(values, k)
    above, equal = int((values > threshold).sum()), int((values == threshold).sum())
    assert above + int(ties) == k and 1 <= int(ties) <= equal


# Left out are what takes seconds a call: numpy where half of the values are equal, and more sorts of sorts.
@pytest.mark.parametrize(
    "millions, kind, contestants",
    [
        (36, "abs(normal)", (torch_kthvalue, numpy_partition, salun_ranks)),
        (36, "abs(normal)**3", (torch_kthvalue, numpy_partition)),
        (36, "half zeros", (torch_kthvalue,)),
        (100, "abs(normal)", (torch_kthvalue, numpy_partition)),
        (100, "abs(normal)**3", (torch_kthvalue, numpy_partition)),
    ],
    ids=lambda value: str(value).replace(" ", "_") if isinstance(value, int | str) else "",
)
def bench_select_threshold(benchmark, device, copy_bandwidth, millions, kind, contestants):
    if device.type != "cpu":
        pytest.skip("the kernel is for the CPU")
    torch.manual_seed(0)
    values = VALUES[kind](millions * MILLION)
    k = round(DENSITY * values.numel())
    check(values, k)
    race_of = {function.__name__: (lambda f=function: f(values, k)) for function in contestants}
    seconds = race({"ours": lambda: select_threshold([values], k), **race_of}, rounds=5)
    benchmark.pedantic(lambda: select_threshold([values], k), rounds=3)

    moved = PASSES * values.nbytes
    share = f"{moved / seconds['ours'] / copy_bandwidth:.0%} of copy bandwidth {copy_bandwidth / 1e9:.1f} GB/s"
    for name in race_of:
        times = 1e3 * seconds["ours"], 1e3 * seconds[name]
        row = Row(f"threshold of {millions}M, {kind}", name, DENSITY, *times, f"{moved / 1e6:.0f} MB : -", share)
        row.headline = kind == "abs(normal)"
        ROWS.append(row)
        benchmark.extra_info[name] = {"ratio": row.ratio, "share": share}
