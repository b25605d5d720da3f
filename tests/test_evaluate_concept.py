"""``evaluate`` of a pipeline: what is measured on its images, and that damage shows where there is some."""

import json
import re

import numpy as np
import pipelines
import pytest
import torch
import transformers
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from pecker_fast import models
from pecker_fast.cli import main
from pecker_fast.commands.evaluate_concept import _text
from pecker_fast.concept_draws import check_pipeline, draw, is_pipeline, load_pipeline, sampling_of
from pecker_fast.concept_evaluation import DrawSettings, evaluate_concept
from pecker_fast.concept_tables import collect
from pecker_fast.detectors import ClipScore, External
from pecker_fast.errors import FileFormatError, NonFiniteError
from pecker_fast.evaluate_flags import CLASS_ONLY, PIPELINE_ONLY
from pecker_fast.metrics import wilson_interval
from pecker_fast.models import DDPMUNet, DigitsClassifier
from pecker_fast.parser import build_parser
from pecker_fast.prompt_files import EvaluationPrompt, PromptSet

QUICK = ("--num_inference_steps", "1", "--guidance_scale", "0", "--quiet")
SETTINGS = DrawSettings(num_inference_steps=2, guidance_scale=3.0)


def bright(images):
    return images.mean((1, 2, 3)) / 255


def prompt_set(*texts, seeds=2, concept=None):
    prompts = [EvaluationPrompt(text, seed, None, concept or text) for text in texts for seed in range(seeds)]
    return PromptSet(tuple(prompts), "here", "digest")


SETS = {"concept": prompt_set("cat"), "neighbours": prompt_set("dog", "red bird")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return pipelines.write_three(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="module")
def original(folders):
    return load_pipeline(check_pipeline(folders / "original"), "cpu", torch.float32)


@pytest.fixture(scope="module")
def clip(tmp_path_factory, folders):
    """A CLIP of random weights with the tokens of the pipeline."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(folders / "original" / "tokenizer", local_files_only=True)
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1, "pad_token_id": len(tokenizer) - 1}
    text = shared | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": pipelines.MAX_TOKENS}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=shared | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    )
    model.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


# -- what is measured ------------------------------------------------------------------------------


def test_an_unchanged_model_has_no_damage_and_a_changed_one_has(folders):
    detectors = {"bright": External(bright, threshold=0.5)}
    results = {}
    for name in ("original", "changed"):
        evaluation = evaluate_concept(folders / name, SETS, detectors, original=folders / "original", settings=SETTINGS)
        assert evaluation.values["same_sampling"] is True
        results[name] = evaluation.values["sets"]
    for name, found in results["original"].items():
        assert found["change"]["changed"] == {
            "n": found["images"],
            "share": 0.0,
            "ci95": list(wilson_interval(0, found["images"])),
        }
        assert found["change"]["mean_absolute_difference"]["mean"] == 0 and found["change"]["psnr_db"] is None
        pair = found["measures"]["bright"]["probability"]
        assert pair["before"] == pair["after"] and pair["difference"]["mean"] == 0, name
    for found in results["changed"].values():
        assert found["change"]["changed"]["share"] == 1 and found["change"]["mean_absolute_difference"]["mean"] > 0.01
        assert 0 < found["change"]["psnr_db"] < 60
        assert found["measures"]["bright"]["probability"]["difference"]["mean"] != 0
    assert [found["images"] for found in results["changed"].values()] == [2, 4]
    assert {name: part["images"] for name, part in results["changed"]["neighbours"]["by_concept"].items()} == {
        "dog": 2,
        "red bird": 2,
    }


def test_figures_are_those_of_the_images(folders, original):
    seen, threshold = {}, 0.5

    def keep(side, positions, pixels):
        for position, image in zip(positions, pixels, strict=True):
            seen[side, position] = image

    evaluation = evaluate_concept(
        folders / "changed",
        SETS,
        {"bright": External(bright, threshold=threshold)},
        original=folders / "original",
        settings=SETTINGS,
        on_images=keep,
    )
    after, before = (np.stack([seen[side, index] for index in range(6)]) for side in ("after", "before"))
    gap = np.abs(after[2:].astype(float) - before[2:]) / 255
    found = evaluation.values["sets"]["neighbours"]
    assert found["change"]["mean_absolute_difference"]["mean"] == pytest.approx(gap.mean())
    assert found["change"]["psnr_db"] == pytest.approx(-10 * np.log10((gap**2).mean()))
    shares = found["measures"]["bright"]["seen"]
    for side, images in (("before", before), ("after", after)):
        count = int((bright(images[2:]) >= threshold).sum())
        assert shares[side] == {"n": 4, "share": count / 4, "ci95": list(wilson_interval(count, 4))}
    sampling = sampling_of(check_pipeline(folders / "original"), steps=2, guidance=3.0)
    [(_, alone)] = draw(original, [SETS["neighbours"].prompts[3]], sampling, 1)
    assert np.abs(alone[0].astype(int) - before[5]).max() <= 1
    assert [row["set"] for row in evaluation.rows] == ["concept"] * 2 + ["neighbours"] * 4
    row = evaluation.rows[5]
    assert (row["text"], row["seed"]) == ("red bird", 1)
    assert row["before"]["bright"]["probability"] == pytest.approx(float(bright(before[5:])[0]))
    assert row["before"]["change"]["mean_absolute_difference"] == pytest.approx(float(gap[3].mean()))


def test_everything_that_a_number_depends_on_is_recorded(folders):
    values = evaluate_concept(
        folders / "one_step",
        {"concept": prompt_set("cat " * 20, "cat"), "neighbours": SETS["neighbours"]},
        {"bright": External(bright)},
        original=folders / "original",
        settings=DrawSettings(usual_steps=1),
    ).values
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["detectors"]["bright"]["threshold"] == 0.5
    assert set(values["versions"]) == {"pecker_fast", "torch", "diffusers", "transformers", "numpy"}
    model, before = values["model"], values["original"]
    assert model["scheduler"]["_class_name"] == "EulerDiscreteScheduler" and model["guidance_scale"] == 0
    assert before["scheduler"]["_class_name"] == "DDIMScheduler" and before["guidance_scale"] == 7.5
    assert model["unet_sha256"] != before["unet_sha256"] and model["cut_prompts"] == 2
    assert values["same_sampling"] is False
    found = values["sets"]["concept"]
    assert (found["seeds"], found["source"], found["source_sha256"]) == ([0, 1], "here", "digest")
    digests = {part["drawn_sha256"] for part in values["sets"].values()}
    assert len(digests) == 2 and all(len(digest) == 64 for digest in digests)


def test_cut_prompts_are_told():
    values = {"sets": {"concept": {"images": 3, "measures": {}, "change": None}}, "original": None}
    told = "2 of 3 images are of prompts longer than the tokenizer takes"
    assert told in _text({**values, "model": {"cut_prompts": 2}})
    assert "tokenizer" not in _text({**values, "model": {"cut_prompts": 0}})


def test_clip_score(clip, original):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    prompts = [EvaluationPrompt("a photo of cat"), EvaluationPrompt("dog"), EvaluationPrompt("dog " * 30)]
    detector = ClipScore(clip)
    found = detector.measure(images, prompts)["clip_score"]
    model = CLIPModel.from_pretrained(clip, local_files_only=True).eval()
    processor = CLIPProcessor.from_pretrained(clip, local_files_only=True)
    for image, prompt, score in zip(images, prompts, found, strict=True):
        inputs = processor(
            text=[prompt.text], images=[Image.fromarray(image)], return_tensors="pt", truncation=True, max_length=16
        )
        with torch.no_grad():
            outputs = model(**inputs)
        assert 100 * float((outputs.image_embeds * outputs.text_embeds).sum()) == pytest.approx(score, abs=1e-3)
        assert detector.measure(image[None], [prompt])["clip_score"] == pytest.approx([score], abs=1e-3)
    described = detector.describe()
    assert described["name"] == "clip" and len(described["sha256"]) == 64 and described["patch_size"] == 8
    (clip / "model.safetensors").rename(clip / "elsewhere")
    with pytest.raises(FileFormatError, match="no model.safetensors"):
        ClipScore(clip)
    (clip / "elsewhere").rename(clip / "model.safetensors")


def test_clip_score_refuses_other_models(tmp_path, folders):
    with pytest.raises(FileFormatError, match="cannot be read"):
        ClipScore(tmp_path)
    with pytest.raises(FileFormatError, match="expected a CLIP model, whose config.json says model_type clip"):
        ClipScore(folders / "original" / "text_encoder")


@pytest.mark.parametrize(
    ("measured", "error", "said"),
    [
        ({"seen": np.array([True])}, ValueError, "mine: seen: expected 4 booleans or floating-point numbers"),
        ({"seen": np.arange(4)}, ValueError, "got int64"),
        ({"size": np.array([1.0, 2.0, np.inf, 1.0])}, NonFiniteError, "mine: size: infinite"),
    ],
)
def test_detectors_that_break_their_protocol(measured, error, said):
    with pytest.raises(error, match=said):
        collect({}, "mine", measured, [3, 4, 5, 6], 9)


def test_a_share_is_that_of_the_images_that_have_one():
    columns = {}
    told = np.ma.array([True, True, False], mask=[False, False, True])
    collect(columns, "mine", {"seen": told, "size": np.array([1.0, np.nan, 3.0])}, [0, 2, 3], 5)
    assert columns["mine"]["seen"].summary() == {"n": 2, "share": 1.0, "ci95": list(wilson_interval(2, 2))}
    assert columns["mine"]["size"].summary()["n"] == 2 and columns["mine"]["size"].summary()["mean"] == 2
    assert columns["mine"]["size"].at([1, 2]).summary() == {"n": 0, "mean": None, "ci95": [None, None]}


def test_what_makes_no_evaluation(folders, monkeypatch):
    monkeypatch.setattr("pecker_fast.concept_evaluation.load_pipeline", lambda *_: pytest.fail("nothing is loaded"))
    model, found = folders / "original", {"bright": External(bright)}
    unseeded = PromptSet((EvaluationPrompt("cat"),), "here", "")
    for sets, detectors, said in (
        ({"concept": SETS["concept"]}, found, "expected concept and neighbours"),
        (SETS | {"concept": unseeded}, found, "concept: expected prompts that all have a seed"),
        (SETS, {}, "nothing to measure"),
        (SETS, {"change": found["bright"]}, "choose another one"),
    ):
        with pytest.raises(ValueError, match=said):
            evaluate_concept(model, sets, detectors)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch, folders):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def bright(images):\n    return images.mean((1, 2, 3)) / 255\n")
    (tmp_path / "p.csv").write_text("prompt,evaluation_seed,evaluation_guidance\na photo of the Cat,7,3\ncat,8,2\n")
    (tmp_path / "n.txt").write_text("dog\nbird\n")
    return tmp_path


def run(capsys, *arguments):
    assert main(["evaluate", *map(str, arguments), "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_writes_results_rows_and_pictures(here, folders, capsys, monkeypatch):
    torch.manual_seed(0)
    models.save(DigitsClassifier(width=2, image_size=16, channels=3, num_classes=4), here / "judge")
    arguments = ["--model", folders / "changed", "--original", folders / "original", *QUICK, "--prompts", "p.csv"]
    arguments += ["--concept", "cat", "--neighbour_concepts", "dog", "red bird", "--neighbour_classes", "1", "2"]
    arguments += ["--unrelated_prompts", "n.txt", "--judge", "judge", "--judge_class", "3"]
    arguments += ["--detector", "mine.py:bright", "--output_dir", "out", "--save_images"]
    planned = run(capsys, *arguments, "--dry_run")
    assert planned["settings"]["images"] == {"concept": 2, "neighbours": 4, "unrelated": 2}
    assert planned["settings"]["detectors"]["mine.py:bright"]["threshold"] == 0.5
    assert sorted(path.name for path in here.iterdir()) == ["judge", "mine.py", "n.txt", "p.csv"]
    mapped, open_memmap = [], np.lib.format.open_memmap
    remember = lambda file, *how: mapped.append(file) or open_memmap(file, *how)  # noqa: E731
    monkeypatch.setattr(np.lib.format, "open_memmap", remember)
    values = run(capsys, *arguments)
    assert here in mapped[0].parents and not mapped[0].exists()  # not in a folder of the system's
    written = {path.relative_to(here / "out").as_posix() for path in (here / "out").rglob("*") if path.is_file()}
    images = {f"images/{side}/concept-00001.png" for side in ("before", "after")}
    assert {"results.json", "images.jsonl", "before_after.png", "config.yaml"} | images <= written
    assert sum(name.startswith("images/") for name in written) == 16
    assert {path.split("/")[-1] for path in planned["would_write"]} >= {
        "results.json",
        "images.jsonl",
        "before_after.png",
    }
    assert json.loads((here / "out" / "results.json").read_text()) | {"output_dir": "out"} == values
    rows = [json.loads(line) for line in (here / "out" / "images.jsonl").read_text().splitlines()]
    assert [(row["text"], row["seed"]) for row in rows] == [
        ("a photo of the Cat", 7),
        ("cat", 8),
        ("a photo of the dog", 7),
        ("dog", 8),
        ("a photo of the red bird", 7),
        ("red bird", 8),
        ("dog", 0),
        ("bird", 1),
    ]
    image = np.asarray(Image.open(here / "out" / "images" / "after" / "concept-00001.png"))
    grid = np.asarray(Image.open(here / "out" / "before_after.png").resize((4 * 17 - 1, 6 * 17 - 1), Image.NEAREST))
    assert np.array_equal(grid[17:33, 17:33], image) and np.all(grid[:33, 34:] == 255)  # its set has two images
    assert rows[1]["after"]["mine.py:bright"]["probability"] == pytest.approx(float(bright(image[None])[0]))
    neighbours = values["sets"]["neighbours"]["measures"]["judge"]
    assert neighbours["correct"]["after"]["n"] == 4 and "correct" not in values["sets"]["concept"]["measures"]["judge"]
    assert [row["after"]["judge"]["correct"] is None for row in rows] == [True] * 2 + [False] * 4 + [True] * 2


def test_a_protocol_and_a_report(here, folders, capsys):
    protocol = ["--protocol", "short", "--concept", "cat", "--neighbour_concepts", "dog", "--seeds", "1"]
    arguments = ["--model", folders / "original", "--num_inference_steps", "1", "--guidance_scale", "0", *protocol]
    level = transformers.utils.logging.get_verbosity()
    assert main(["evaluate", *map(str, arguments), "--detector", "mine.py:bright"]) == 0
    report, progress = capsys.readouterr()
    assert "Images after: 100%" in progress and "token" not in progress.lower()  # prompts are cut, and counted
    assert transformers.utils.logging.get_verbosity() == level
    assert " -> " not in report and "images changed" not in report
    assert "concept: 5 images\n  mine.py:bright seen: " in report and "neighbours: 5 images\n" in report
    assert "No --original: what was there before is unknown, and so is the damage." in report


REFUSED = [
    (["--forget_class", "3"], 2, "--forget_class: .*is a pipeline of prompts"),
    (["--num", "3"], 2, "--num: .*is a pipeline of prompts"),
    ([], 2, "expected either --protocol or --prompts"),
    (["--prompts", "p.csv", "--protocol", "short"], 2, "expected either --protocol or --prompts"),
    (["--prompts", "p.csv"], 2, "--neighbour_concepts: expected related concepts"),
    (["--protocol", "short"], 2, "--concept: expected what was erased"),
    (["--protocol", "short", "--concept", "cat"], 2, "--neighbour_concepts: expected related concepts"),
    (["--protocol", "short", "--concept", "cat", "--neighbour_concepts", "Cat"], 2, "not the concept itself"),
    (["--protocol", "none", "--concept", "cat"], 3, "none: expected one of celebrity"),
    (["--prompts", "p.csv", "--neighbour_concepts", "dog"], 2, "--concept: expected the words"),
    (
        ["--prompts", "p.csv", "--concept", "bird", "--neighbour_concepts", "dog"],
        2,
        "does not contain the concept 'bird'",
    ),
    (["--prompts", "p.csv", "--concept", "ca", "--neighbour_concepts", "dog"], 2, "does not contain the concept 'ca'"),
    (["--prompts", "p.csv", "--neighbour_prompts", "none.txt"], 3, "none.txt: cannot be read"),
    (["--prompts", "p.csv", "--neighbour_prompts", "n.txt"], 2, "nothing to measure"),
    (["--prompts", "p.csv", "--neighbour_prompts", "n.txt", "--clip_model", "none"], 3, "none"),
    (["--prompts", "p.csv", "--neighbour_prompts", "n.txt", "--detector", "none.py:x"], 3, "none.py: no such file"),
    (["--prompts", "p.csv", "--neighbour_prompts", "n.txt", "--nudenet", "none.onnx"], 3, "none.onnx: no such file"),
    (["--prompts", "p.csv", "--neighbour_prompts", "n.txt", "--detector_threshold", "0.1"], 2, "give --detector too"),
    (
        ["--prompts", "p.csv", "--neighbour_prompts", "n.txt", "--judge", "judge"],
        2,
        "--judge_class: expected the class",
    ),
    (["--prompts", "p.csv", "--neighbour_prompts", "n.txt", "--save_images"], 2, "--save_images: name the folder"),
    (["--prompts", "p.csv", "--neighbour_prompts", "n.txt", "--original", "none"], 3, "none/model_index.json"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), REFUSED)
def test_the_command_refuses_before_anything_is_drawn_or_written(
    here, folders, capsys, monkeypatch, arguments, code, said
):
    monkeypatch.setattr("pecker_fast.concept_evaluation.load_pipeline", lambda *_: pytest.fail("nothing is loaded"))
    before = sorted(here.iterdir())
    arguments = arguments if "--save_images" in arguments else [*arguments, "--output_dir", "out"]
    assert main(["evaluate", "--model", str(folders / "original"), *arguments]) == code
    assert re.search(f"^pecker-fast evaluate: error: .*{said}", capsys.readouterr().err, flags=re.M)
    assert sorted(here.iterdir()) == before


def test_every_flag_is_of_classes_or_of_pipelines_or_of_both():
    commands = next(action for action in build_parser()._actions if action.dest == "command").choices
    both = {"help", "config", "json", "dry_run", "quiet", "model", "images", "judge", "device"}
    flags = {action.dest for action in commands["evaluate"]._actions}
    assert flags == both | set(CLASS_ONLY) | set(PIPELINE_ONLY) and not set(CLASS_ONLY) & set(PIPELINE_ONLY)


def test_flags_of_pipelines_mean_nothing_to_models_of_classes(here, capsys):
    small = {"width": 4, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (), "norm_groups": 2}
    models.save(DDPMUNet(**small, image_size=8, channels=1), here / "model")
    assert not is_pipeline(here / "model")
    for arguments, said in (
        (["--forget_class", "3", "--protocol", "short"], "--protocol: model is no pipeline"),
        (["--forget_class", "3", "--output_dir", "out"], "--output_dir: model is no pipeline"),
        ([], "--forget_class: expected the classes that were forgotten"),
    ):
        assert main(["evaluate", "--model", "model", *arguments]) == 2
        assert said in capsys.readouterr().err
