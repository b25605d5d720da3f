"""``pecker-fast unlearn`` of a pipeline, end to end: what comes out, and that nothing else changed."""

import functools
import json
import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.resnet import ResnetBlock2D
from erasing import ESD, PECKER, unlearn, write_place
from PIL import Image

from pecker_fast import BlockMask
from pecker_fast.checkpoint import read_safetensors
from pecker_fast.commands import before_after, concept_estimate, unlearn_concept
from pecker_fast.commands.concept_training import Trained
from pecker_fast.commands.resuming import Training
from pecker_fast.concepts import PipelineFolder, embed_prompts, replaced
from pecker_fast.delta import Delta, Ledger
from pecker_fast.sampling import one_step_sample

DOCUMENT = Path(__file__).parents[1] / "docs" / "concepts.md"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("concepts"))


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(concept_estimate, "estimate", lambda job: ({"seconds": 7.0}, "in seven seconds"))
    return place


@pytest.fixture(scope="module")
def plain(place):
    """A one-step generator, and how many ResNets were asked with gradients on."""
    torch.set_num_threads(1)  # made before what conftest does for each test
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        calls = counted(patched)
        return place / unlearn("plain", *PECKER, "--checkpointing_steps", "1"), sum(calls)


def counted(monkeypatch):
    calls, forward = [], ResnetBlock2D.forward

    def forward_and_count(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(ResnetBlock2D, "forward", forward_and_count)
    return calls


def weights(folder):
    return read_safetensors(folder / UNET)[0]


def assert_only_masked_weights_changed(base, out):
    before, after, mask = weights(base), weights(out / "model"), Delta.load(out / "delta").mask
    assert before.keys() == after.keys()
    changed = 0
    for name, tensor in before.items():
        flags = mask.parameters[name].to_dense() if name in mask.parameters else torch.zeros_like(tensor).bool()
        assert torch.equal(after[name][~flags], tensor[~flags]) and after[name].dtype == tensor.dtype
        changed += int((after[name] != tensor).sum())
    assert 0.4 * mask.numel < changed <= mask.numel
    return before, after


def images(folder, output_type="pt", **how):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a cat", generator=torch.Generator().manual_seed(0), output_type=output_type, **how).images


# -- a one-step generator --------------------------------------------------------------------------


def test_a_one_step_generator(here, plain):
    before, after = assert_only_masked_weights_changed(here / "epsilon", plain[0])
    drawn = [images(plain[0] / "model", num_inference_steps=1, guidance_scale=0.0) for _ in range(2)]
    assert torch.equal(*drawn)
    Delta.load(plain[0] / "delta").revert(after, ledger=Ledger.load(plain[0] / "model/unet"), progress=False)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_documented_python_runs_and_stock_diffusers_draws_what_we_draw(here):
    """Of a velocity, trained in bfloat16 off a float32 folder."""
    names = {}
    code = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)[1]
    short = {"run(1000)": "run(1)", "density=0.1": 'kind="random"', '"sd15"': '"v_prediction"', '"out"': '"documented"'}
    for before, after in short.items():
        assert before in code
        code = code.replace(before, after)
    exec(compile(code, DOCUMENT, "exec"), names)
    before, after = assert_only_masked_weights_changed(here / "v_prediction", here / "documented")
    assert_no_bits_were_lost(before, after)
    assert_no_bits_were_lost(before, replaced(names["distiller"].fake_score_optimizer.active, before))

    folder = PipelineFolder.read(here / "v_prediction")
    predict = embed_prompts(folder, ["a cat"])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours, label = functools.partial(predict, folder.unet(after)), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        latents = one_step_sample(ours, folder.schedule(), noise, label, t_init=625)
    theirs = images("documented/model", output_type="latent", num_inference_steps=1, guidance_scale=0.0)
    torch.testing.assert_close(theirs, latents, rtol=1e-4, atol=1e-4)


def assert_no_bits_were_lost(before, after):
    """After few steps at 1e-6; a master that began with the bits of a bfloat16 alone is 5e-4 away."""
    steps = torch.cat([(after[name] - before[name]).flatten() for name in after]).abs()
    assert 0 < float(steps.max()) < 1e-4


def test_resumed_with_gradient_checkpointing(plain, monkeypatch, capsys):
    """The same weights to the bit, out of more forwards: none of the networks is in training mode."""
    folder, kept = plain
    shutil.copytree(folder / "checkpoint-1", "resumed/checkpoint-1")
    resume = (*PECKER, "--checkpointing_steps", "1", "--resume_from_checkpoint", "latest")
    Path("others.txt").write_text("a dog\nthe blue bird\n")  # as many labels as before
    unlearn("resumed", *resume, "--retain_prompts", "others.txt", code=2)
    assert "was saved with other prompts" in capsys.readouterr().err
    calls = counted(monkeypatch)
    ours = weights(unlearn("resumed", *resume, "--gradient_checkpointing") / "model")
    assert all(torch.equal(ours[name], tensor) for name, tensor in weights(folder / "model").items())
    assert Path("resumed/metrics.jsonl").read_text() == (folder / "metrics.jsonl").read_text()
    passes = 4  # fake score; then generator, fake and true score
    assert sum(calls) == 2 * kept // 2 - passes > kept // 2  # diffusers keeps the middle block's first ResNet


def test_erasures_add_up_and_each_can_be_undone(here, plain, capsys, monkeypatch):
    flags = (*PECKER, "--override_concept", "drawing", "--earlier", "plain")
    unlearn("second", *flags, "--erase_concept", "photo", code=2)
    assert "--earlier plain: override prompt 'a photo of dog' contains 'photo'" in capsys.readouterr().err
    (here / "cats.txt").write_text("the dog and a Cat\n")
    unlearn("second", *flags, "--erase_concept", "three", "--retain_prompts", "cats.txt", code=2)
    assert "retained prompt 'the dog and a Cat' contains 'cat'" in capsys.readouterr().err  # stays forgotten
    (here / "threes.txt").write_text("the three\n")
    flags = (*flags, "--erase_concept", "three", "--forget_prompts", "threes.txt")
    fine = ("--generator_lr", "1e-6", "--max_train_steps", "1", "--mixed_precision", "bf16")
    with monkeypatch.context() as patched:
        held = unets_held_while_training(patched)
        second = unlearn("second", *flags, *fine)
    assert held == [1]  # of two that were read
    assert_no_bits_were_lost(weights(plain[0] / "model"), weights(second / "model"))
    plan = json.loads((second / "prompts.json").read_text())
    assert [plan["texts"][label] for label in plan["forget"]][:2] == ["the three", "cat"]  # which stays forgotten
    deltas = [Delta.load(folder / "delta") for folder in (plain[0], second)]
    assert not deltas[0].overlaps(deltas[1])
    state, ledger = weights(second / "model"), Ledger.load(second / "model/unet")
    assert len(ledger) == 2
    for delta in deltas:  # the older one first
        delta.revert(state, ledger=ledger, progress=False)
    assert all(torch.equal(state[name], tensor) for name, tensor in weights(here / "epsilon").items())


def unets_held_while_training(monkeypatch):
    """How many readings of a UNet's file still lie in memory when the steps begin."""
    read, held, tensors, run = [], [], PipelineFolder.tensors, Training.run

    def remembered(self):
        found = tensors(self)
        read.append(weakref.ref(next(iter(found.values()))))
        return found

    def counted_run(self, distiller, **how):
        held.append(sum(tensor() is not None for tensor in read))
        assert len(read) == 2
        run(self, distiller, **how)

    monkeypatch.setattr(PipelineFolder, "tensors", remembered)
    monkeypatch.setattr(Training, "run", counted_run)
    return held


# -- an ordinary UNet ------------------------------------------------------------------------------


def assert_an_ordinary_pipeline(base, out):
    assert_only_masked_weights_changed(base, out)
    for file in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"):
        assert (out / "model" / file).read_bytes() == (base / file).read_bytes()


def test_salun_on_latents_of_its_own(here):
    Path("one.txt").write_text("a cat\n")
    flags = ("--num_inference_steps", "2", "--latents_per_prompt", "2", "--learning_rate", "1e-3", "--mask", "saliency")
    out = unlearn("salun", "--method", "salun", "--forget_prompts", "one.txt", "--train_batch_size", "4", *flags)
    assert_an_ordinary_pipeline(here / "epsilon", out)
    assert torch.equal(*(images(out / "model", num_inference_steps=1) for _ in range(2)))


def test_esd_with_pictures_and_a_card(here):
    flags = ("--num_validation_images", "1", "--validation_steps", "1", "--validation_prompts", "a dog", "a cat")
    out = unlearn("esd", *ESD, *flags)
    assert_an_ordinary_pipeline(here / "epsilon", out)
    with Image.open(out / "model" / "before_after.png") as picture:
        assert picture.size[0] > 2 * 96 and picture.convert("L").entropy() > 4
    card = (out / "model" / "README.md").read_text()
    assert card.startswith("---\nbase_model: epsilon\nlibrary_name: diffusers\n")
    assert "Left: the base model, in 1 step. Right: this model, in 1 step." in card
    assert "before_after.png" in card and "`a photo of cat`" in card and "of many steps" in card


# -- pictures, after the rest ----------------------------------------------------------------------


@pytest.fixture
def untrained(plain, monkeypatch):
    """The run without its training; what pictures were drawn of."""
    drawn = []

    def train(job, tensors):
        mask = BlockMask.load("plain/mask.safetensors")
        return Trained(dict(tensors), mask, mask.numel, [], 0.0)

    def draw(folder, drawing, *, one_step, parts=None):
        drawn.append((str(folder), one_step, parts or {}))
        return [[Image.new("RGB", (16, 16))] * drawing.count for _ in drawing.prompts]

    monkeypatch.setattr(unlearn_concept, "train", train)
    monkeypatch.setattr(before_after, "draw", draw)
    monkeypatch.setattr(before_after, "gc", SimpleNamespace(collect=lambda: None))  # a fifth of a second
    return drawn


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (RuntimeError("out of\nmemory"), 0, "drawing them failed (RuntimeError: out of memory)"),
        (KeyboardInterrupt(), 130, "interrupted; broken is complete, but for pictures"),
    ],
    ids=["no memory", "interrupted"],
)
def test_what_trained_stays_when_drawing_fails(error, code, told, here, untrained, monkeypatch, capsys):
    def draw(*_, **__):
        assert (here / "broken/delta").is_dir() and (here / "broken/metrics.jsonl").is_file()
        raise error

    shutil.rmtree(here / "broken", ignore_errors=True)
    monkeypatch.setattr(before_after, "draw", draw)
    unlearn("broken", *ESD, "--num_validation_images", "1", code=code)
    assert told in capsys.readouterr().err
    card = (here / "broken/model/README.md").read_text()
    assert ("drawing them failed (RuntimeError)." in card) == (code == 0) and "before_after.png" not in card
    assert weights(here / "broken/model").keys() == weights(here / "epsilon").keys()
    assert (here / "broken/config.yaml").is_file() and not (here / "broken/model/before_after.png").exists()


@pytest.mark.parametrize(
    ("flags", "folder", "one_step", "parts", "caption"),
    [
        (
            ("--erase_concept", "cat", "--init_generator", "plain/model"),
            *("plain/model", True, set(), "Left: the generator that the training started from, in 1 step."),
        ),
        (
            ("--erase_concept", "three", "--forget_prompts", "threes.txt", "--earlier", "plain"),
            *("epsilon", True, {"unet", "scheduler"}, "Left: the base model with the earlier erasures, in 1 step."),
        ),
    ],
    ids=["generator", "earlier"],
)
def test_before_is_what_the_training_started_from(flags, folder, one_step, parts, caption, here, plain, untrained):
    (here / "threes.txt").write_text("the three\n")
    out = unlearn("drawn", *PECKER, *flags, "--overwrite", "--num_validation_images", "1", "--validation_steps", "2")
    before, after = untrained
    assert (before[:2], set(before[2])) == ((folder, one_step), parts) and after == ("drawn/model", True, {})
    if "unet" in parts:  # with what the earlier erasure changed
        name, weight = max(weights(plain[0] / "model").items(), key=lambda item: item[1].numel())
        assert torch.equal(before[2]["unet"].state_dict()[name], weight)
        assert before[2]["scheduler"].config.num_train_timesteps == 626
    assert caption in (out / "model/README.md").read_text() and (out / "model/before_after.png").is_file()


# -- what is told ----------------------------------------------------------------------------------


def test_what_folders_and_files_say_is_a_setting(plain, capsys):
    given = ("--mask_path", "plain/mask.safetensors", "--init_generator", "plain/model")
    unlearn("dry", *PECKER, "--mask_density", "0.3", *given, "--dry_run", "--json")
    found = json.loads(capsys.readouterr().out)
    mask = BlockMask.load("plain/mask.safetensors")
    assert found["parameters"]["active_at_most"] == mask.numel
    assert (found["settings"]["mask"]["density"], found["settings"]["t_init"]) == (mask.density_asked, 625)
    assert "note" not in found


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--init_generator", "plain/model", "--t_init", "500"), "the generator of plain/model starts at 625"),
        (("--earlier", "plain"), "prompt 'cat' is forgotten already by plain"),
        (
            ("--erase_concept", "three", "--earlier", "plain", "--t_init", "300"),
            "--earlier plain starts at 625; leave it",
        ),
    ],
)
def test_what_does_not_go_on_from_there(flags, text, plain, capsys):
    unlearn("none", *PECKER, *flags, code=2)
    assert text in capsys.readouterr().err
