"""Files of prompts and protocols: what they say, what is refused, and that damage never goes unnoticed."""

import csv
import hashlib
import json
import random
import time
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from pecker_fast import prompt_files
from pecker_fast.errors import FileFormatError
from pecker_fast.prompt_files import EvaluationPrompt, read_prompts, with_seeds
from pecker_fast.prompt_protocols import FOLDER, protocol_names, read_protocol

ROOT = Path(__file__).parents[1]
TABLE = (
    "case_number,prompt,evaluation_seed,evaluation_guidance\n"
    '0,"a cat, asleep",7,7.5\n\n1,"two ""dogs""\nat play",8.0,3\n'
)
CAPTIONS = {
    "info": {},
    "annotations": [{"image_id": i // 2, "id": i, "caption": f"caption {i} \n"} for i in range(12)],
}
PROTOCOL = "name: mine\nsource: nobody\nseeds: 2\ntemplates:\n  - 'a {concept}'\n  - 'the {concept} of a {concept}'\n"


def written(folder, name, content):
    file = folder / name
    file.unlink(missing_ok=True)  # some file systems wait for the disk when a file is written over
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def texts(read):
    return [prompt.text for prompt in read.prompts]


# -- readers ---------------------------------------------------------------------------------------


def test_a_text_has_a_prompt_a_line(tmp_path):
    content = '﻿a cat \r\n\r\n  a dog, "quoted"\n# a comment'.encode()
    read = read_prompts(written(tmp_path, "p.txt", content))
    assert texts(read) == ["a cat", 'a dog, "quoted"']
    assert read.sha256 == hashlib.sha256(content).hexdigest() and read.source == str(tmp_path / "p.txt")
    assert {(prompt.seed, prompt.guidance_scale) for prompt in read.prompts} == {(None, None)}


def test_a_table_has_seeds_and_guidance(tmp_path):
    read = read_prompts(written(tmp_path, "p.csv", TABLE))
    assert read.prompts == (
        EvaluationPrompt("a cat, asleep", 7, 7.5),
        EvaluationPrompt('two "dogs"\nat play', 8, 3.0),
    )
    tabs = "prompt\tsd_seed\tsd_guidance_scale\tconcept\tlabel\na cat, asleep\t4294967295\t7\tcat\t3\n"
    read = read_prompts(written(tmp_path, "p.tsv", tabs))
    assert read.prompts == (EvaluationPrompt("a cat, asleep", 4294967295, 7.0, "cat", 3),)


def test_the_first_known_column_of_seeds_counts(tmp_path):
    read = read_prompts(written(tmp_path, "p.csv", "sd_seed,prompt,evaluation_seed\n1,a cat,2\n"))
    assert read.prompts[0].seed == 2


def test_captions_are_one_an_image(tmp_path):
    file = written(tmp_path, "c.json", json.dumps(CAPTIONS))
    assert texts(read_prompts(file)) == [f"caption {2 * i}" for i in range(6)]
    assert texts(read_prompts(file, limit=2)) == ["caption 0", "caption 2"]
    drawn = [texts(read_prompts(file, limit=3, sample_seed=seed)) for seed in (0, 0, 1)]
    numbers = [int(text.split()[1]) for text in drawn[0]]
    assert drawn[0] == drawn[1] != drawn[2] and numbers == sorted(set(numbers)) and len(numbers) == 3


def test_every_prompt_is_drawn_with_every_seed_unless_it_has_its_own():
    drawn = with_seeds([EvaluationPrompt("a"), EvaluationPrompt("b", 9)], [0, 1])
    assert [(prompt.text, prompt.seed) for prompt in drawn] == [("a", 0), ("a", 1), ("b", 9)]
    with pytest.raises(ValueError, match="'a' has no seed"):
        with_seeds([EvaluationPrompt("a")], [])


# -- what is refused -------------------------------------------------------------------------------

HEADER = "prompt,evaluation_seed,evaluation_guidance\n"
REFUSED = [
    ("p.txt", "", "expected 1 to"),
    ("p.txt", b"fine\na \xff\n", "line 2: not UTF-8"),
    ("p.txt", "fine\n\nbad\x00\n", "line 3: the prompt has control characters"),
    ("p.txt", "fine\n" + "a" * 10_001, "line 2: expected at most 10000 characters"),
    ("p.md", "a cat", r"expected a file that ends in .txt, .csv, .tsv, .json, got '.md'"),
    ("p.csv", "text,seed\na,1\n", "line 1: expected a column named prompt"),
    ("p.csv", "prompt,seed,seed\na,1,2\n", "line 1: a column comes twice: 'seed'"),
    ("p.csv", HEADER, "expected 1 to"),
    ("p.csv", HEADER + "a,1,7\nb,2\n", "line 3: expected 3 columns, got 2"),
    ("p.csv", HEADER + "a,1,7\n ,2,7\n", "line 3: expected a prompt, got ' '"),
    ("p.csv", HEADER + "a,-1,7\n", "line 2: evaluation_seed: expected an integer"),
    ("p.csv", HEADER + "a,1.5,7\n", "line 2: evaluation_seed: expected an integer"),
    ("p.csv", HEADER + "a,٣,7\n", "line 2: evaluation_seed: expected an integer"),
    ("p.csv", HEADER + f"a,{2**63},7\n", "line 2: evaluation_seed: expected an integer"),
    ("p.csv", HEADER + "a,1,nan\n", "line 2: evaluation_guidance: expected a number"),
    ("p.csv", HEADER + "a,1,\n", "line 2: evaluation_guidance: expected a number"),
    ("p.csv", HEADER + '"a,1,7\n', "line 2: not a table that can be read"),
    ("p.csv", HEADER + '"a"b,1,7\n', "line 2: not a table that can be read"),
    ("c.json", "[", "not JSON"),
    ("c.json", "[" * 100_000, "not JSON"),
    ("c.json", '{"images": []}', "expected COCO's captions"),
    ("c.json", '{"annotations": []}', "expected 1 to"),
    (
        "c.json",
        '{"annotations": [{"image_id": 1, "caption": "a"}, {"caption": "b"}]}',
        r"annotations\[1\]: expected an",
    ),
    ("c.json", '{"annotations": [{"image_id": 1, "caption": 4}]}', r"annotations\[0\]: expected a prompt, got 4"),
]


@pytest.mark.parametrize(("name", "content", "said"), REFUSED)
def test_what_is_wrong_is_named_with_its_line(tmp_path, name, content, said):
    with pytest.raises(FileFormatError, match=said) as refused:
        read_prompts(written(tmp_path, name, content))
    assert str(tmp_path / name) in str(refused.value)


def test_missing_and_endless_files(tmp_path, monkeypatch):
    with pytest.raises(FileFormatError, match=r"p\.txt: cannot be read"):
        read_prompts(tmp_path / "p.txt")
    monkeypatch.setattr(prompt_files, "MAX_BYTES", 10)
    with pytest.raises(FileFormatError, match="longer than 10 bytes"):
        read_prompts(written(tmp_path, "p.txt", "a" * 11))
    with pytest.raises(ValueError, match="limit"):
        read_prompts(written(tmp_path, "p.txt", "a"), limit=0)


WHOLE = {
    "p.txt": "a cat\na dög\n" * 4,
    "p.csv": TABLE,
    "p.tsv": TABLE.replace(",", "\t"),
    "c.json": json.dumps(CAPTIONS),
}


@pytest.mark.parametrize("name", WHOLE)
def test_damaged_files_are_refused_or_read_as_what_they_say(tmp_path, name):
    """Never anything but our error, never a prompt that is not a text of the file, and never slow."""
    content, draw = WHOLE[name].encode(), random.Random(name)
    refused = 0
    started = time.process_time()
    for _ in range(200):
        changed = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(changed))
            match draw.randrange(3):
                case 0:
                    changed[at] = draw.randrange(256)
                case 1:
                    del changed[at : at + draw.randrange(1, 9)]
                case 2:
                    changed[at:at] = draw.choice((b'"', b",", b"\n", b"\0", b"\xff", b"[", b"9" * 30))
        try:
            read = read_prompts(written(tmp_path, name, bytes(changed)))
        except FileFormatError as error:
            refused += 1
            assert str(tmp_path / name) in str(error) and len(str(error)) < 400
            continue
        assert all(prompt.text.strip() and len(prompt.text) <= len(changed) for prompt in read.prompts)
        assert all(prompt.seed is None or 0 <= prompt.seed < 2**63 for prompt in read.prompts)
    assert 10 < refused < 200 and time.process_time() - started < 30


def test_csv_module_is_left_as_it_was(tmp_path):
    before = csv.field_size_limit()
    with pytest.raises(FileFormatError, match="field larger than field limit"):
        read_prompts(written(tmp_path, "p.csv", HEADER + "a" * (before + 1) + ",1,7\n"))
    assert csv.field_size_limit() == before


# -- protocols -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", protocol_names())
def test_protocols_of_the_package(name):
    protocol = read_protocol(name)
    assert protocol.name == name and "our own" in protocol.source
    assert len(set(protocol.templates)) == len(protocol.templates)
    prompts = protocol.prompts("green horse", 3)
    assert len(prompts) == len(protocol.templates) * len(protocol.seeds) == len(set(prompts))
    assert all("green horse" in prompt.text and "{" not in prompt.text for prompt in prompts)
    assert {(prompt.concept, prompt.label, prompt.guidance_scale) for prompt in prompts} == {("green horse", 3, None)}


def test_the_celebrity_protocol_has_the_shape_of_the_paper():
    protocol = read_protocol("celebrity")
    assert (len(protocol.templates), protocol.seeds) == (50, tuple(range(20)))
    assert len(protocol.prompts("x")) == 1000


def test_protocols_are_installed():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["pecker_fast"]
    assert len(protocol_names()) == 5
    for file in FOLDER.iterdir():
        if file.is_file():
            relative = file.relative_to(ROOT / "pecker_fast").as_posix()
            assert any(fnmatch(relative, pattern) for pattern in patterns), relative


def test_a_protocol_of_ones_own(tmp_path):
    file = written(tmp_path, "m.yaml", PROTOCOL + "guidance_scale: 3\nnum_inference_steps: 20\nneighbours: [dog]\n")
    protocol = read_protocol(file)
    assert (protocol.guidance_scale, protocol.num_inference_steps, protocol.neighbours) == (3.0, 20, ("dog",))
    assert [(prompt.text, prompt.seed) for prompt in protocol.prompts(" cat ")] == [
        ("a cat", 0),
        ("a cat", 1),
        ("the cat of a cat", 0),
        ("the cat of a cat", 1),
    ]
    assert protocol.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="concept: expected a text"):
        protocol.prompts(" ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("name: mine\n", ""), "expected the key name"),
        (("name: mine\n", "name: mine\nseed: 3\n"), "unknown key 'seed'"),
        (("seeds: 2", "seeds: 0"), "seeds: expected how many"),
        (("seeds: 2", "seeds: [1, -1]"), "seeds: expected how many"),
        (("seeds: 2", "seeds: true"), "seeds: expected how many"),
        (("seeds: 2", "seeds: [1, 2]\nguidance_scale: -1"), "guidance_scale: expected a number"),
        (("seeds: 2", "seeds: 2\nnum_inference_steps: 1.5"), "num_inference_steps: expected a number"),
        (("seeds: 2", "seeds: 1000000"), "seeds: expected how many"),
        (("a {concept}'\n", "a cat'\n"), "expected {concept} in each, got 'a cat'"),
        (("- 'a {concept}'", "- 4"), r"templates\[0\]: expected a prompt, got 4"),
        (("templates:\n", "templates: []\nneighbours:\n"), "templates: expected at least one text"),
        (("templates:\n", "templates: &a\n"), "anchors and aliases are not read"),
    ],
)
def test_malformed_protocols(tmp_path, change, said):
    assert change[0] in PROTOCOL
    with pytest.raises(FileFormatError, match=said) as refused:
        read_protocol(written(tmp_path, "m.yaml", PROTOCOL.replace(*change, 1)))
    assert "m.yaml" in str(refused.value)


def test_unknown_protocols(tmp_path):
    with pytest.raises(
        FileFormatError, match="expected one of celebrity, nudity, object, short, style, or a .yaml file"
    ):
        read_protocol("person")
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_protocol(tmp_path / "none.yaml")
