"""Prompts and their labels, pipeline folders, embeddings, masters: what concept erasure is made of."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pipelines import write_pipeline

from pecker_fast import BlockMask, MaskConfig, apply_mask
from pecker_fast.concepts import Erasure, PipelineFolder, PromptPlan, embed_prompts, replaced, start_masters
from pecker_fast.concepts.card import Card, base_front
from pecker_fast.concepts.output import write_pipeline as write_output
from pecker_fast.concepts.prompts import TEMPLATES, read_prompts
from pecker_fast.concepts.train_methods import region_of
from pecker_fast.delta import Ledger
from pecker_fast.prompt_text import replace_concepts
from pecker_fast.regions import in_region


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipelines") / "base")


@pytest.fixture(scope="module")
def pipeline(base):
    return PipelineFolder.read(base)


# -- prompts ---------------------------------------------------------------------------------------


def test_a_file_has_one_prompt_a_line(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\r\n\r\n  # a comment\n  a dög  \n".encode())
    assert read_prompts(tmp_path / "prompts.txt") == ("a cat", "a dög")


@pytest.mark.parametrize(
    ("prompt", "changed"),
    [
        ("Brad  Pitt, smiling", "a man, smiling"),
        ("a photo of BRAD PITT and brad pitt", "a photo of a man and a man"),
        ("brad pittsburgh", "brad pittsburgh"),
        ("new york city at night", "a village at night"),
        ("new york", "a town"),
    ],
)
def test_concepts_are_replaced_as_whole_words(prompt, changed):
    table = {"brad pitt": "a man", "new york": "a town", "new york city": "a village"}
    assert replace_concepts(prompt, table) == changed


def test_what_takes_its_place_is_taken_literally():
    assert replace_concepts("a cat", {"cat": r"\1 \g<0>"}) == r"a \1 \g<0>"


def test_a_concept_fills_the_templates():
    found = Erasure.of("cat", "dog")
    assert found.forget == tuple(template.format("cat") for template in TEMPLATES)
    assert found.override == tuple(template.format("dog") for template in TEMPLATES)
    several = Erasure.of("cat; bird", "dog", templates=("a {}",))
    assert (several.forget, several.override) == (("a cat", "a bird"), ("a dog", "a dog"))
    assert Erasure.of("cat;bird", "dog; tree", templates=("a {}",)).override == ("a dog", "a tree")


def test_overrides_line_by_line_or_one_for_all():
    assert Erasure.of(forget=["x", "y", "x"], override=["a", "b", "a"]).override == ("a", "b")
    assert Erasure.of(forget=["x", "y"], override=["a"]).override == ("a", "a")


def test_labels_are_rows_of_the_table():
    erasure = Erasure.of("cat", "dog", forget=["a cat", "cat at night"])
    plan = PromptPlan.of(erasure, ["a dog", "a bird", "a bird"], negative="a cat")
    assert plan.rows == ("a cat", "cat at night", "a dog", "a bird", "dog at night", "a cat", "")
    assert (plan.forget, plan.override, plan.retain, plan.negative) == ((0, 1), (2, 4), (2, 3), (5,))
    assert plan.num_classes == 6  # the null prompt's row
    assert PromptPlan.from_dict(plan.to_dict()) == plan
    assert PromptPlan.of(erasure).retain == (2,) and PromptPlan.of(erasure).retained_texts == ()


def test_spellings_of_one_prompt_are_one_prompt():
    """As to CLIP's tokenizer: lower case, single spaces."""
    erasure = Erasure.of("Brad Pitt;brad  pitt", forget=["Brad Pitt ", "brad  PITT", "a man, brad pitt"])
    assert (erasure.concepts, erasure.forget) == (("Brad Pitt",), ("Brad Pitt", "a man, brad pitt"))
    assert Erasure.of(forget=["x", "X", "y"], override=["A b", "a  B", "c"]).override == ("A b", "c")
    plan = PromptPlan.of(Erasure.of(forget=["x"], override=["A  dog"]), ["a dog", "a Dog", "a bird"])
    assert plan.texts == ("x", "a dog", "a bird") and plan.override == (1,) and plan.retain == (1, 2)


def test_an_embedding_takes_spellings_for_one(pipeline):
    one, other = embed_prompts(pipeline, ["a photo of the cat", " A photo  of the CAT"]).embeddings
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Erasure.of(), "nothing to erase"),
        (lambda: Erasure.of(forget=["a", " "]), "prompt 2 is empty"),
        (lambda: Erasure.of("cat", forget=["a cat", "a caterpillar"]), "'a caterpillar' is to be forgotten, but does"),
        (lambda: Erasure.of(forget=["a cat"], override_concept="dog"), "give --erase_concept"),
        (lambda: Erasure.of("cat", "dog", override=["x"]), "overrides are given twice"),
        (lambda: Erasure.of("cat", "a big cat"), "contains 'cat', which is to be erased"),
        (lambda: Erasure.of("cat; ", "dog"), "separated by ';'"),
        (lambda: Erasure.of("cat", "a; b"), "one, or one for each of the 1 erased, got 2"),
        (lambda: Erasure.of(forget=["a", "b", "c"], override=["x", "y"]), "each of the 3 forgotten ones"),
        (lambda: Erasure.of(forget=["a", "a"], override=["x", "y"]), "two overrides"),
        (lambda: Erasure.of("cat", templates=["no place"]), "has no {}"),
        (lambda: PromptPlan.of(Erasure.of("cat"), ["a dog", "cat"]), "'cat' is to be forgotten and to be retained"),
        (lambda: PromptPlan.of(Erasure.of("cat"), ["A Photo  of cat"]), "'a photo of cat' is to be forgotten and"),
        (lambda: PromptPlan.of(Erasure.of("cat"), ["my CAT"]), "retained prompt 'my CAT' contains 'cat', which is"),
        (lambda: Erasure.of("brad pitt", override=["a man", *7 * ["Brad  Pitt"]]), "override prompt 'Brad  Pitt' con"),
        (lambda: PromptPlan.of(Erasure(("cat",), ("a cat",), ("the Cat",))), "override prompt 'the Cat' contains"),
        (lambda: PromptPlan.of(Erasure.of(forget=["a", "b"], override=["c", "A "])), "'A' is itself to be forgotten"),
        (lambda: Erasure.of(forget=["a", "A"], override=["x", "y"]), "two overrides"),
        (lambda: PromptPlan.of(Erasure.of("cat"), [" "]), "one is empty"),
        (lambda: PromptPlan.of(Erasure.of("cat"), negative=" "), "the negative prompt is empty"),
        (lambda: PromptPlan.of(Erasure.of(forget=["a"], override=["a"])), "itself to be forgotten"),
    ],
)
def test_prompts_that_make_no_sense(make, text):
    with pytest.raises(ValueError, match=text.replace("(", r"\(").replace("{", r"\{")):
        make()


# -- folders ---------------------------------------------------------------------------------------


def test_a_folder_is_described_without_its_weights(pipeline, monkeypatch):
    monkeypatch.setattr(PipelineFolder, "tensors", None)
    assert (pipeline.sample_shape, pipeline.prediction_type, pipeline.t_init) == ((4, 8, 8), "epsilon", None)
    assert sum(torch.Size(shape).numel() for shape in pipeline.shapes.values()) == 203204
    assert pipeline.components == {"scheduler", "text_encoder", "tokenizer", "unet", "vae"}


def test_embeddings_are_the_pipelines(base, pipeline):
    prompts = ["a photo of a cat", "", "three dogs"]
    expected = StableDiffusionPipeline.from_pretrained(base, local_files_only=True).encode_prompt(
        prompts, torch.device("cpu"), 1, False
    )[0]
    found = embed_prompts(pipeline, prompts)
    assert torch.equal(found.embeddings, expected) and found.added == {}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_unet_has_weights_of_its_own_and_one_copy_of_them(dtype, pipeline, monkeypatch):
    tensors = pipeline.tensors()
    monkeypatch.setattr(torch.Tensor, "clone", None)
    unet = pipeline.unet(tensors, dtype)
    for name, weight in unet.state_dict().items():
        assert torch.equal(weight, tensors[name].to(dtype)) and weight.data_ptr() != tensors[name].data_ptr()


@pytest.mark.parametrize("method", ["xattn", "selfattn", "noxattn", "full"])
def test_train_methods_are_regions(method, pipeline):
    inside = {
        "xattn": lambda name: ".attn2." in name,
        "selfattn": lambda name: ".attn1." in name,
        "noxattn": lambda name: (
            ".attn2." not in name and name.split(".")[0] not in ("conv_norm_out", "conv_out", "time_embedding")
        ),
        "full": lambda name: True,
    }[method]
    found = in_region(pipeline.shapes, MaskConfig(region=region_of(method, pipeline.shapes)).region)
    assert found == {name for name in pipeline.shapes if inside(name)} and found


@pytest.mark.parametrize(("block", "stored"), [("row", torch.float32), ((8, 8), torch.float16)])
def test_masters_have_the_bits_of_the_file(block, stored, pipeline):
    tensors = {name: tensor.to(stored) for name, tensor in pipeline.tensors().items()}
    unet = pipeline.unet(tensors, torch.bfloat16).to(memory_format=torch.channels_last)
    active = apply_mask(unet, BlockMask.random(unet, 0.3, block))
    start_masters(active, tensors)
    same = replaced(active, tensors)  # nothing has trained yet
    assert all(torch.equal(same[name], tensor) for name, tensor in tensors.items())
    active.check()
    with torch.no_grad():
        active.values += 1
    moved = replaced(active, tensors)
    for name, tensor in tensors.items():
        flags = active.mask.parameters[name].to_dense()
        assert torch.equal(moved[name], torch.where(flags, (tensor.float() + 1).to(stored), tensor))
        assert moved[name].is_contiguous()


def test_what_is_copied_along(base, pipeline, tmp_path):
    """No older copies of the weights, and no file beside the components but a licence."""
    for stray in ("v1.safetensors", "LICENSE", "unet/diffusion_pytorch_model.fp16.safetensors"):
        (base / stray).write_bytes(b"x")
    try:
        write_output(pipeline, tmp_path / "out", pipeline.tensors(), Ledger())
        files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
        expected = {path.relative_to(base).as_posix() for path in base.rglob("*")}
        assert files == expected - {"v1.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"}
        for name in files - {"unet/diffusion_pytorch_model.safetensors"}:
            if (base / name).is_file():
                assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    finally:
        for stray in ("v1.safetensors", "LICENSE", "unet/diffusion_pytorch_model.fp16.safetensors"):
            (base / stray).unlink()


def test_the_card_passes_on_the_licence_and_no_path(tmp_path, pipeline):
    (tmp_path / "README.md").write_text("---\nlicense: creativeml-openrail-m\ntags: [a]\n---\n# Old\n")
    assert base_front(tmp_path)["license"] == "creativeml-openrail-m"
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    assert base_front(tmp_path) == {} == base_front(tmp_path / "nowhere")
    text = str(Card(pipeline, "esd", False, ["cat"], ["a `cat`"], None, 0.1, {"steps": 2}))
    assert str(pipeline.path.parent) not in text and "base_model: base" in text and "not proven absent" in text
