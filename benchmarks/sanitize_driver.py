"""Call every native kernel that has a CUDA version, at small ragged sizes, for compute-sanitizer to watch.

compute-sanitizer --kernel-name kns=pecker python benchmarks/sanitize_driver.py
PECKER_FAST_REHEARSE=1 python benchmarks/sanitize_driver.py   # the same calls of the native CPU kernels
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import torch
from machines import here
from torch import Tensor, nn

from pecker_fast import BlockMask, MaskedAdamW, apply_mask, native, ops

DEVICE, BACKEND = here().device, here().native
SIZES = (1, 3, 1023, 1024, 1025, 5000)
SETTINGS = [{}, {"betas": (0.0, 0.999)}, {"ema_decay": 0.9, "clip_value": 0.5}, {"saliency": "square"}]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def there(tensor: Tensor) -> Tensor:
    """Made on the CPU: then torch has hardly a kernel of its own to run under the tool."""
    return tensor.to(DEVICE)


def optimizer_steps() -> Iterator[str]:
    """Models whose blocks are ragged, in several dtypes: the step, and the scatter on its own."""
    for block in ("row", (16, 16), (5, 7), "element"):
        for dtype in DTYPES:
            for settings in SETTINGS:
                model = nn.ModuleList([nn.Conv2d(21, 33, 3), nn.Linear(70, 66), nn.Linear(9, 3)]).to(dtype).to(DEVICE)
                active = apply_mask(model, BlockMask.random(model, 0.3, block))
                for parameter in active.parameters():
                    parameter.grad = there(torch.randn(parameter.shape))
                optimizer = MaskedAdamW(active, backend=BACKEND, **settings)
                optimizer.step()
                optimizer.step()
                active.scatter_()
                active.check()
                yield f"masked_adamw_ {block} {dtype} {settings}"


def flat_steps() -> Iterator[str]:
    """Without a table, at every length around a tile, and not aligned to 16 bytes."""
    for size in SIZES:
        for offset in (0, 1):
            buffers = [there(torch.rand(size + offset))[offset:] for _ in range(4)]
            ops.masked_adamw_(*buffers, step=1, lr=0.1, clip_value=math.inf, backend=BACKEND)
            yield f"masked_adamw_ {size} weights at offset {offset}"


def selections() -> Iterator[str]:
    """Thresholds, and positions where the native module has them."""
    reason = ops.OPS["select_threshold"].why_not(BACKEND, DEVICE.type)
    if reason is not None:
        print(f"select_threshold left out: {reason}")
        return
    for dtype in (torch.float32, torch.float64):
        for sizes in ((1,), (7, 1025), SIZES):
            tensors = [there(torch.randn(size, dtype=dtype)) for size in sizes]
            k = max(sum(sizes) // 3, 1)
            threshold, ties = ops.select_threshold(tensors, k, backend=BACKEND)
            if "compact_active" in ops.OPS and ops.OPS["compact_active"].why_not(BACKEND, DEVICE.type) is None:
                ops.compact_active(tensors, threshold, ties, k, backend=BACKEND)
            yield f"select_threshold {dtype} {sizes}"


def main() -> int:
    reason = native.why_not_cuda() if DEVICE.type == "cuda" else native.why_not()
    if reason is not None:
        print(reason)
        return 1
    torch.manual_seed(0)
    calls = [call for kind in (optimizer_steps, flat_steps, selections) for call in kind()]
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print(f"{len(calls)} calls of the native kernels for {DEVICE.type} ended")
    return 0


if __name__ == "__main__":
    sys.exit(main())
