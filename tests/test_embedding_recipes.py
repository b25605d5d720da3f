"""Every block of docs/recipes.md runs, each after the first one and in a folder of its own."""

import functools
import re
import socket
import sys
from pathlib import Path

import pytest
import torch

TEXT = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
FIRST, *BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
OPTIONAL = ("accelerate", "lion_pytorch", "transformers")


@pytest.fixture(autouse=True)
def _forget_the_accelerator():
    """Its state is one for the process, and would reach other tests."""
    yield
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def one_rank(monkeypatch):
    """What torchrun tells a single process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block {i}" for i in range(len(BLOCKS))])
def test_recipe_runs(code, tmp_path, monkeypatch, request):
    for package in OPTIONAL:
        if f"from {package} " in code:
            pytest.importorskip(package)
    if "init_process_group" in code:
        request.getfixturevalue("one_rank")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # inductor is slow
    exec(compile(FIRST + code, "recipes.md", "exec"), {})
