"""Results go into folders of the user's: what this package did not write is never removed, whenever a run is killed."""

import json
import os
import shutil
from collections import namedtuple
from contextlib import ExitStack
from pathlib import Path

import pytest

from pecker_fast import output_folder
from pecker_fast.errors import FileFormatError
from pecker_fast.output_folder import Output, claim
from pecker_fast.written import NAME, read


def write(folder, text="new", names=("model/a", "model/b", "settings.json")):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def put(folder, text="new", replace=False, **how):
    with Output(folder, "unlearn", ("model/", "settings.json"), replace=replace, **how).claimed() as staged:
        write(staged, text)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


RESULT = {"model/a", "model/b", "settings.json", NAME}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# -- the folder is the user's ----------------------------------------------------------------------


def test_a_folder_keeps_its_place_and_what_else_is_in_it(out):
    out.mkdir()
    (out / ".gitignore").write_text("*")
    inode, mode = out.stat().st_ino, out.stat().st_mode
    put(out)
    put(out, "newer", replace=True)
    assert (out.stat().st_ino, out.stat().st_mode) == (inode, mode)
    assert set(contents(out)) == {*RESULT, ".gitignore"} and (out / "model/a").read_text() == "newer"


def test_the_working_directory_may_be_the_folder(out, monkeypatch):
    out.mkdir()
    monkeypatch.chdir(out)
    put(Path(os.path.realpath(".")))
    assert Path("model/a").read_text() == "new" and os.getcwd() == str(out)


def test_a_link_stays_a_link(out, tmp_path):
    (tmp_path / "disk").mkdir()
    out.symlink_to("disk")
    with claim(out, "models.save") as staged:
        write(staged)
    assert out.is_symlink() and set(contents(tmp_path / "disk")) == RESULT
    (tmp_path / "last.png").symlink_to("disk/drawn.png")
    for text, replace in (("one", False), ("two", True)):
        with Output.of_file(tmp_path / "last.png", "sample", replace=replace).claimed() as staged:
            (staged / "drawn.png").write_text(text)
    assert (tmp_path / "last.png").is_symlink() and (tmp_path / "disk/drawn.png").read_text() == "two"


def test_folders_that_were_made_for_nothing_are_removed(out):
    with pytest.raises(RuntimeError, match="boom"), claim(out / "deep" / "er", "unlearn") as staged:
        write(staged)
        raise RuntimeError("boom")
    assert not out.exists()


# -- what is the user's stays ----------------------------------------------------------------------


def foreign_file(out):
    (out / "model/mine.txt").write_text("mine")


def edited_file(out):
    (out / "settings.json").write_text("NEW")


def foreign_folder(out):
    (out / "model/notes").mkdir()


def linked_file(out):
    (out / "model/a").rename(out / "elsewhere")
    (out / "model/a").symlink_to("../elsewhere")


def copied_record(out):
    for name in ("model", "settings.json"):
        shutil.move(out / name, out.parent / f"old {name}")
    write(out, "mine")


def no_record(out):
    (out / NAME).unlink()


def damaged_record(out):
    (out / NAME).write_text('{"format": "pecker_fast.written", "version": 1, "results": {".": {"command": "unlearn"}}}')


def other_version(out):
    (out / NAME).write_text((out / NAME).read_text().replace('"version": 1', '"version": 2'))


@pytest.mark.parametrize("replace", [True, False], ids=["overwrite", "plain"])
@pytest.mark.parametrize(
    "touch",
    [
        *(foreign_file, edited_file, foreign_folder, linked_file),
        *(copied_record, no_record, damaged_record, other_version),
    ],
)
def test_what_was_not_written_here_is_not_replaced(touch, replace, out):
    put(out)
    touch(out)
    before = contents(out)
    with pytest.raises(FileFormatError, match=r"move (it|this one)"):
        put(out, "newer", replace)
    assert contents(out) == before


@pytest.mark.parametrize("name", ["model", "settings.json"])
def test_what_was_there_before_is_not_replaced(name, out):
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(FileFormatError, match=f"{name}: was not written by pecker_fast"):
        put(out, replace=True)
    assert contents(out) == {name: "mine"}


def test_what_comes_meanwhile_stays_and_so_does_the_result(out):
    output = Output(out, "pretrain", ("config.json",))
    with pytest.raises(FileFormatError, match="is complete in .*complete-") as raised, output.claimed() as staged:
        write(staged)
        write(out, "mine", ["model/mine.txt"])
    kept = Path(str(raised.value).rpartition(" ")[2])
    assert set(contents(kept)) == RESULT - {NAME} and (out / "model/mine.txt").read_text() == "mine"
    put(out.parent / "other")
    shutil.rmtree(out / "model")
    put(out)
    assert kept.is_dir() and (out / "model/a").read_text() == "new"


def test_results_are_replaced_only_when_that_is_asked_for(out):
    put(out)
    before = contents(out)
    with pytest.raises(FileFormatError, match="out: holds a result of unlearn already; give --overwrite"):
        put(out, "newer")
    with pytest.raises(FileFormatError, match="holds a result of unlearn, and pretrain replaces only its own"):
        put_as_pretrain(out)
    assert contents(out) == before
    put(out, "newer", replace=True)
    assert set(contents(out)) == RESULT and (out / "settings.json").read_text() == "newer"


def put_as_pretrain(out):
    with Output(out, "pretrain", ("config.json",), replace=True).claimed() as staged:
        write(staged)


def test_what_the_new_result_has_not_goes_with_the_old_one(out):
    put(out)
    with Output(out, "unlearn", ("model/",), replace=True).claimed() as staged:
        write(staged, names=["model/c"])
    assert set(contents(out)) == {"model/c", NAME}


def test_a_result_that_was_taken_away_is_not_missed(out):
    put(out)
    shutil.rmtree(out / "model")
    (out / "settings.json").unlink()
    put(out)
    assert set(contents(out)) == RESULT


def test_files_beside_one_another(out):
    def draw(name, text, replace=False):
        with Output.of_file(out / name, "sample", replace=replace).claimed() as staged:
            (staged / name).write_text(text)

    put(out)
    draw("a.png", "a")
    draw("[ab].png", "b")
    draw("tmp-*.png", "c")
    for name in ("a.png", "[ab].png", "tmp-*.png"):
        with pytest.raises(FileFormatError, match=r"png: holds a result of sample already"):
            draw(name, "x")
    with pytest.raises(FileFormatError, match=r"json: was written by unlearn, and sample replaces only its own"):
        draw("settings.json", "x", replace=True)
    with pytest.raises(FileFormatError, match=r"model: is a folder, but a file is to be written"):
        draw("model", "x", replace=True)
    draw("[ab].png", "new", replace=True)
    put(out, "newer", replace=True)
    found = contents(out)
    assert {found[name] for name in ("a.png", "[ab].png", "tmp-*.png")} == {"a", "new", "c"}


# -- inputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "relation"),
    [
        ("in", "is the input"),
        ("in/../in", "is the input"),
        ("link", "is the input"),
        ("link/deep/er", "lies in the input"),
        ("in/new", "lies in the input"),
        (".", "holds the input"),
        ("in/model", "is the input"),
    ],
)
def test_inputs_are_left_alone(target, relation, tmp_path):
    (tmp_path / "in" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to("in")
    sources = (tmp_path / "in" / "model",) if target == "in/model" else (tmp_path / "in",)
    with pytest.raises(FileFormatError, match=f"{relation} .*, which is only read"):
        put(Path(os.path.realpath(tmp_path / target)), replace=True, inputs=sources)
    assert names(tmp_path) == ["in", "link"] and names(tmp_path / "in") == ["model"]


def test_inputs_beside_the_folder_are_fine(out, tmp_path):
    (tmp_path / "outer").mkdir()
    put(out, inputs=(tmp_path / "outer", tmp_path / "missing"))


# -- refused before anything is done ---------------------------------------------------------------


def test_a_full_disk_is_known_before(out, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, 3 << 20))
    put(out, needs_bytes=2 << 20)
    with pytest.raises(FileFormatError, match=r"needs about 5 MiB, but the disk has 3 MiB left; make room"):
        put(out.parent / "large", needs_bytes=5 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, 0))
    with pytest.raises(FileFormatError, match="0 MiB left"):
        put(out.parent / "small")
    assert names(out.parent) == ["out"]


def test_a_folder_without_permission_is_known_before(out, monkeypatch):
    out.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != out)  # who runs tests as root may write anywhere
    for folder in (out, out / "new"):
        with pytest.raises(FileFormatError, match=f"cannot write into {out}; choose another folder"):
            put(folder)
    assert not names(out)


def test_checking_writes_nothing(out, tmp_path):
    Output(out, "unlearn").check()
    assert not out.exists()
    put(out)
    before = contents(tmp_path)
    with pytest.raises(FileFormatError, match="already"):
        Output(out, "unlearn").check()
    Output(out, "unlearn", replace=True).check()
    assert contents(tmp_path) == before


# -- one run at a time -----------------------------------------------------------------------------


def test_two_runs_at_once(out):
    with claim(out, "unlearn") as staged:
        write(staged)
        for replace in (False, True):
            with pytest.raises(FileFormatError, match=f"another run writes there .process {os.getpid()} on "):
                put(out, replace=replace)
        with pytest.raises(FileFormatError, match="another run writes there"):
            Output(out, "unlearn").check()
        with Output.of_file(out / "a.png", "sample").claimed() as drawn, ExitStack() as stack:
            write(drawn, names=["a.png"])
            with pytest.raises(FileFormatError, match="another run writes there"):
                stack.enter_context(Output.of_file(out / "a.png", "sample").claimed())
    assert set(contents(out)) == {*RESULT, "a.png"}


def in_a_child(act):
    """Run it in a process of its own, which may end however it likes; its exit code."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_lock_of_a_killed_run_is_free(out):
    def be_killed():
        with claim(out, "unlearn") as staged:
            write(staged)
            os._exit(9)

    assert in_a_child(be_killed) == 9
    assert any("lock" in name for name in names(out)) and any("tmp" in name for name in names(out))
    put(out)
    assert set(contents(out)) == RESULT


@pytest.mark.parametrize("at", range(12))
def test_killed_while_an_older_result_is_replaced(at, out, monkeypatch):
    """Whatever the moment: every entry is the old one or the new one, nothing foreign goes, and the next run can."""
    put(out, "old")
    (out / "mine.txt").write_text("mine")
    calls = 0

    def be_killed():
        rename, replace = os.rename, os.replace

        def counted(how):
            def move(*arguments):
                nonlocal calls
                if calls == at:
                    os._exit(9)
                calls += 1
                how(*arguments)

            return move

        monkeypatch.setattr(os, "rename", counted(rename))
        monkeypatch.setattr(os, "replace", counted(replace))
        put(out, "new", replace=True)
        os._exit(0)

    code = in_a_child(be_killed)
    assert code == 9 or (code == 0 and at > 6)
    found = contents(out)
    assert found["mine.txt"] == "mine"
    parts = [{found[name] for name in found if name.startswith(f"{top}/")} for top in ("model",)]
    assert all(part in (set(), {"old"}, {"new"}) for part in parts)
    put(out, "newest", replace=True)
    found = contents(out)
    assert set(found) == {*RESULT, "mine.txt"} and found["model/a"] == found["settings.json"] == "newest"


def test_the_old_result_comes_back_when_the_new_one_cannot_be_put_in_place(out, monkeypatch):
    put(out, "old")
    rename = os.rename

    def fail(source, target):
        if Path(target) == out / "settings.json" and "ready" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(output_folder.os, "rename", fail)
        with pytest.raises(FileFormatError, match="cannot be put in place .*complete in"):
            put(out, "new", replace=True)
    found = contents(out)
    assert found["model/a"] == found["settings.json"] == "old"
    put(out, "newer", replace=True)


# -- results that grow -----------------------------------------------------------------------------


def test_a_result_that_grows_goes_on_after_a_kill(out):
    comparison = Output(out, "compare", ("runs.jsonl", "report.html", "samples"), replace=True)

    def be_killed():
        with comparison.opened() as folder:
            write(folder, "half", ["runs.jsonl", "samples/a.npz"])
            os._exit(9)

    assert in_a_child(be_killed) == 9
    with comparison.opened() as folder:
        assert (folder / "runs.jsonl").read_text() == "half"
        write(folder, "whole", ["runs.jsonl", "report.html"])
    assert set(read(out)["."].entries) == {"runs.jsonl", "report.html", "samples", "samples/a.npz"}
    (out / "report.html").write_text("edited")
    with pytest.raises(FileFormatError, match=r"report.html: was changed"), comparison.opened():
        pass
    (out / "report.html").write_text("whole")
    with comparison.opened(anew=True) as folder:
        assert not (folder / "runs.jsonl").exists()
    assert not out.exists() or not contents(out)


def test_files_are_added_to_a_result(out):
    put(out)
    output = Output(out, "unlearn", replace=True)
    with output.extended() as staged:
        write(staged, "more", ["model/a", "model/picture.png"])
    put(out, "newer", replace=True)
    with output.extended() as staged:
        write(staged, "more", ["model/picture.png"])
    (out / "model/mine.png").write_text("mine")
    with pytest.raises(FileFormatError, match=r"mine.png: was not written"), output.extended() as staged:
        write(staged, "more", ["model/mine.png"])
    found = contents(out)
    assert (found["model/mine.png"], found["model/picture.png"], found["model/a"]) == ("mine", "more", "newer")


def test_a_record_cannot_name_other_places(out):
    put(out)
    record = json.loads((out / NAME).read_text())
    for name in ("../victim", "/etc/passwd", "model/../../victim", ""):
        record["results"]["."]["entries"] = {name: []}
        (out / NAME).write_text(json.dumps(record))
        with pytest.raises(FileFormatError, match="is no path in the folder"):
            put(out, replace=True)
