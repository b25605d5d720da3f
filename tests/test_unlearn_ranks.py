"""``pecker-fast`` in two processes: one mask, one text, one folder, one exit code, and nobody waits for the dead."""

import json
import os
import socket
import subprocess
import sys

import pytest
import unlearn_ranks
from processes import needs_gloo, run_ranks
from test_cli import DDIM, _tiny
from test_requests import same, weights

from pecker_fast import BlockMask, Delta, distilled, models
from pecker_fast.cli import main
from pecker_fast.models import DigitsClassifier

pytestmark = needs_gloo


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    models.save(_tiny(dropout=0.2), folder / "teacher", DDIM)
    models.save(DigitsClassifier(width=4), folder / "judge")
    (folder / "file").write_text("in the way")
    (folder / "ports.json").write_text(json.dumps(free_ports(len(list(unlearn_ranks.scenes(0))))))
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return run_ranks("unlearn_ranks.py", folder)


def ends(results, scene):
    """What the first process said, once it is known that the other ended alike and said nothing."""
    (code, out, err), other = (result[scene] for result in results)
    assert other == (code, "", "")
    return code, out, err


def test_the_first_alone_speaks_and_writes(results, folder):
    code, out, err = ends(results, "distill")
    assert (code, err) == (0, "") and json.loads(out)["cached"] is False
    code, out, _ = ends(results, "again")
    assert code == 0 and json.loads(out)["cached"] is True
    assert distilled.load(folder / "distilled").record["max_train_steps"] == 2
    code, out, err = ends(results, "whole")
    assert code == 0 and json.loads(out)["stopped"] is None
    assert err and all("warning: no names of classes" in line for line in err.splitlines())
    base = models.load(folder / "distilled" / "model")
    Delta.load(folder / "whole" / "delta").apply(base, progress=False)
    assert same(base.state_dict(), weights(folder / "whole" / "model"))
    assert not [path for path in folder.iterdir() if path.name.startswith(".") or path.name == "new"]


def test_interrupted_in_one_process_and_resumed_in_both(results, folder):
    code, _, err = ends(results, "interrupted")
    assert code == 130 and "half/checkpoint-2 is complete" in err
    assert ends(results, "resumed")[0] == 0
    assert same(weights(folder / "half" / "model"), weights(folder / "whole" / "model"))
    lines = [(folder / name / "metrics.jsonl").read_text() for name in ("half", "whole")]
    assert lines[0] == lines[1] and '"ua_lower"' in lines[0]


@pytest.mark.parametrize(
    ("scene", "code", "text"),
    [
        ("usage", 2, "error: rank 1: of the second alone"),
        ("unexpected", 1, "LookupError: nobody knew"),
        ("first", 2, "unlearn: error: of the first alone"),
        ("unwritable", 3, "error: "),
        ("same mistake", 2, "error: --forget_class: unknown class 11"),
    ],
)
def test_a_failure_in_one_process_ends_both_alike(scene, code, text, results):
    found, out, err = ends(results, scene)
    assert (found, out) == (code, "") and text in err
    assert ("Traceback" in err) == (code == 1)


def test_other_commands_are_for_one_process(results):
    code, _, err = results[0]["alone"]
    assert code == 2 and "runs in one process; only distill and unlearn run in several" in err


def test_a_launcher_that_says_too_little(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    source = ["--pretrained_model_name_or_path", "teacher", "--output_dir", "out"]
    assert main(["distill", *source]) == 2
    assert "MASTER_ADDR expected, but not set" in capsys.readouterr().err


def test_torchrun(results, folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    command += [str(free_ports(1)[0]), "-m", "pecker_fast", *unlearn_ranks.REQUEST, *unlearn_ranks.STOP]
    command += [*unlearn_ranks.TEACHER, "--max_train_steps", "4", "--output_dir", "launched", "--json", "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output_dir"] == "launched"
    masks = [BlockMask.load(folder / name / "mask.safetensors") for name in ("launched", "whole")]
    assert masks[0] == masks[1]
    assert models.load(folder / "launched" / "model").config == models.load(folder / "teacher").config
