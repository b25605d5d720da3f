"""How a kernel is compiled: what the launchers ship, stated so that tests can compile and check it without a GPU."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Build:
    """One shipped configuration of a kernel, and what its machine code must look like.

    Attributes:
        name: Which configuration, for messages.
        kernel: The ``triton.jit`` function.
        signature: Argument -> triton type ("*fp32", "*bf16", "i32", "fp32", ...), without the constants.
        constants: ``tl.constexpr`` argument -> value.
        aligned: Arguments that are multiples of 16, as pointers and channel counts are: without them no wide accesses.
        num_warps: Warps a program.
        num_stages: Depth of the software pipeline.
        registers: At most so many registers a thread.
        shared_bytes: At most so many bytes of shared memory a program.
        tensor_cores: Whether the products must be on tensor cores: ``wgmma`` from sm_90 on, ``mma.sync`` on sm_80.
        async_copies: Whether loads must be 16-byte ``cp.async``.
        wide_accesses: Whether global loads and stores must be of 16 bytes a thread.
        wide_loads: The same of loads alone, where little is stored.
        options: Further options of the compiler.
        options_sm_90: Those for sm_90 and newer alone.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int = 1
    registers: int = 128
    shared_bytes: int = 0
    tensor_cores: bool = False
    async_copies: bool = False
    wide_accesses: bool = False
    wide_loads: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    options_sm_90: dict[str, Any] = field(default_factory=dict)
