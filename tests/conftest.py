"""Shared by all tests: one thread, fixed seeds, and the devices there are."""

import importlib.util
import os

import background
import interpreter
import pytest
import torch

if not torch.cuda.is_available():  # Triton kernels then run in its interpreter; read when they are first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        interpreter.repair()


SHARED = "PYTEST_XDIST_WORKER" in os.environ
"""Whether several processes share the tests (``pytest -n``)."""


@pytest.fixture(autouse=True)
def _same_start_for_every_test() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on small tensors threads only wait for each other; native tests ask for more


def _program(item: pytest.Item) -> object:
    return getattr(getattr(item, "module", None), "BACKGROUND", None)


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly and not SHARED:  # else another process would start them too
        for program in dict.fromkeys(map(_program, session.items)):
            if program is not None:
                background.start(program)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What waits for a program comes last; where processes share the tests, what takes longest comes first.
    items.sort(key=lambda item: (_program(item) is not None) != SHARED)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none here"))
