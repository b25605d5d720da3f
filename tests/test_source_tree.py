"""A checkout without native module says that it hides an installed one that has it, and no benchmark times it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from models import conv_net, loss_of

import pecker_fast
from pecker_fast import BlockMask, MaskedAdamW, apply_mask, native, use_backend
from pecker_fast.blocks import BlockGrid, ParameterMask
from pecker_fast.ops import accumulate_saliency_, masked_weight_grad, select_threshold
from pecker_fast.source_tree import hidden_build

ROOT = Path(__file__).parents[1]
NATIVE = f"_C{EXTENSION_SUFFIXES[0]}"


def package(folder, built):
    folder = folder / "pecker_fast"
    folder.mkdir(parents=True)
    if built:
        (folder / NATIVE).touch()
    return folder


def installed(site, *, built=True, editable=None, name="pecker_fast-0.1.0.dist-info", origin=None):
    """As pip leaves it: a wheel with the package beside it, or an editable one that points to a checkout."""
    (site / name).mkdir(parents=True)
    (site / name / "METADATA").write_text("Metadata-Version: 2.1\nName: pecker_fast\nVersion: 0.1.0\n")
    if editable is None:
        package(site, built)
    else:
        origin = json.dumps({"url": editable.as_uri(), "dir_info": {"editable": True}})
    if origin is not None:
        (site / name / "direct_url.json").write_text(origin)


def wheel(site, tree):
    installed(site)
    return site / "pecker_fast" / NATIVE


def wheel_from_a_folder(site, tree):
    installed(site, origin=json.dumps({"url": tree.as_uri(), "dir_info": {}}))
    return site / "pecker_fast" / NATIVE


def wheel_with_a_damaged_origin(site, tree):
    installed(site, origin="{")
    return site / "pecker_fast" / NATIVE


def another_checkout(site, tree):
    other = site.parent / "other checkout"  # of which pip writes %20
    installed(site, editable=other)
    return package(other, built=True) / NATIVE


def metadata_of_its_own_and_a_wheel(site, tree):
    installed(tree, editable=tree, name="pecker_fast.egg-info")
    return wheel(site, tree)


HIDING = [wheel, wheel_from_a_folder, wheel_with_a_damaged_origin, another_checkout, metadata_of_its_own_and_a_wheel]


@pytest.mark.parametrize("install", HIDING)
def test_an_unbuilt_tree_hides_an_installed_build(install, tmp_path):
    tree, site = tmp_path / "tree", tmp_path / "site"
    own = package(tree, built=False)
    expected = install(site, tree)
    assert hidden_build(own, [str(tree), str(site)]) == expected
    (own / NATIVE).touch()
    assert hidden_build(own, [str(tree), str(site)]) is None  # it is built itself


def nothing(site, tree):
    pass


def itself(site, tree):
    installed(site, editable=tree)


def pure_python(site, tree):
    installed(site, built=False)


def a_wheel_that_lost_its_module(site, tree):
    wheel(site, tree).unlink()


@pytest.mark.parametrize("install", [nothing, itself, pure_python, a_wheel_that_lost_its_module])
def test_a_tree_that_hides_no_build_is_silent(install, tmp_path):
    tree, site = tmp_path / "tree", tmp_path / "site"
    own = package(tree, built=False)
    install(site, tree)
    assert hidden_build(own, [str(tree), str(site)]) is None


@pytest.fixture(scope="module")
def unbuilt(tmp_path_factory):
    """A checkout without native module, and a folder with an installed build."""
    folder = tmp_path_factory.mktemp("unbuilt")
    for name in ("pecker_fast", "kernels"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    shutil.copy(ROOT / "setup.py", folder / "tree")
    installed(folder / "site")
    return folder


def run(unbuilt, *command):
    """In the tree, which Python then looks into first."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(unbuilt / "site"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=unbuilt / "tree", env=environment, capture_output=True, text=True)


def test_importing_it_warns_once(unbuilt):
    ran = run(unbuilt, "-c", "import pecker_fast, pecker_fast.cli; print(pecker_fast.__file__)")
    assert ran.stdout.strip() == str(unbuilt / "tree" / "pecker_fast" / "__init__.py")
    assert ran.stderr.count("UserWarning") == 1 and ran.stderr.startswith("<string>:1:")
    assert f"in place of the installed one that has it: {unbuilt / 'site' / 'pecker_fast' / NATIVE}" in ran.stderr


# -- benchmarks ------------------------------------------------------------------------------------

BENCH = """
def bench_it(benchmark):
    import torch
    from pecker_fast.ops import select_threshold
    from measure import race
    race({"ours": lambda: select_threshold([torch.rand(9)], 3)})
    benchmark.pedantic(lambda: None)
"""


def test_a_benchmark_of_an_unbuilt_tree_fails_before_it_times(unbuilt):
    pytest.importorskip("pytest_benchmark")
    shutil.copytree(ROOT / "benchmarks", unbuilt / "tree" / "benchmarks", ignore=lambda folder, names: [
        name for name in names if not name.endswith(".py") or name.startswith("bench_")
    ])  # fmt: skip
    shutil.copy(ROOT / "pyproject.toml", unbuilt / "tree")
    (unbuilt / "tree" / "benchmarks" / "bench_it.py").write_text(BENCH)
    ran = run(unbuilt, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only", "benchmarks")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "select_threshold: this benchmark means cpu" in ran.stdout
    assert f"of {unbuilt / 'tree' / 'pecker_fast'}, native module: none" in ran.stdout


@pytest.fixture
def backends(monkeypatch):
    """``benchmarks/backends.py``, where no native module is."""
    spec = importlib.util.spec_from_file_location("backends", ROOT / "benchmarks" / "backends.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setattr(native, "_find", lambda: ImportError("not built"))


def optimizer_step(**settings):
    net = conv_net()
    active = apply_mask(net, BlockMask.random(net, 0.3, "row"))
    loss_of(net).backward()
    MaskedAdamW(active, **settings).step()


def a_layer(**settings):
    mask = ParameterMask(BlockGrid.of((8, 4), "row"), torch.tensor([1, 3]))
    masked_weight_grad(torch.randn(5, 8), torch.randn(5, 4), mask, **settings)


def a_threshold(**settings):
    select_threshold([torch.rand(9)], 3, **settings)


def a_saliency(**settings):
    accumulate_saliency_(torch.zeros(2), torch.ones(8, 4), "abs", grid=BlockGrid.of((8, 4), (4, 4)), **settings)


MEANT = {
    "masked_adamw_": optimizer_step,
    "masked_weight_grad": a_layer,
    "select_threshold": a_threshold,
    "accumulate_saliency_": a_saliency,
}


@pytest.mark.parametrize("op", MEANT)
def test_the_reference_is_timed_only_where_it_is_named(op, backends, no_native):
    call = MEANT[op]
    call()  # a user gets it
    with backends.fast_only():
        with pytest.raises(RuntimeError, match=r"this benchmark means cpu.*Nothing is timed\. cpu: .*not built"):
            call()
        if op != "masked_adamw_":  # whose gradients are masked_weight_grad's
            call(backend="reference")
        with use_backend("reference"):
            call()
    call()
    assert not backends.USED


@pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
@pytest.mark.parametrize("op", MEANT)
def test_what_ran_is_told(op, backends):
    with backends.fast_only():
        MEANT[op]()
    first, used = backends.described()
    assert str(Path(pecker_fast.__file__).parent) in first and native.load().build_info()["isa_selected"] in first
    assert f"{op} cpu" in used
