"""Benchmarks for a GPU: the limits of the card, and what its result files say beside the rows."""

from __future__ import annotations

import datetime
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from machines import REHEARSAL, here, sized
from measure import FACTS, race, record

if TYPE_CHECKING:
    from pecker_fast.ops.costs import Cost

COPIED, COPIED_IN_CACHE, MATMUL = sized(2 << 30, 1 << 20), sized(20 << 20, 1 << 16), sized(8192, 128)
"""Bytes of the large copy, bytes of one whose source and target stay in the L2 cache, side of the product."""
COPIES_IN_CACHE = 50
ROOT = Path(__file__).resolve().parents[2]

if REHEARSAL:
    import sys

    sys.path.append(str(ROOT / "tests"))
    import interpreter

    interpreter.repair()


@dataclass(frozen=True)
class Limits:
    """What the card does at best, measured in the same run: bytes, and FLOPs of a bfloat16 product, a second."""

    copy: float
    l2: float
    matmul: float

    def share(self, cost: Cost, seconds: float, l2_bytes: int = 0) -> str:
        """How near a run came to the limits that it could meet."""
        shares = [f"{cost.bytes / seconds / self.copy:.0%} of copy bandwidth"]
        if cost.flops / self.matmul > 0.1 * cost.bytes / self.copy:
            shares.append(f"{cost.flops / seconds / self.matmul:.0%} of matmul")
        if l2_bytes:
            shares.append(f"{l2_bytes / seconds / self.l2:.0%} of L2")
        return ", ".join(shares)


@pytest.fixture(scope="session")
def machine() -> Any:
    return here()


@pytest.fixture(scope="session")
def limits(machine: Any) -> Limits:
    """Measured once; printed and kept with the rows."""
    copies = copy_rate(machine, COPIED, 1), copy_rate(machine, COPIED_IN_CACHE, COPIES_IN_CACHE)
    limits = Limits(*copies, matmul(machine))
    FACTS["limits"] = asdict(limits)
    return limits


def copy_rate(machine: Any, size: int, times: int) -> float:
    """Bytes a second that a copy reads and writes; many of them in a row find both in the cache, if they fit."""
    source = torch.full((size // 4,), 1.0, device=machine.device)
    target = torch.empty_like(source)
    return 2 * size / race({"copy": machine.burst([lambda: target.copy_(source)] * times)}, rounds=9)["copy"]


def matmul(machine: Any) -> float:
    """FLOPs a second of a large product of random numbers."""
    dtype = sized(torch.bfloat16, torch.float32)
    a, b = (torch.randn(MATMUL, MATMUL, device=machine.device, dtype=dtype) for _ in range(2))
    return 2 * MATMUL**3 / race({"matmul": lambda: a @ b}, rounds=9)["matmul"]


@pytest.fixture
def runnable(machine: Any) -> Any:
    """The fast backends of an op that can run here, the native module's first; of the others it is noted why not."""
    from pecker_fast.ops import OPS

    def of(op: str) -> list[str]:
        if op not in OPS:
            record(f"{op}: not in this version")
            return []
        names = []
        for name in (machine.native, "triton"):
            reason = OPS[op].why_not(name, machine.device.type)
            if reason is None:
                names.append(name)
            else:
                record(f"{op}: backend {name} left out: {reason}")
        return names or sized([], ["reference"])

    return of


@pytest.fixture(autouse=True)
def _fresh_memory() -> Any:
    torch.manual_seed(0)
    yield
    if here().device.type == "cuda":
        torch.cuda.empty_cache()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without a GPU there is nothing here, unless it is a rehearsal."""
    if REHEARSAL or torch.cuda.is_available():
        return None
    return True if collection_path.name.startswith("bench_") else None


def pytest_configure() -> None:
    if REHEARSAL or torch.cuda.is_available():
        FACTS.update(facts())


def triton_version() -> str:
    try:
        import triton
    except ImportError as error:
        return f"missing: {error}"
    return str(triton.__version__)


def facts() -> dict[str, object]:
    """What a result file says of its run."""
    import pecker_fast
    from pecker_fast import native

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "rehearsal": REHEARSAL,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {
            "pecker_fast": pecker_fast.__version__,
            "commit": commit.stdout.strip() or "unknown",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": triton_version(),
            "native": native.load().build_info() if native.available() else native.why_not(),
        },
    }
