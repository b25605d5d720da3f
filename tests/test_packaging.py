"""What the build promises, checked without a full build (.ci/run installs wheels for that)."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.fixture
def setup_arguments(monkeypatch):
    """Runs setup.py with the given environment variables and returns what it passes to setup()."""

    def run(**variables: str) -> dict:
        passed = {}
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(setuptools, "setup", passed.update)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        passed["globals"] = runpy.run_path(str(ROOT / "setup.py"))
        return passed

    return run


def test_every_package_folder_is_installed_and_none_beside_ours(setup_arguments):
    packages = setup_arguments()["packages"]
    folders = {path.parent for path in (ROOT / "pecker_fast").rglob("*.py")}
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"pecker_fast.kernels"}
    assert set(packages) == expected
    assert all(package.split(".")[0] == "pecker_fast" for package in packages)


def test_native_module_is_optional(setup_arguments, monkeypatch):
    assert setup_arguments(PECKER_FAST_NATIVE="0")["ext_modules"] == []
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        assert setup_arguments(PECKER_FAST_NATIVE="")["ext_modules"] == []
    with pytest.raises(SystemExit, match="PECKER_FAST_NATIVE=1"):
        setup_arguments(PECKER_FAST_NATIVE="1")
    with pytest.raises(SystemExit, match="to be 0, 1 or unset"):
        setup_arguments(PECKER_FAST_NATIVE="yes")


def test_cuda_is_chosen_by_nvcc_and_the_environment(setup_arguments, monkeypatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("PECKER_FAST_CUDA", raising=False)
    cuda_arguments = setup_arguments(PECKER_FAST_NATIVE="0")["globals"]["cuda_arguments"]
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: "/a/nvcc")
    assert cuda_arguments() == {"PECKER_FAST_CUDA": "ON", "CMAKE_CUDA_COMPILER": "/a/nvcc"}
    monkeypatch.setenv("PECKER_FAST_CUDA", "0")
    assert cuda_arguments() == {"PECKER_FAST_CUDA": "OFF"}
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    monkeypatch.setenv("PECKER_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc"):
        cuda_arguments()


def test_kernels_folder_is_not_mistaken_for_another_package():
    # transformers asks for a version, and takes a package without one for absent.
    code = "import sys; sys.path.insert(0, sys.argv[1]); import kernels; assert not hasattr(kernels, '__version__')"
    code += "; print('imported'); from kernels import get_kernel"
    result = subprocess.run([sys.executable, "-c", code, ROOT], capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == "imported\n"
    assert "ImportError: This folder is pecker_fast.kernels" in result.stderr


def test_importing_native_imports_neither_torch_nor_the_module():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); assert not {'torch', '_C'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, ROOT / "pecker_fast" / "native.py"], check=True)


WIDE_ACCESSES = {
    "masked_adamw": (r"ld\.global\.cs\.v4\.f32", r"st\.global\.cs\.v4\.f32", r"st\.global\.v4\.u32"),
    "scatter": (r"ld\.global\.cs\.v4\.f32", r"st\.global\.v4\.u32", r"st\.global\.v2\.u32"),
    "reconcile": (r"shfl\.sync",),  # reads weights where they lie, one by one, and adds up within a warp
    "probe": (),
}
"""Stem of a CUDA source -> what its PTX must have; for the others, which store little, a load of 16 bytes."""
REGISTERS = {"masked_adamw": 72, "scatter": 32, "select_threshold": 40, "compact_active": 40}
"""Registers a thread at most: with 72 a multiprocessor has room for three blocks of 256 threads."""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc not found")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.stem)
def test_cuda_compiles_without_spills_and_with_wide_accesses(source, architecture, tmp_path):
    ptx, options = tmp_path / "kernel.ptx", ["-std=c++17", "-O3", "--fmad=false", f"-arch=compute_{architecture}"]
    subprocess.run(["nvcc", *options, "-ptx", source, "-o", ptx], check=True)
    assemble = ["ptxas", "-v", f"-arch=sm_{architecture}", ptx, "-o", tmp_path / "kernel.cubin"]
    report = subprocess.run(assemble, check=True, capture_output=True, text=True).stderr
    spilled = re.findall(r"(\d+) bytes spill", report)
    assert spilled and set(spilled) == {"0"}, report
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    assert max(registers) <= REGISTERS.get(source.stem, 128), report
    text = ptx.read_text()
    for pattern in WIDE_ACCESSES.get(source.stem, (r"ld\.global\S*\.v4",)):
        assert re.search(pattern, text), pattern
    assert "fma.rn.f32" not in text  # contraction would cost the bits that the CPU gives; pow in double has its own
