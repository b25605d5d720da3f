"""Which spellings are one prompt, everywhere that prompts are compared; and lists that are taken for one concept."""

import unicodedata
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pipelines import write_pipeline

from pecker_fast.cli import main
from pecker_fast.commands import concept_estimate
from pecker_fast.commands.concept_prompts import prompt_sets
from pecker_fast.concept_tables import set_values
from pecker_fast.concepts import Erasure, PipelineFolder, PromptPlan, embed_prompts
from pecker_fast.concepts.record import EarlierErasure, merged
from pecker_fast.errors import FileFormatError, PeckerFastWarning
from pecker_fast.prompt_files import EvaluationPrompt, PromptSet, read_prompts
from pecker_fast.prompt_protocols import read_protocol
from pecker_fast.prompt_text import contains, normal, replace_concepts, tidy

NFC, NFD = (unicodedata.normalize(form, "zoé") for form in ("NFC", "NFD"))
ZERO_WIDTH = "zo\u200bé"
SPELLINGS = [NFD, "ZOÉ", NFD.upper(), ZERO_WIDTH, "\ufeffzoé", "zoé\u2060", "\u3000zoé"]
FLAGS = dict.fromkeys(
    ("neighbour_prompts", "unrelated_prompts", "max_prompts", "seeds", "neighbour_classes", "prompts", "concept")
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return PipelineFolder.read(write_pipeline(tmp_path_factory.mktemp("pipelines") / "base"))


# -- one prompt ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_prompt_is_not_forgotten_and_kept_in_another_spelling(spelling):
    with pytest.raises(ValueError, match="forgotten and to be retained"):
        PromptPlan.of(Erasure.of("zoé"), retain=[f"a photo\u00a0of {spelling}"])
    with pytest.raises(ValueError, match="contains 'zoé'"):
        PromptPlan.of(Erasure.of("zoé"), retain=[f"somebody like {spelling}"])
    with pytest.raises(ValueError, match="itself to be forgotten"):
        PromptPlan.of(Erasure.of(forget=["zoé", "x"], override=["y", spelling]))
    with pytest.raises(ValueError, match="contains 'zoé'"):
        Erasure.of("zoé", f"a {spelling}")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_are_numbered_once(spelling):
    assert Erasure.of(f"zoé; {spelling}").concepts == ("zoé",)
    plan = PromptPlan.of(Erasure.of(forget=["x", "X"], override=["zoé", spelling]), [spelling, "zoé"])
    assert len(plan.texts) == 2 and plan.override == plan.retain == (1,)
    replaced = Erasure.of("zoé", "a man", forget=[f"the {spelling}"]).override
    assert replaced is not None and list(map(normal, replaced)) == ["the a man"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_earlier_request_knows_the_spelling(spelling):
    before = PromptPlan(("a " + NFD,), (0,), None, (0,))
    earlier = EarlierErasure(Path("before"), None, before, one_step=True)
    erasure = Erasure.of(forget=[f"a {spelling}"])
    with pytest.raises(ValueError, match="is forgotten already by before"):
        merged(PromptPlan.of(erasure), erasure, [earlier], [])


@pytest.mark.parametrize("spelling", [*SPELLINGS, "a zoé\u2028", "zoe\u0301"])
def test_what_is_embedded_is_what_the_normal_form_says(spelling, pipeline):
    one, other = embed_prompts(pipeline, ["zoé", tidy(spelling.removeprefix("a "))]).embeddings
    assert torch.equal(one, other) and normal(spelling.removeprefix("a ")) == "zoé"


@pytest.mark.parametrize(
    "text", ["ΣΑΣ", "İstanbul", "a\u00a0 Cat", "STRASSE", "straße", "ｃａｔ", "it’s", "ﬁsh", "\u212b"]
)
def test_the_normal_form_is_the_tokenizers(text, pipeline):
    normalizer = pipeline.tokenizer().backend_tokenizer.normalizer
    assert normal(text) == normalizer.normalize_str(text)


def test_what_the_tokenizer_tells_apart_stays_apart():
    for one, other in [("it's zoé", "it’s zoé"), ("ｃａｔ", "cat"), ("ﬁsh", "fish"), ("straße", "strasse")]:
        PromptPlan.of(Erasure.of(forget=[one]), retain=[other])


@pytest.mark.parametrize(("one", "other"), [("a cat.", "a cat ."), ("cat,dog", "cat, dog"), ("4 cats", "4cats")])
def test_the_pipelines_own_tokenizer_has_the_last_word(one, other, pipeline):
    retained = PromptPlan.of(Erasure.of(forget=["x", one]), retain=[other, "y"])
    override = PromptPlan.of(Erasure.of(forget=["x", one], override=["y", other]))
    for plan in (retained, override):
        with pytest.raises(ValueError, match="has the tokens of"):
            plan.check_apart(pipeline.token_ids(plan.texts))
    apart = PromptPlan.of(Erasure.of(forget=["x"]), retain=[one, other])
    apart.check_apart(pipeline.token_ids(apart.texts))


def test_unlearn_asks_the_tokenizer(pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("forget.txt").write_text("a cat.\n")
    Path("keep.txt").write_text("a dog\na cat .\n")
    flags = ("--forget_prompts", "forget.txt", "--retain_prompts", "keep.txt", "--output_dir", "out", "--dry_run")
    assert main(["unlearn", "--pretrained_model_name_or_path", str(pipeline.path), "--device", "cpu", *flags]) == 2
    assert "'a cat .' has the tokens of 'a cat.'" in capsys.readouterr().err


def test_concepts_are_found_and_replaced_in_any_spelling():
    assert contains(f"a {NFD} here", NFC) and contains(f"a {NFC}", NFD) and contains(f"a {ZERO_WIDTH}", "ZOÉ")
    assert not contains(f"a {NFD}", "zoe")  # another word: the accent is part of its last letter
    assert replace_concepts(f"a {NFD}, {ZERO_WIDTH}", {NFC: "dog"}) == "a dog, dog"


# -- files and evaluation --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        f"{NFD}\r\na cat\r\n".encode(),
        f"{NFC}\ra cat\r".encode(),  # as some spreadsheets still write texts
        f"\ufeff# kept\n{NFC}\n\ufeffa cat\n".encode(),  # two files with byte order marks, put together
        f"{ZERO_WIDTH}\n\u200b\n\u00a0a cat\u3000\n".encode(),
    ],
)
def test_files_hold_the_same_prompts_however_they_were_saved(content, tmp_path):
    (tmp_path / "p.txt").write_bytes(content)
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.txt").prompts] == [NFC, "a cat"]


def test_tables_and_protocols_are_read_alike(tmp_path):
    (tmp_path / "p.csv").write_bytes(f"\ufeffprompt,concept\r\na {NFD},{NFD}\r\na {NFC},{ZERO_WIDTH}\r\n".encode())
    one, other = read_prompts(tmp_path / "p.csv").prompts
    assert one == other == EvaluationPrompt("a zoé", concept="zoé")
    (tmp_path / "p.yaml").write_text(f"name: n\nsource: s\nseeds: 1\ntemplates: ['{NFD} and {{concept}}']\n", "utf-8")
    assert read_protocol(tmp_path / "p.yaml").prompts(NFD)[0].text == "zoé and zoé"
    (tmp_path / "q.txt").write_text("a cat\n\u200b\ufeff\n", "utf-8")
    assert len(read_prompts(tmp_path / "q.txt").prompts) == 1
    (tmp_path / "q.csv").write_text("prompt\n\u200b\n", "utf-8")
    with pytest.raises(FileFormatError, match="expected a prompt"):
        read_prompts(tmp_path / "q.csv")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_neighbours_are_not_the_concept_in_another_spelling(spelling, tmp_path):
    options = SimpleNamespace(**FLAGS | {"protocol": "short", "concept": "zoé", "neighbour_concepts": [spelling, "x"]})
    with pytest.raises(ValueError, match="expected different ones, and not the concept itself"):
        prompt_sets(options)
    (tmp_path / "p.txt").write_text(f"a {spelling}\n", "utf-8")
    given = {"protocol": None, "prompts": tmp_path / "p.txt", "neighbour_concepts": ["ann"]}
    sets, _ = prompt_sets(SimpleNamespace(**FLAGS | {"concept": "zoé"} | given))
    assert {normal(prompt.text) for prompt in sets["neighbours"].prompts} == {"a ann"}


@pytest.mark.parametrize("spelling", [NFD, ZERO_WIDTH, "\u200bzoé"])
def test_results_count_and_hash_spellings_alike(spelling):
    def values(*texts):
        prompts = tuple(EvaluationPrompt(text, 0, concept=text) for text in texts)
        return set_values(PromptSet(prompts, "", ""), 0, {"after": {}})

    assert values(NFC, "x")["drawn_sha256"] == values(spelling, "x")["drawn_sha256"]
    both = values(NFC, spelling)
    assert both["prompts"] == 1 and "by_concept" not in both


# -- one concept, or several? ----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["cat, dog", "cat,dog", "cat | dog", "cat、dog", "cat，dog", "cat；dog", "cat\ndog"])
def test_a_list_that_is_one_concept_is_warned_of(text):
    with pytest.warns(PeckerFastWarning, match=r"concept to erase.* separated by ';': 'cat; dog'"):
        assert len(Erasure.of(text).concepts) == 1
    with pytest.warns(PeckerFastWarning, match=r"override concept.* separated by ';': 'cat; dog'"):
        Erasure.of("bird", text)
    with pytest.warns(PeckerFastWarning, match=r"retained prompts.*one a line.*';'"):
        PromptPlan.of(Erasure.of("bird"), retain=[text])
    options = SimpleNamespace(**FLAGS | {"protocol": "short", "concept": "bird", "neighbour_concepts": [text]})
    with pytest.warns(PeckerFastWarning, match=r"neighbour_concepts.* separated by ';': 'cat; dog'"):
        prompt_sets(options)
    options = SimpleNamespace(**FLAGS | {"protocol": "short", "concept": text, "neighbour_concepts": ["bird"]})
    with pytest.warns(PeckerFastWarning, match="--concept: .* is taken for one"):
        prompt_sets(options)


def test_what_is_meant_as_it_is_written_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Erasure.of("cat; dog", "a bird; a tree", templates=["a {}, 4k"])
        PromptPlan.of(Erasure.of("cat"), retain=["a dog, asleep", "a bird, 4k"])


def test_neighbours_are_separated_as_concepts_are():
    options = {"protocol": "short", "concept": "cat", "neighbour_concepts": ["dog; bird", "fox"]}
    sets, _ = prompt_sets(SimpleNamespace(**FLAGS | options))
    assert {prompt.concept for prompt in sets["neighbours"].prompts} == {"dog", "bird", "fox"}


@pytest.mark.parametrize("how", ["flag", "file"])
def test_the_command_line_says_it_in_one_line_before_anything_else(how, pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(concept_estimate, "estimate", lambda job: ({}, ""))  # which takes seconds
    Path("keep.txt").write_text("a bird\na tree\n")
    Path("run.yaml").write_text('erase_concept: "cat, dog"\n')
    given = ("--erase_concept", "cat, dog") if how == "flag" else ("--config", "run.yaml")
    flags = ("--retain_prompts", "keep.txt", "--output_dir", "out", "--override_concept", "cat")
    assert main(["unlearn", "--pretrained_model_name_or_path", str(pipeline.path), *given, *flags, "--dry_run"]) == 0
    error = capsys.readouterr().err
    assert error.startswith("pecker-fast unlearn: warning: the concept to erase: 'cat, dog' is taken for one;"), error
    assert error.count("\n") == 1 and "'cat; dog'" in error


@pytest.mark.parametrize(
    "make",
    [
        lambda: PromptPlan.of(Erasure.of("cat"), retain="a dog"),
        lambda: Erasure.of(forget="a cat"),
        lambda: Erasure.of("cat", override="a dog"),
        lambda: Erasure.of("cat", templates="a {}"),
    ],
)
def test_one_text_in_the_place_of_a_list_is_refused(make):
    with pytest.raises(TypeError, match="expected a list of texts, got one"):
        make()


def test_a_list_in_the_place_of_one_text_is_refused():
    with pytest.raises(TypeError, match="several concepts separated by ';', got list"):
        Erasure.of(["cat", "dog"])
