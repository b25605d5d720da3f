"""``--config``: a file says what the command line would, the command line wins, and what a run was told is kept."""

import argparse
import json
import random

import pytest
import torch
import yaml

from pecker_fast import NoiseSchedule, config_file, models
from pecker_fast.cli import main
from pecker_fast.config_file import MAX_BYTES, read
from pecker_fast.errors import FileFormatError
from pecker_fast.flags import Parser, new_command, on_off, positive_float, positive_int
from pecker_fast.models import DDPMUNet
from pecker_fast.parser import build_parser


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _leaves(parser):
    """Every command and sub-command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _leaves(child)
            return
    yield parser


PARSER = build_parser()
COMMANDS = {" ".join(leaf.prog.split()[1:]): leaf for leaf in _leaves(PARSER)}


def _parse(command, text, *more, here):
    (here / "c.yaml").write_text(text)
    return PARSER.parse_args([*command.split(), "--config", str(here / "c.yaml"), *more])


def _refused(capsys, command, text, *more, here, code=2):
    with pytest.raises(SystemExit) as stop:
        _parse(command, text, *more, here=here)
    assert stop.value.code == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"pecker-fast {command}: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


BOMB = "[&a [1,2,3,4,5,6,7,8,9]"
for _name, _last in ("ba", "cb", "dc", "ed", "fe"):  # each nine times the one before
    BOMB += f",&{_name} [{','.join([f'*{_last}'] * 9)}]"
BOMB += "]"
UNLEARN = "pretrained_model_name_or_path: teacher\nforget_class: [3]\noutput_dir: out\n"


# -- what a file says ------------------------------------------------------------------------------


def test_every_command_takes_a_file_and_delta_does_too():
    assert {"unlearn", "demo", "convert", "delta apply", "doctor"} < COMMANDS.keys()
    for leaf in COMMANDS.values():
        assert "--config" in leaf._option_string_actions


def test_a_file_says_what_the_command_line_would(here):
    text = (
        "# a comment\ncommand: unlearn\npretrained-model-name-or-path: teacher\nforget_class: [3, 5]\noutput_dir: out\n"
        "block: 64x32\nmask_region: up.0.,norm_out.\nmerge_batches: on\nskip_frozen: false\nstop_gradient: true\n"
        "generator_lr: 1e-5\nfake_score_lr: 3\nsid_alpha: 1.2\nmax_train_steps: 7\nquiet: true\njson: false\n"
        "density: 0.1\nresume_from_checkpoint: latest\nmask: random\nt_init: null\n"
    )
    words = (
        "unlearn --pretrained_model_name_or_path teacher --forget_class 3 5 --output_dir out --block 64x32 "
        "--mask_region up.0.,norm_out. --merge_batches on --skip_frozen off --stop_gradient on --generator_lr 1e-5 "
        "--fake_score_lr 3 --sid_alpha 1.2 --max_train_steps 7 --quiet --density 0.1 "
        "--resume_from_checkpoint latest --mask random"
    )
    got, expected = vars(_parse("unlearn", text, here=here)), vars(PARSER.parse_args(words.split()))
    assert got.pop("config") == here / "c.yaml"
    assert expected.pop("config") is None
    assert got.pop("parser").prog == expected.pop("parser").prog
    assert got == expected


def test_one_value_stands_for_a_list_of_one(here):
    text = UNLEARN.replace("[3]", "3")
    assert _parse("unlearn", text, here=here).forget_class == [3]
    assert _parse("unlearn", UNLEARN + "generator_lr: -1e-05\n", here=here).generator_lr == -1e-5


def test_the_command_line_wins(here):
    text = UNLEARN + "max_train_steps: 7\nmask_density: 0.5\nseed: 3\n"
    for more in (("--max_train_steps", "9"), ("--max_train_steps=9",)):
        options = _parse("unlearn", text, *more, "--forget_class", "1", "2", "--density", "0.25", here=here)
        assert (options.max_train_steps, options.forget_class, options.mask_density) == (9, [1, 2], 0.25)
        assert options.seed == 3
    judged = _parse("evaluate", "model: m\nforget_class: 3\n", "--images", "x.npz", here=here)  # one excludes the other
    assert (judged.model, str(judged.images)) == (None, "x.npz")


def test_flags_of_every_kind(here):
    parser = Parser(prog="pecker-fast")
    command = new_command(parser.add_subparsers(dest="command"), "x", "do it", "pecker-fast x")
    command.add_argument("--fold", action=argparse.BooleanOptionalAction, default=None)
    command.add_argument("--names", nargs="*")
    command.add_argument("--sizes", nargs=2, type=positive_int)
    command.add_argument("--rate", type=positive_float, choices=(0.5, 1.0))
    command.add_argument("--maybe", nargs="?", const="always")
    command.add_argument("--no_images", action="store_false", dest="images")
    command.add_argument("--switch", type=on_off, default=True)

    def parse(text, *more):
        (here / "x.yaml").write_text(text)
        options = vars(parser.parse_args(["x", "--config", str(here / "x.yaml"), *more]))
        return [options[name] for name in ("fold", "names", "sizes", "rate", "maybe", "images", "switch")]

    full = "fold: false\nnames: []\nsizes: [3, 4]\nrate: 1\nmaybe: now\nno_images: true\nswitch: off\n"
    assert parse(full) == [False, [], [3, 4], 1.0, "now", False, False]
    assert parse(full, "--fold", "--names", "a")[:2] == [True, ["a"]]
    assert parse("fold: true\nno_images: false\n") == [True, None, None, None, None, True, True]
    options = parser.parse_args(["x", "--config", str(here / "x.yaml"), "--names", "1e-5", "on", "7", "a: b", "null"])
    config_file.write(here, command, options)
    again = parser.parse_args(["x", "--config", str(here / "config.yaml")])
    assert {**vars(again), "config": None} == {**vars(options), "config": None}
    assert again.names == ["1e-5", "on", "7", "a: b", "null"]


def test_scalars_are_those_of_yaml_1_2(here):
    (here / "c.yaml").write_text(
        "a: on\nb: 1e-5\nc: 010\nd: 2026-01-01\ne: 1:30\nf: 0x10\ng: 1_0\nh: ~\ni: 1.\nj: +3\nk: <<"
    )
    expected = {"a": "on", "b": 1e-5, "c": "010", "d": "2026-01-01", "e": "1:30", "f": "0x10", "g": "1_0"}
    assert read(here / "c.yaml") == {**expected, "h": None, "i": 1.0, "j": 3, "k": "<<"}


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_train_step: 5", "unknown key max_train_step; did you mean max_train_steps?"),
        ("zzz: 5", "c.yaml: unknown key zzz (see"),
        ("config: other.yaml", "unknown key config"),
        ("help: true", "unknown key help"),
        ("command: sample", "is for another command than unlearn"),
        ("density: 0.1\nmask-density: 0.2", "mask-density is given twice"),
        ("max-train-steps: 1\nmax_train_steps: 1", "max_train_steps is given twice"),
        ("max_train_steps: many", "max_train_steps: expected an integer, got 'many'"),
        ("max_train_steps: 1.0", "max_train_steps: expected an integer, got 1.0"),
        ("max_train_steps: true", "max_train_steps: expected an integer, got True"),
        ("max_train_steps: '5'", "max_train_steps: expected an integer, got '5'"),
        ("max_train_steps: 0", "max_train_steps: expected a positive integer, got '0'"),
        ("max_train_steps: [5]", "max_train_steps: expected an integer, got [5]"),
        ("generator_lr: fast", "generator_lr: expected a number, got 'fast'"),
        ("output_dir: 5", "output_dir: expected a text, got 5"),
        ("quiet: on", "quiet: expected true or false, got 'on'"),
        ("merge_batches: maybe", "merge_batches: expected on or off, got 'maybe'"),
        ("merge_batches: 1", "merge_batches: expected a text, got 1"),
        ("forget_class: [3, 1.5]", "forget_class: expected an integer or a text, got 1.5"),
        ("forget_class: []", "forget_class: expected at least one value, got an empty list"),
        ("forget_class: {3: 4}", "forget_class: expected an integer or a text, got {3: 4}"),
        ("mask: best", "mask: expected one of saliency, random, dense, complement, layer_random, got 'best'"),
        ("block: 0x4", "block: expected row, element, auto or OUTxIN such as 64x64, got '0x4'"),
    ],
)
def test_wrong_keys_and_values_are_usage_errors(here, capsys, text, message):
    assert message in _refused(capsys, "unlearn", text, "--forget_class", "3", here=here)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "'a' is given twice"),
        ("a: [1", "not YAML"),
        ("a: 1\n---\nb: 2", "not YAML"),
        ("- a", "expected a mapping from flags to values, got list"),
        ("", "expected a mapping from flags to values, got NoneType"),
        ("3: a", "got the keys [3]"),
        ("a: !!python/object/apply:os.mkdir [sprung]", "not YAML"),
        ("a: !!int x", "not YAML"),
        ("? [a]\n: 1", "not YAML"),
        ("a: " + "[" * 500, "not YAML"),
        ("a: " + "b" * MAX_BYTES, "longer than 65536 bytes"),
        ("a: &x 1\nb: 2", "c.yaml: not YAML that is read here (line 1: anchors and aliases are not read, write"),
        ("a: 1\nb: *x", "c.yaml: not YAML that is read here (line 2: anchors and aliases are not read"),
        ("&x\na: 1", "line 1: anchors and aliases are not read, write the value out: &x"),
        ("seed: " + BOMB, "c.yaml: not YAML that is read here (line 1: anchors"),
        ("? &x a\n: 1", "line 1: anchors"),
    ],
)
def test_what_is_no_mapping_is_a_file_error(here, capsys, text, message):
    assert message in _refused(capsys, "unlearn", text, here=here, code=3)
    assert not (here / "sprung").exists()


def test_the_bomb_would_go_off():
    """A control: what is refused above is some hundred bytes, and a million once it is written out."""
    assert len(BOMB) < 400
    assert len(repr(yaml.safe_load(BOMB))) > 1_000_000


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (f"seed: {list(range(9999))}", 2),
        ("seed: " + "[" * 90 + "1" + "]" * 90, 2),
        ("seed: " + "b" * 60_000, 2),
        ("seed: " + "1" * 4000, 2),
        ("seed: " + "1" * 60_000, 3),
        ("block: " + "b" * 60_000, 2),
        ("mask: " + "b" * 60_000, 2),
        ("b" * 100 + ": " + "b" * 60_000, 2),
        (f"? {'b' * 60_000}\n: 1", 2),
        (f"a: !{'b' * 60_000} 1", 3),
        (f"{list(range(9999))}", 3),
        (f"{{{', '.join(f'{number}: 1' for number in range(5000))}}}", 3),
        (f"a: &{'b' * 60_000} 1", 3),
        (f"? {'b' * 20_000}\n: 1\n? {'b' * 20_000}\n: 2", 3),
    ],
    ids=lambda value: value[:9] if isinstance(value, str) else None,
)
def test_errors_quote_a_line_and_no_more(here, capsys, text, code):
    message = _refused(capsys, "unlearn", text, "--output_dir", "out", here=here, code=code)
    assert "c.yaml: " in message
    assert len(message) < 1000


def test_missing_files_and_required_flags(here, capsys):
    assert main(["doctor", "--config", "nowhere.yaml"]) == 3
    assert "nowhere.yaml: cannot be read" in capsys.readouterr().err
    assert main(["doctor", "--config", "."]) == 3
    assert main(["unlearn", "--config"]) == 2
    capsys.readouterr()
    assert "are required: --output_dir" in _refused(
        capsys, "unlearn", UNLEARN.replace("output_dir: out\n", ""), here=here
    )
    assert main(["unlearn", "--config", "nowhere.yaml", "--help"]) == 0


def test_damaged_files_are_errors_or_options(here, capsys):
    draw = random.Random(0)
    text = UNLEARN + "max_train_steps: 7\nblock: 64x64\nmerge_batches: on\nsid_alpha: 1.2\n"
    codes = []
    for _ in range(200):
        data, at = bytearray(text.encode()), draw.randrange(len(text))
        data[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(4))
        (here / "c.yaml").write_bytes(data)
        try:
            PARSER.parse_args(["unlearn", "--config", "c.yaml"])
            codes.append(0)
        except SystemExit as stop:
            codes.append(stop.code)
            assert "pecker-fast unlearn: error: " in capsys.readouterr().err
    assert set(codes) == {0, 2, 3}


# -- what is kept ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_kept_parses_to_the_same_options(command, here):
    leaf = COMMANDS[command]
    words = []
    for action in leaf._actions:
        if action.required:
            value = "3" if action.type is int else "some/where"
            words += [action.option_strings[0], value]
    words += ["--model", "m"] if command == "evaluate" else []
    more = {
        "unlearn": "--block 64x32 --mask_region up.0.,mid. --merge_batches off --generator_lr 1e-5 --quiet",
        "demo": "--forget_class 3 5 --density 0.3 --short",
    }
    options = PARSER.parse_args([*command.split(), *words, *more.get(command, "").split()])
    config_file.write(here, options.parser, options)
    again = PARSER.parse_args([*command.split(), "--config", str(here / "config.yaml")])
    assert {**vars(again), "config": None, "parser": None} == {**vars(options), "config": None, "parser": None}
    named = {action.dest for action in leaf._actions} - {"help", "config"}
    assert len(read(here / "config.yaml")) == 1 + len(named)
    assert len((here / "config.yaml").read_text().splitlines()) == 2 + len(named)  # a flag a line


def test_a_run_is_repeated_from_what_it_kept(here, capsys):
    torch.manual_seed(0)
    small = {"width": 4, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (), "norm_groups": 2}
    teacher = DDPMUNet(**small, image_size=8, channels=1, dropout=0.0)
    ddim = {"kind": "ddim", "steps": 2, "schedule": NoiseSchedule.linear().to_dict(), "sample_shape": [1, 8, 8]}
    models.save(teacher, "teacher", ddim)
    (here / "mine.yaml").write_text(
        UNLEARN + "max_train_steps: 2\ntrain_batch_size: 4\nforget_batch_size: 4\nt_init: 500\nmask_batches: 1\n"
        "generator_lr: 1e-3\nseed: 4\nmask: random\nblock: 2x2\n"
    )
    before = sorted(here.iterdir())
    assert main(["unlearn", "--config", "mine.yaml", "--dry_run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["would_write"][-1] == "out/config.yaml"
    assert sorted(here.iterdir()) == before
    assert main(["unlearn", "--config", "mine.yaml", "--quiet", "--seed", "5"]) == 0
    first = models.load("out/model").state_dict()
    assert read("out/config.yaml")["seed"] == 5
    assert main(["unlearn", "--config", "out/config.yaml", "--output_dir", "again"]) == 0
    second = models.load("again/model").state_dict()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    assert main(["unlearn", "--config", "out/config.yaml", "--output_dir", "other", "--seed", "4"]) == 0
    third = models.load("other/model").state_dict()
    assert any(not torch.equal(third[name], tensor) for name, tensor in first.items())
    told, retold = read("out/config.yaml"), read("again/config.yaml")
    assert {**told, "output_dir": None} == {**retold, "output_dir": None}
    assert main(["sample", "--model", "out/model", "--class", "3", "--output", "drawn/x.npz", "--quiet"]) == 0
    assert [path.name for path in (here / "drawn").iterdir() if path.suffix != ".json"] == ["x.npz"]
    assert capsys.readouterr().out == ""


def test_a_copy_that_cannot_be_written_is_a_file_error(here):
    options = PARSER.parse_args(["pretrain", "--output_dir", "out"])
    (here / "out").mkdir()
    (here / "out" / "config.yaml").mkdir()
    with pytest.raises(FileFormatError, match="config.yaml: cannot be written"):
        config_file.write("out", options.parser, options)
