"""Shared by all tests: one thread, fixed seeds, and the devices there are."""

import importlib.util
import os

import interpreter
import pytest
import torch

if not torch.cuda.is_available():  # Triton kernels then run in its interpreter; read when they are first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        interpreter.repair()


@pytest.fixture(autouse=True)
def _same_start_for_every_test() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on small tensors threads only wait for each other; native tests ask for more


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none here"))
