"""Compiles every shipped configuration of every Triton kernel for GPUs that need not be here; prints one JSON object.

A program of its own: in the test process triton interprets kernels, which it decides once, when they are imported.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def stems() -> list[str]:
    return sorted(p.stem for p in (ROOT / "kernels").glob("*.py") if p.stem not in ("__init__", "build"))


def facts(build, capability: int) -> dict[str, object]:
    """What the machine code of one build looks like."""
    arguments = build.kernel.arg_names
    signature = {name: build.signature.get(name, "constexpr") for name in arguments}
    constants = {(arguments.index(name),): value for name, value in build.constants.items()}
    attributes = {(arguments.index(name),): [["tt.divisibility", 16]] for name in build.aligned}
    source = ASTSource(build.kernel, signature, constants, attributes)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, **build.options}
    options |= build.options_sm_90 if capability >= 90 else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local_bytes": int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma_sync": len(re.findall(r"mma\.sync", ptx)),
        "async_copies": [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.[^;]*?\], (0x[0-9a-f]+|\d+)", ptx)],
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32", ptx)),
    }


def compiled(job: tuple[str, int, int]) -> tuple[str, dict[str, object]]:
    stem, number, capability = job
    build = importlib.import_module(f"kernels.{stem}").BUILDS[number]
    return f"{stem}/{build.name}/sm_{capability}", facts(build, capability)


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    jobs = [
        (stem, number, capability)
        for stem in sys.argv[1:] or stems()
        for number in range(len(importlib.import_module(f"kernels.{stem}").BUILDS))
        for capability in (80, 90)
    ]
    processes = max((os.cpu_count() or 1) - 1, 1)  # one is the tests'
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        json.dump(dict(pool.map(compiled, jobs, chunksize=4)), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
