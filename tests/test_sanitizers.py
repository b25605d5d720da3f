"""`make sanitize` runs the native tests under two sanitizers; deliberate mistakes show here that both are on."""

import os
import subprocess
import sys

import pytest

from pecker_fast import native

pytestmark = pytest.mark.skipif(os.environ.get("PECKER_FAST_SANITIZED") != "1", reason="part of `make sanitize`")

CALL = """
import torch
from pecker_fast import native
total, grad = torch.zeros(1000), torch.zeros({grads})
native.load().accumulate_saliency_cpu(total=total.data_ptr() + {shift}, total_is_double=False, grad=grad.data_ptr(),
                                      grad_dtype=0, kind=1, numel=999, threads=1)
print(native.load().__file__)
"""


def run(grads: int = 999, shift: int = 0) -> subprocess.CompletedProcess[str]:
    code = CALL.format(grads=grads, shift=shift)
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)


def test_a_correct_call_passes_in_the_module_that_the_other_tests_use():
    result = run()
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == native.load().__file__


@pytest.mark.parametrize(
    "mistake, report",
    [({"grads": 998}, "AddressSanitizer: heap-buffer-overflow"), ({"shift": 1}, "misaligned address")],
    ids=["address", "undefined"],
)
def test_a_mistake_is_reported(mistake, report):
    result = run(**mistake)
    assert result.returncode != 0 and report in result.stderr, result.stderr
