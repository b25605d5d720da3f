"""What killed runs left is removed by the next one, and nothing else is; rights are what the umask says."""

import os
import shutil
import signal
import stat
import warnings

import pytest
import torch

from pecker_fast import checkpoint, leftovers
from pecker_fast.checkpoint import atomic_file, atomic_folder, write_safetensors
from pecker_fast.checkpoint_folders import remove_oldest
from pecker_fast.leftovers import scratch_folder
from pecker_fast.manifest import write_manifest


def _names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def _killed(body):
    """Run in a process of its own, which is killed at the end if not before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads, which are not used there
        child = os.fork()
    if child == 0:
        try:
            body()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def _kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def _half_a_folder(target):
    with atomic_folder(target) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "half").write_text("half")
        _kill()


def _half_a_file(target):
    with atomic_file(target) as file:
        file.write_text("half")
        _kill()


def _whole_folder(target):
    with atomic_folder(target) as folder:
        (folder / "new").write_text("new")


def _whole_file(target):
    with atomic_file(target) as file:
        file.write_text("new")


def _killed_in_scratch(target):
    with scratch_folder(target.parent) as folder:
        (folder / "images.npy").write_text("half")
        _kill()


@pytest.mark.parametrize("left", [_half_a_folder, _half_a_file, _killed_in_scratch])
@pytest.mark.parametrize("write", [_whole_folder, _whole_file])
@pytest.mark.parametrize("name", ["out", "checkpoint-10", "ünï cöde.tmp-1"])
def test_the_next_one_beside_it_removes_what_a_killed_one_left(tmp_path, left, write, name):
    _killed(lambda: left(tmp_path / name))
    assert len(_names(tmp_path)) == 1
    write(tmp_path / "checkpoint-20")  # the next one need not be of the same name: it may be of the next step
    assert _names(tmp_path) == ["checkpoint-20"]


def test_leftovers_inside_of_a_folder_that_is_replaced_go_too(tmp_path):
    (tmp_path / "out").mkdir()
    _killed(lambda: _half_a_folder(tmp_path / "out" / "checkpoint-10"))
    _whole_folder(tmp_path / "out")
    assert _names(tmp_path / "out") == ["new"]


def test_what_lives_stays(tmp_path):
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            with atomic_folder(tmp_path / "a") as a, atomic_file(tmp_path / "b"), scratch_folder(tmp_path):
                _whole_folder(a)  # what the distiller does: the lock must not be lost by it
                os.write(write, b"1")
                signal.pause()
        finally:
            os._exit(1)
    os.read(read, 1)
    try:
        alive = _names(tmp_path)
        assert len(alive) == 3
        _whole_folder(tmp_path / "c")
        _whole_file(tmp_path / "d")
        assert _names(tmp_path) == [*alive, "c", "d"]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    _whole_folder(tmp_path / "c")
    assert _names(tmp_path) == ["c", "d"]


def test_a_dead_parent_with_a_live_worker_is_alive(tmp_path):
    """Workers that a run started write into its folder as well."""
    read, write = os.pipe()

    def parent():
        with atomic_folder(tmp_path / "a"):
            worker = os.fork()
            if worker == 0:
                signal.pause()
            os.write(write, worker.to_bytes(8, "little"))
            _kill()

    _killed(parent)
    worker = int.from_bytes(os.read(read, 8), "little")
    _whole_folder(tmp_path / "b")
    found = _names(tmp_path)
    os.kill(worker, signal.SIGKILL)
    assert len(found) == 2


@pytest.mark.parametrize(
    "name",
    [
        ".model.tmp-mine",
        ".model.tmp-0123456789abcdef0123456789abcdef",  # no machine: nobody knows whose it is
        "model.tmp-{machine}-0123456789abcdef01234567",
        ".model.tmp-{machine}-0123456789abcdef01234567.bak",
        ".model.tmp-{other}-0123456789abcdef01234567",
        ".model.12345",
        ".tmp-{machine}-0123456789abcdef01234567",
    ],
)
def test_what_only_looks_like_a_leftover_stays(tmp_path, name):
    machine = leftovers._machine()
    name = name.format(machine=machine, other=f"{int(machine, 16) ^ 1:08x}")
    (tmp_path / name).mkdir()
    (tmp_path / f"{name}x").write_text("mine")
    _whole_folder(tmp_path / "model")
    _whole_file(tmp_path / "mask")
    assert _names(tmp_path) == sorted([name, f"{name}x", "model", "mask"])


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "mine").write_text("mine")
    link = tmp_path / f".model.tmp-{leftovers._machine()}-0123456789abcdef01234567"
    link.symlink_to(tmp_path / "real")
    _whole_folder(tmp_path / "model")
    assert _names(tmp_path / "real") == ["mine"]


@pytest.mark.parametrize("when", ["before the new folder has its name", "before all is moved over", "half way removed"])
def test_an_interrupted_replacement_is_finished(tmp_path, when, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "new").write_text("old")
    (target / "mine").write_text("mine")
    rename, rmtree = os.rename, shutil.rmtree

    def kill_at(source, destination):
        if (when.startswith("before the new") and ".tmp-" in str(source)) or (
            when.startswith("before all") and "mine" in str(source)
        ):
            _kill()
        rename(source, destination)

    def kill_in_rmtree(path, **options):
        if ".old-" in str(path):
            _kill()
        rmtree(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", kill_at)
        patch.setattr(shutil, "rmtree", kill_in_rmtree)
        _killed(lambda: _whole_folder(target))
    assert any(".old-" in name for name in _names(tmp_path))
    _whole_file(tmp_path / "other")
    assert _names(tmp_path) == ["model", "other"]
    assert (target / "mine").read_text() == "mine"
    assert (target / "new").read_text() == ("old" if when.startswith("before the new") else "new")


def test_an_older_folder_stays_where_another_one_took_its_place(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "mine").write_text("mine")
    rename = os.rename
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda a, b: _kill() if ".tmp-" in str(a) else rename(a, b))
        _killed(lambda: _whole_folder(target))
    target.mkdir()  # somebody's, without looking at what was there
    _whole_file(tmp_path / "other")
    (older,) = [entry for entry in tmp_path.iterdir() if ".old-" in entry.name]
    assert (older / "mine").read_text() == "mine"


def test_a_checkpoint_that_was_being_removed_does_not_come_back(tmp_path, monkeypatch):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        write_manifest(tmp_path / f"checkpoint-{step}", "test", 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", _kill)
        _killed(lambda: remove_oldest(tmp_path, "test", tmp_path / "checkpoint-2", 1))
    assert len(_names(tmp_path)) == 2
    _whole_folder(tmp_path / "checkpoint-3")
    assert _names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
@pytest.mark.parametrize("shared", [0o777, 0o700])
def test_rights_are_what_the_umask_says(tmp_path, umask, shared):
    """In a folder that all may write to, nothing that is written may be written by all."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(shared)
    (folder / "replaced").write_text("old")
    (folder / "replaced").chmod(0o666)
    foreign = tmp_path / "foreign"
    foreign.write_text("x")
    foreign.chmod(0o400)
    before = os.umask(umask)
    try:
        for name in ("mask", "replaced"):
            with atomic_file(folder / name) as file:
                write_safetensors(file, {"a": torch.zeros(1)})
        write_safetensors(folder / "bare", {"a": torch.zeros(1)})
        with atomic_folder(folder / "model") as unfinished:
            (unfinished / "part").mkdir(0o500)
            write_safetensors(unfinished / "weights", {"a": torch.zeros(1)})
            shutil.copy(foreign, unfinished / "copied")  # with its rights, as copytree does
            (unfinished / "link").symlink_to(foreign)
    finally:
        os.umask(before)
    modes = {path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    files = {"mask", "replaced", "bare", "model/weights", "model/copied"}
    assert modes == {
        **dict.fromkeys(files, 0o666 & ~umask),
        **dict.fromkeys(("model", "model/part"), 0o777 & ~umask),
        "model/link": 0o400,
    }


@pytest.mark.parametrize("write", [_whole_folder, _whole_file])
def test_all_is_on_the_disk_before_it_has_its_name_and_then_the_name(tmp_path, write, monkeypatch):
    done = []
    flush, rename, replace = checkpoint._flush, os.rename, os.replace
    monkeypatch.setattr(checkpoint, "_flush", lambda path: (done.append(path.name), flush(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append("rename"), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    write(tmp_path / "x")
    assert done[-1] == tmp_path.name
    assert done[-2] == "rename"
    assert any(name.startswith(".x.tmp-") for name in done[:-2])
