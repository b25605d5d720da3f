"""Packages and the native module; everything else is in pyproject.toml.

Environment variables:
    PECKER_FAST_NATIVE: 0 builds no native module, 1 requires it; unset builds it if there is a C++ compiler.
    PECKER_FAST_CUDA: 0 leaves the CUDA kernels out, 1 requires them; unset builds them if there is nvcc.
"""

import importlib
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds `pecker_fast._C` with CMake and ninja, which need neither torch nor a GPU."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        arguments = {
            "CMAKE_MAKE_PROGRAM": find_tool("ninja", "BIN_DIR"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "PECKER_FAST_VERSION": self.distribution.get_version(),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": importlib.import_module("pybind11").get_cmake_dir(),
            **cuda_arguments(),
        }
        definitions = [f"-D{name}={value}" for name, value in arguments.items()]
        run(cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *definitions)
        run(cmake, "--build", build)


def run(*command: str | Path) -> None:
    if subprocess.run(command).returncode:
        raise SystemExit(
            "pecker_fast: the native build failed, see above. PECKER_FAST_CUDA=0 leaves the CUDA kernels "
            "out, PECKER_FAST_NATIVE=0 all native code."
        )


def find_tool(name: str, folder_attribute: str) -> str:
    """The program of its Python package, which need not be on PATH, else the one on PATH."""
    try:
        folder = getattr(importlib.import_module(name), folder_attribute, "")
    except ImportError:
        folder = ""
    program = shutil.which(name, path=folder) or shutil.which(name)
    if program is None:
        raise SystemExit(f"pecker_fast: {name} not found. pip install {name}, or set PECKER_FAST_NATIVE=0.")
    return program


def cuda_arguments() -> dict[str, object]:
    nvcc = find_nvcc() if switch("PECKER_FAST_CUDA") is not False else None
    if nvcc is None:
        if switch("PECKER_FAST_CUDA"):
            raise SystemExit("pecker_fast: PECKER_FAST_CUDA=1, but no nvcc in CUDA_HOME/bin or on PATH.")
        return {"PECKER_FAST_CUDA": "OFF"}
    return {"PECKER_FAST_CUDA": "ON", "CMAKE_CUDA_COMPILER": nvcc}


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=str(Path(home) / "bin"))) or shutil.which("nvcc")


def wants_native() -> bool:
    wanted = switch("PECKER_FAST_NATIVE")
    if wanted is False:
        return False
    if any(shutil.which(name) for name in (os.environ.get("CXX", "c++").split()[0], "c++", "g++", "clang++")):
        return True
    if wanted:
        raise SystemExit("pecker_fast: PECKER_FAST_NATIVE=1, but there is no C++ compiler (g++ or clang++).")
    warnings.warn(
        "pecker_fast: no C++ compiler found, so the native CPU and CUDA kernels are left out; the reference "
        "and Triton ones remain. Install g++ or clang++ and reinstall to have them.",
        stacklevel=1,
    )
    return False


def switch(variable: str) -> bool | None:
    """True for 1, False for 0, None when unset."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"pecker_fast: expected {variable} to be 0, 1 or unset, got {value!r}.")
    return value == "1" if value else None


setup(
    # Listed by name: a bare find_packages() would install `kernels` as a package of its own.
    packages=[*find_packages(include=["pecker_fast", "pecker_fast.*"]), "pecker_fast.kernels"],
    package_dir={"pecker_fast.kernels": "kernels"},
    ext_modules=[Extension("pecker_fast._C", sources=[])] if wants_native() else [],
    cmdclass={"build_ext": CMakeBuild},
)
