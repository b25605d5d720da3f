"""What docs/delta.md shows runs, and its links lead somewhere."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "delta.md").read_text()


def test_the_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
        exec(compile(code, "docs/delta.md", "exec"), namespace)
    assert capsys.readouterr().out.splitlines()[-1] == "Ledger('three')"


def test_the_keys_are_those_of_the_file(tmp_path):
    from test_delta_file import make

    from pecker_fast.delta.file import read_config

    make()[2].save(tmp_path / "d")
    table = re.findall(r"^\| (`.*?) \|", PAGE, flags=re.M)
    keys = {key for row in table for key in re.findall(r"`(\w+)`", row)}
    assert keys == {*read_config(tmp_path / "d"), "sha256"}
