"""What docs/requests.md shows runs: its Python with tiny networks, its commands as far as their flags."""

import re
import shlex
from pathlib import Path

import torch
from test_cli import _tiny
from test_requests import same

from pecker_fast import MaskedDistiller, digits_task
from pecker_fast.models import DigitsClassifier
from pecker_fast.parser import build_parser
from pecker_fast.stop_rule import lower_bound, samples_needed

PAGE = (Path(__file__).parents[1] / "docs" / "requests.md").read_text()


def test_the_python_runs(monkeypatch):
    torch.set_num_threads(1)
    start = _tiny()
    monkeypatch.setattr(digits_task, "load_teacher", _tiny)
    monkeypatch.setattr(digits_task, "load_distilled", lambda: (_tiny(), _tiny()))
    monkeypatch.setattr(digits_task, "load_judge", lambda: DigitsClassifier(width=4).eval())
    run = MaskedDistiller.run
    monkeypatch.setattr(MaskedDistiller, "run", lambda self, steps: run(self, steps // 75, progress=False))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    namespace = {}
    exec(compile(code, "docs/requests.md", "exec"), namespace)
    namespace["five"].revert(namespace["generator"], progress=False)
    assert same(namespace["generator"].state_dict(), start.state_dict())
    assert not namespace["three"].overlaps(namespace["five"])


def test_the_commands_are_understood():
    blocks = re.findall(r"(?:^    .*\n)+", PAGE.split("## What it printed")[0], flags=re.M)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "pecker-fast" in line]
    assert len(commands) >= 3
    for command in commands:
        arguments = [word for word in shlex.split(command)[1:] if word != "..."]
        if "..." in command:
            arguments += ["--pretrained_model_name_or_path", "teacher", "--init", "distilled"]
        options, rest = build_parser().parse_known_args(arguments)
        assert not rest and options.command == arguments[0]


def test_the_table_of_samples():
    rows = re.findall(r"^\| (0\.\d+) \| (\d+) \| (\w+) \| (\w+) \| (\w+) \|$", PAGE, flags=re.M)
    assert len(rows) == 6
    for target, needed, *allowed in rows:
        assert int(needed) == samples_needed(float(target))
        for count, shown in zip((500, 1000, 2000), allowed, strict=True):
            fit = [errors for errors in range(count) if lower_bound(count - errors, count) >= float(target)]
            assert shown == (str(max(fit)) if fit else "refused")
